// Fused AdaLN forward on the device. See README.md for the mathematics and adaln.h for the parameters.
//
// blockDim = (threads of a row, rows of a block). A thread holds kChunks chunks of kVec neighbouring elements of its
// row in registers; kStreamed kernels hold nothing and read the row again, for rows too long for that. kVec = 1 serves
// operands that are not aligned for vector accesses. x's type X is compiled in, the other operands' are looked up.
#pragma once
#include "kernels/adaln/adaln.h"
#include "kernels/common/cuda_dtype.cuh"
#include "kernels/common/reduce.cuh"

namespace fastdiff::cuda {

constexpr int kStreamed = 0;    // for kChunks
constexpr int kSmallHeld = 8;   // elements a thread holds of rows of up to 8 * 256 elements ...
constexpr int kLargeHeld = 16;  // ... and of rows of up to 16 * 384

constexpr int max_threads(int vec, int chunks) { return vec * chunks == kLargeHeld ? 384 : 256; }

// Blocks that fit on a multiprocessor: what bounds the registers, as low as goes without spilling.
constexpr int forward_blocks(int vec, int chunks) {
  return vec * chunks == kSmallHeld ? 4 : vec * chunks == kLargeHeld ? 2 : 3;
}

// The elements of one row that a thread works on: chunks of kVec neighbours, blockDim.x chunks apart.
template <int kVec, int kChunks>
struct Columns {
  int64_t dim;  // 0: there is nothing to do

  static constexpr int kHeld = kChunks == kStreamed ? 1 : kChunks;  // chunks in registers

  // f(i, column) for every chunk: its place among the held ones and its first element
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    if constexpr (kChunks == kStreamed) {
      for (int64_t c = int64_t{threadIdx.x} * kVec; c < dim; c += int64_t{blockDim.x} * kVec) f(0, c);
    } else {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int64_t c = (i * blockDim.x + threadIdx.x) * kVec;
        if (c < dim) f(i, c);
      }
    }
  }
};

// Where row n of batch entry b finds its modulation.
__device__ __forceinline__ int64_t modulation_row(const Modulation& m, int64_t b, int64_t n) {
  return b * m.batch_stride + (m.frame_stride == 0 ? 0 : divide(n, m.tokens_per_frame) * m.frame_stride);
}

template <int kVec>
__device__ __forceinline__ void fill(float (&v)[kVec], float value) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) v[j] = value;
}

// 1 + scale, and weight * (1 + scale)
template <int kVec>
__device__ __forceinline__ void load_one_plus_scale(const Modulation& scale, int64_t at, float (&v)[kVec]) {
  fill(v, 0.0f);
  if (scale.data) load(scale.data, scale.dtype, at, v);
#pragma unroll
  for (int j = 0; j < kVec; ++j) v[j] += 1.0f;
}

template <int kVec>
__device__ __forceinline__ void multiply_by_weight(const void* weight, int64_t column, float (&v)[kVec]) {
  if (!weight) return;
  float w[kVec];
  load(static_cast<const float*>(weight) + column, w);
#pragma unroll
  for (int j = 0; j < kVec; ++j) v[j] *= w[j];
}

// One row of a block's rows, and where its modulation lies.
struct ForwardRow {
  int64_t at;  // of the row's first element
  int64_t gate, shift, scale;
};

struct RowStatistics {
  float mean, correction, rstd;  // xhat = ((x - mean) - correction) * rstd
};

__device__ __forceinline__ float clip(float v, float limit) {  // a NaN stays one
  return v > limit ? limit : v < -limit ? -limit : v;
}

