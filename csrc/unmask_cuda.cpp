// unmask_ on CUDA tensors: the device guard, torch's current stream, and the launch function.
#include "csrc/cuda_launch.h"
#include "csrc/unmask.h"
#include "kernels/unmask/unmask_cuda.h"

namespace fastdiff::torch_binding {
namespace {

struct Cuda {
  static void unmask(const UnmaskParams& p, const Tensor& token_ids) {
    launch_on(token_ids, "unmask_", [&](CUstream_st* stream) { return cuda::unmask(p, stream); });
  }
  static int64_t workspace_bytes(const UnmaskParams& p) { return cuda::unmask_workspace_bytes(p); }
};

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("unmask_", TORCH_BOX(&unmask<Cuda>)); }

}  // namespace
}  // namespace fastdiff::torch_binding
