// Comparisons of vectors: keeping lanes, and packing the kept ones together.
#pragma once
#include "kernels/common/vec.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

#if defined(__AVX512F__)
// v where a >= b, else 0.
FD_INLINE Vec keep_at_least(Vec a, Vec b, Vec v) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), v.v)};
}
// Writes the lanes of v with low <= a < high one after the other, and anything after them up to a vector's width.
FD_INLINE int64_t pack_between(Vec a, Vec low, Vec high, Vec v, float* to) {
  const __mmask16 at_least = _mm512_cmp_ps_mask(a.v, low.v, _CMP_GE_OQ);
  const __mmask16 keep = _mm512_mask_cmp_ps_mask(at_least, a.v, high.v, _CMP_LT_OQ);
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(keep, v.v));
  return __builtin_popcount(keep);
}
#else
#if defined(__AVX2__)
FD_INLINE Vec keep_at_least(Vec a, Vec b, Vec v) { return {_mm256_and_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ), v.v)}; }
#else
FD_INLINE Vec keep_at_least(Vec a, Vec b, Vec v) { return {a.v >= b.v ? v.v : Vec::set(0).v}; }
#endif
FD_INLINE int64_t pack_between(Vec a, Vec low, Vec high, Vec v, float* to) {
  float lane[Vec::kWidth], value[Vec::kWidth];
  a.store(lane);
  v.store(value);
  float l[Vec::kWidth], h[Vec::kWidth];
  low.store(l);
  high.store(h);
  int64_t kept = 0;
  for (int i = 0; i < Vec::kWidth; i++) {  // without a branch: kept lanes are as good as random
    to[kept] = value[i];
    kept += lane[i] >= l[i] && lane[i] < h[i];
  }
  return kept;
}
#endif

}  // namespace fastdiff::cpu::FASTDIFF_ISA
