// scale_shift as a torch operator, for any backend: checks, allocation, and the parameters of the launch functions.
// fastdiff/ops/scale_shift.py checks with kinder messages; these keep a direct call from reading out of bounds.
#pragma once
#include "csrc/tensors.h"
#include "kernels/scale_shift/scale_shift.h"

namespace fastdiff::torch_binding {

template <class Backend>
Tensor scale_shift(Tensor x, Tensor scale, Tensor shift) {
  check_aligned(x, "x");
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "x does not fit; expected contiguous [B, N, D]");
  for (const Tensor* t : {&scale, &shift}) {
    check_device(*t, x, "scale or shift");
    STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == x.size(0) && t->size(1) == x.size(2) && t->is_contiguous() &&
                        t->scalar_type() == x.scalar_type(),
                    "scale or shift does not fit; expected contiguous [", x.size(0), ", ", x.size(2), "] in x's dtype");
  }
  Tensor out = empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  ScaleShiftParams p{};
  p.x = x.const_data_ptr();
  p.scale = scale.const_data_ptr();
  p.shift = shift.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.dim = x.size(2);
  p.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(p.dtype != DType::kFloat64, "x is float64; expected float32, bfloat16 or float16");
  if (x.numel() > 0) Backend::scale_shift(p, x);
  return out;
}

}  // namespace fastdiff::torch_binding
