// gate(v) and its derivative of each activation, on vectors. Part of bias_activation_cpu.inl.
namespace fastdiff::cpu::FASTDIFF_ISA {

// For normal_tail, which finds them beside Vec.
FD_INLINE Vec line(Vec t, float slope, float constant) { return fma(Vec::set(slope), t, Vec::set(constant)); }
FD_INLINE Vec horner(Vec sum, Vec t, float constant) { return fma(sum, t, Vec::set(constant)); }

namespace {

FD_INLINE Vec abs(Vec v) {
#if defined(__AVX512F__)
  return {_mm512_abs_ps(v.v)};
#else
  return max(Vec::set(0) - v, v);  // NaN stays
#endif
}

// a where v < 0, else b
FD_INLINE Vec where_negative(Vec v, Vec a, Vec b) {
#if defined(__AVX512F__)
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(v.v, _mm512_setzero_ps(), _CMP_LT_OQ), b.v, a.v)};
#elif defined(__AVX2__)
  return {_mm256_blendv_ps(b.v, a.v, v.v)};
#else
  return {v.v < Vec::set(0).v ? a.v : b.v};
#endif
}

// 1 / d for 1 <= d, within a unit in the last place
FD_INLINE Vec reciprocal(Vec d) {
#if defined(__AVX512F__)
  const __m512 r = _mm512_rcp14_ps(d.v);  // a division takes five times as long
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(d.v, r, _mm512_set1_ps(1.0f)), r, r)};
#elif defined(__AVX2__)
  return {_mm256_div_ps(_mm256_set1_ps(1.0f), d.v)};
#else
  return {Vec::set(1).v / d.v};
#endif
}

template <class V>
struct Gate {
  V value, slope;
};

// 1 / (1 + exp(-z)), from exp(-|z|): nothing cancels, and nothing overflows
FD_INLINE Gate<Vec> logistic(Vec z) {
  const Vec e = exp(Vec::set(0) - abs(z));
  const Vec above = reciprocal(Vec::set(1) + e), below = e * above;
  return {where_negative(z, below, above), below * above};
}
FD_INLINE Gate<VecDouble> logistic(VecDouble z) {
  const double e = ::exp(-fabs(z.v)), above = 1 / (1 + e), below = e * above;
  return {{z.v < 0 ? below : above}, {below * above}};
}

FD_INLINE Gate<VecDouble> normal(VecDouble v) {
  return {{0.5 * erfc(v.v * -0.70710678118654752)}, {0.39894228040143268 * ::exp(-0.5 * v.v * v.v)}};
}
#if !defined(__AVX512F__)
FD_INLINE Gate<Vec> normal(Vec v) {
  const Vec a = min(Vec::set(kNormalFarthest), abs(v));
  const Vec half = a * Vec::set(-0.5f), exponent = half * a;
  Vec e = exp_above_floor(exponent);
  e = fma(e, fma(half, a, Vec::set(0) - exponent), e);  // what the product's rounding lost, where fma rounds once
  const Vec t = reciprocal(fma(a, Vec::set(kNormalSlope), Vec::set(1)));
  const Vec tail = e * (normal_tail(t) * t);
  return {where_negative(v, tail, Vec::set(1) - tail), e * Vec::set(kNormalDensityAtZero)};
}
#endif

template <class V>
FD_INLINE Gate<V> normal_tanh(V v) {
  // 0.5 (1 + tanh u) is the logistic function of 2u; beyond kFar it is 0 or 1, and its derivative 0 times a number
  constexpr double kTwice = 1.5957691216057308, kCubic = kTwice * 0.044715, kFar = 64;  // kTwice = 2 √(2/π)
  const V c = min(V::set(kFar), max(V::set(-kFar), v)), square = c * c;
  const Gate<V> g = logistic(c * fma(square, V::set(kCubic), V::set(kTwice)));
  return {g.value, g.slope * fma(square, V::set(3 * kCubic), V::set(kTwice))};
}

