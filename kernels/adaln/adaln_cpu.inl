// AdaLN on the CPU, compiled once an instruction set (see kernels/common/vec.h).
// A row is read from memory once; the passes over it after that hit the L1 cache.
#include <math.h>
#include <stdlib.h>

#include "kernels/adaln/adaln.h"
#include "kernels/common/vec.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should have before a second one is woken

// Rows of the arithmetic's type, 64-byte aligned, one block a thread's chunk.
template <class S>
struct Scratch {
  S* data;
  int64_t stride;
  Scratch(int64_t rows, int64_t dim) : stride((dim + 15) / 16 * 16) {
    data = static_cast<S*>(aligned_alloc(64, rows * stride * sizeof(S)));
    if (data == nullptr) abort();  // a few rows: as far gone as a stack overflow
  }
  ~Scratch() { free(data); }
  S* row(int64_t i) const { return data + i * stride; }
};

// ------------------------------------------------------------------------------------------------ modulation
inline int64_t modulation_offset(const Modulation& m, int64_t b, int64_t n) {
  return b * m.batch_stride + n / m.tokens_per_frame * m.frame_stride;
}

// dst = constant + the modulation's row, or the constant alone where the operand is absent
template <class V>
void widen_row(const Modulation& m, int64_t offset, typename V::Scalar constant, int64_t dim, typename V::Scalar* dst) {
  const V k = V::set(constant);
  if (m.data == nullptr) {
    for_lanes<V>(dim, [&](int64_t i, auto n) { store(k, dst + i, n); });
    return;
  }
  with_type<V>(m.dtype, [&](auto type) {
    const auto* src = static_cast<const typename decltype(type)::type*>(m.data) + offset;
    for_lanes<V>(dim, [&](int64_t i, auto n) { store(k + load<V>(src + i, n), dst + i, n); });
  });
}

// The rows a = weight·(1 + scale), c = bias·(1 + scale) + shift and gate that hold for a token, made anew only when
// the token's modulation rows change: once a sample, a frame or a token.
template <class V>
struct ModulationRows {
  using S = typename V::Scalar;
  const Modulation &scale, &shift, &gate;
  const S *weight, *bias;
  int64_t dim;
  S *a, *c, *g;
  int64_t scale_at = -1, shift_at = -1, gate_at = -1;

  void move_to(int64_t b, int64_t n) {
    const int64_t s = modulation_offset(scale, b, n), t = modulation_offset(shift, b, n);
    const bool new_scale = s != scale_at;
    if (new_scale) {
      widen_row<V>(scale, s, 1, dim, a);
    }
    if (c != nullptr && (t != shift_at || (new_scale && bias != nullptr))) {
      widen_row<V>(shift, t, 0, dim, c);
      if (bias != nullptr) {
        if (!new_scale) widen_row<V>(scale, s, 1, dim, a);
        for_lanes<V>(dim, [&](int64_t i, auto n_) {
          store(fma(load<V>(bias + i, n_), load<V>(a + i, n_), load<V>(c + i, n_)), c + i, n_);
        });
        if (!new_scale) scale_weight();
      }
      shift_at = t;
    }
    if (new_scale) {
      scale_weight();
      scale_at = s;
    }
    if (g != nullptr) {
      const int64_t u = modulation_offset(gate, b, n);
      if (u != gate_at) widen_row<V>(gate, u, 0, dim, g);
      gate_at = u;
    }
  }

 private:
  void scale_weight() {
    if (weight == nullptr) return;
    for_lanes<V>(dim, [&](int64_t i, auto n) { store(load<V>(weight + i, n) * load<V>(a + i, n), a + i, n); });
  }
};

// ------------------------------------------------------------------------------------------------ forward
template <class V, class X, class B>
void gate_row(const X* x, const B* branch, const typename V::Scalar* g, int64_t dim, X* out) {
  for_lanes<V>(dim, [&](int64_t i, auto n) {
    store(fma(load<V>(g + i, n), load<V>(branch + i, n), load<V>(x + i, n)), out + i, n);
  });
}

template <class S>
struct Statistics {
  S first_mean;   // the mean as the first pass has it
  S correction;   // what the second pass adds to it
  S rstd;
};

