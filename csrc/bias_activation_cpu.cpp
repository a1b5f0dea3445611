// bias_activation's schemas, and the operators on CPU tensors.
#include "csrc/bias_activation.h"

namespace fastdiff::torch_binding {
namespace {

struct Cpu {
  static void forward(const BiasActivationParams& p, const Tensor&) { cpu::bias_activation(p, {run_on_torch_threads}); }
  static void backward(const BiasActivationBackwardParams& p, const Tensor&) {
    cpu::bias_activation_backward(p, {run_on_torch_threads});
  }
  // Fixed, so that sums do not depend on the number of threads; partial sums are then a few per cent of the traffic.
  static int64_t rows_per_segment(const BiasActivationBackwardParams&) { return 32; }
};

#define OPERANDS "Tensor x, Tensor? bias, Tensor? up, Tensor? up_bias, int activation"

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) {
  m.def("bias_activation(" OPERANDS ") -> Tensor");
  m.def("bias_activation_out(" OPERANDS ", Tensor(a!) out) -> ()");
  m.def("bias_activation_backward(Tensor grad_out, " OPERANDS ", bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { register_bias_activation<Cpu>(m); }

}  // namespace
}  // namespace fastdiff::torch_binding
