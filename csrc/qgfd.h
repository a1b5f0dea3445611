// The operator under QGFD attention as torch operators: checks, and the parameters of kernels/qgfd/qgfd.h. Users come
// through fastdiff/ops/qgfd_attention.py, which checks with kinder messages; the checks here keep a direct call of
// torch.ops.fastdiff.* from reading out of bounds.
#pragma once
#include <cmath>
#include <tuple>

#include "csrc/tensors.h"
#include "kernels/qgfd/qgfd.h"

namespace fastdiff::torch_binding {

// The masks, and the numbers of the recurrence, as every one of the operators takes them.
struct QgfdArguments {
  const OptionalTensor &key_mask, &row_begin, &row_end;
  double scale;
  int64_t hops, first_mixed, last_mixed;
  double alpha;
};

inline QgfdHeads heads_of(const Tensor& t, const Tensor& query, const char* name) {
  check_device(t, query, name);
  STD_TORCH_CHECK(t.dim() == 4 && (t.stride(3) == 1 || t.size(3) == 1) && t.scalar_type() == query.scalar_type(), name,
                  " does not fit; expected [B, H, L, d] with a contiguous last dimension, in query's dtype");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline const int32_t* bounds_of(const OptionalTensor& t, const Tensor& query, const char* name, int64_t* batch_stride) {
  if (!t) return nullptr;
  check_device(*t, query, name);
  const int64_t queries = query.size(2);
  STD_TORCH_CHECK(t->dim() == 2 && t->is_contiguous() && t->scalar_type() == ScalarType::Int && t->size(1) == queries &&
                      (t->size(0) == 1 || t->size(0) == query.size(0)),
                  name, " does not fit; expected contiguous int32 [B or 1, L_q]");
  *batch_stride = t->size(0) == 1 ? 0 : queries;
  return static_cast<const int32_t*>(t->const_data_ptr());
}

inline QgfdMatrix qgfd_matrix(const Tensor& query, const Tensor& key, const QgfdArguments& a) {
  QgfdMatrix m{};
  m.query = heads_of(query, query, "query");
  m.key = heads_of(key, query, "key");
  m.dtype = dtype_of(query, "query");
  STD_TORCH_CHECK(m.dtype != DType::kFloat64, "query is float64; expected float32, bfloat16 or float16");
  m.batch = query.size(0);
  m.heads = query.size(1);
  m.queries = query.size(2);
  m.dim = query.size(3);
  m.kv_heads = key.size(1);
  m.keys = key.size(2);
  constexpr int64_t kMost = int64_t(1) << 31;  // bounds are int32
  STD_TORCH_CHECK(key.size(0) == m.batch && key.size(3) == m.dim && m.dim > 0 &&
                      (m.kv_heads > 0 ? m.heads % m.kv_heads == 0 : m.heads == 0) && m.queries < kMost && m.keys < kMost,
                  "key does not fit; expected [B, H_kv, L_k, d] with H a multiple of H_kv");
  m.row_begin = bounds_of(a.row_begin, query, "row_begin", &m.begin_batch_stride);
  m.row_end = bounds_of(a.row_end, query, "row_end", &m.end_batch_stride);
  if (a.key_mask) {
    check_device(*a.key_mask, query, "key_mask");
    STD_TORCH_CHECK(a.key_mask->dim() == 2 && a.key_mask->is_contiguous() &&
                        a.key_mask->scalar_type() == ScalarType::Bool && a.key_mask->size(0) == m.batch &&
                        a.key_mask->size(1) == m.keys,
                    "key_mask does not fit; expected contiguous bool [B, L_k]");
    m.key_mask = static_cast<const uint8_t*>(a.key_mask->const_data_ptr());
  }
  m.scale = static_cast<float>(a.scale);
  STD_TORCH_CHECK(a.scale > 0 && std::isfinite(m.scale), "scale is ", a.scale, "; expected a finite number > 0");
  return m;
}

// Published systems take 2 to 8. A limit keeps the sizes of what is saved, and the time of a call, within numbers.
constexpr int64_t kMostHops = 4096;

inline QgfdRecurrence qgfd_recurrence(const QgfdMatrix& m, const QgfdArguments& a) {
  const QgfdRecurrence r{a.hops, a.first_mixed, a.last_mixed, static_cast<float>(a.alpha)};
  const bool square = m.queries == m.keys, mixes = a.first_mixed <= a.last_mixed;
  STD_TORCH_CHECK(a.hops <= kMostHops, "hops is ", a.hops, "; expected at most ", kMostHops);
  STD_TORCH_CHECK(a.hops >= 1 && (square || (a.hops == 1 && !mixes)) && (!mixes || a.first_mixed >= 1) &&
                      (!mixes || a.last_mixed <= a.hops),
                  "hops does not fit; expected at least 1, one without mixture where L_q != L_k, and 1 <= first_mixed <= "
                  "last_mixed <= hops, or first_mixed > last_mixed for none");
  return r;
}

inline QgfdHeads value_of(const Tensor& value, const Tensor& query, const Tensor& key) {
  const QgfdHeads heads = heads_of(value, query, "value");
  for (int i = 0; i < 4; i++)
    STD_TORCH_CHECK(value.size(i) == key.size(i), "value does not fit; expected key's shape");
  return heads;
}

inline QgfdForwardParams qgfd_forward_params(const Tensor& query, const Tensor& key, const Tensor& value,
                                             const QgfdArguments& a) {
  QgfdForwardParams p{};
  p.matrix = qgfd_matrix(query, key, a);
  p.recurrence = qgfd_recurrence(p.matrix, a);
  p.value = value_of(value, query, key);
  return p;
}

template <class Backend>
void run_forward(QgfdForwardParams& p, const Tensor& query) {
  if (p.matrix.batch * p.matrix.heads * p.matrix.queries == 0) return;
  Tensor workspace = empty(query, {(Backend::forward_workspace_bytes(p) + 7) / 8}, ScalarType::Long);
  p.workspace = workspace.mutable_data_ptr();
  Backend::forward(p, query);
}

template <class Backend>
Tensor qgfd_forward(Tensor query, Tensor key, Tensor value, OptionalTensor key_mask, OptionalTensor row_begin,
                    OptionalTensor row_end, double scale, int64_t hops, int64_t first_mixed, int64_t last_mixed,
                    double alpha) {
  const QgfdArguments a{key_mask, row_begin, row_end, scale, hops, first_mixed, last_mixed, alpha};
  QgfdForwardParams p = qgfd_forward_params(query, key, value, a);
  Tensor out = empty(query, {p.matrix.batch, p.matrix.queries, p.matrix.heads, p.matrix.dim}, query.scalar_type());
  p.out = out.mutable_data_ptr();
  run_forward<Backend>(p, query);
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> qgfd_forward_saved(Tensor query, Tensor key, Tensor value, OptionalTensor key_mask,
                                                      OptionalTensor row_begin, OptionalTensor row_end, double scale,
                                                      int64_t hops, int64_t first_mixed, int64_t last_mixed,
                                                      double alpha) {
  const QgfdArguments a{key_mask, row_begin, row_end, scale, hops, first_mixed, last_mixed, alpha};
  QgfdForwardParams p = qgfd_forward_params(query, key, value, a);
  const QgfdMatrix& m = p.matrix;
  Tensor out = empty(query, {m.batch, m.queries, m.heads, m.dim}, query.scalar_type());
  Tensor lse = empty(query, {m.batch, m.heads, m.queries}, ScalarType::Float);
  Tensor passes = empty(query, {p.recurrence.saved(), m.batch, m.heads, m.queries, m.dim}, query.scalar_type());
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.passes = passes.mutable_data_ptr();
  run_forward<Backend>(p, query);
  return {out, lse, passes};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> qgfd_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,
                                                 Tensor lse, Tensor passes, OptionalTensor key_mask,
                                                 OptionalTensor row_begin, OptionalTensor row_end, double scale,
                                                 int64_t hops, int64_t first_mixed, int64_t last_mixed, double alpha) {
  const QgfdArguments a{key_mask, row_begin, row_end, scale, hops, first_mixed, last_mixed, alpha};
  QgfdBackwardParams p{};
  p.matrix = qgfd_matrix(query, key, a);
  p.recurrence = qgfd_recurrence(p.matrix, a);
  p.value = value_of(value, query, key);
  const QgfdMatrix& m = p.matrix;
  p.grad_out = heads_of(grad_out, query, "grad_out");
  for (int i = 0; i < 4; i++)
    STD_TORCH_CHECK(grad_out.size(i) == query.size(i), "grad_out does not fit; expected query's shape");
  check_device(out, query, "out");
  STD_TORCH_CHECK(out.dim() == 4 && out.is_contiguous() && out.size(0) == m.batch && out.size(1) == m.queries &&
                      out.size(2) == m.heads && out.size(3) == m.dim && out.scalar_type() == query.scalar_type(),
                  "out does not fit; expected what qgfd_forward_saved gave");
  p.out = {out.const_data_ptr(), m.queries * m.heads * m.dim, m.dim, m.heads * m.dim};
  p.lse = numbers<float>(lse, query, m.batch * m.heads * m.queries, "lse");
  check_device(passes, query, "passes");
  STD_TORCH_CHECK(passes.is_contiguous() && passes.scalar_type() == query.scalar_type() &&
                      passes.numel() == p.recurrence.saved() * m.batch * m.heads * m.queries * m.dim,
                  "passes does not fit; expected what qgfd_forward_saved gave");
  p.passes = passes.const_data_ptr();
  Tensor grad_query = empty(query, {m.batch, m.queries, m.heads, m.dim}, query.scalar_type());
  Tensor grad_key = empty(query, {m.batch, m.keys, m.heads, m.dim}, query.scalar_type());
  Tensor grad_value = empty(query, {m.batch, m.keys, m.heads, m.dim}, query.scalar_type());
  p.grad_query = grad_query.mutable_data_ptr();
  p.grad_key = grad_key.mutable_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  if (m.batch * m.heads * (m.queries + m.keys) > 0) {
    Tensor workspace = empty(query, {(Backend::backward_workspace_bytes(p) + 7) / 8}, ScalarType::Long);
    p.workspace = workspace.mutable_data_ptr();
    Backend::backward(p, query);
  }
  return {grad_query, grad_key, grad_value};
}

template <class Backend, class Library>
void register_qgfd(Library& m) {
  m.impl("qgfd_forward", TORCH_BOX(&qgfd_forward<Backend>));
  m.impl("qgfd_forward_saved", TORCH_BOX(&qgfd_forward_saved<Backend>));
  m.impl("qgfd_backward", TORCH_BOX(&qgfd_backward<Backend>));
}

}  // namespace fastdiff::torch_binding
