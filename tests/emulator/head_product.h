// The matrix product that operators on hidden states borrow, for the emulator: exact to one rounding, as slow as it looks.
#pragma once
#include "kernels/common/cuda_dtype.cuh"
#include "kernels/common/logit_tiles.h"

namespace cuda_on_cpu {

struct HeadOperands {
  const void* hidden;  // [rows, dim]
  const void* weight;  // [vocab, dim], rows apart by weight_stride
  const void* bias;    // [vocab], or nullptr
  int64_t weight_stride, dim;
  fastdiff::DType dtype;
};

template <class T>
void head_product(const HeadOperands& h, const fastdiff::HeadTile& tile) {
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
  const auto& h = *static_cast<const HeadOperands*>(context);
  if (h.dtype == fastdiff::DType::kFloat32) return head_product<float>(h, tile);
  if (h.dtype == fastdiff::DType::kBFloat16) return head_product<__nv_bfloat16>(h, tile);
  return head_product<__half>(h, tile);
}

}  // namespace cuda_on_cpu
