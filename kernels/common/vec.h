// Vectors of floats for one instruction set, chosen by the flags this file is compiled with:
// AVX-512 (16 lanes), AVX2 (8), else GCC/Clang vector extensions (4; SSE2 on x86-64, NEON on aarch64).
//
// A kernel file (<op>_cpu.inl) is compiled once an instruction set, with FASTDIFF_ISA set to that set's name; all it
// defines lies in namespace fastdiff::cpu::FASTDIFF_ISA. These files use no std templates and have no static
// initialisers: such weak symbols would be merged across the files, and a CPU without AVX-512 could run AVX-512 code.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/common/dtype.h"

#define FD_INLINE inline __attribute__((always_inline))

namespace fastdiff::cpu::FASTDIFF_ISA {

// 16-bit floats as stored; arithmetic is done in float.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

FD_INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
FD_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

FD_INLINE double to_float(double v) { return v; }
FD_INLINE float to_float(float v) { return v; }
FD_INLINE float to_float(BF16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
FD_INLINE float to_float(F16 v) {
  // Shift exponent and mantissa into place, then scale by 2^112: exact, subnormals included.
  const float magnitude = bits_to_float(uint32_t(v.bits & 0x7fff) << 13) * 0x1p112f;
  uint32_t u = float_to_bits(magnitude);
  if ((v.bits & 0x7c00) == 0x7c00) u |= 0x7f800000;  // Inf and NaN
  return bits_to_float(u | uint32_t(v.bits & 0x8000) << 16);
}

FD_INLINE void from_float(float f, float* out) { *out = f; }
FD_INLINE void from_float(float f, BF16* out) {
  const uint32_t u = float_to_bits(f);
  const bool nan = (u & 0x7fffffff) > 0x7f800000;
  out->bits = nan ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
FD_INLINE void from_float(float f, F16* out) {
  const uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  uint32_t h;
  if (a > 0x7f800000) {
    h = 0x7e00 | (a >> 13 & 0x3ff);  // NaN, quiet
  } else if (a >= 0x477ff000) {
    h = 0x7c00;  // rounds beyond 65504
  } else if (a < 0x38800000) {
    // Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded to nearest even by the FPU, in the low mantissa.
    h = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000;
  } else {
    h = (a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13;
  }
  out->bits = uint16_t(sign | h);
}

// ---------------------------------------------------------------------------------------------------- AVX-512
#if defined(__AVX512F__)
struct Vec {
  using Scalar = float;
  static constexpr int kWidth = 16;
  __m512 v;

  static FD_INLINE __mmask16 mask(int64_t n) { return __mmask16((1u << n) - 1); }
  static FD_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }

  static FD_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static FD_INLINE Vec load(const BF16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static FD_INLINE Vec load(const F16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  // 2·kWidth numbers, the even ones and the odd ones: two instructions where load() takes four
  static FD_INLINE void load_halves(const BF16* p, Vec* even, Vec* odd) {
    const __m512i h = _mm512_loadu_si512(p);
    *even = {_mm512_castsi512_ps(_mm512_slli_epi32(h, 16))};
    *odd = {_mm512_castsi512_ps(_mm512_and_si512(h, _mm512_set1_epi32(int(0xffff0000))))};
  }
  static FD_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  static FD_INLINE Vec load(const BF16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(mask(n), p)); }
  static FD_INLINE Vec load(const F16* p, int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))}; }

  FD_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  FD_INLINE void store(BF16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  FD_INLINE void store(F16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half()); }
  FD_INLINE void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  FD_INLINE void store(BF16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, mask(n), narrow()); }
  FD_INLINE void store(F16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, mask(n), half()); }

  // Past the caches; p aligned to the vector.
  FD_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  FD_INLINE void stream(BF16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  FD_INLINE void stream(F16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half()); }
  static FD_INLINE void stream_fence() { _mm_sfence(); }
  // a's lanes, then b's, rounded and put together: 64 bytes, a whole cache line
  static FD_INLINE void store_two(Vec a, Vec b, BF16* p) { _mm512_storeu_si512(p, narrow(a, b)); }
  static FD_INLINE void store_two(Vec a, Vec b, F16* p) { _mm512_storeu_si512(p, together(a.half(), b.half())); }
  static FD_INLINE void stream_two(Vec a, Vec b, BF16* p) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow(a, b));
  }
  static FD_INLINE void stream_two(Vec a, Vec b, F16* p) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), together(a.half(), b.half()));
  }

  FD_INLINE Vec first(int64_t n) const { return {_mm512_maskz_mov_ps(mask(n), v)}; }
  FD_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  FD_INLINE float max() const { return _mm512_reduce_max_ps(v); }
  friend FD_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN, in all sets
  friend FD_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }  // the same
  friend FD_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend FD_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend FD_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

 private:
  static FD_INLINE Vec widen(__m256i h) {  // each number into the upper half of its lane, zeros below: one instruction
    const __m512i from = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4,
                                          4, 3, 3, 2, 2, 1, 1, 0, 0);
    return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, _mm512_castsi256_si512(h)))};
  }
  static FD_INLINE __m512i together(__m256i a, __m256i b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  }
  static FD_INLINE __m512i narrow(Vec a, Vec b) {
#if defined(__AVX512BF16__)
    return (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
#else
    return together(a.narrow(), b.narrow());
#endif
  }
  FD_INLINE __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  FD_INLINE __m256i narrow() const {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(v);  // the same rounding; subnormal results become zero
#else
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
  }
};

