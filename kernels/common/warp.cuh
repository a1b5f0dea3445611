// What kernels do with a warp: reductions, and a search. Every lane of the warp must call a reduction, and every lane
// gets the result.
#pragma once
#include "kernels/common/reduce.cuh"

namespace fastdiff::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kInfinity = __builtin_huge_valf();

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }

template <class T, class F>
__device__ __forceinline__ T warp_reduce(T value, const F& join) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = join(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}
template <class T>
__device__ __forceinline__ T warp_min(T value) {
  return warp_reduce(value, [](T a, T b) { return b < a ? b : a; });
}
__device__ __forceinline__ float warp_max(float value) {
  return warp_reduce(value, [](float a, float b) { return fmaxf(a, b); });  // of a number and NaN, the number
}
__device__ __forceinline__ double warp_sum(double value) {
  return warp_reduce(value, [](double a, double b) { return a + b; });
}
__device__ __forceinline__ bool warp_any(bool value) { return __ballot_sync(kAllLanes, value) != 0; }

// How many of the ascending numbers are below `value`.
__device__ __forceinline__ int64_t count_below(const int64_t* ascending, int64_t count, int64_t value) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ascending[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace fastdiff::cuda
