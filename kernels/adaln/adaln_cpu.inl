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
    data = static_cast<S*>(aligned_alloc(64, (rows * stride * sizeof(S) + 63) / 64 * 64));
    if (data == nullptr && rows > 0) abort();  // a few rows: as far gone as a stack overflow
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

// The rows a = weight·(1 + scale), c = bias·(1 + scale) + shift and gate that hold for a token, made anew only where
// the token's modulation rows change: once a sample, a frame or a token.
template <class V>
struct ModulationRows {
  using S = typename V::Scalar;
  const Modulation &scale, &shift, &gate;
  const S *weight, *bias;
  int64_t tokens, dim;
  S *a, *c, *g;  // c and g may be absent
  int64_t scale_at = -1, shift_at = -1, gate_at = -1;

  // Makes the rows for row r of all; returns how many rows from there on share them.
  int64_t move_to(int64_t r) {
    const int64_t b = r / tokens, n = r % tokens;
    const int64_t s = modulation_offset(scale, b, n), t = modulation_offset(shift, b, n);
    const bool new_scale = s != scale_at, new_shift = c != nullptr && (t != shift_at || (new_scale && bias != nullptr));
    if (new_scale || (new_shift && bias != nullptr)) widen_row<V>(scale, s, 1, dim, a);
    if (new_shift) {
      widen_row<V>(shift, t, 0, dim, c);
      if (bias != nullptr)
        for_lanes<V>(dim, [&](int64_t i, auto k) {
          store(fma(load<V>(bias + i, k), load<V>(a + i, k), load<V>(c + i, k)), c + i, k);
        });
    }
    if (weight != nullptr && (new_scale || (new_shift && bias != nullptr)))
      for_lanes<V>(dim, [&](int64_t i, auto k) { store(load<V>(weight + i, k) * load<V>(a + i, k), a + i, k); });
    scale_at = s;
    shift_at = t;
    if (g != nullptr) {
      const int64_t u = modulation_offset(gate, b, n);
      if (u != gate_at) widen_row<V>(gate, u, 0, dim, g);
      gate_at = u;
    }
    int64_t run = tokens - n;
    const Modulation* const operands[] = {&scale, &shift, &gate};
    for (const Modulation* m : operands)
      if (m->frame_stride != 0) {
        const int64_t left = m->tokens_per_frame - n % m->tokens_per_frame;
        run = left < run ? left : run;
      }
    return run;
  }
};

// ------------------------------------------------------------------------------------------------ forward
template <class V, class X, class B>
void gate_row(const X* x, const B* branch, const typename V::Scalar* g, int64_t dim, X* out) {
  for_lanes<V>(dim, [&](int64_t i, auto n) {
    store(fma(load<V>(g + i, n), load<V>(branch + i, n), load<V>(x + i, n)), out + i, n);
  });
}

// The mean as `origin + correction`, so that x̂ = (x − origin)·ρ − correction·ρ keeps its digits far from zero.
template <class S>
struct Statistics {
  S origin, correction, rstd;
};

template <class S>
struct Moments {
  S first, second;  // Σ (x − origin), Σ (x − origin)²
};

// Running sums enough to hide the latency of the additions.
template <class V, class X>
FD_INLINE Moments<typename V::Scalar> row_moments(const X* x, typename V::Scalar origin, int64_t dim) {
  constexpr int W = V::kWidth;
  const V o = V::set(origin);
  V first[4] = {V::set(0), V::set(0), V::set(0), V::set(0)}, second[4] = {first[0], first[0], first[0], first[0]};
  int64_t i = 0;
  for (; i + 4 * W <= dim; i += 4 * W)
    for (int k = 0; k < 4; k++) {
      const V d = V::load(x + i + k * W) - o;
      first[k] = first[k] + d;
      second[k] = fma(d, d, second[k]);
    }
  for (int k = 0; i < dim; i += W, k++) {
    const int64_t n = dim - i < W ? dim - i : W;
    const V d = (V::load(x + i, n) - o).first(n);
    first[k] = first[k] + d;
    second[k] = fma(d, d, second[k]);
  }
  return {((first[0] + first[1]) + (first[2] + first[3])).sum(), ((second[0] + second[1]) + (second[2] + second[3])).sum()};
}

// One pass around the row's first element. Where that lies so far from the mean (more than two standard deviations)
// that the difference of squares would lose digits, a second pass around the mean.
template <class V, class X>
FD_INLINE Statistics<typename V::Scalar> row_statistics(const X* x, int64_t dim, bool rms, double eps) {
  using S = typename V::Scalar;
  const S size = S(dim);
  if (rms) return {0, 0, S(1) / S(sqrt(row_moments<V>(x, 0, dim).second / size + S(eps)))};
  S origin = S(to_float(x[0]));
  Moments<S> m = row_moments<V>(x, origin, dim);
  S correction = m.first / size, variance = m.second / size - correction * correction;
  if (!(correction * correction <= 4 * variance)) {
    origin += correction;
    m = row_moments<V>(x, origin, dim);
    correction = m.first / size;
    variance = m.second / size - correction * correction;
  }
  return {origin, correction, S(1) / S(sqrt((variance < 0 ? 0 : variance) + S(eps)))};
}

