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

constexpr float kTermFloor = -87.0f;  // exp is a normal number from here on

// For the terms of long sums whose largest is about 1, and kTermFloor <= x <= 88 or NaN: exact at 0, else within
// 2.6e-9 |x| + 1.5e-7 of the exact value, relative to it. With AVX-512 it takes 5 instructions on the units that multiply,
// where exp_above_floor takes 10: 2^(k/32) comes from a table in two registers, and what is left is at most ln(2) / 64.
#if defined(__AVX512F__)
constexpr uint32_t kPowers[32] = {  // the bits of 2^(k/32), less k in the places that n << 18 fills
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};

FD_INLINE Vec exp_of_term(Vec x) {
  const Vec magic = Vec::set(0x1.8p18f);  // adding it rounds to n / 32; n stands in the last bits then
  const Vec t = fma(x, Vec::set(1.44269504f), magic), r = fma(t - magic, Vec::set(-0.693147181f), x);
  const Vec less_one = fma(r, Vec::set(0.500002444f), Vec::set(1.00001466f)) * r;  // exp(r) - 1, to 5e-8
  const __m512i n = _mm512_castps_si512(t.v);
  const __m512i power = _mm512_permutex2var_epi32(_mm512_loadu_si512(kPowers), n, _mm512_loadu_si512(kPowers + 16));
  const Vec whole{_mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_slli_epi32(n, 18)))};  // 2^(n/32)
  return fma(whole, less_one, whole);
}
#else
FD_INLINE Vec exp_of_term(Vec x) { return exp_above_floor(x); }
#endif

FD_INLINE Vec exp(Vec x) { return exp_above_floor(max(Vec::set(kExpFloor), x)); }  // NaN stays

}  // namespace fastdiff::cpu::FASTDIFF_ISA
