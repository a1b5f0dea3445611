// bias_activation on the device: a block takes kRowsAtOnce rows of kLanes · kVec columns at a time, so that a thread keeps
// its columns, their bias and their sums in registers.
#pragma once
#include "kernels/bias_activation/bias_activation.h"
#include "kernels/bias_activation/normal_tail.h"
#include "kernels/common/cuda_dtype.cuh"

namespace fastdiff::cuda {

constexpr int kLanes = 32, kRowsAtOnce = 8;           // threads of a block
constexpr int kSumColumns = 32, kSumSlices = 8;       // of the second step: columns, and shares of the segments

// act(v) = v · value, act'(v) = derivative
struct Act {
  float value, derivative;
};

// 1 / (1 + exp(-z)), from exp(-|z|), and its derivative
__device__ __forceinline__ Act logistic(float z) {
  const float e = expf(-fabsf(z)), above = 1.0f / (1.0f + e), below = e * above;
  return {z < 0.0f ? below : above, below * above};
}

__device__ __forceinline__ Act act_of(Activation activation, float v) {
  float gate, slope;
  if (activation == Activation::kGelu) {
    const float a = fminf(kNormalFarthest, fabsf(v)), half = -0.5f * a, exponent = half * a;
    float e = expf(exponent);
    e = fmaf(e, fmaf(half, a, -exponent), e);  // what the product's rounding lost
    const float t = 1.0f / fmaf(a, kNormalSlope, 1.0f), tail = e * (normal_tail(t) * t);
    gate = v < 0.0f ? tail : 1.0f - tail;
    slope = e * kNormalDensityAtZero;
  } else if (activation == Activation::kGeluTanh) {
    // 0.5 (1 + tanh u) is the logistic function of 2u; beyond kFar it is 0 or 1, and its derivative 0 times a number
    constexpr float kTwice = 1.5957691216057308f, kCubic = kTwice * 0.044715f, kFar = 64.0f;
    const float c = fminf(kFar, fmaxf(-kFar, v)), square = c * c;
    const Act g = logistic(c * fmaf(square, kCubic, kTwice));
    gate = g.value;
    slope = g.derivative * fmaf(square, 3 * kCubic, kTwice);
  } else {
    const Act g = logistic(v);
    gate = g.value;
    slope = g.derivative;
  }
  return {gate, fmaf(v, slope, gate)};
}

template <int kVec>
__device__ __forceinline__ void load_bias(const void* bias, int64_t column, float (&to)[kVec]) {
  if (bias) {
    load(static_cast<const float*>(bias) + column, to);
    return;
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) to[j] = -0.0f;  // added to a number it changes none, -0 included
}

// A block's share of the work: one segment of rows, one tile of columns.
struct Share {
  int64_t first_row, end_row, column;
};

__device__ __forceinline__ int64_t column_tiles(int64_t dim, int vec) { return (dim + kLanes * vec - 1) / (kLanes * vec); }

__device__ __forceinline__ Share share_of(int64_t item, int64_t rows, int64_t dim, int64_t rows_per_segment, int vec) {
  const int64_t tiles = column_tiles(dim, vec), segment = divide(item, tiles);
  const int64_t begin = segment * rows_per_segment, end = begin + rows_per_segment;
  return {begin, end < rows ? end : rows, ((item - segment * tiles) * kLanes + threadIdx.x) * vec};
}

template <class T, int kVec>
__global__ void __launch_bounds__(kLanes* kRowsAtOnce)
    bias_activation_kernel(const __grid_constant__ BiasActivationParams p, const int64_t items,
                           const int64_t rows_per_segment) {
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Share s = share_of(item, p.rows, p.dim, rows_per_segment, kVec);
    if (s.column >= p.dim) continue;
    float bias[kVec], up_bias[kVec];
    load_bias(p.bias, s.column, bias);
    load_bias(p.up_bias, s.column, up_bias);
    for (int64_t row = s.first_row + threadIdx.y; row < s.end_row; row += kRowsAtOnce) {
      const int64_t at = row * p.dim + s.column;
      float x[kVec], up[kVec];
      load(static_cast<const T*>(p.x) + at, x);
      if (p.up) load(static_cast<const T*>(p.up) + at, up);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        x[j] += bias[j];
        x[j] *= act_of(p.activation, x[j]).value;
        if (p.up) x[j] *= up[j] + up_bias[j];
      }
      store(static_cast<T*>(p.out) + at, x);
    }
  }
}

