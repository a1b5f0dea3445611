// AdaLN's operators on CUDA tensors: the device guard, torch's current stream, and the launch functions.
#include "csrc/cuda_launch.h"
#include "csrc/adaln.h"
#include "kernels/adaln/adaln_cuda.h"

namespace fastdiff::torch_binding {
namespace {

struct Cuda {
  static void forward(const AdaLNForwardParams& p, const Tensor& x) {
    launch_on(x, "adaln_forward", [&](CUstream_st* stream) { return cuda::adaln_forward(p, stream); });
  }
  static void backward(const AdaLNBackwardParams& p, const Tensor& x) {
    launch_on(x, "adaln_backward", [&](CUstream_st* stream) { return cuda::adaln_backward(p, stream); });
  }
  // A function of the shape alone (results must not depend on the device): shorter segments where there are few rows.
  static int64_t rows_per_segment(const AdaLNBackwardParams& p) {
    const int64_t rows = p.batch * p.tokens;
    return rows <= 8192 ? 16 : rows <= 32768 ? 32 : 64;
  }
};

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { register_adaln<Cuda>(m); }

}  // namespace
}  // namespace fastdiff::torch_binding
