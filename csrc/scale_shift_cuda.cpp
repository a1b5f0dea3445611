// scale_shift on CUDA tensors: the device guard, torch's current stream, and the launch function.
#include "csrc/cuda_launch.h"
#include "csrc/scale_shift.h"

namespace fastdiff::torch_binding {
namespace {

struct Cuda {
  static void scale_shift(const ScaleShiftParams& p, const Tensor& x) {
    launch_on(x, "scale_shift", [&](CUstream_st* stream) { return cuda::scale_shift(p, stream); });
  }
};

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("scale_shift", TORCH_BOX(&scale_shift<Cuda>)); }

}  // namespace
}  // namespace fastdiff::torch_binding
