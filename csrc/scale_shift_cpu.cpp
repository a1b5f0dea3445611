// scale_shift's schema, and the operator on CPU tensors.
#include "csrc/scale_shift.h"

namespace fastdiff::torch_binding {
namespace {

struct Cpu {
  static void scale_shift(const ScaleShiftParams& p, const Tensor&) { cpu::scale_shift(p, {run_on_torch_threads}); }
};

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) { m.def("scale_shift(Tensor x, Tensor scale, Tensor shift) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("scale_shift", TORCH_BOX(&scale_shift<Cpu>)); }

}  // namespace
}  // namespace fastdiff::torch_binding
