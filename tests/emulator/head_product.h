// The matrix product that lm_head_sample borrows, for the emulator: exact to one rounding, as slow as it looks.
#pragma once
#include "kernels/common/cuda_dtype.cuh"
#include "kernels/token_sampling/token_sampling.h"

namespace cuda_on_cpu {

template <class T>
void head_product(const fastdiff::LmHeadSampleParams& h, int64_t begin, int64_t end) {
  using fastdiff::cuda::from_float, fastdiff::cuda::to_float;
  const auto *hidden = static_cast<const T*>(h.hidden), *weight = static_cast<const T*>(h.weight);
  const auto* bias = static_cast<const T*>(h.bias);
  for (int64_t row = 0; row < h.sample.batch * h.sample.length; ++row) {
    for (int64_t id = begin; id < end; ++id) {
      double sum = bias ? to_float(bias[id]) : 0.0;
      for (int64_t d = 0; d < h.dim; ++d) {
        sum += static_cast<double>(to_float(hidden[row * h.dim + d])) * to_float(weight[id * h.weight_stride + d]);
      }
      static_cast<T*>(h.tile)[row * (end - begin) + id - begin] = from_float<T>(static_cast<float>(sum));
    }
  }
}

inline void run_head_product(void* context, int64_t begin, int64_t end) {
  const auto& h = *static_cast<const fastdiff::LmHeadSampleParams*>(context);
  if (h.sample.dtype == fastdiff::DType::kFloat32) return head_product<float>(h, begin, end);
  if (h.sample.dtype == fastdiff::DType::kBFloat16) return head_product<__nv_bfloat16>(h, begin, end);
  return head_product<__half>(h, begin, end);
}

}  // namespace cuda_on_cpu