// What an operator takes of act(v) = v · gate(v): the gate, and act'(v) = gate(v) + v · gate'(v).
template <class V>
struct Taken {
  V gate, derivative;
};

// kShort: for values that are rounded to bfloat16
template <Activation kActivation, bool kShort, class V>
struct Act {
  static FD_INLINE Gate<V> whole(V v) {
    if constexpr (kActivation == Activation::kGelu) return normal(v);
    if constexpr (kActivation == Activation::kGeluTanh) return normal_tanh(v);
    if constexpr (kActivation == Activation::kSilu) return logistic(v);
  }
  static FD_INLINE V gate(V v) { return whole(v).value; }
  static FD_INLINE V derivative(V v) { return take(v).derivative; }
  static FD_INLINE Taken<V> take(V v) {
    const Gate<V> g = whole(v);
    return {g.value, fma(v, g.slope, g.value)};
  }
};

#if defined(__AVX512F__)
// Both GELUs from gelu_table.h: a register or two hold a coefficient of all pieces, and one instruction picks from them.
template <bool kShort>
FD_INLINE Vec piecewise(const float (&table)[6][32], __m512i k, Vec u, Vec v) {
  const auto coefficient = [&](int i) __attribute__((always_inline)) {
    return Vec{_mm512_permutex2var_ps(_mm512_load_ps(table[i]), k, _mm512_load_ps(table[i] + 16))};
  };
  Vec tail;
  if constexpr (kShort) {  // what is left out is at most 1 / 16 of the coefficient of u⁴
    tail = fma(coefficient(3), u, coefficient(2));
  } else {
    tail = fma(fma(fma(coefficient(5), u, coefficient(4)), u, coefficient(3)), u, coefficient(2));
  }
  tail = fma(fma(tail, u, coefficient(1)), u, coefficient(0));
  return where_negative(v, tail, Vec::set(1) - tail);
}

template <bool kShort>
struct TableAct {
  static FD_INLINE Vec gate_from(const float (&table)[6][32], Vec v) {
    const Vec place = min(Vec::set(kGeluLastPiece), abs(v) * Vec::set(kGeluPiecesPerUnit));  // NaN stays
    const Vec u{_mm512_reduce_ps(place.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    return piecewise<kShort>(table, _mm512_cvtps_epi32(place.v), u, v);
  }
  // Like v · gate'(v), NaN where v is infinite: u is, and the last piece's coefficients are 0.
  static FD_INLINE Vec derivative_from(const float (&table)[6][32], Vec v) {
    const Vec place = abs(v) * Vec::set(kGeluPiecesPerUnit), inside = min(Vec::set(kGeluLastPiece), place);
    const Vec whole{_mm512_roundscale_ps(inside.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    return piecewise<kShort>(table, _mm512_cvtps_epi32(inside.v), place - whole, v);
  }
};

template <bool kShort>
struct Act<Activation::kGelu, kShort, Vec> : TableAct<kShort> {
  static FD_INLINE Vec gate(Vec v) { return TableAct<kShort>::gate_from(kGeluGate, v); }
  static FD_INLINE Vec derivative(Vec v) { return TableAct<kShort>::derivative_from(kGeluDerivative, v); }
  static FD_INLINE Taken<Vec> take(Vec v) { return {gate(v), derivative(v)}; }
};
template <bool kShort>
struct Act<Activation::kGeluTanh, kShort, Vec> : TableAct<kShort> {
  static FD_INLINE Vec gate(Vec v) { return TableAct<kShort>::gate_from(kGeluTanhGate, v); }
  static FD_INLINE Vec derivative(Vec v) { return TableAct<kShort>::derivative_from(kGeluTanhDerivative, v); }
  static FD_INLINE Taken<Vec> take(Vec v) { return {gate(v), derivative(v)}; }
};
#endif

}  // namespace
}  // namespace fastdiff::cpu::FASTDIFF_ISA
