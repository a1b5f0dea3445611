// The schemas of the operators under QGFD attention, and the operators on CPU tensors.
#include "csrc/qgfd.h"

namespace fastdiff::torch_binding {
namespace {

struct Cpu {
  static int64_t forward_workspace_bytes(const QgfdForwardParams&) { return 0; }
  static int64_t backward_workspace_bytes(const QgfdBackwardParams&) { return 0; }
  static void forward(const QgfdForwardParams& p, const Tensor&) { cpu::qgfd_forward(p, {run_on_torch_threads}); }
  static void backward(const QgfdBackwardParams& p, const Tensor&) { cpu::qgfd_backward(p, {run_on_torch_threads}); }
};

#define MATRIX                                                                                                        \
  "Tensor? key_mask, Tensor? row_begin, Tensor? row_end, float scale, int hops, int first_mixed, int last_mixed,"     \
  " float alpha"

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) {
  m.def("qgfd_forward(Tensor query, Tensor key, Tensor value, " MATRIX ") -> Tensor");
  m.def("qgfd_forward_saved(Tensor query, Tensor key, Tensor value, " MATRIX ") -> (Tensor, Tensor, Tensor)");
  m.def("qgfd_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor passes, "
        MATRIX ") -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { register_qgfd<Cpu>(m); }

}  // namespace
}  // namespace fastdiff::torch_binding
