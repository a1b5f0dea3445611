// qk_norm_rotary as torch operators on CPU tensors: schemas, checks, allocation. Users come through
// fastdiff/ops/qk_norm_rotary.py, which checks with kinder messages; these keep a direct call from reading out of bounds.
#include <tuple>

#include "csrc/tensors.h"
#include "kernels/qk_norm_rotary/qk_norm_rotary.h"

namespace fastdiff::torch_binding {
namespace {

QkNormRotaryShape shape_of(const Tensor& qkv, double eps) {
  check_device(qkv, qkv, "qkv");
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3 && qkv.is_contiguous(),
                  "qkv does not fit; expected contiguous [B, N, 3, H, d]");
  QkNormRotaryShape s{};
  s.batch = qkv.size(0);
  s.tokens = qkv.size(1);
  s.heads = qkv.size(3);
  s.dim = qkv.size(4);
  s.dtype = dtype_of(qkv, "qkv");
  STD_TORCH_CHECK(s.dtype != DType::kFloat64, "qkv is float64; expected float32, bfloat16 or float16");
  s.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(eps >= 0, "eps is ", eps, "; expected a number >= 0");
  return s;
}

const float* matrix(const Tensor& t, const Tensor& qkv, int64_t rows, int64_t columns, const char* name) {
  check_device(t, qkv, name);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous() &&
                      t.scalar_type() == ScalarType::Float,
                  name, " does not fit; expected contiguous float32 [", rows, ", ", columns, "]");
  return static_cast<const float*>(t.const_data_ptr());
}

QkNormRotaryOperands operands(const QkNormRotaryShape& s, const Tensor& qkv, const Tensor& weight, const Tensor& bias,
                              const OptionalTensor& cosine, const OptionalTensor& sine) {
  QkNormRotaryOperands o{};
  o.qkv = qkv.const_data_ptr();
  o.weight = matrix(weight, qkv, 2, s.heads * s.dim, "weight");
  o.bias = matrix(bias, qkv, 2, s.heads * s.dim, "bias");
  STD_TORCH_CHECK(bool(cosine) == bool(sine), "sine goes with cosine; expected both or neither");
  if (cosine) {
    STD_TORCH_CHECK(s.dim % 2 == 0, "qkv has heads of ", s.dim, " numbers; expected an even number");
    o.cosine = matrix(*cosine, qkv, s.tokens, s.dim / 2, "cosine");
    o.sine = matrix(*sine, qkv, s.tokens, s.dim / 2, "sine");
  }
  return o;
}

Tensor forward(const Tensor& qkv, const QkNormRotaryShape& s, const QkNormRotaryOperands& o, float* stats) {
  Tensor out = empty_like_contiguous(qkv);
  const QkNormRotaryForwardParams p{s, o, out.mutable_data_ptr(), stats};
  if (qkv.numel() > 0) cpu::qk_norm_rotary_forward(p, {run_on_torch_threads});
  return out;
}

Tensor qk_norm_rotary(Tensor qkv, Tensor weight, Tensor bias, OptionalTensor cosine, OptionalTensor sine, double eps) {
  const QkNormRotaryShape s = shape_of(qkv, eps);
  return forward(qkv, s, operands(s, qkv, weight, bias, cosine, sine), nullptr);
}

std::tuple<Tensor, Tensor> qk_norm_rotary_saved(Tensor qkv, Tensor weight, Tensor bias, OptionalTensor cosine,
                                                OptionalTensor sine, double eps) {
  const QkNormRotaryShape s = shape_of(qkv, eps);
  const QkNormRotaryOperands o = operands(s, qkv, weight, bias, cosine, sine);
  Tensor stats = empty(qkv, {s.batch * s.tokens, 4}, ScalarType::Float);
  Tensor out = forward(qkv, s, o, static_cast<float*>(stats.mutable_data_ptr()));
  return {out, stats};
}

// Gradients of qkv, and of the query's weight and bias and the key's as the rows of [4, D]; without a row where they are not
// wanted.
std::tuple<Tensor, Tensor> qk_norm_rotary_backward(Tensor grad_out, Tensor qkv, Tensor stats, Tensor weight, Tensor bias,
                                                   OptionalTensor cosine, OptionalTensor sine, bool need_parameters) {
  QkNormRotaryBackwardParams p{};
  const QkNormRotaryShape& s = p.shape = shape_of(qkv, 0);
  p.operands = operands(s, qkv, weight, bias, cosine, sine);
  p.stats = matrix(stats, qkv, s.batch * s.tokens, 4, "stats");
  check_device(grad_out, qkv, "grad_out");
  bool fits = grad_out.dim() == 5 && grad_out.is_contiguous() && grad_out.scalar_type() == qkv.scalar_type();
  for (int64_t i = 0; fits && i < 5; i++) fits = grad_out.size(i) == qkv.size(i);
  STD_TORCH_CHECK(fits, "grad_out does not fit; expected a contiguous tensor of qkv's shape and dtype");
  p.grad_out = grad_out.const_data_ptr();
  Tensor grad_qkv = empty_like_contiguous(qkv);
  const int64_t width = s.heads * s.dim;
  Tensor grads = empty(qkv, {need_parameters ? 4 : 0, width}, ScalarType::Float);
  if (qkv.numel() == 0) {  // sums over nothing
    torch::stable::zero_(grads);
    return {grad_qkv, grads};
  }
  p.grad_qkv = grad_qkv.mutable_data_ptr();
  Tensor workspace = empty(qkv, {need_parameters ? qk_norm_rotary_segments(s) : 0, 4, width}, ScalarType::Float);
  if (need_parameters) {
    p.grad_parameters = static_cast<float*>(grads.mutable_data_ptr());
    p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  }
  cpu::qk_norm_rotary_backward(p, {run_on_torch_threads});
  return {grad_qkv, grads};
}

#define OPERANDS "Tensor weight, Tensor bias, Tensor? cosine, Tensor? sine"

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) {
  m.def("qk_norm_rotary(Tensor qkv, " OPERANDS ", float eps) -> Tensor");
  m.def("qk_norm_rotary_saved(Tensor qkv, " OPERANDS ", float eps) -> (Tensor, Tensor)");
  m.def("qk_norm_rotary_backward(Tensor grad_out, Tensor qkv, Tensor stats, " OPERANDS
        ", bool need_parameters) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("qk_norm_rotary", TORCH_BOX(&qk_norm_rotary));
  m.impl("qk_norm_rotary_saved", TORCH_BOX(&qk_norm_rotary_saved));
  m.impl("qk_norm_rotary_backward", TORCH_BOX(&qk_norm_rotary_backward));
}

}  // namespace
}  // namespace fastdiff::torch_binding
