// Row by row beside the passes over M: mixtures made again, and delta. A warp a row of [batch, heads, rows, dim].
#pragma once
#include "kernels/qgfd/qgfd_pass.h"

namespace fastdiff::cuda::qgfd {

constexpr int kRowWarps = 4;  // of a block

struct RowIndex {
  int64_t batch, head, row;
};
__device__ __forceinline__ RowIndex row_index(int64_t i, int64_t heads, int64_t rows) {
  const int64_t b = divide(i, heads * rows), rest = i - b * heads * rows, h = divide(rest, rows);
  return {b, h, rest - h * rows};
}
__device__ __forceinline__ int64_t offset(const Operand& o, const RowIndex& i) {
  return i.batch * o.batch_stride + i.head / o.group * o.head_stride + i.row * o.row_stride;
}
__device__ __forceinline__ float element(const Operand& o, DType dtype, int64_t at) {
  float value[1];
  load(o.data, dtype, at, value);
  return value[0];
}

struct Mixture {  // to = round(a * x + b * y), y nothing where its data is nullptr
  Operand x, y;
  void* to;  // contiguous
  float a, b;
  int64_t batch, heads, rows, dim;
  DType dtype;
};

__global__ __launch_bounds__(kRowWarps * kWarp, 8) void mix_kernel(const __grid_constant__ Mixture m) {
  const int64_t all = m.batch * m.heads * m.rows, step = int64_t{gridDim.x} * kRowWarps;
  for (int64_t i = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp; i < all; i += step) {
    const RowIndex row = row_index(i, m.heads, m.rows);
    const int64_t x = offset(m.x, row), y = m.y.data ? offset(m.y, row) : 0;
    for (int64_t c = lane_id(); c < m.dim; c += kWarp) {
      float value[1] = {m.a * element(m.x, m.dtype, x + c)};
      if (m.y.data) value[0] = fmaf(m.b, element(m.y, m.dtype, y + c), value[0]);
      store(m.to, m.dtype, i * m.dim + c, value);
    }
  }
}

struct Delta {  // sum over j of rowsum(h_j * y_j)
  Chain chain;
  Operand last;  // y_hops
  float* delta;  // [batch, heads, rows]
  int64_t batch, heads, rows, dim;
  DType dtype;
};

__global__ __launch_bounds__(kRowWarps * kWarp, 6) void delta_kernel(const __grid_constant__ Delta d) {
  const int64_t all = d.batch * d.heads * d.rows, step = int64_t{gridDim.x} * kRowWarps;
  const int64_t hops = d.chain.recurrence.hops;
  for (int64_t i = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp; i < all; i += step) {
    const RowIndex row = row_index(i, d.heads, d.rows);
    float sum = 0.0f;
    for (int64_t j = 1; j <= hops; ++j) {
      const Operand h = d.chain.gradient(j), y = j < hops ? d.chain.at(d.chain.passes, j - 1) : d.last;
      const int64_t h_at = offset(h, row), y_at = offset(y, row);
      for (int64_t c = lane_id(); c < d.dim; c += kWarp) {
        sum = fmaf(element(h, d.dtype, h_at + c), element(y, d.dtype, y_at + c), sum);
      }
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) d.delta[i] = sum;
  }
}

}  // namespace fastdiff::cuda::qgfd
