// exp of a vector of floats, for x <= 88: within 1.1 units in the last place of the exact value wherever that is at least
// 2^-126 (what is smaller may come out as 0), 0 at -Inf, NaN at NaN.
#pragma once
#include "kernels/common/vec.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

// exp(r) on |r| <= ln(2) / 2 as 1 + r + r^2 (...): minimax, relative error 3.1e-9 before rounding.
FD_INLINE Vec exp_fraction(Vec r) {
  Vec p = fma(Vec::set(0.00138145382f), r, Vec::set(0.00836874532f));
  p = fma(p, r, Vec::set(0.0416683908f));
  p = fma(p, r, Vec::set(0.166665204f));
  p = fma(p, r, Vec::set(0.499999934f));
  const Vec one = Vec::set(1.0f);
  return fma(fma(p, r, one), r, one);
}

// x = n ln(2) + r; ln(2) in two pieces, the first with zeros at its end, so that n times it is exact.
FD_INLINE Vec exp_remainder(Vec x, Vec n) {
  return fma(n, Vec::set(-1.42860677e-6f), fma(n, Vec::set(-0.693145752f), x));
}

constexpr float kExpFloor = -110.0f;  // exp is 0 here and below

// The same for kExpFloor <= x or NaN: saves a comparison where the caller has made one.
FD_INLINE Vec exp_above_floor(Vec x) {
  constexpr float kLog2E = 1.44269504f;
#if defined(__AVX512F__)
  const Vec n{_mm512_roundscale_ps((x * Vec::set(kLog2E)).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  return {_mm512_scalef_ps(exp_fraction(exp_remainder(x, n)).v, n.v)};
#elif defined(__AVX2__)
  const __m256 small = _mm256_cmp_ps(x.v, _mm256_set1_ps(-87.3365402f), _CMP_LT_OQ);
  x = max(Vec::set(-88.0f), x);
  const Vec n{_mm256_round_ps((x * Vec::set(kLog2E)).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  const Vec scale{_mm256_castsi256_ps(exponent)};
  return {_mm256_andnot_ps(small, (exp_fraction(exp_remainder(x, n)) * scale).v)};
#else
  typedef int32_t Ints __attribute__((vector_size(16)));
  const Ints small = x.v < Vec::set(-87.3365402f).v;
  const Ints nan = x.v != x.v;
  x = max(Vec::set(-88.0f), x);
  const Vec magic = Vec::set(0x1.8p23f);  // adding it rounds to an integer, to nearest even
  const Vec t = fma(x, Vec::set(kLog2E), magic), n = t - magic;
  Ints bits, whole;
  memcpy(&bits, &t.v, sizeof bits);
  memcpy(&whole, &magic.v, sizeof whole);
  bits = (bits - whole + 127) << 23;
  Vec scale, result;
  memcpy(&scale.v, &bits, sizeof bits);
  result = exp_fraction(exp_remainder(x, n)) * scale;
  memcpy(&bits, &result.v, sizeof bits);
  memcpy(&whole, &x.v, sizeof whole);
  bits = (bits & ~small & ~nan) | (whole & nan);
  memcpy(&result.v, &bits, sizeof bits);
  return result;
#endif
}

FD_INLINE Vec exp(Vec x) { return exp_above_floor(max(Vec::set(kExpFloor), x)); }  // NaN stays

}  // namespace fastdiff::cpu::FASTDIFF_ISA
