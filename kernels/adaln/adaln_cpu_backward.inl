// AdaLN's backward pass over segments of rows. Part of adaln_cpu.inl: compiled once an instruction set.
namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

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
template <class V, bool kStream, class G, class X>
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
    for_lanes<V>(dim, [&](int64_t i, auto n) { put<kStream>(value(i, n), grad_x + i, n); });
  } else if (grad_residual == nullptr) {
    for_lanes<V>(dim, [&](int64_t i, auto n) {
      const V v = value(i, n);
      put<kStream>(v, grad_x + i, n);
      store(v, kept + i, n);
    });
  } else {
    for_lanes<V>(dim, [&](int64_t i, auto n) {
      const V v = value(i, n) + load<V>(grad_residual + i, n);
      put<kStream>(v, grad_x + i, n);
      store(v, kept + i, n);
    });
  }
}

// Where residual + gate·branch was clipped, its gradient is 0. Scalar: few streams are in float16, fewer saturate.
template <class S, class X, class B>
void clip_gradient_row(const X* residual, const B* branch, const S* gate, int64_t dim, X* grad_x, S* kept) {
  for (int64_t i = 0; i < dim; i++) {
    const S sum = S(to_float(residual[i])) + gate[i] * S(to_float(branch[i]));
    if (sum > -S(kFloat16Overflow) && sum < S(kFloat16Overflow)) continue;
    kept[i] = 0;
    from_float(0.0f, grad_x + i);
  }
}

// grad_branch = gate·grad and sum_gate += Σ grad·branch for kRows rows
template <class V, int kRows, bool kStream, class B>
void branch_gradient_rows(const typename V::Scalar* grad, int64_t stride, const B* branch, const typename V::Scalar* gate,
                          int64_t dim, B* grad_branch, typename V::Scalar* sum_gate) {
  for_lanes<V>(dim, [&](int64_t i, auto n) __attribute__((always_inline)) {
    const V factor = load<V>(gate + i, n);
    V add = V::set(0);
#pragma GCC unroll 4
    for (int k = 0; k < kRows; k++) {
      const V d = load<V>(grad + k * stride + i, n);
      add = fma(d, load<V>(branch + k * dim + i, n), add);
      put<kStream>(d * factor, grad_branch + k * dim + i, n);
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
template <class V, int kRows, bool kStream, class G, class X>
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
    input_gradient_row<V, kStream>(g + to, x + to, rows.a, grad_residual, p.dim, row[k], static_cast<X*>(p.grad_x) + at + to,
                          p.branch ? kept.row(k) : nullptr);
  }
  if (p.branch != nullptr)
    with_type<V>(p.branch_dtype, [&](auto type) {
      using B = typename decltype(type)::type;
      const B* branch = static_cast<const B*>(p.branch) + at;
      if constexpr (sizeof(X) == sizeof(F16))
        for (int64_t k = 0; k < (p.residual_in ? kRows : 0); k++)
          clip_gradient_row(static_cast<const X*>(p.residual_in) + at + k * p.dim, branch + k * p.dim, rows.g, p.dim,
                            static_cast<X*>(p.grad_x) + at + k * p.dim, kept.row(k));
      branch_gradient_rows<V, kRows, kStream>(kept.row(0), kept.stride, branch, rows.g, p.dim,
                                     static_cast<B*>(p.grad_branch) + at, sums + kSumGate * p.dim);
    });
}

// All rows of one segment, which share their modulation; its three rows of partial sums are left at `sums`.
template <class V, bool kStream, class G, class X>
void backward_segment(const AdaLNBackwardParams& p, int64_t begin, int64_t end, ModulationRows<V>& rows,
                      const Scratch<typename V::Scalar>& kept, typename V::Scalar* sums) {
  for_lanes<V>(3 * p.dim, [&](int64_t i, auto n) { store(V::set(0), sums + i, n); });
  rows.move_to(begin);
  int64_t r = begin;
  for (; r + kBlock <= end; r += kBlock) backward_block<V, kBlock, kStream, G, X>(p, rows, r, kept, sums);
  for (; r < end; r++) backward_block<V, 1, kStream, G, X>(p, rows, r, kept, sums);
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
bool streams(const AdaLNBackwardParams& p) {
  const int64_t streams_of_x = p.branch ? 3 : 2, gated = p.branch ? 2 * dtype_size(p.branch_dtype) : 0;
  const int64_t moved = p.dim * p.batch * p.tokens * (sizeof(G) + streams_of_x * sizeof(X) + gated);
  // a vector of floats has the widest alignment that the branch's type may ask for
  return moved >= stream_bytes() && streamable<X>(p.grad_x, p.dim) &&
         (p.branch == nullptr || streamable<float>(p.grad_branch, p.dim));
}

template <class V, class G, class X>
void backward_typed(const AdaLNBackwardParams& p, const ParallelFor& parallel_for) {
  using S = typename V::Scalar;
  const Segments segments(p);
  const bool affine = p.grad_weight || p.grad_bias;
  // A frame of one segment needs no second pass: its sums stay in the cache and are stored at once.
  const bool through_workspace = wants_sums(p) && (segments.per_frame > 1 || affine);
  S* workspace = static_cast<S*>(p.workspace);
  const bool stream = streams<V, G, X>(p);
  const int64_t least_rows =
      p.grad_tokens_per_frame < p.rows_per_segment ? p.grad_tokens_per_frame : p.rows_per_segment;
  const int64_t grain = thread_grain() / (p.dim * least_rows);
  parallel_for(0, segments.count, grain, [&](int64_t first, int64_t last) {
    const Scratch<S> scratch(2, p.dim), local_sums(1, 3 * p.dim), kept(p.branch ? kBlock : 0, p.dim);
    const Modulation no_shift{nullptr, p.scale.dtype, 0, 0, 1};
    ModulationRows<V> rows{p.scale, no_shift, p.gate, static_cast<const S*>(p.weight), nullptr, p.tokens, p.dim,
                           scratch.row(0), nullptr, p.branch ? scratch.row(1) : nullptr};
    for (int64_t s = first; s < last; s++) {
      S* sums = through_workspace ? workspace + 3 * s * p.dim : local_sums.row(0);
      if (stream)
        backward_segment<V, true, G, X>(p, segments.begin(p, s), segments.end(p, s), rows, kept, sums);
      else
        backward_segment<V, false, G, X>(p, segments.begin(p, s), segments.end(p, s), rows, kept, sums);
      if (segments.per_frame == 1) finish_frame<V>(p, s, sums, 1, 0, p.dim);
    }
    if (stream) V::stream_fence();
  });
  constexpr int64_t kColumns = 256;
  const int64_t blocks = (p.dim + kColumns - 1) / kColumns;
  const auto columns_end = [&](int64_t block) {
    return (block + 1) * kColumns < p.dim ? (block + 1) * kColumns : p.dim;
  };
  if (through_workspace && segments.per_frame > 1)
    parallel_for(0, segments.count / segments.per_frame * blocks, thread_grain() / (kColumns * segments.per_frame),
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
}  // namespace fastdiff::cpu::FASTDIFF_ISA
