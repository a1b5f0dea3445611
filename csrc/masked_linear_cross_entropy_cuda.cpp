// The masked loss's operator on CUDA tensors: the device guard, torch's current stream, and the launch function.
#include "csrc/cuda_launch.h"
#include "csrc/masked_linear_cross_entropy.h"
#include "kernels/masked_linear_cross_entropy/masked_linear_cross_entropy_cuda.h"

namespace fastdiff::torch_binding {
namespace {

struct Cuda {
  // The kernel passes over ids outside [0, V) itself; their order does not matter to it.
  static bool ascending_ids(const CrossEntropyParams&) { return true; }
  static void cross_entropy(const CrossEntropyParams& p, const Tensor& logits) {
    launch_on(logits, "cross_entropy_rows_", [&](CUstream_st* stream) { return cuda::cross_entropy(p, stream); });
  }
};

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("cross_entropy_rows_", TORCH_BOX(&cross_entropy_rows<Cuda>)); }

}  // namespace
}  // namespace fastdiff::torch_binding