// ---------------------------------------------------------------------------------------------------- AVX2
#elif defined(__AVX2__)
struct Vec {
  using Scalar = float;
  static constexpr int kWidth = 8;
  __m256 v;

  static FD_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static FD_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static FD_INLINE Vec load(const BF16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static FD_INLINE Vec load(const F16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static FD_INLINE void load_halves(const BF16* p, Vec* even, Vec* odd) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    *even = {_mm256_castsi256_ps(_mm256_slli_epi32(h, 16))};
    *odd = {_mm256_castsi256_ps(_mm256_and_si256(h, _mm256_set1_epi32(int(0xffff0000))))};
  }
  template <class T>
  static FD_INLINE Vec load(const T* p, int64_t n) {
    T tail[kWidth] = {};
    memcpy(tail, p, n * sizeof(T));
    return load(tail);
  }
  FD_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  FD_INLINE void store(BF16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow()); }
  FD_INLINE void store(F16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half()); }
  FD_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  FD_INLINE void stream(BF16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow()); }
  FD_INLINE void stream(F16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), half()); }
  static FD_INLINE void stream_fence() { _mm_sfence(); }
  FD_INLINE __m128i half() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  FD_INLINE __m256i rounded() const {  // to bfloat16, in the lower half of each lane
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  }
  FD_INLINE __m128i narrow() const {
    const __m256i top = rounded();
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08));
  }
  // a's lanes, then b's, rounded and put together
  static FD_INLINE __m256i together(Vec a, Vec b, const BF16*) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a.rounded(), b.rounded()), 0xd8);
  }
  static FD_INLINE __m256i together(Vec a, Vec b, const F16*) { return _mm256_set_m128i(b.half(), a.half()); }
  template <class T>
  static FD_INLINE void store_two(Vec a, Vec b, T* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), together(a, b, p));
  }
  template <class T>
  static FD_INLINE void stream_two(Vec a, Vec b, T* p) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), together(a, b, p));
  }
  template <class T>
  FD_INLINE void store(T* p, int64_t n) const {
    T tail[kWidth];
    store(tail);
    memcpy(p, tail, n * sizeof(T));
  }
  FD_INLINE Vec first(int64_t n) const {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lane);
    return {_mm256_and_ps(v, _mm256_castsi256_ps(keep))};
  }
  FD_INLINE float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  FD_INLINE float max() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  friend FD_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend FD_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend FD_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend FD_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend FD_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
};

// ---------------------------------------------------------------------------------------------------- baseline
#else
struct Vec {
  using Scalar = float;
  static constexpr int kWidth = 4;
  typedef float Lanes __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef uint16_t Shorts __attribute__((vector_size(8)));
  Lanes v;

