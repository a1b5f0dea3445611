// unmask_ on CUDA tensors: the device guard, torch's current stream, and the launch function.
#include <torch/csrc/stable/accelerator.h>

#include "csrc/unmask.h"
#include "kernels/token_sampling/unmask_cuda.h"

namespace fastdiff::torch_binding {
namespace {

struct Cuda {
  static void unmask(const UnmaskParams& p, const Tensor& token_ids) {
    const auto device = token_ids.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    auto* stream = static_cast<CUstream_st*>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
    const int error = cuda::unmask(p, stream);
    STD_TORCH_CHECK(error == 0, "fastdiff::unmask_ could not be launched: CUDA error ", error);
  }
  static int64_t workspace_bytes(const UnmaskParams& p) { return cuda::unmask_workspace_bytes(p); }
};

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("unmask_", TORCH_BOX(&unmask<Cuda>)); }

}  // namespace
}  // namespace fastdiff::torch_binding
