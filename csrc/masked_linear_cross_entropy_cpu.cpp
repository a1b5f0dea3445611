// The masked loss's schema, and its operator on CPU tensors.
#include "csrc/masked_linear_cross_entropy.h"

namespace fastdiff::torch_binding {
namespace {

struct Cpu {
  static bool ascending_ids(const CrossEntropyParams& p) {
    for (int64_t k = 0; k < p.suppress_count; k++)
      if (p.suppress[k] < (k ? p.suppress[k - 1] + 1 : 0) || p.suppress[k] >= p.vocab) return false;
    return true;
  }
  static void cross_entropy(const CrossEntropyParams& p, const Tensor&) { cpu::cross_entropy(p, {run_on_torch_threads}); }
};

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) {
  m.def("cross_entropy_rows_(Tensor(a!) logits, Tensor targets, Tensor? row_weight, Tensor? suppress_tokens,"
        " float label_smoothing, bool want_grad) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("cross_entropy_rows_", TORCH_BOX(&cross_entropy_rows<Cpu>)); }

}  // namespace
}  // namespace fastdiff::torch_binding
