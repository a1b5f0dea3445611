// AdaLN's forward pass over rows. Part of adaln_cpu.inl: compiled once an instruction set.
namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

// kStream: `out` past the caches, for outputs that would not fit; the row is kept in `near` for what comes next.
template <class V, bool kStream, class X, class B>
void gate_row(const X* x, const B* branch, const typename V::Scalar* g, typename V::Scalar limit, int64_t dim, X* out,
              X* near) {
  const V low = V::set(-limit), high = V::set(limit);
  for_lanes<V>(dim, [&](int64_t i, auto n) {
    const V free = fma(load<V>(g + i, n), load<V>(branch + i, n), load<V>(x + i, n));
    const V sum = min(high, max(low, free));  // a NaN stays one
    put<kStream>(sum, out + i, n);
    if constexpr (kStream) store(sum, near + i, n);
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

template <class V, bool kStream, class X, class O>
void normalise_row(const X* x, const Statistics<typename V::Scalar>& s, const typename V::Scalar* a,
                   const typename V::Scalar* c, int64_t dim, O* out) {
  const V origin = V::set(s.origin), rstd = V::set(s.rstd), rest = V::set(-s.correction * s.rstd);
  for_lanes<V>(dim, [&](int64_t i, auto n) {
    const V xhat = fma(load<V>(x + i, n) - origin, rstd, rest);
    put<kStream>(fma(xhat, load<V>(a + i, n), load<V>(c + i, n)), out + i, n);
  });
}

template <class V, class X, class O>
bool streams(const AdaLNForwardParams& p) {
  const int64_t moved = p.dim * ((p.branch ? 3 : 1) * sizeof(X) + sizeof(O)) * p.batch * p.tokens;
  return moved >= stream_bytes() && streamable<V, O>(p.out, p.dim) &&
         (p.branch == nullptr || streamable<V, X>(p.residual_out, p.dim));
}

constexpr int64_t kBlock = 4;  // rows whose reductions overlap

// Rows [r, r + count) with count <= kBlock, all under the same modulation.
template <class V, class X, class O>
void forward_block(const AdaLNForwardParams& p, const ModulationRows<V>& rows, int64_t r, int64_t count, bool stream,
                   X* near) {
  using S = typename V::Scalar;
  const X* x = static_cast<const X*>(p.x) + r * p.dim;
  if (p.branch != nullptr) {
    X* sum = static_cast<X*>(p.residual_out) + r * p.dim;
    const S limit = p.saturate && p.x_dtype == DType::kFloat16 ? S(kFloat16Largest) : S(INFINITY);
    with_type<V>(p.branch_dtype, [&](auto type) {
      const auto* branch = static_cast<const typename decltype(type)::type*>(p.branch) + r * p.dim;
      for (int64_t k = 0; k < count * p.dim; k += p.dim)
        if (stream)
          gate_row<V, true>(x + k, branch + k, rows.g, limit, p.dim, sum + k, near + k);
        else
          gate_row<V, false>(x + k, branch + k, rows.g, limit, p.dim, sum + k, sum + k);
    });
    x = stream ? near : sum;
  }
  Statistics<S> statistics[kBlock];
  for (int64_t k = 0; k < count; k++) statistics[k] = row_statistics<V>(x + k * p.dim, p.dim, p.rms, p.eps);
  for (int64_t k = 0; k < count; k++) {
    const Statistics<S>& s = statistics[k];
    O* out = static_cast<O*>(p.out) + (r + k) * p.dim;
    if (stream)
      normalise_row<V, true>(x + k * p.dim, s, rows.a, rows.c, p.dim, out);
    else
      normalise_row<V, false>(x + k * p.dim, s, rows.a, rows.c, p.dim, out);
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
  const bool stream = streams<V, X, O>(p);
  const Scratch<X> near(stream && p.branch ? 1 : 0, kBlock * p.dim);
  for (int64_t r = begin; r < end;) {
    const int64_t run = rows.move_to(r), stop = r + run < end ? r + run : end;
    for (; r < stop; r += kBlock) forward_block<V, X, O>(p, rows, r, stop - r < kBlock ? stop - r : kBlock, stream, near.data);
    r = stop;
  }
  if (stream) V::stream_fence();
}

template <class V>
void forward(const AdaLNForwardParams& p, const ParallelFor& parallel_for) {
  with_type<V>(p.x_dtype, [&](auto x_type) {
    with_type<V>(p.out_dtype, [&](auto out_type) {
      parallel_for(0, p.batch * p.tokens, thread_grain() / p.dim, [&](int64_t begin, int64_t end) {
        forward_rows<V, typename decltype(x_type)::type, typename decltype(out_type)::type>(p, begin, end);
      });
    });
  });
}

}  // namespace
}  // namespace fastdiff::cpu::FASTDIFF_ISA