template <class V, class X, class O>
void normalise_row(const X* x, const Statistics<typename V::Scalar>& s, const typename V::Scalar* a,
                   const typename V::Scalar* c, int64_t dim, O* out) {
  const V origin = V::set(s.origin), rstd = V::set(s.rstd), rest = V::set(-s.correction * s.rstd);
  for_lanes<V>(dim, [&](int64_t i, auto n) {
    const V xhat = fma(load<V>(x + i, n) - origin, rstd, rest);
    store(fma(xhat, load<V>(a + i, n), load<V>(c + i, n)), out + i, n);
  });
}

constexpr int64_t kBlock = 4;  // rows whose reductions overlap

// Rows [r, r + count) with count <= kBlock, all under the same modulation.
template <class V, class X, class O>
void forward_block(const AdaLNForwardParams& p, const ModulationRows<V>& rows, int64_t r, int64_t count) {
  using S = typename V::Scalar;
  const X* x = static_cast<const X*>(p.x) + r * p.dim;
  if (p.branch != nullptr) {
    X* sum = static_cast<X*>(p.residual_out) + r * p.dim;
    with_type<V>(p.branch_dtype, [&](auto type) {
      const auto* branch = static_cast<const typename decltype(type)::type*>(p.branch) + r * p.dim;
      for (int64_t k = 0; k < count; k++) gate_row<V>(x + k * p.dim, branch + k * p.dim, rows.g, p.dim, sum + k * p.dim);
    });
    x = sum;
  }
  Statistics<S> statistics[kBlock];
  for (int64_t k = 0; k < count; k++) statistics[k] = row_statistics<V>(x + k * p.dim, p.dim, p.rms, p.eps);
  for (int64_t k = 0; k < count; k++) {
    const Statistics<S>& s = statistics[k];
    normalise_row<V>(x + k * p.dim, s, rows.a, rows.c, p.dim, static_cast<O*>(p.out) + (r + k) * p.dim);
    if (p.mean != nullptr && !p.rms) static_cast<S*>(p.mean)[r + k] = s.origin + s.correction;
    if (p.rstd != nullptr) static_cast<S*>(p.rstd)[r + k] = s.rstd;
  }
}