  static FD_INLINE Vec set(float x) { return {Lanes{x, x, x, x}}; }
  static FD_INLINE Vec load(const float* p) {
    Vec r;
    memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  static FD_INLINE Vec load(const BF16* p) {
    Shorts s;
    memcpy(&s, p, sizeof s);
    const Bits u = __builtin_convertvector(s, Bits) << 16;
    Vec r;
    memcpy(&r.v, &u, sizeof u);
    return r;
  }
  static FD_INLINE Vec load(const F16* p) { return {Lanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}}; }
  static FD_INLINE void load_halves(const BF16* p, Vec* even, Vec* odd) {
    Bits h;
    memcpy(&h, p, sizeof h);
    const Bits low = h << 16, high = h & 0xffff0000;
    memcpy(&even->v, &low, sizeof low);
    memcpy(&odd->v, &high, sizeof high);
  }
  template <class T>
  static FD_INLINE Vec load(const T* p, int64_t n) {
    T tail[kWidth] = {};
    for (int i = 0; i < n; i++) tail[i] = p[i];
    return load(tail);
  }
  FD_INLINE void store(float* p) const { memcpy(p, &v, sizeof v); }
  FD_INLINE Shorts narrow() const {
    Bits u;
    memcpy(&u, &v, sizeof u);
    const Bits rounded = u + 0x7fff + (u >> 16 & 1), quiet = u | 0x400000;
    const Bits nan = (Bits)((u & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector(((rounded & ~nan) | (quiet & nan)) >> 16, Shorts);
  }
  FD_INLINE void store(BF16* p) const {
    const Shorts s = narrow();
    memcpy(p, &s, sizeof s);
  }
  FD_INLINE void store(F16* p) const {
    for (int i = 0; i < kWidth; i++) from_float(v[i], p + i);
  }
  template <class T>
  FD_INLINE void stream(T* p) const {
    store(p);
  }
  static FD_INLINE void store_two(Vec a, Vec b, BF16* p) {  // one store: load_halves would wait for two
    typedef uint16_t Both __attribute__((vector_size(16)));
    const Both s = __builtin_shufflevector(a.narrow(), b.narrow(), 0, 1, 2, 3, 4, 5, 6, 7);
    memcpy(p, &s, sizeof s);
  }
  static FD_INLINE void store_two(Vec a, Vec b, F16* p) {
    a.store(p);
    b.store(p + kWidth);
  }
  template <class T>
  static FD_INLINE void stream_two(Vec a, Vec b, T* p) {
    store_two(a, b, p);
  }
  static FD_INLINE void stream_fence() {}
  template <class T>
  FD_INLINE void store(T* p, int64_t n) const {
    for (int i = 0; i < n; i++) from_float(v[i], p + i);
  }
  FD_INLINE Vec first(int64_t n) const {
    Vec r = *this;
    for (int i = 0; i < kWidth; i++) r.v[i] = i < n ? v[i] : 0.f;
    return r;
  }
  FD_INLINE float sum() const { return (v[0] + v[1]) + (v[2] + v[3]); }
  FD_INLINE float max() const {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
  friend FD_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  friend FD_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
  friend FD_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend FD_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend FD_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
};
#endif

// One lane of double: the same kernels, instantiated to check gradients against finite differences.
struct VecDouble {
  using Scalar = double;
  static constexpr int kWidth = 1;
  double v;
  static FD_INLINE VecDouble set(double x) { return {x}; }
  static FD_INLINE VecDouble load(const double* p, int64_t = 1) { return {*p}; }
  FD_INLINE void store(double* p, int64_t = 1) const { *p = v; }
  FD_INLINE void stream(double* p) const { *p = v; }
  static FD_INLINE void stream_fence() {}
  FD_INLINE VecDouble first(int64_t) const { return *this; }
  FD_INLINE double sum() const { return v; }
  friend FD_INLINE VecDouble max(VecDouble a, VecDouble b) { return {a.v > b.v ? a.v : b.v}; }
  friend FD_INLINE VecDouble min(VecDouble a, VecDouble b) { return {a.v < b.v ? a.v : b.v}; }
  friend FD_INLINE VecDouble operator+(VecDouble a, VecDouble b) { return {a.v + b.v}; }
  friend FD_INLINE VecDouble operator-(VecDouble a, VecDouble b) { return {a.v - b.v}; }
  friend FD_INLINE VecDouble operator*(VecDouble a, VecDouble b) { return {a.v * b.v}; }
  friend FD_INLINE VecDouble fma(VecDouble a, VecDouble b, VecDouble c) { return {a.v * b.v + c.v}; }
};

// Loops over a row: f(i, n) for i = 0, W, 2W, …, with n = Whole{} for whole vectors and the number of lanes for the tail.
struct Whole {};
template <class V, class F>
FD_INLINE void for_lanes(int64_t size, const F& f) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + V::kWidth <= size; i += V::kWidth) f(i, Whole{});
  if (i < size) f(i, size - i);
}
template <class V, class T>
FD_INLINE V load(const T* p, Whole) {
  return V::load(p);
}
template <class V, class T>
FD_INLINE V load(const T* p, int64_t n) {  // zeros beyond n
  return V::load(p, n);
}
template <class V, class T>
FD_INLINE void store(V v, T* p, Whole) {
  v.store(p);
}
template <class V, class T>
FD_INLINE void store(V v, T* p, int64_t n) {
  v.store(p, n);
}

// Past the caches or not. A streamed row has whole vectors only, aligned.
template <bool kStream, class V, class T, class N>
FD_INLINE void put(V v, T* p, N n) {
  if constexpr (kStream)
    v.stream(p);
  else
    store(v, p, n);
}

// 2·kWidth numbers for a sum: all of them once, in an order that is the type's own.
template <class V, class T>
FD_INLINE void load_two(const T* p, V* a, V* b) {
  if constexpr (__is_same(T, BF16)) {
    V::load_halves(p, a, b);
  } else {
    *a = V::load(p);
    *b = V::load(p + V::kWidth);
  }
}

// a at p and b behind it. A streamed row begins at a cache line.
template <bool kStream, class V, class T>
FD_INLINE void put_two(V a, V b, T* p) {
  if constexpr (sizeof(T) == 2 && kStream) {
    V::stream_two(a, b, p);
  } else if constexpr (sizeof(T) == 2) {
    V::store_two(a, b, p);
  } else {
    put<kStream>(a, p, Whole{});
    put<kStream>(b, p + V::kWidth, Whole{});
  }
}

// Calls f(Type<T>{}) with the C++ type of a DType; a kernel instantiated for double sees double alone.
template <class T>
struct Type {
  using type = T;
};
template <class V, class F>
FD_INLINE void with_type(DType t, const F& f) {
  if constexpr (sizeof(typename V::Scalar) == 8) {
    f(Type<double>{});
  } else {
    if (t == DType::kFloat32) f(Type<float>{});
    if (t == DType::kBFloat16) f(Type<BF16>{});
    if (t == DType::kFloat16) f(Type<F16>{});
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
