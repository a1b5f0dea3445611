// AdaLN's torch operators, for any backend: checks, allocation, and the parameters of kernels/adaln/adaln.h.
// Users come through fastdiff/ops/adaln.py, which checks with kinder messages; the checks here keep a direct call of
// torch.ops.fastdiff.* from reading out of bounds.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <tuple>

#include "csrc/tensors.h"
#include "kernels/adaln/adaln.h"

namespace fastdiff::torch_binding {

struct Shape {
  int64_t batch, tokens, dim;
};

inline Shape stream_shape(const Tensor& x, const char* name) {
  check_aligned(x, name);
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous() && x.size(2) > 0, name, " does not fit; expected contiguous [B, N, D]");
  return {x.size(0), x.size(1), x.size(2)};
}

inline int64_t frames_of(const OptionalTensor& m) { return m && m->dim() == 3 ? m->size(1) : 1; }

inline Modulation modulation(const OptionalTensor& m, const Tensor& x, const Shape& s, const char* name) {
  if (!m) return {nullptr, DType::kFloat32, 0, 0, 1};
  check_device(*m, x, name);
  const int64_t dims = m->dim();
  bool fits = dims >= 1 && dims <= 3 && m->size(dims - 1) == s.dim && (s.dim == 1 || m->stride(dims - 1) == 1);
  fits = fits && (dims == 1 || m->size(0) == 1 || m->size(0) == s.batch);
  const int64_t frames = fits ? frames_of(m) : 1;
  fits = fits && (frames == s.tokens || (frames > 0 && s.tokens % frames == 0));
  STD_TORCH_CHECK(fits, name, " does not fit; expected [D], [1 or B, D] or [1 or B, F, D] with F dividing N, B = ", s.batch,
                  ", N = ", s.tokens, ", D = ", s.dim, ", and a contiguous last dimension");
  Modulation result{m->const_data_ptr(), dtype_of(*m, name), 0, 0, 1};
  if (dims > 1 && m->size(0) > 1) result.batch_stride = m->stride(0);
  if (frames > 1) result.frame_stride = m->stride(1);
  if (frames > 0) result.tokens_per_frame = std::max<int64_t>(s.tokens / frames, 1);
  return result;
}

inline const void* affine(const OptionalTensor& t, const Tensor& x, const char* name) {
  if (!t) return nullptr;
  check_device(*t, x, name);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(2) && t->is_contiguous() && t->scalar_type() == compute_type(x), name,
                  " does not fit; expected contiguous [", x.size(2), "] in the dtype of the statistics");
  return t->const_data_ptr();
}

// Doubles go with doubles only.
inline void check_double(std::initializer_list<const Modulation*> modulations, std::initializer_list<DType> streams) {
  const bool wide = *streams.begin() == DType::kFloat64;
  const auto fits = [wide](DType t) { return (t == DType::kFloat64) == wide; };
  const auto modulates = [&](const Modulation* m) { return !m->data || fits(m->dtype); };
  STD_TORCH_CHECK(std::all_of(streams.begin(), streams.end(), fits) &&
                      std::all_of(modulations.begin(), modulations.end(), modulates),
                  "float64 goes with float64 only: cast the operands");
}

// An output that the caller gave: the stream or the branch itself, whose rows are read before they are written, or apart
// from everything that is read.
inline void check_output(const Tensor& out, const char* name, std::initializer_list<const Tensor*> streams,
                         std::initializer_list<const OptionalTensor*> others) {
  for (const Tensor* t : streams) {
    check_device(*t, out, "an operand");
    const bool same = t->const_data_ptr() == out.const_data_ptr() && t->scalar_type() == out.scalar_type() &&
                      t->numel() == out.numel() && t->is_contiguous();
    if (!same) check_apart(out, name, *t, "an operand");
  }
  for (const OptionalTensor* t : others) check_apart(out, name, *t, "an operand");
}

// ------------------------------------------------------------------------------------------------ forward
struct ForwardArguments {
  const Tensor& x;
  const Tensor* branch;
  OptionalTensor gate, shift, scale, weight, bias;
  bool rms;
  double eps;
  std::optional<ScalarType> out_dtype;
  bool saturate = false;
};

