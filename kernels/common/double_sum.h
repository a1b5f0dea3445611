// A sum of vectors of floats, kept in double.
#pragma once
#include "kernels/common/vec.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

#if defined(__AVX512F__)
struct DoubleSum {
  __m512d lanes = _mm512_setzero_pd();
  FD_INLINE void add(Vec x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
    lanes = _mm512_add_pd(lanes, _mm512_add_pd(low, high));
  }
  FD_INLINE double total() const { return _mm512_reduce_add_pd(lanes); }
};
#elif defined(__AVX2__)
struct DoubleSum {
  __m256d lanes = _mm256_setzero_pd();
  FD_INLINE void add(Vec x) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x.v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1));
    lanes = _mm256_add_pd(lanes, _mm256_add_pd(low, high));
  }
  FD_INLINE double total() const {
    const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(lanes), _mm256_extractf128_pd(lanes, 1));
    return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
  }
};
#else
struct DoubleSum {
  double lanes[2] = {0, 0};
  FD_INLINE void add(Vec x) {
    lanes[0] += double(x.v[0]) + double(x.v[2]);
    lanes[1] += double(x.v[1]) + double(x.v[3]);
  }
  FD_INLINE double total() const { return lanes[0] + lanes[1]; }
};
#endif

}  // namespace fastdiff::cpu::FASTDIFF_ISA
