// The emulator's settings, its faults and AdaLN's launch functions, as Python calls them.
#include "launch.h"

#include "cuda_on_cpu.h"
#include "faults.h"
#include "kernels/adaln/adaln_cuda.h"

using cuda_on_cpu::g_error;
using cuda_on_cpu::guarded;

extern "C" {

const char* fd_error() { return g_error; }

void fd_configure(int schedule, long shared_limit, long max_grid) {
  cuda_on_cpu::config().schedule = schedule;
  cuda_on_cpu::config().shared_limit = static_cast<size_t>(shared_limit);
  cuda_on_cpu::config().max_grid = max_grid;
}

long fd_size_of_forward_params() { return sizeof(fastdiff::AdaLNForwardParams); }
long fd_size_of_backward_params() { return sizeof(fastdiff::AdaLNBackwardParams); }
long fd_backward_workspace_bytes(const fastdiff::AdaLNBackwardParams* p) {
  return fastdiff::adaln_backward_workspace_bytes(*p);
}

int fd_adaln_forward(const fastdiff::AdaLNForwardParams* p) {
  return guarded([&] { return fastdiff::cuda::adaln_forward(*p, nullptr); });
}
int fd_adaln_backward(const fastdiff::AdaLNBackwardParams* p) {
  return guarded([&] { return fastdiff::cuda::adaln_backward(*p, nullptr); });
}

int fd_fault(const char* name, const float* in, float* out, int n) {
  return guarded([&] { return cuda_on_cpu::faults::run(name, in, out, n); });
}

}  // extern "C"
