// AdaLN's forward pass over rows. Part of adaln_cpu.inl: compiled once an instruction set.
namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

// The mean as `origin + correction`, so that x̂ = (x − origin)·ρ − correction·ρ keeps its digits far from zero.
template <class S>
struct Statistics {
  S origin, correction, rstd;
};

template <class S>
struct Moments {
  S origin, first, second;  // Σ (x − origin), Σ (x − origin)²
};

// Of a row that `two(i, &a, &b)` gives 2·kWidth elements of (in any order), and `some(i, n)` n elements from i on.
// Running sums enough to hide the latency of the additions.
template <class V, class Two, class Some>
FD_INLINE Moments<typename V::Scalar> sum_moments(typename V::Scalar origin, int64_t dim, const Two& two,
                                                  const Some& some) {
  constexpr int W = V::kWidth;
  const V o = V::set(origin);
  V first[4] = {V::set(0), V::set(0), V::set(0), V::set(0)}, second[4] = {first[0], first[0], first[0], first[0]};
  int64_t i = 0;
  for (; i + 4 * W <= dim; i += 4 * W) {
    V x[4];
    two(i, x, x + 1);
    two(i + 2 * W, x + 2, x + 3);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      const V d = x[k] - o;
      first[k] = first[k] + d;
      second[k] = fma(d, d, second[k]);
    }
  }
  for (int k = 0; i < dim; i += W, k++) {
    const int64_t n = dim - i < W ? dim - i : W;
    const V d = (some(i, n) - o).first(n);
    first[k] = first[k] + d;
    second[k] = fma(d, d, second[k]);
  }
  return {origin, ((first[0] + first[1]) + (first[2] + first[3])).sum(),
          ((second[0] + second[1]) + (second[2] + second[3])).sum()};
}

template <class V, class X>
Moments<typename V::Scalar> row_moments(const X* x, typename V::Scalar origin, int64_t dim) {
  return sum_moments<V>(
      origin, dim, [&](int64_t i, V* a, V* b) __attribute__((always_inline)) { load_two(x + i, a, b); },
      [&](int64_t i, int64_t n) { return V::load(x + i, n); });
}

// r = residual + gate·branch, stored, and in the same pass the moments of what was stored: those that row_moments finds.
// kStream: `out` past the caches, for outputs that would not fit; the row is kept in `near` for what comes next. `limit` is
// used where X is float16.
template <class V, bool kStream, class X, class B>
Moments<typename V::Scalar> gate_row(const X* x, const B* branch, const typename V::Scalar* g, typename V::Scalar limit,
                                     bool rms, int64_t dim, X* out, X* near) {
  const auto gated = [&](int64_t i, auto n) __attribute__((always_inline)) {
    const V free = fma(load<V>(g + i, n), load<V>(branch + i, n), load<V>(x + i, n));
    if constexpr (__is_same(X, F16))
      return min(V::set(limit), max(V::set(-limit), free));  // a NaN stays one
    else
      return free;
  };
  X head;  // `out` may be x: nothing is stored there yet
  store(gated(0, int64_t(1)), &head, int64_t(1));
  X* const kept = kStream ? near : out;
  return sum_moments<V>(
      rms ? 0 : to_float(head), dim,
      [&](int64_t i, V* a, V* b) __attribute__((always_inline)) {
        const V r = gated(i, Whole{}), s = gated(i + V::kWidth, Whole{});
        put_two<false>(r, s, kept + i);
        if constexpr (kStream) put_two<true>(r, s, out + i);
        load_two(kept + i, a, b);
      },
      [&](int64_t i, int64_t n) {
        const V r = gated(i, n);
        store(r, kept + i, n);
        if constexpr (kStream) r.stream(out + i);  // rows of whole cache lines: n = kWidth
        return V::load(kept + i, n);
      });
}

// The moments are those around the row's first element. Where that lies so far from the mean (more than two standard
// deviations) that the difference of squares would lose digits, a second pass around the mean.
template <class V, class X>
FD_INLINE Statistics<typename V::Scalar> row_statistics(const X* x, Moments<typename V::Scalar> m, int64_t dim, bool rms,
                                                        double eps) {
  using S = typename V::Scalar;
  const S size = S(dim);
  if (rms) return {0, 0, S(1) / S(sqrt(m.second / size + S(eps)))};
  S correction = m.first / size, variance = m.second / size - correction * correction;
  if (!(correction * correction <= 4 * variance)) {
    m = row_moments<V>(x, m.origin + correction, dim);
    correction = m.first / size;
    variance = m.second / size - correction * correction;
  }
  return {m.origin, correction, S(1) / S(sqrt((variance < 0 ? 0 : variance) + S(eps)))};
}

