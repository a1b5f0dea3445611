// scale_shift on the device: a block takes rows, a thread kVec neighbouring columns at a time.
#pragma once
#include "kernels/common/cuda_dtype.cuh"
#include "kernels/scale_shift/scale_shift.h"

namespace fastdiff::cuda {

constexpr int kScaleShiftThreads = 256;

template <class T, int kVec>
__global__ void __launch_bounds__(kScaleShiftThreads) scale_shift_kernel(const __grid_constant__ ScaleShiftParams p) {
  for (int64_t row = blockIdx.x; row < p.batch * p.tokens; row += gridDim.x) {
    const int64_t sample = divide(row, p.tokens);
    const T* const x = static_cast<const T*>(p.x) + row * p.dim;
    const T* const scale = static_cast<const T*>(p.scale) + sample * p.dim;
    const T* const shift = static_cast<const T*>(p.shift) + sample * p.dim;
    T* const out = static_cast<T*>(p.out) + row * p.dim;
    for (int64_t i = int64_t{threadIdx.x} * kVec; i < p.dim; i += int64_t{blockDim.x} * kVec) {
      float value[kVec], factor[kVec], term[kVec];
      load(x + i, value);
      load(scale + i, factor);
      load(shift + i, term);
#pragma unroll
      for (int k = 0; k < kVec; ++k) value[k] = value[k] * (1.0f + factor[k]) + term[k];
      store(out + i, value);
    }
  }
}

}  // namespace fastdiff::cuda