// Reads the row: x, or residual + gate * branch, rounded and stored. Leaves it in `held` and returns this thread's sum.
template <class X, int kVec, int kChunks>
__device__ __forceinline__ float read_row(const AdaLNForwardParams& p, const ForwardRow& row,
                                          const Columns<kVec, kChunks>& columns,
                                          float (&held)[Columns<kVec, kChunks>::kHeld][kVec]) {
  float sum = 0.0f;
  const float limit = p.saturate && p.x_dtype == DType::kFloat16 ? kFloat16Largest : __builtin_huge_valf();
  columns.each([&](int i, int64_t column) {
    load(static_cast<const X*>(p.x) + row.at + column, held[i]);
    if (p.branch) {
      float branch[kVec], gate[kVec];
      load(p.branch, p.branch_dtype, row.at + column, branch);
      load(p.gate.data, p.gate.dtype, row.gate + column, gate);
#pragma unroll
      for (int j = 0; j < kVec; ++j) held[i][j] = to_float(from_float<X>(clip(held[i][j] + gate[j] * branch[j], limit)));
      store(static_cast<X*>(p.residual_out) + row.at + column, held[i]);
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum += held[i][j];
  });
  return sum;
}

// The second look at the row: from registers, or from memory where it was streamed. A thread reads of residual_out
// only what it stored itself.
template <class X, int kVec, int kChunks>
__device__ __forceinline__ void reread(const AdaLNForwardParams& p, int64_t at, float (&chunk)[kVec]) {
  if constexpr (kChunks == kStreamed) load(static_cast<const X*>(p.branch ? p.residual_out : p.x) + at, chunk);
}

// Two passes; the second also sums x - mean, which would be 0 in exact arithmetic, and corrects the mean with it.
template <class X, int kVec, int kChunks>
__device__ __forceinline__ RowStatistics row_statistics(const AdaLNForwardParams& p, const ForwardRow& row,
                                                        const Columns<kVec, kChunks>& columns, float sum,
                                                        float (&held)[Columns<kVec, kChunks>::kHeld][kVec],
                                                        RowSum<1>& row_sum, RowSum<2>& row_sums) {
  const float dim = static_cast<float>(p.dim);
  float mean[1] = {sum};
  if (p.rms) {
    mean[0] = 0.0f;
  } else {
    row_sum(mean);
    mean[0] /= dim;
  }
  float sums[2] = {0.0f, 0.0f};  // of x - mean, and of its square
  columns.each([&](int i, int64_t column) {
    reread<X, kVec, kChunks>(p, row.at + column, held[i]);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float d = held[i][j] - mean[0];
      sums[0] += d;
      sums[1] += d * d;
    }
  });
  row_sums(sums);
  const float correction = p.rms ? 0.0f : sums[0] / dim;
  return {mean[0], correction, rsqrtf(sums[1] / dim - correction * correction + static_cast<float>(p.eps))};
}

// out = xhat * a + c, with a = weight * (1 + scale) and c = bias * (1 + scale) + shift
template <class X, int kVec, int kChunks>
__device__ __forceinline__ void write_row(const AdaLNForwardParams& p, const ForwardRow& row,
                                          const Columns<kVec, kChunks>& columns, const RowStatistics& s,
                                          float (&held)[Columns<kVec, kChunks>::kHeld][kVec]) {
  columns.each([&](int i, int64_t column) {
    reread<X, kVec, kChunks>(p, row.at + column, held[i]);
    float a[kVec], c[kVec], bias[kVec];
    load_one_plus_scale(p.scale, row.scale + column, a);
    fill(c, 0.0f);
    if (p.shift.data) load(p.shift.data, p.shift.dtype, row.shift + column, c);
    if (p.bias) {
      load(static_cast<const float*>(p.bias) + column, bias);
#pragma unroll
      for (int j = 0; j < kVec; ++j) c[j] += bias[j] * a[j];
    }
    multiply_by_weight(p.weight, column, a);
#pragma unroll
    for (int j = 0; j < kVec; ++j) c[j] += ((held[i][j] - s.mean) - s.correction) * s.rstd * a[j];
    store(p.out, p.out_dtype, row.at + column, c);
  });
}

template <class X, int kVec, int kChunks>
__global__ void __launch_bounds__(max_threads(kVec, kChunks), forward_blocks(kVec, kChunks))
    adaln_forward_kernel(const __grid_constant__ AdaLNForwardParams p) {
  FD_SHARED(float, scratch, [2][kMaxWarps][1]);
  FD_SHARED(float, scratch_of_two, [2][kMaxWarps][2]);
  RowSum<1> row_sum(scratch);
  RowSum<2> row_sums(scratch_of_two);
  const int64_t rows = p.batch * p.tokens;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < rows; first += int64_t{gridDim.x} * blockDim.y) {
    const int64_t r = first + threadIdx.y;
    const bool exists = r < rows;  // the last block's spare rows do nothing but meet the barriers
    const int64_t b = divide(r, p.tokens), n = r - b * p.tokens;
    const ForwardRow row{r * p.dim, modulation_row(p.gate, b, n), modulation_row(p.shift, b, n),
                         modulation_row(p.scale, b, n)};
    const Columns<kVec, kChunks> columns{exists ? p.dim : 0};
    float held[columns.kHeld][kVec];
    const float sum = read_row<X>(p, row, columns, held);
    const RowStatistics s = row_statistics<X>(p, row, columns, sum, held, row_sum, row_sums);
    write_row<X>(p, row, columns, s, held);
    if (exists && threadIdx.x == 0) {
      if (p.mean && !p.rms) static_cast<float*>(p.mean)[r] = s.mean + s.correction;
      if (p.rstd) static_cast<float*>(p.rstd)[r] = s.rstd;
    }
  }
}

}  // namespace fastdiff::cuda