// kRows rows at once share the loads of a and c, which are as many bytes as a row's own and more.
template <class V, bool kStream, int kRows, class X, class O>
void normalise_rows(const X* x, const Statistics<typename V::Scalar>* s, const typename V::Scalar* a,
                    const typename V::Scalar* c, int64_t dim, O* out) {
  constexpr int W = V::kWidth;
  V origin[kRows], rstd[kRows], rest[kRows];
  for (int k = 0; k < kRows; k++) {
    origin[k] = V::set(s[k].origin);
    rstd[k] = V::set(s[k].rstd);
    rest[k] = V::set(-s[k].correction * s[k].rstd);
  }
  const auto value = [&](int k, int64_t i, auto n, V scale, V shift) __attribute__((always_inline)) {
    return fma(fma(load<V>(x + k * dim + i, n) - origin[k], rstd[k], rest[k]), scale, shift);
  };
  int64_t i = 0;
  for (; i + 2 * W <= dim; i += 2 * W) {
    const V a0 = V::load(a + i), a1 = V::load(a + i + W), c0 = V::load(c + i), c1 = V::load(c + i + W);
#pragma GCC unroll 4
    for (int k = 0; k < kRows; k++)
      put_two<kStream>(value(k, i, Whole{}, a0, c0), value(k, i + W, Whole{}, a1, c1), out + k * dim + i);
  }
  for_lanes<V>(dim - i, [&](int64_t j, auto n) __attribute__((always_inline)) {
    const V scale = load<V>(a + i + j, n), shift = load<V>(c + i + j, n);
    for (int k = 0; k < kRows; k++) put<kStream>(value(k, i + j, n, scale, shift), out + k * dim + i + j, n);
  });
}

template <class V, class X, class O>
bool streams(const AdaLNForwardParams& p) {
  const int64_t moved = p.dim * ((p.branch ? 3 : 1) * sizeof(X) + sizeof(O)) * p.batch * p.tokens;
  return moved >= stream_bytes() && streamable<O>(p.out, p.dim) &&
         (p.branch == nullptr || streamable<X>(p.residual_out, p.dim));
}

constexpr int64_t kBlock = 4;  // rows whose reductions overlap

// Rows [r, r + count) with count <= kBlock, all under the same modulation. `near`: kBlock rows, where gated and streamed.
template <class V, bool kStream, class X, class O>
void forward_block(const AdaLNForwardParams& p, const ModulationRows<V>& rows, int64_t r, int64_t count, X* near) {
  using S = typename V::Scalar;
  const int64_t dim = p.dim;
  const X* x = static_cast<const X*>(p.x) + r * dim;
  Moments<S> moments[kBlock];
  if (p.branch != nullptr) {
    X* sum = static_cast<X*>(p.residual_out) + r * dim;
    const S limit = p.saturate ? S(kFloat16Largest) : S(INFINITY);
    with_type<V>(p.branch_dtype, [&](auto type) {
      const auto* branch = static_cast<const typename decltype(type)::type*>(p.branch) + r * dim;
      for (int64_t k = 0; k < count; k++) {
        const int64_t at = k * dim;
        moments[k] = gate_row<V, kStream>(x + at, branch + at, rows.g, limit, p.rms, dim, sum + at, near + at);
      }
    });
    x = kStream ? near : sum;
  } else {
    for (int64_t k = 0; k < count; k++) {
      const S origin = p.rms ? S(0) : S(to_float(x[k * dim]));
      moments[k] = row_moments<V>(x + k * dim, origin, dim);
    }
  }
  Statistics<S> statistics[kBlock];
  for (int64_t k = 0; k < count; k++) {
    const Statistics<S> s = statistics[k] = row_statistics<V>(x + k * dim, moments[k], dim, p.rms, p.eps);
    if (p.mean != nullptr && !p.rms) static_cast<S*>(p.mean)[r + k] = s.origin + s.correction;
    if (p.rstd != nullptr) static_cast<S*>(p.rstd)[r + k] = s.rstd;
  }
  O* out = static_cast<O*>(p.out) + r * dim;
  if (count == kBlock)
    normalise_rows<V, kStream, kBlock>(x, statistics, rows.a, rows.c, dim, out);
  else
    for (int64_t k = 0; k < count; k++)
      normalise_rows<V, kStream, 1>(x + k * dim, statistics + k, rows.a, rows.c, dim, out + k * dim);
}

template <class V, bool kStream, class X, class O>
void forward_rows(const AdaLNForwardParams& p, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const Scratch<S> scratch(3, p.dim);
  const S *weight = static_cast<const S*>(p.weight), *bias = static_cast<const S*>(p.bias);
  ModulationRows<V> rows{p.scale, p.shift, p.gate, weight, bias, p.tokens, p.dim,
                         scratch.row(0), scratch.row(1), p.branch ? scratch.row(2) : nullptr};
  const Scratch<X> near(kStream && p.branch ? 1 : 0, kBlock * p.dim);
  for (int64_t r = begin; r < end;) {
    const int64_t run = rows.move_to(r), stop = r + run < end ? r + run : end;
    for (; r < stop; r += kBlock)
      forward_block<V, kStream, X, O>(p, rows, r, stop - r < kBlock ? stop - r : kBlock, near.data);
    r = stop;
  }
  if (kStream) V::stream_fence();
}

template <class V>
void forward(const AdaLNForwardParams& p, const ParallelFor& parallel_for) {
  with_type<V>(p.x_dtype, [&](auto x_type) {
    with_type<V>(p.out_dtype, [&](auto out_type) {
      using X = typename decltype(x_type)::type;
      using O = typename decltype(out_type)::type;
      const bool stream = streams<V, X, O>(p);
      parallel_for(0, p.batch * p.tokens, thread_grain() / p.dim, [&](int64_t begin, int64_t end) {
        if (stream)
          forward_rows<V, true, X, O>(p, begin, end);
        else
          forward_rows<V, false, X, O>(p, begin, end);
      });
    });
  });
}

}  // namespace
}  // namespace fastdiff::cpu::FASTDIFF_ISA
