// Sums over the threads of a warp and of a row, always in the same order.
#pragma once
#include "kernels/common/launch.cuh"

namespace fastdiff::cuda {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;  // 1024 threads a block

// Every lane gets the same sum: xor exchanges add the same pairs on both sides.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Sums of kValues numbers over the threads that share threadIdx.y, in a block whose blockDim.x is a multiple of 32.
// Each use takes the other half of `scratch`, so one barrier a use is enough: who writes a half again has passed the
// barrier of the use in between, which is met only after that half was read. Every thread of the block must call.
template <int kValues>
class RowSum {
 public:
  using Scratch = float[2][kMaxWarps][kValues];

  __device__ explicit RowSum(Scratch& scratch) : scratch_(scratch) {}

  __device__ __forceinline__ void operator()(float (&values)[kValues]) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) values[k] = warp_sum(values[k]);
    const int warps = blockDim.x / kWarp;  // a row
    if (warps == 1) return;
    const int lane = threadIdx.x % kWarp;
    float(*sums)[kValues] = scratch_[half_] + threadIdx.y * warps;
    half_ ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < kValues; ++k) sums[threadIdx.x / kWarp][k] = values[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kValues; ++k) values[k] = warp_sum(lane < warps ? sums[lane][k] : 0.0f);
  }

 private:
  Scratch& scratch_;
  int half_ = 0;
};

}  // namespace fastdiff::cuda
