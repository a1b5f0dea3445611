// The launch functions of every .cu file, as Python calls them: 0, a cudaError_t, or -1 with fd_error().
#include <cstdio>
#include <exception>

#include "cuda_on_cpu.h"
#include "faults.h"
#include "kernels/adaln/adaln_cuda.h"

namespace {

char g_error[1024];

template <class F>
int guarded(const F& f) {
  try {
    return f();
  } catch (const std::exception& e) {
    std::snprintf(g_error, sizeof g_error, "%s", e.what());
    return -1;
  }
}

}  // namespace

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
