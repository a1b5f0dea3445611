// bias_activation's launch functions, as Python calls them.
#include "kernels/bias_activation/bias_activation.h"
#include "launch.h"

extern "C" {

long fd_size_of_bias_activation_params() { return sizeof(fastdiff::BiasActivationParams); }
long fd_size_of_bias_activation_backward_params() { return sizeof(fastdiff::BiasActivationBackwardParams); }

int fd_bias_activation(const fastdiff::BiasActivationParams* p) {
  return cuda_on_cpu::guarded([&] { return fastdiff::cuda::bias_activation(*p, nullptr); });
}

int fd_bias_activation_backward(const fastdiff::BiasActivationBackwardParams* p) {
  return cuda_on_cpu::guarded([&] { return fastdiff::cuda::bias_activation_backward(*p, nullptr); });
}

}  // extern "C"
