// AdaLN's schemas, and its operators on CPU tensors.
#include "csrc/adaln.h"

namespace fastdiff::torch_binding {
namespace {

struct Cpu {
  static void forward(const AdaLNForwardParams& p, const Tensor&) { cpu::adaln_forward(p, {run_on_torch_threads}); }
  static void backward(const AdaLNBackwardParams& p, const Tensor&) { cpu::adaln_backward(p, {run_on_torch_threads}); }
  // Fixed, so that sums over tokens do not depend on the number of threads; short enough that a segment's rows stay in
  // the L2 cache between the passes, long enough that partial sums are a few per cent of the traffic.
  static int64_t rows_per_segment(const AdaLNBackwardParams&) { return 32; }
};

#define FORWARD "Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, bool rms, float eps, ScalarType? out_dtype"
#define BACKWARD "Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, bool rms, bool need_modulation, bool need_affine"

STABLE_TORCH_LIBRARY(fastdiff, m) {
  m.def("adaln_forward(Tensor x, " FORWARD ") -> Tensor");
  m.def("adaln_forward_stats(Tensor x, " FORWARD ") -> (Tensor, Tensor, Tensor)");
  m.def("adaln_forward_out(Tensor x, " FORWARD ", Tensor(a!) out) -> ()");
  m.def("adaln_backward(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, " BACKWARD
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gated_residual_adaln_forward(Tensor residual, Tensor branch, Tensor gate, " FORWARD ", bool saturate)"
        " -> (Tensor, Tensor)");
  m.def("gated_residual_adaln_forward_stats(Tensor residual, Tensor branch, Tensor gate, " FORWARD
        ", bool saturate) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gated_residual_adaln_forward_out(Tensor residual, Tensor branch, Tensor gate, " FORWARD
        ", bool saturate, Tensor(a!) residual_out, Tensor(b!) out) -> ()");
  m.def("gated_residual_adaln_backward(Tensor grad_out, Tensor? grad_residual_out, Tensor residual_out, Tensor mean,"
        " Tensor rstd, Tensor branch, Tensor gate, " BACKWARD
        ", Tensor? residual_in) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { register_adaln<Cpu>(m); }

}  // namespace
}  // namespace fastdiff::torch_binding
