// The matrix product that lm_head_sample borrows, for the emulator: exact to one rounding, as slow as it looks.
#pragma once
#include "kernels/common/cuda_dtype.cuh"
#include "kernels/token_sampling/token_sampling.h"

namespace cuda_on_cpu {

template <class T>
void head_product(const fastdiff::LmHeadSampleParams& h, const fastdiff::HeadTile& tile) {
  using fastdiff::cuda::from_float, fastdiff::cuda::to_float;
  const auto *hidden = static_cast<const T*>(h.hidden), *weight = static_cast<const T*>(h.weight);
  const auto* bias = static_cast<const T*>(h.bias);
  for (int64_t row = tile.first_row; row < tile.first_row + tile.rows; ++row) {
    for (int64_t id = tile.begin; id < tile.end; ++id) {
      double sum = bias ? to_float(bias[id]) : 0.0;
      for (int64_t d = 0; d < h.dim; ++d) {
        sum += static_cast<double>(to_float(hidden[row * h.dim + d])) * to_float(weight[id * h.weight_stride + d]);
      }
      static_cast<T*>(tile.logits)[(row - tile.first_row) * (tile.end - tile.begin) + id - tile.begin] =
           from_float<T>(static_cast<float>(sum));
    }
  }
}

inline void run_head_product(void* context, const fastdiff::HeadTile& tile) {
  const auto& h = *static_cast<const fastdiff::LmHeadSampleParams*>(context);
  if (h.sample.dtype == fastdiff::DType::kFloat32) return head_product<float>(h, tile);
  if (h.sample.dtype == fastdiff::DType::kBFloat16) return head_product<__nv_bfloat16>(h, tile);
  return head_product<__half>(h, tile);
}

}  // namespace cuda_on_cpu
