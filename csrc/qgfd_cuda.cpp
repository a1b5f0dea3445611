// The operators under QGFD attention on CUDA tensors: the device guard, torch's current stream, the launch functions.
#include "csrc/cuda_launch.h"
#include "csrc/qgfd.h"
#include "kernels/qgfd/qgfd_cuda.h"

namespace fastdiff::torch_binding {
namespace {

void check_head_size(const QgfdMatrix& m) {
  STD_TORCH_CHECK(m.dim % 8 == 0 && m.dim <= 256, "head size ", m.dim,
                  " does not fit; expected a multiple of 8 up to 256 (other backends take others)");
}

struct Cuda {
  static int64_t forward_workspace_bytes(const QgfdForwardParams& p) {
    check_head_size(p.matrix);
    return cuda::qgfd_forward_workspace_bytes(p);
  }
  static int64_t backward_workspace_bytes(const QgfdBackwardParams& p) {
    check_head_size(p.matrix);
    return cuda::qgfd_backward_workspace_bytes(p);
  }
  static void forward(const QgfdForwardParams& p, const Tensor& query) {
    launch_on(query, "qgfd_forward", [&](CUstream_st* stream) { return cuda::qgfd_forward(p, stream); });
  }
  static void backward(const QgfdBackwardParams& p, const Tensor& query) {
    launch_on(query, "qgfd_backward", [&](CUstream_st* stream) { return cuda::qgfd_backward(p, stream); });
  }
};

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { register_qgfd<Cuda>(m); }

}  // namespace
}  // namespace fastdiff::torch_binding
