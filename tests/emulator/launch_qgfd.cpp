// QGFD attention's launch functions, as Python calls them.
#include "launch.h"

#include "kernels/qgfd/qgfd_cuda.h"

using cuda_on_cpu::guarded;

extern "C" {

long fd_size_of_qgfd_forward_params() { return sizeof(fastdiff::QgfdForwardParams); }
long fd_size_of_qgfd_backward_params() { return sizeof(fastdiff::QgfdBackwardParams); }
int fd_qgfd_fuses(const fastdiff::QgfdForwardParams* p) { return fastdiff::cuda::qgfd_fuses(*p); }
long fd_qgfd_forward_workspace_bytes(const fastdiff::QgfdForwardParams* p, int path) {
  return fastdiff::cuda::qgfd_forward_workspace_bytes(*p, static_cast<fastdiff::cuda::QgfdPath>(path));
}
long fd_qgfd_backward_workspace_bytes(const fastdiff::QgfdBackwardParams* p) {
  return fastdiff::cuda::qgfd_backward_workspace_bytes(*p);
}

int fd_qgfd_forward(const fastdiff::QgfdForwardParams* p, int path) {
  return guarded(
      [&] { return fastdiff::cuda::qgfd_forward(*p, nullptr, static_cast<fastdiff::cuda::QgfdPath>(path)); });
}
int fd_qgfd_backward(const fastdiff::QgfdBackwardParams* p) {
  return guarded([&] { return fastdiff::cuda::qgfd_backward(*p, nullptr); });
}

}  // extern "C"
