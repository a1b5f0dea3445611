// Loads and stores of neighbouring elements, converted from and to fp32; the widest accesses the device has (16 bytes).
#pragma once
#include "kernels/common/dtype.h"
#include "kernels/common/launch.cuh"

namespace fastdiff::cuda {

constexpr int kVectorBytes = 16;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

// One rounding, to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// What one access moves: kN elements, or the part of them that fits in 16 bytes.
template <class T, int kN>
struct alignas(sizeof(T) * kN) Pack {
  T element[kN];
};
template <class T, int kN>
using PackOf = Pack<T, (kN * sizeof(T) <= kVectorBytes ? kN : kVectorBytes / static_cast<int>(sizeof(T)))>;

template <int kN, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[kN]) {
  using P = PackOf<T, kN>;
  constexpr int kEach = sizeof(P) / sizeof(T);
#pragma unroll
  for (int i = 0; i < kN; i += kEach) {
    FD_CHECK_ALIGNED(from + i, sizeof(P));
    const P pack = *reinterpret_cast<const P*>(from + i);
#pragma unroll
    for (int j = 0; j < kEach; ++j) to[i + j] = to_float(pack.element[j]);
  }
}

template <int kN, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[kN]) {
  using P = PackOf<T, kN>;
  constexpr int kEach = sizeof(P) / sizeof(T);
#pragma unroll
  for (int i = 0; i < kN; i += kEach) {
    P pack;
#pragma unroll
    for (int j = 0; j < kEach; ++j) pack.element[j] = from_float<T>(from[i + j]);
    FD_CHECK_ALIGNED(to + i, sizeof(P));
    *reinterpret_cast<P*>(to + i) = pack;
  }
}

// The same where the type is known at run time only. It is the same for every thread of a launch, so that the branch
// costs next to nothing, and saves a kernel for every combination of types.
template <int kN>
__device__ __forceinline__ void load(const void* data, DType dtype, int64_t index, float (&to)[kN]) {
  if (dtype == DType::kFloat32) {
    load(static_cast<const float*>(data) + index, to);
  } else if (dtype == DType::kBFloat16) {
    load(static_cast<const __nv_bfloat16*>(data) + index, to);
  } else {
    load(static_cast<const __half*>(data) + index, to);
  }
}

template <int kN>
__device__ __forceinline__ void store(void* data, DType dtype, int64_t index, const float (&from)[kN]) {
  if (dtype == DType::kFloat32) {
    store(static_cast<float*>(data) + index, from);
  } else if (dtype == DType::kBFloat16) {
    store(static_cast<__nv_bfloat16*>(data) + index, from);
  } else {
    store(static_cast<__half*>(data) + index, from);
  }
}

// 64-bit division is slow on a GPU, and almost every quotient here fits in 32 bits.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

}  // namespace fastdiff::cuda
