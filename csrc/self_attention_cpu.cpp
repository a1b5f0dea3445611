// self_attention as torch operators on CPU tensors: schemas, checks, allocation. Users come through
// fastdiff/ops/self_attention.py, which checks with kinder messages; these keep a direct call from reading out of bounds.
#include <cmath>
#include <tuple>

#include "csrc/tensors.h"
#include "kernels/self_attention/self_attention.h"

namespace fastdiff::torch_binding {
namespace {

SelfAttentionShape shape_of(const Tensor& qkv, double scale) {
  check_device(qkv, qkv, "qkv");
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3 && qkv.size(4) > 0 && qkv.is_contiguous(),
                  "qkv does not fit; expected contiguous [B, N, 3, H, d] with d > 0");
  SelfAttentionShape s{};
  s.batch = qkv.size(0);
  s.tokens = qkv.size(1);
  s.heads = qkv.size(3);
  s.dim = qkv.size(4);
  s.dtype = dtype_of(qkv, "qkv");
  STD_TORCH_CHECK(s.dtype != DType::kFloat64, "qkv is float64; expected float32, bfloat16 or float16");
  s.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(scale > 0 && s.scale > 0 && std::isfinite(s.scale), "scale is ", scale,
                  "; expected a finite number > 0");
  return s;
}

Tensor forward(const Tensor& qkv, const SelfAttentionShape& s, float* lse) {
  Tensor out = empty(qkv, {s.batch, s.tokens, s.heads, s.dim}, qkv.scalar_type());
  const SelfAttentionForwardParams p{s, qkv.const_data_ptr(), out.mutable_data_ptr(), lse};
  if (qkv.numel() > 0) cpu::self_attention_forward(p, {run_on_torch_threads});
  return out;
}

Tensor self_attention(Tensor qkv, double scale) { return forward(qkv, shape_of(qkv, scale), nullptr); }

std::tuple<Tensor, Tensor> self_attention_saved(Tensor qkv, double scale) {
  const SelfAttentionShape s = shape_of(qkv, scale);
  Tensor lse = empty(qkv, {s.batch, s.heads, s.tokens}, ScalarType::Float);
  Tensor out = forward(qkv, s, static_cast<float*>(lse.mutable_data_ptr()));
  return {out, lse};
}

const void* like_out(const Tensor& t, const Tensor& qkv, const char* name) {
  check_device(t, qkv, name);
  STD_TORCH_CHECK(t.dim() == 4 && t.is_contiguous() && t.scalar_type() == qkv.scalar_type() &&
                      t.size(0) == qkv.size(0) && t.size(1) == qkv.size(1) && t.size(2) == qkv.size(3) &&
                      t.size(3) == qkv.size(4),
                  name, " does not fit; expected contiguous [B, N, H, d] in qkv's dtype");
  return t.const_data_ptr();
}

Tensor self_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, double scale) {
  SelfAttentionBackwardParams p{};
  const SelfAttentionShape& s = p.shape = shape_of(qkv, scale);
  p.grad_out = like_out(grad_out, qkv, "grad_out");
  p.qkv = qkv.const_data_ptr();
  p.out = like_out(out, qkv, "out");
  p.lse = numbers<float>(lse, qkv, s.batch * s.heads * s.tokens, "lse");
  Tensor grad_qkv = empty(qkv, {s.batch, s.tokens, 3, s.heads, s.dim}, qkv.scalar_type());
  p.grad_qkv = grad_qkv.mutable_data_ptr();
  if (qkv.numel() > 0) cpu::self_attention_backward(p, {run_on_torch_threads});
  return grad_qkv;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) {
  m.def("self_attention(Tensor qkv, float scale) -> Tensor");
  m.def("self_attention_saved(Tensor qkv, float scale) -> (Tensor, Tensor)");
  m.def("self_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("self_attention", TORCH_BOX(&self_attention));
  m.impl("self_attention_saved", TORCH_BOX(&self_attention_saved));
  m.impl("self_attention_backward", TORCH_BOX(&self_attention_backward));
}

}  // namespace
}  // namespace fastdiff::torch_binding