// Four running sums in flight hide the latency of the additions.
template <class V, class F>
FD_INLINE typename V::Scalar sum_of(int64_t dim, const F& term) {
  constexpr int W = V::kWidth;
  V sum[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
  int64_t i = 0;
  for (; i + 4 * W <= dim; i += 4 * W)
    for (int k = 0; k < 4; k++) sum[k] = sum[k] + term(i + k * W, Whole{});
  for (; i + W <= dim; i += W) sum[0] = sum[0] + term(i, Whole{});
  if (i < dim) sum[1] = sum[1] + term(i, dim - i).first(dim - i);
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
}

template <class V, class X>
Statistics<typename V::Scalar> row_statistics(const X* x, int64_t dim, bool rms, double eps) {
  using S = typename V::Scalar;
  const S size = S(dim);
  if (rms) {
    const S square = sum_of<V>(dim, [&](int64_t i, auto n) {
      const V v = load<V>(x + i, n);
      return v * v;
    });
    return {0, 0, S(1) / S(sqrt(square / size + S(eps)))};
  }
  const S mean = sum_of<V>(dim, [&](int64_t i, auto n) { return load<V>(x + i, n); }) / size;
  const V m = V::set(mean);
  constexpr int W = V::kWidth;
  V sum[2] = {V::set(0), V::set(0)}, square[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
  int64_t i = 0;
  for (; i + 4 * W <= dim; i += 4 * W)
    for (int k = 0; k < 4; k++) {
      const V d = V::load(x + i + k * W) - m;
      sum[k & 1] = sum[k & 1] + d;
      square[k] = fma(d, d, square[k]);
    }
  for (; i < dim; i += W) {
    const int64_t n = dim - i < W ? dim - i : W;
    const V d = (V::load(x + i, n) - m).first(n);
    sum[0] = sum[0] + d;
    square[0] = fma(d, d, square[0]);
  }
  const S correction = (sum[0] + sum[1]).sum() / size;
  const S variance = ((square[0] + square[1]) + (square[2] + square[3])).sum() / size - correction * correction;
  return {mean, correction, S(1) / S(sqrt((variance > 0 ? variance : 0) + S(eps)))};
}

template <class V, class X, class O>
void normalise_row(const X* x, const Statistics<typename V::Scalar>& s, const typename V::Scalar* a,
                   const typename V::Scalar* c, int64_t dim, O* out) {
  const V mean = V::set(s.first_mean), rstd = V::set(s.rstd), rest = V::set(-s.correction * s.rstd);
  for_lanes<V>(dim, [&](int64_t i, auto n) {
    const V xhat = fma(load<V>(x + i, n) - mean, rstd, rest);
    store(fma(xhat, load<V>(a + i, n), load<V>(c + i, n)), out + i, n);
  });
}

template <class V, class X, class O>
void forward_rows(const AdaLNForwardParams& p, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const Scratch<S> scratch(3, p.dim);
  ModulationRows<V> rows{p.scale,
                         p.shift,
                         p.gate,
                         static_cast<const S*>(p.weight),
                         static_cast<const S*>(p.bias),
                         p.dim,
                         scratch.row(0),
                         scratch.row(1),
                         p.branch ? scratch.row(2) : nullptr};
  for (int64_t r = begin; r < end; r++) {
    rows.move_to(r / p.tokens, r % p.tokens);
    const X* x = static_cast<const X*>(p.x) + r * p.dim;
    if (p.branch != nullptr) {
      X* sum = static_cast<X*>(p.residual_out) + r * p.dim;
      with_type<V>(p.branch_dtype, [&](auto type) {
        using B = typename decltype(type)::type;
        gate_row<V>(x, static_cast<const B*>(p.branch) + r * p.dim, rows.g, p.dim, sum);
      });
      x = sum;
    }
    const Statistics<S> s = row_statistics<V>(x, p.dim, p.rms, p.eps);
    normalise_row<V>(x, s, rows.a, rows.c, p.dim, static_cast<O*>(p.out) + r * p.dim);
    if (p.mean != nullptr && !p.rms) static_cast<S*>(p.mean)[r] = s.first_mean + s.correction;
    if (p.rstd != nullptr) static_cast<S*>(p.rstd)[r] = s.rstd;
  }
}

template <class V>
void forward(const AdaLNForwardParams& p, const ParallelFor& parallel_for) {
  with_type<V>(p.x_dtype, [&](auto x_type) {
    with_type<V>(p.out_dtype, [&](auto out_type) {
      parallel_for(0, p.batch * p.tokens, kGrain / p.dim, [&](int64_t begin, int64_t end) {
        forward_rows<V, typename decltype(x_type)::type, typename decltype(out_type)::type>(p, begin, end);
      });
    });
  });
}

// ------------------------------------------------------------------------------------------------ backward
template <class S>
struct RowGradient {
  S mean, rstd;
  S mean_g, mean_gx;  // of ĝ = g·a, and of ĝ·x̂
};

// The row's two means; adds g to sum_g and g·x̂ to sum_gx where sums are wanted.
template <class V, bool kSums, class G, class X>
void reduce_row(const G* g, const X* x, const typename V::Scalar* a, int64_t dim, bool rms,
                RowGradient<typename V::Scalar>& r, typename V::Scalar* sum_g, typename V::Scalar* sum_gx) {
  using S = typename V::Scalar;
  const V mean = V::set(r.mean), rstd = V::set(r.rstd);
  V total_g[2] = {V::set(0), V::set(0)}, total_gx[2] = {V::set(0), V::set(0)};
  const auto step = [&](int k, int64_t i, auto n) __attribute__((always_inline)) {
    const V grad = load<V>(g + i, n), xhat = (load<V>(x + i, n) - mean) * rstd, ga = grad * load<V>(a + i, n);
    total_g[k] = total_g[k] + ga;
    total_gx[k] = fma(ga, xhat, total_gx[k]);
    if constexpr (kSums) {
      store(load<V>(sum_g + i, n) + grad, sum_g + i, n);
      store(fma(grad, xhat, load<V>(sum_gx + i, n)), sum_gx + i, n);
    }
  };
  constexpr int W = V::kWidth;
  int64_t i = 0;
  for (; i + 2 * W <= dim; i += 2 * W) {
    step(0, i, Whole{});
    step(1, i + W, Whole{});
  }
  for (; i + W <= dim; i += W) step(0, i, Whole{});
  if (i < dim) step(1, i, dim - i);  // the lanes beyond the row load g = 0 and add nothing
  r.mean_g = rms ? S(0) : (total_g[0] + total_g[1]).sum() / S(dim);
  r.mean_gx = (total_gx[0] + total_gx[1]).sum() / S(dim);
}

// grad_x = ρ·(ĝ − mean(ĝ) − x̂·mean(ĝ·x̂)) + grad_residual; where gated also kept unrounded in `kept`
template <class V, class G, class X>
void input_gradient_row(const G* g, const X* x, const typename V::Scalar* a, const X* grad_residual, int64_t dim,
                        const RowGradient<typename V::Scalar>& r, X* grad_x, typename V::Scalar* kept) {
  const V mean = V::set(r.mean), rstd = V::set(r.rstd);
  const V mean_g = V::set(r.mean_g), mean_gx = V::set(-r.mean_gx);
  const auto value = [&](int64_t i, auto n) __attribute__((always_inline)) {
    const V xhat = (load<V>(x + i, n) - mean) * rstd;
    const V ga = load<V>(g + i, n) * load<V>(a + i, n);
    return fma(xhat, mean_gx, ga - mean_g) * rstd;
  };
  if (kept == nullptr) {
    for_lanes<V>(dim, [&](int64_t i, auto n) { store(value(i, n), grad_x + i, n); });
  } else if (grad_residual == nullptr) {
    for_lanes<V>(dim, [&](int64_t i, auto n) {
      const V v = value(i, n);
      store(v, grad_x + i, n);
      store(v, kept + i, n);
    });
  } else {
    for_lanes<V>(dim, [&](int64_t i, auto n) {
      const V v = value(i, n) + load<V>(grad_residual + i, n);
      store(v, grad_x + i, n);
      store(v, kept + i, n);
    });
  }
}

template <class V, class B>
void branch_gradient_row(const typename V::Scalar* grad, const B* branch, const typename V::Scalar* gate, int64_t dim,
                         B* grad_branch, typename V::Scalar* sum_gate) {
  for_lanes<V>(dim, [&](int64_t i, auto n) {
    const V d = load<V>(grad + i, n);
    store(fma(d, load<V>(branch + i, n), load<V>(sum_gate + i, n)), sum_gate + i, n);
    store(d * load<V>(gate + i, n), grad_branch + i, n);
  });
}

struct Segments {  // rows of one frame, in runs of rows_per_segment
  int64_t per_frame, count;
  explicit Segments(const AdaLNBackwardParams& p)
      : per_frame((p.grad_tokens_per_frame + p.rows_per_segment - 1) / p.rows_per_segment),
        count(adaln_backward_segments(p)) {}
  int64_t begin(const AdaLNBackwardParams& p, int64_t segment) const {
    return segment / per_frame * p.grad_tokens_per_frame + segment % per_frame * p.rows_per_segment;
  }
  int64_t end(const AdaLNBackwardParams& p, int64_t segment) const {
    const int64_t frame_end = (segment / per_frame + 1) * p.grad_tokens_per_frame;
    const int64_t e = begin(p, segment) + p.rows_per_segment;
    return e < frame_end ? e : frame_end;
  }
};

enum { kSumG, kSumGX, kSumGate };  // the rows of a segment's partial sums

template <class V>
bool wants_sums(const AdaLNBackwardParams& p) {
  return p.grad_gate || p.grad_shift || p.grad_scale || p.grad_weight || p.grad_bias;
}

// All rows of one segment; its three rows of partial sums are left at `sums`.
template <class V, class G, class X>
void backward_segment(const AdaLNBackwardParams& p, int64_t begin, int64_t end, ModulationRows<V>& rows,
                      typename V::Scalar* kept, typename V::Scalar* sums) {
  using S = typename V::Scalar;
  for_lanes<V>(3 * p.dim, [&](int64_t i, auto n) { store(V::set(0), sums + i, n); });
  for (int64_t r = begin; r < end; r++) {
    rows.move_to(r / p.tokens, r % p.tokens);
    const int64_t at = r * p.dim;
    const G* g = static_cast<const G*>(p.grad_out) + at;
    const X* x = static_cast<const X*>(p.x) + at;
    RowGradient<S> row{p.rms ? S(0) : static_cast<const S*>(p.mean)[r], static_cast<const S*>(p.rstd)[r], 0, 0};
    if (wants_sums<V>(p))
      reduce_row<V, true>(g, x, rows.a, p.dim, p.rms, row, sums, sums + p.dim);
    else
      reduce_row<V, false>(g, x, rows.a, p.dim, p.rms, row, sums, sums + p.dim);
    const X* grad_residual = p.grad_residual_out ? static_cast<const X*>(p.grad_residual_out) + at : nullptr;
    input_gradient_row<V>(g, x, rows.a, grad_residual, p.dim, row, static_cast<X*>(p.grad_x) + at, kept);
    if (p.branch != nullptr)
      with_type<V>(p.branch_dtype, [&](auto type) {
        using B = typename decltype(type)::type;
        branch_gradient_row<V>(kept, static_cast<const B*>(p.branch) + at, rows.g, p.dim,
                               static_cast<B*>(p.grad_branch) + at, sums + kSumGate * p.dim);
      });
  }
}

template <class V>
void store_as(V v, void* base, DType dtype, int64_t i, int64_t n) {
  with_type<V>(dtype, [&](auto type) { store(v, static_cast<typename decltype(type)::type*>(base) + i, n); });
}

// Adds a frame's partial sums in order and stores the gradients of its modulation rows, for columns [begin, end).
template <class V>
void finish_frame(const AdaLNBackwardParams& p, int64_t frame, const typename V::Scalar* sums, int64_t segments,
                  int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const S *weight = static_cast<const S*>(p.weight), *bias = static_cast<const S*>(p.bias);
  for (int64_t i = begin; i < end; i += V::kWidth) {
    const int64_t n = end - i < V::kWidth ? end - i : V::kWidth, at = frame * p.dim + i;
    V total[3] = {V::set(0), V::set(0), V::set(0)};
    for (int64_t k = 0; k < segments; k++)
      for (int j = 0; j < 3; j++) total[j] = total[j] + V::load(sums + (3 * k + j) * p.dim + i, n);
    if (p.grad_shift) store_as<V>(total[kSumG], p.grad_shift, p.grad_shift_dtype, at, n);
    if (p.grad_gate) store_as<V>(total[kSumGate], p.grad_gate, p.grad_gate_dtype, at, n);
    if (p.grad_scale) {
      V d = total[kSumGX];
      if (weight != nullptr) d = d * V::load(weight + i, n);
      if (bias != nullptr) d = fma(V::load(bias + i, n), total[kSumG], d);
      store_as<V>(d, p.grad_scale, p.grad_scale_dtype, at, n);
    }
  }
}

// ∂weight = Σ (1 + scale)·Q and ∂bias = Σ (1 + scale)·P over all segments in order, for columns [begin, end).
template <class V>
void finish_affine(const AdaLNBackwardParams& p, const Segments& segments, const typename V::Scalar* sums,
                   int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const int64_t size = end - begin;
  const Scratch<S> scratch(3, size);
  S *w = scratch.row(0), *b = scratch.row(1), *one_plus_scale = scratch.row(2);
  for_lanes<V>(size, [&](int64_t i, auto n) {
    store(V::set(0), w + i, n);
    store(V::set(0), b + i, n);
  });
  for (int64_t s = 0; s < segments.count; s++) {
    const int64_t row = segments.begin(p, s);
    widen_row<V>(p.scale, modulation_offset(p.scale, row / p.tokens, row % p.tokens) + begin, 1, size, one_plus_scale);
    const S* g = sums + (3 * s + kSumG) * p.dim + begin;
    const S* gx = sums + (3 * s + kSumGX) * p.dim + begin;
    for_lanes<V>(size, [&](int64_t i, auto n) {
      const V scale = load<V>(one_plus_scale + i, n);
      store(fma(scale, load<V>(gx + i, n), load<V>(w + i, n)), w + i, n);
      store(fma(scale, load<V>(g + i, n), load<V>(b + i, n)), b + i, n);
    });
  }
  if (p.grad_weight) memcpy(static_cast<S*>(p.grad_weight) + begin, w, size * sizeof(S));
  if (p.grad_bias) memcpy(static_cast<S*>(p.grad_bias) + begin, b, size * sizeof(S));
}

template <class V, class G, class X>
void backward_typed(const AdaLNBackwardParams& p, const ParallelFor& parallel_for) {
  using S = typename V::Scalar;
  const Segments segments(p);
  const bool affine = p.grad_weight || p.grad_bias;
  // A frame of one segment needs no second pass: its sums stay in the cache and are stored at once.
  const bool through_workspace = wants_sums<V>(p) && (segments.per_frame > 1 || affine);
  S* workspace = static_cast<S*>(p.workspace);
  const int64_t grain = kGrain / (p.dim * (p.grad_tokens_per_frame < p.rows_per_segment ? p.grad_tokens_per_frame
                                                                                         : p.rows_per_segment));
  parallel_for(0, segments.count, grain, [&](int64_t first, int64_t last) {
    const Scratch<S> scratch(6, p.dim);
    const Modulation no_shift{nullptr, p.scale.dtype, 0, 0, 1};
    ModulationRows<V> rows{p.scale, no_shift, p.gate, static_cast<const S*>(p.weight), nullptr, p.dim,
                           scratch.row(0), nullptr, p.branch ? scratch.row(1) : nullptr};
    for (int64_t s = first; s < last; s++) {
      S* sums = through_workspace ? workspace + 3 * s * p.dim : scratch.row(3);
      backward_segment<V, G, X>(p, segments.begin(p, s), segments.end(p, s), rows,
                                p.branch ? scratch.row(2) : nullptr, sums);
      if (segments.per_frame == 1) finish_frame<V>(p, s, sums, 1, 0, p.dim);
    }
  });
  constexpr int64_t kColumns = 256;
  const int64_t blocks = (p.dim + kColumns - 1) / kColumns;
  const auto columns_end = [&](int64_t block) {
    return (block + 1) * kColumns < p.dim ? (block + 1) * kColumns : p.dim;
  };
  if (through_workspace && segments.per_frame > 1)
    parallel_for(0, segments.count / segments.per_frame * blocks, kGrain / (kColumns * segments.per_frame),
                 [&](int64_t first, int64_t last) {
                   for (int64_t k = first; k < last; k++) {
                     const int64_t frame = k / blocks, block = k % blocks;
                     finish_frame<V>(p, frame, workspace + 3 * frame * segments.per_frame * p.dim, segments.per_frame,
                                     block * kColumns, columns_end(block));
                   }
                 });
  if (affine)
    parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; block++)
        finish_affine<V>(p, segments, workspace, block * kColumns, columns_end(block));
    });
}

template <class V>
void backward(const AdaLNBackwardParams& p, const ParallelFor& parallel_for) {
  with_type<V>(p.out_dtype, [&](auto g_type) {
    with_type<V>(p.x_dtype, [&](auto x_type) {
      backward_typed<V, typename decltype(g_type)::type, typename decltype(x_type)::type>(p, parallel_for);
    });
  });
}

}  // namespace

void adaln_forward(const AdaLNForwardParams& p, const ParallelFor& parallel_for) { forward<Vec>(p, parallel_for); }
void adaln_backward(const AdaLNBackwardParams& p, const ParallelFor& parallel_for) { backward<Vec>(p, parallel_for); }

#if defined(FASTDIFF_ISA_BASELINE)  // the double kernel is wanted once
void adaln_forward_double(const AdaLNForwardParams& p, const ParallelFor& parallel_for) {
  forward<VecDouble>(p, parallel_for);
}
void adaln_backward_double(const AdaLNBackwardParams& p, const ParallelFor& parallel_for) {
  backward<VecDouble>(p, parallel_for);
}
#endif

}  // namespace fastdiff::cpu::FASTDIFF_ISA
