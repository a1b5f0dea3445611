// bias_activation on CUDA tensors: the device guard, torch's current stream, and the launch functions.
#include "csrc/bias_activation.h"
#include "csrc/cuda_launch.h"

namespace fastdiff::torch_binding {
namespace {

struct Cuda {
  static void forward(const BiasActivationParams& p, const Tensor& x) {
    launch_on(x, "bias_activation", [&](CUstream_st* stream) { return cuda::bias_activation(p, stream); });
  }
  static void backward(const BiasActivationBackwardParams& p, const Tensor& x) {
    launch_on(x, "bias_activation_backward",
              [&](CUstream_st* stream) { return cuda::bias_activation_backward(p, stream); });
  }
  // A function of the shape alone (results must not depend on the device): shorter segments where there are few rows.
  static int64_t rows_per_segment(const BiasActivationBackwardParams& p) { return p.rows <= 8192 ? 16 : 64; }
};

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { register_bias_activation<Cuda>(m); }

}  // namespace
}  // namespace fastdiff::torch_binding
