// The masked loss's operator on CUDA tensors: the device guard, torch's current stream, and the launch function.
#include <torch/csrc/stable/accelerator.h>

#include "csrc/masked_loss.h"
#include "kernels/masked_loss/masked_loss_cuda.h"

namespace fastdiff::torch_binding {
namespace {

struct Cuda {
  // The kernel passes over ids outside [0, V) itself; their order does not matter to it.
  static bool ascending_ids(const CrossEntropyParams&) { return true; }
  static void cross_entropy(const CrossEntropyParams& p, const Tensor& logits) {
    const int32_t device = logits.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = torch::stable::accelerator::getCurrentStream(device).nativeHandle();
    const int error = cuda::cross_entropy(p, static_cast<CUstream_st*>(stream));
    STD_TORCH_CHECK(error == 0, "fastdiff::cross_entropy_rows_ could not be launched: CUDA error ", error);
  }
};

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("cross_entropy_rows_", TORCH_BOX(&cross_entropy_rows<Cuda>)); }

}  // namespace
}  // namespace fastdiff::torch_binding