template <class Backend>
void run_forward(const ForwardArguments& a, Tensor* residual_out, Tensor& out, Tensor* mean, Tensor* rstd) {
  const Shape s = stream_shape(a.x, a.branch ? "residual" : "x");
  AdaLNForwardParams p{};
  p.x = a.x.const_data_ptr();
  p.x_dtype = dtype_of(a.x, "x");
  if (a.branch) {
    check_like(*a.branch, a.x, "branch");
    check_like(*residual_out, a.x, "residual_out");
    STD_TORCH_CHECK(residual_out->scalar_type() == a.x.scalar_type(), "residual_out must have residual's dtype");
    p.branch = a.branch->const_data_ptr();
    p.branch_dtype = dtype_of(*a.branch, "branch");
    p.residual_out = residual_out->mutable_data_ptr();
  }
  check_like(out, a.x, "out");
  p.gate = modulation(a.gate, a.x, s, "gate");
  p.shift = modulation(a.shift, a.x, s, "shift");
  p.scale = modulation(a.scale, a.x, s, "scale");
  p.weight = affine(a.weight, a.x, "weight");
  p.bias = affine(a.bias, a.x, "bias");
  p.out = out.mutable_data_ptr();
  p.out_dtype = dtype_of(out, "out");
  if (mean && !a.rms) p.mean = mean->mutable_data_ptr();
  if (rstd) p.rstd = rstd->mutable_data_ptr();
  p.batch = s.batch;
  p.tokens = s.tokens;
  p.dim = s.dim;
  p.eps = a.eps;
  p.rms = a.rms;
  p.saturate = a.saturate;
  STD_TORCH_CHECK(a.eps >= 0, "eps is ", a.eps, "; expected 0 or more");
  check_double({&p.gate, &p.shift, &p.scale}, {p.x_dtype, p.out_dtype, a.branch ? p.branch_dtype : p.x_dtype});
  if (s.batch * s.tokens > 0) Backend::forward(p, a.x);
}

inline Tensor empty_like(const Tensor& x, ScalarType type) {
  stream_shape(x, "the stream");
  return empty(x, {x.size(0), x.size(1), x.size(2)}, type);
}

#define FASTDIFF_ADALN_FORWARD                                                                                   \
  OptionalTensor shift, OptionalTensor scale, OptionalTensor weight, OptionalTensor bias, bool rms, double eps, \
      std::optional<ScalarType> out_dtype

