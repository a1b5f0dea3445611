// AdaLN's operators on CUDA tensors: the device guard, torch's current stream, and the launch functions.
#include <torch/csrc/stable/accelerator.h>

#include "csrc/adaln.h"
#include "kernels/adaln/adaln_cuda.h"

namespace fastdiff::torch_binding {
namespace {

struct Cuda {
  static void forward(const AdaLNForwardParams& p, const Tensor& x) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    check(cuda::adaln_forward(p, stream(x)), "adaln_forward");
  }
  static void backward(const AdaLNBackwardParams& p, const Tensor& x) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    check(cuda::adaln_backward(p, stream(x)), "adaln_backward");
  }
  // A function of the shape alone (results must not depend on the device): shorter segments where there are few rows.
  static int64_t rows_per_segment(const AdaLNBackwardParams& p) {
    const int64_t rows = p.batch * p.tokens;
    return rows <= 8192 ? 16 : rows <= 32768 ? 32 : 64;
  }

 private:
  static CUstream_st* stream(const Tensor& x) {
    return static_cast<CUstream_st*>(
        torch::stable::accelerator::getCurrentStream(x.get_device_index()).nativeHandle());
  }
  static void check(int error, const char* what) {
    STD_TORCH_CHECK(error == 0, "fastdiff::", what, " could not be launched: CUDA error ", error);
  }
};

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { register_adaln<Cuda>(m); }

}  // namespace
}  // namespace fastdiff::torch_binding
