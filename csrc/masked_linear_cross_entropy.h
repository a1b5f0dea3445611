// masked_linear_cross_entropy's row kernel as a torch operator: checks, and the parameters of its header in kernels/.
// fastdiff/ops/_masked_linear_cross_entropy_backends.py calls it between two matrix products.
#pragma once
#include "csrc/tensors.h"
#include "kernels/masked_linear_cross_entropy/masked_linear_cross_entropy.h"

namespace fastdiff::torch_binding {

inline const void* vector_of(const Tensor& t, const Tensor& logits, int64_t size, ScalarType type, const char* name) {
  check_device(t, logits, name);
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous() && t.scalar_type() == type && (size < 0 || t.size(0) == size), name,
                  " does not fit; expected a contiguous vector, targets int64 [R], row_weight float32 [R], "
                  "suppress_tokens int64");
  return t.const_data_ptr();
}

// logits [R, V], V contiguous, become their gradient where want_grad; returns the loss of each row [R].
template <class Backend>
Tensor cross_entropy_rows(Tensor logits, Tensor targets, OptionalTensor row_weight, OptionalTensor suppress_tokens,
                          double label_smoothing, bool want_grad) {
  check_aligned(logits, "logits");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && (logits.stride(1) == 1 || logits.size(1) == 1) &&
                      (logits.size(0) < 2 || logits.stride(0) >= logits.size(1)),
                  "logits does not fit; expected [R, V] with V > 0, rows apart, and a contiguous last dimension");
  STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing < 1, "label_smoothing is ", label_smoothing,
                  "; expected a number in [0, 1)");
  check_device(targets, logits, "targets");
  check_apart(logits, "logits", targets, "targets");
  check_apart(logits, "logits", row_weight, "row_weight");
  check_apart(logits, "logits", suppress_tokens, "suppress_tokens");
  CrossEntropyParams p{};
  p.logits = logits.mutable_data_ptr();
  p.row_stride = logits.stride(0);
  p.rows = logits.size(0);
  p.vocab = logits.size(1);
  p.dtype = dtype_of(logits, "logits");
  STD_TORCH_CHECK(p.dtype != DType::kFloat64, "logits are float64; expected float32, bfloat16 or float16");
  p.targets = static_cast<const int64_t*>(vector_of(targets, logits, p.rows, ScalarType::Long, "targets"));
  if (row_weight)
    p.row_weight = static_cast<const float*>(vector_of(*row_weight, logits, p.rows, ScalarType::Float, "row_weight"));
  if (suppress_tokens && suppress_tokens->numel() > 0) {
    p.suppress = static_cast<const int64_t*>(
        vector_of(*suppress_tokens, logits, -1, ScalarType::Long, "suppress_tokens"));
    p.suppress_count = suppress_tokens->size(0);
    STD_TORCH_CHECK(p.suppress_count < p.vocab && Backend::ascending_ids(p),
                    "suppress_tokens does not fit; expected fewer than V ids in [0, V), ascending, no id twice");
  }
  Tensor row_loss = empty(logits, {p.rows}, ScalarType::Float);
  p.row_loss = static_cast<float*>(row_loss.mutable_data_ptr());
  p.label_smoothing = label_smoothing;
  p.want_grad = want_grad;
  if (p.rows > 0) Backend::cross_entropy(p, logits);
  return row_loss;
}

}  // namespace fastdiff::torch_binding
