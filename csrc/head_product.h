// What operators on hidden states share: the head's operands, checked. head_product_cpu.h and head_product_cuda.h
// multiply them, a tile at a time.
#pragma once
#include "csrc/tensors.h"
#include "kernels/common/logit_tiles.h"

namespace fastdiff::torch_binding {

inline void check_head(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias) {
  check_aligned(hidden, "hidden");
  STD_TORCH_CHECK(hidden.dim() == 3 && hidden.is_contiguous(), "hidden does not fit; expected contiguous [B, L, D]");
  check_device(weight, hidden, "weight");
  const int64_t dim = hidden.size(2);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == dim && (weight.stride(1) == 1 || dim == 1) &&
                      weight.scalar_type() == hidden.scalar_type(),
                  "weight does not fit; expected [V, ", dim, "] with a contiguous last dimension in hidden's dtype");
  if (!bias) return;
  check_device(*bias, hidden, "bias");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_contiguous() &&
                      bias->scalar_type() == hidden.scalar_type(),
                  "bias does not fit; expected contiguous [", weight.size(0), "] in hidden's dtype");
}

// The operands of the product: the context of HeadProduct::run.
struct Head {
  const Tensor &hidden, &weight;  // [rows, D] contiguous, [V, D]
  const OptionalTensor& bias;     // [V] contiguous
};

}  // namespace fastdiff::torch_binding