// Adds what the threads of one column hold, in the order of threadIdx.y; row 0 of the block gets the result.
template <int kVec>
__device__ __forceinline__ void add_rows(float (&values)[kVec]) {
  FD_SHARED(float, tile, [kRowsAtOnce][kVec][kLanes]);
  __syncthreads();  // the tile may be read still
#pragma unroll
  for (int j = 0; j < kVec; ++j) tile[threadIdx.y][j][threadIdx.x] = values[j];
  __syncthreads();
  if (threadIdx.y > 0) return;
  for (int y = 1; y < kRowsAtOnce; ++y) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[j] += tile[y][j][threadIdx.x];
  }
}

// The gradients of x and of `up`, and the segment's sums of both, left in the workspace.
template <class T, int kVec>
__global__ void __launch_bounds__(kLanes* kRowsAtOnce)
    bias_activation_backward_kernel(const __grid_constant__ BiasActivationBackwardParams p, const int64_t items) {
  const int kinds = p.up ? 2 : 1;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Share s = share_of(item, p.rows, p.dim, p.rows_per_segment, kVec);
    const bool inside = s.column < p.dim;
    float bias[kVec], up_bias[kVec], sum[kVec], up_sum[kVec];
    load_bias(inside ? p.bias : nullptr, s.column, bias);
    load_bias(inside ? p.up_bias : nullptr, s.column, up_bias);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum[j] = up_sum[j] = 0.0f;
    for (int64_t row = s.first_row + threadIdx.y; inside && row < s.end_row; row += kRowsAtOnce) {
      const int64_t at = row * p.dim + s.column;
      float grad[kVec], x[kVec], up[kVec];
      load(static_cast<const T*>(p.grad_out) + at, grad);
      load(static_cast<const T*>(p.x) + at, x);
      if (p.up) load(static_cast<const T*>(p.up) + at, up);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float v = x[j] + bias[j];
        const Act act = act_of(p.activation, v);
        if (p.up) {
          const float gated = grad[j] * (up[j] + up_bias[j]);
          up[j] = grad[j] * (v * act.value);
          up_sum[j] += up[j];
          grad[j] = gated;
        }
        grad[j] *= act.derivative;
        sum[j] += grad[j];
      }
      store(static_cast<T*>(p.grad_x) + at, grad);
      if (p.up) store(static_cast<T*>(p.grad_up) + at, up);
    }
    if (!p.workspace) continue;
    float* const workspace = static_cast<float*>(p.workspace) + divide(s.first_row, p.rows_per_segment) * kinds * p.dim;
    add_rows(sum);
    if (inside && threadIdx.y == 0) store(workspace + s.column, sum);
    if (!p.up) continue;
    add_rows(up_sum);
    if (inside && threadIdx.y == 0) store(workspace + p.dim + s.column, up_sum);
  }
}

// Adds the segments' sums: a thread its share of them in order, then the shares in order.
__global__ void __launch_bounds__(kSumColumns* kSumSlices)
    bias_activation_sums_kernel(const __grid_constant__ BiasActivationBackwardParams p, const int64_t segments) {
  FD_SHARED(float, tile, [kSumSlices][kSumColumns]);
  const int64_t kinds = p.up ? 2 : 1, columns = kinds * p.dim;
  for (int64_t first = int64_t{blockIdx.x} * kSumColumns; first < columns; first += int64_t{gridDim.x} * kSumColumns) {
    const int64_t column = first + threadIdx.x;
    const int64_t end = column < columns ? divide((threadIdx.y + 1) * segments, kSumSlices) : 0;
    float sum = 0.0f;
    for (int64_t s = divide(threadIdx.y * segments, kSumSlices); s < end; ++s) {
      sum += static_cast<const float*>(p.workspace)[s * columns + column];
    }
    __syncthreads();  // the tile may be read still
    tile[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= columns) continue;
    for (int y = 1; y < kSumSlices; ++y) sum += tile[y][threadIdx.x];
    float* const out = static_cast<float*>(column < p.dim ? p.grad_bias : p.grad_up_bias);
    if (out) out[column < p.dim ? column : column - p.dim] = sum;
  }
}

}  // namespace fastdiff::cuda