template <class V, class X, class O>
void forward_rows(const AdaLNForwardParams& p, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const Scratch<S> scratch(3, p.dim);
  const S *weight = static_cast<const S*>(p.weight), *bias = static_cast<const S*>(p.bias);
  ModulationRows<V> rows{p.scale, p.shift, p.gate, weight, bias, p.tokens, p.dim,
                         scratch.row(0), scratch.row(1), p.branch ? scratch.row(2) : nullptr};
  for (int64_t r = begin; r < end;) {
    const int64_t run = rows.move_to(r), stop = r + run < end ? r + run : end;
    for (; r < stop; r += kBlock) forward_block<V, X, O>(p, rows, r, stop - r < kBlock ? stop - r : kBlock);
    r = stop;
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

// For kRows rows at once: their means, and, where sums are wanted, sum_g += Σ g and sum_gx += Σ g·x̂ over the rows.
// Taken together the rows share the loads of a and the loads and stores of the sums.
template <class V, int kRows, bool kSums, class G, class X>
void reduce_rows(const G* g, const X* x, const typename V::Scalar* a, int64_t dim, bool rms,
                 RowGradient<typename V::Scalar>* rows, typename V::Scalar* sum_g, typename V::Scalar* sum_gx) {
  using S = typename V::Scalar;
  V mean[kRows], rstd[kRows], total_g[kRows], total_gx[kRows];
  for (int k = 0; k < kRows; k++) {
    mean[k] = V::set(rows[k].mean);
    rstd[k] = V::set(rows[k].rstd);
    total_g[k] = total_gx[k] = V::set(0);
  }
  for_lanes<V>(dim, [&](int64_t i, auto n) __attribute__((always_inline)) {
    const V scale = load<V>(a + i, n);
    V add_g = V::set(0), add_gx = V::set(0);
#pragma GCC unroll 4
    for (int k = 0; k < kRows; k++) {  // lanes beyond the row load g = 0 and add nothing
      const V grad = load<V>(g + k * dim + i, n), xhat = (load<V>(x + k * dim + i, n) - mean[k]) * rstd[k];
      const V ga = grad * scale;
      total_g[k] = total_g[k] + ga;
      total_gx[k] = fma(ga, xhat, total_gx[k]);
      if constexpr (kSums) {
        add_g = add_g + grad;
        add_gx = fma(grad, xhat, add_gx);
      }
    }
    if constexpr (kSums) {
      store(load<V>(sum_g + i, n) + add_g, sum_g + i, n);
      store(load<V>(sum_gx + i, n) + add_gx, sum_gx + i, n);
    }
  });
  for (int k = 0; k < kRows; k++) {
    rows[k].mean_g = rms ? S(0) : total_g[k].sum() / S(dim);
    rows[k].mean_gx = total_gx[k].sum() / S(dim);
  }
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

// grad_branch = gate·grad and sum_gate += Σ grad·branch for kRows rows
template <class V, int kRows, class B>
void branch_gradient_rows(const typename V::Scalar* grad, int64_t stride, const B* branch, const typename V::Scalar* gate,
                          int64_t dim, B* grad_branch, typename V::Scalar* sum_gate) {
  for_lanes<V>(dim, [&](int64_t i, auto n) __attribute__((always_inline)) {
    const V factor = load<V>(gate + i, n);
    V add = V::set(0);
#pragma GCC unroll 4
    for (int k = 0; k < kRows; k++) {
      const V d = load<V>(grad + k * stride + i, n);
      add = fma(d, load<V>(branch + k * dim + i, n), add);
      store(d * factor, grad_branch + k * dim + i, n);
    }
    store(load<V>(sum_gate + i, n) + add, sum_gate + i, n);
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

inline bool wants_sums(const AdaLNBackwardParams& p) {
  return p.grad_gate || p.grad_shift || p.grad_scale || p.grad_weight || p.grad_bias;
}

// kRows rows of one segment from row r on.
template <class V, int kRows, class G, class X>
void backward_block(const AdaLNBackwardParams& p, const ModulationRows<V>& rows, int64_t r, const Scratch<typename V::Scalar>& kept,
                    typename V::Scalar* sums) {
  using S = typename V::Scalar;
  const int64_t at = r * p.dim;
  const G* g = static_cast<const G*>(p.grad_out) + at;
  const X* x = static_cast<const X*>(p.x) + at;
  RowGradient<S> row[kRows];
  for (int k = 0; k < kRows; k++)
    row[k] = {p.rms ? S(0) : static_cast<const S*>(p.mean)[r + k], static_cast<const S*>(p.rstd)[r + k], 0, 0};
  if (wants_sums(p))
    reduce_rows<V, kRows, true>(g, x, rows.a, p.dim, p.rms, row, sums, sums + p.dim);
  else
    reduce_rows<V, kRows, false>(g, x, rows.a, p.dim, p.rms, row, sums, sums + p.dim);
  for (int64_t k = 0; k < kRows; k++) {
    const int64_t to = k * p.dim;
    const X* grad_residual = p.grad_residual_out ? static_cast<const X*>(p.grad_residual_out) + at + to : nullptr;
    input_gradient_row<V>(g + to, x + to, rows.a, grad_residual, p.dim, row[k], static_cast<X*>(p.grad_x) + at + to,
                          p.branch ? kept.row(k) : nullptr);
  }
  if (p.branch != nullptr)
    with_type<V>(p.branch_dtype, [&](auto type) {
      using B = typename decltype(type)::type;
      branch_gradient_rows<V, kRows>(kept.row(0), kept.stride, static_cast<const B*>(p.branch) + at, rows.g, p.dim,
                                     static_cast<B*>(p.grad_branch) + at, sums + kSumGate * p.dim);
    });
}

// All rows of one segment, which share their modulation; its three rows of partial sums are left at `sums`.
template <class V, class G, class X>
void backward_segment(const AdaLNBackwardParams& p, int64_t begin, int64_t end, ModulationRows<V>& rows,
                      const Scratch<typename V::Scalar>& kept, typename V::Scalar* sums) {
  for_lanes<V>(3 * p.dim, [&](int64_t i, auto n) { store(V::set(0), sums + i, n); });
  rows.move_to(begin);
  int64_t r = begin;
  for (; r + kBlock <= end; r += kBlock) backward_block<V, kBlock, G, X>(p, rows, r, kept, sums);
  for (; r < end; r++) backward_block<V, 1, G, X>(p, rows, r, kept, sums);
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
  const bool through_workspace = wants_sums(p) && (segments.per_frame > 1 || affine);
  S* workspace = static_cast<S*>(p.workspace);
  const int64_t grain = kGrain / (p.dim * (p.grad_tokens_per_frame < p.rows_per_segment ? p.grad_tokens_per_frame
                                                                                         : p.rows_per_segment));
  parallel_for(0, segments.count, grain, [&](int64_t first, int64_t last) {
    const Scratch<S> scratch(2, p.dim), local_sums(1, 3 * p.dim), kept(p.branch ? kBlock : 0, p.dim);
    const Modulation no_shift{nullptr, p.scale.dtype, 0, 0, 1};
    ModulationRows<V> rows{p.scale, no_shift, p.gate, static_cast<const S*>(p.weight), nullptr, p.tokens, p.dim,
                           scratch.row(0), nullptr, p.branch ? scratch.row(1) : nullptr};
    for (int64_t s = first; s < last; s++) {
      S* sums = through_workspace ? workspace + 3 * s * p.dim : local_sums.row(0);
      backward_segment<V, G, X>(p, segments.begin(p, s), segments.end(p, s), rows, kept, sums);
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