template <class Backend>
Tensor adaln_forward(Tensor x, FASTDIFF_ADALN_FORWARD) {
  Tensor out = empty_like(x, out_dtype.value_or(x.scalar_type()));
  run_forward<Backend>({x, nullptr, {}, shift, scale, weight, bias, rms, eps, out_dtype}, nullptr, out, nullptr, nullptr);
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> adaln_forward_stats(Tensor x, FASTDIFF_ADALN_FORWARD) {
  Tensor out = empty_like(x, out_dtype.value_or(x.scalar_type()));
  Tensor mean = empty(x, {rms ? 0 : x.size(0) * x.size(1)}, compute_type(x));
  Tensor rstd = empty(x, {x.size(0) * x.size(1)}, compute_type(x));
  run_forward<Backend>({x, nullptr, {}, shift, scale, weight, bias, rms, eps, out_dtype}, nullptr, out, &mean, &rstd);
  return {out, mean, rstd};
}

template <class Backend>
void adaln_forward_out(Tensor x, FASTDIFF_ADALN_FORWARD, Tensor out) {
  check_device(out, x, "out");
  check_output(out, "out", {&x}, {&shift, &scale, &weight, &bias});
  run_forward<Backend>({x, nullptr, {}, shift, scale, weight, bias, rms, eps, out_dtype}, nullptr, out, nullptr, nullptr);
}

template <class Backend>
std::tuple<Tensor, Tensor> gated_forward(Tensor residual, Tensor branch, Tensor gate, FASTDIFF_ADALN_FORWARD,
                                         bool saturate) {
  Tensor sum = empty_like(residual, residual.scalar_type());
  Tensor out = empty_like(residual, out_dtype.value_or(residual.scalar_type()));
  run_forward<Backend>({residual, &branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, saturate}, &sum, out,
                       nullptr, nullptr);
  return {sum, out};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> gated_forward_stats(Tensor residual, Tensor branch, Tensor gate,
                                                               FASTDIFF_ADALN_FORWARD, bool saturate) {
  Tensor sum = empty_like(residual, residual.scalar_type());
  Tensor out = empty_like(residual, out_dtype.value_or(residual.scalar_type()));
  Tensor mean = empty(residual, {rms ? 0 : residual.size(0) * residual.size(1)}, compute_type(residual));
  Tensor rstd = empty(residual, {residual.size(0) * residual.size(1)}, compute_type(residual));
  run_forward<Backend>({residual, &branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, saturate}, &sum, out,
                       &mean, &rstd);
  return {sum, out, mean, rstd};
}

template <class Backend>
void gated_forward_out(Tensor residual, Tensor branch, Tensor gate, FASTDIFF_ADALN_FORWARD, bool saturate,
                       Tensor residual_out, Tensor out) {
  check_device(out, residual, "out");
  check_device(residual_out, residual, "residual_out");
  const OptionalTensor a_gate = gate, sum = residual_out;
  check_output(out, "out", {&residual, &branch}, {&a_gate, &shift, &scale, &weight, &bias, &sum});
  check_output(residual_out, "residual_out", {&residual, &branch}, {&a_gate, &shift, &scale, &weight, &bias});
  run_forward<Backend>({residual, &branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, saturate},
                       &residual_out, out, nullptr, nullptr);
}

// ------------------------------------------------------------------------------------------------ backward
struct BackwardArguments {
  const Tensor& grad_out;
  const OptionalTensor grad_residual_out;
  const Tensor &x, &mean, &rstd;
  const Tensor* branch;
  OptionalTensor gate, shift, scale, weight, bias;
  bool rms, need_modulation, need_affine;
  const OptionalTensor residual_in;
};

struct Gradients {
  Tensor x, branch, gate, shift, scale, weight, bias;
};

// The least common multiple. Where there are no tokens, frames may be any numbers.
inline int64_t common_frames(int64_t a, int64_t b) {
  int64_t result = 0;
  const bool fits = a == 0 || b == 0 || !__builtin_mul_overflow(a / std::gcd(a, b), b, &result);
  STD_TORCH_CHECK(fits, "the frames of the modulations do not fit; expected numbers that divide N");
  return result;
}

// The gradient of a modulation, [B, frames, D]: in the operand's dtype where that is its own shape.
inline Tensor modulation_gradient(const OptionalTensor& m, const Tensor& x, int64_t frames, bool needed) {
  if (!m || !needed) return empty(x, {0}, x.scalar_type());
  const bool own_batch = (m->dim() > 1 ? m->size(0) : 1) == x.size(0);
  const bool exact = own_batch && frames_of(m) == frames;
  return empty(x, {x.size(0), frames, x.size(2)}, exact ? m->scalar_type() : compute_type(x));
}

inline Tensor affine_gradient(const OptionalTensor& t, const Tensor& x, bool needed) {
  return empty(x, {t && needed ? x.size(2) : 0}, compute_type(x));
}

inline void* pointer_or_null(Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; }

template <class Backend>
Gradients run_backward(const BackwardArguments& a) {
  const Shape s = stream_shape(a.x, "x");
  AdaLNBackwardParams p{};
  p.gate = modulation(a.gate, a.x, s, "gate");
  p.scale = modulation(a.scale, a.x, s, "scale");
  const Modulation shift = modulation(a.shift, a.x, s, "shift");
  const int64_t frames = common_frames(common_frames(frames_of(a.gate), frames_of(a.shift)), frames_of(a.scale));
  const ScalarType branch_type = a.branch ? a.branch->scalar_type() : a.x.scalar_type();
  Gradients g{empty_like(a.x, a.x.scalar_type()),
              a.branch ? empty_like(a.x, branch_type) : empty(a.x, {0}, branch_type),
              modulation_gradient(a.gate, a.x, frames, a.need_modulation),
              modulation_gradient(a.shift, a.x, frames, a.need_modulation),
              modulation_gradient(a.scale, a.x, frames, a.need_modulation),
              affine_gradient(a.weight, a.x, a.need_affine),
              affine_gradient(a.bias, a.x, a.need_affine)};
  check_like(a.grad_out, a.x, "grad_out");
  p.grad_out = a.grad_out.const_data_ptr();
  p.out_dtype = dtype_of(a.grad_out, "grad_out");
  if (a.grad_residual_out) {
    check_like(*a.grad_residual_out, a.x, "grad_residual_out");
    STD_TORCH_CHECK(a.grad_residual_out->scalar_type() == a.x.scalar_type(), "grad_residual_out must have residual's dtype");
    p.grad_residual_out = a.grad_residual_out->const_data_ptr();
  }
  p.x = a.x.const_data_ptr();
  p.x_dtype = dtype_of(a.x, "x");
  const int64_t rows = s.batch * s.tokens;
  check_device(a.mean, a.x, "mean");
  check_device(a.rstd, a.x, "rstd");
  STD_TORCH_CHECK((a.rms || a.mean.numel() == rows) && a.rstd.numel() == rows && a.mean.is_contiguous() &&
                      a.rstd.is_contiguous() && a.rstd.scalar_type() == compute_type(a.x) && a.mean.scalar_type() == compute_type(a.x),
                  "mean and rstd do not fit; expected contiguous [B * N] as the forward pass returned them");
  p.mean = a.mean.const_data_ptr();
  p.rstd = a.rstd.const_data_ptr();
  if (a.branch) {
    check_like(*a.branch, a.x, "branch");
    p.branch = a.branch->const_data_ptr();
    p.branch_dtype = dtype_of(*a.branch, "branch");
    p.grad_branch = g.branch.mutable_data_ptr();
  }
  if (a.residual_in) {
    check_like(*a.residual_in, a.x, "residual_in");
    STD_TORCH_CHECK(a.branch && p.x_dtype == DType::kFloat16 && a.residual_in->scalar_type() == ScalarType::Half,
                    "residual_in does not fit; expected float16, as the stream, or None");
    p.residual_in = a.residual_in->const_data_ptr();
  }
  check_double({&p.gate, &shift, &p.scale}, {p.x_dtype, p.out_dtype, a.branch ? p.branch_dtype : p.x_dtype});
  p.weight = affine(a.weight, a.x, "weight");
  p.bias = affine(a.bias, a.x, "bias");
  p.grad_x = g.x.mutable_data_ptr();
  p.grad_gate = pointer_or_null(g.gate);
  p.grad_shift = pointer_or_null(g.shift);
  p.grad_scale = pointer_or_null(g.scale);
  p.grad_weight = pointer_or_null(g.weight);
  p.grad_bias = pointer_or_null(g.bias);
  p.grad_gate_dtype = dtype_of(g.gate, "gate");
  p.grad_shift_dtype = dtype_of(g.shift, "shift");
  p.grad_scale_dtype = dtype_of(g.scale, "scale");
  p.batch = s.batch;
  p.tokens = s.tokens;
  p.dim = s.dim;
  p.rms = a.rms;
  if (rows == 0) {  // sums over no rows
    for (Tensor* t : {&g.gate, &g.shift, &g.scale, &g.weight, &g.bias}) torch::stable::zero_(*t);
    return g;
  }
  p.grad_tokens_per_frame = s.tokens / frames;
  p.rows_per_segment = Backend::rows_per_segment(p);
  const int64_t bytes = adaln_backward_workspace_bytes(p);
  Tensor workspace = empty(a.x, {bytes / dtype_size(DType::kFloat32)}, ScalarType::Float);
  p.workspace = workspace.mutable_data_ptr();
  Backend::backward(p, a.x);
  return g;
}

#define FASTDIFF_ADALN_BACKWARD                                                                         \
  OptionalTensor shift, OptionalTensor scale, OptionalTensor weight, OptionalTensor bias, bool rms, \
      bool need_modulation, bool need_affine

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaln_backward(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd,
                                                                  FASTDIFF_ADALN_BACKWARD) {
  Gradients g = run_backward<Backend>({grad_out, {}, x, mean, rstd, nullptr, {}, shift, scale, weight, bias, rms,
                                       need_modulation, need_affine, {}});
  return {g.x, g.shift, g.scale, g.weight, g.bias};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_backward(
    Tensor grad_out, OptionalTensor grad_residual_out, Tensor residual_out, Tensor mean, Tensor rstd, Tensor branch,
    Tensor gate, FASTDIFF_ADALN_BACKWARD, OptionalTensor residual_in) {
  Gradients g = run_backward<Backend>({grad_out, grad_residual_out, residual_out, mean, rstd, &branch, gate, shift,
                                       scale, weight, bias, rms, need_modulation, need_affine, residual_in});
  return {g.x, g.branch, g.gate, g.shift, g.scale, g.weight, g.bias};
}

template <class Backend>
void register_adaln(torch::stable::detail::StableLibrary& m) {
  m.impl("adaln_forward", TORCH_BOX(&adaln_forward<Backend>));
  m.impl("adaln_forward_stats", TORCH_BOX(&adaln_forward_stats<Backend>));
  m.impl("adaln_forward_out", TORCH_BOX(&adaln_forward_out<Backend>));
  m.impl("adaln_backward", TORCH_BOX(&adaln_backward<Backend>));
  m.impl("gated_residual_adaln_forward", TORCH_BOX(&gated_forward<Backend>));
  m.impl("gated_residual_adaln_forward_stats", TORCH_BOX(&gated_forward_stats<Backend>));
  m.impl("gated_residual_adaln_forward_out", TORCH_BOX(&gated_forward_out<Backend>));
  m.impl("gated_residual_adaln_backward", TORCH_BOX(&gated_backward<Backend>));
}

}  // namespace fastdiff::torch_binding
