// Fused AdaLN backward on the device, in two steps of fixed order. First every segment of rows: gradients of x and of
// the branch, and the segment's sums over its rows, left in the workspace. Then the segments' sums, added in order.
// Blocks are laid out as in adaln.cuh; the rows of a block belong to one segment.
#pragma once
#include "kernels/adaln/adaln.cuh"

namespace fastdiff::cuda {

constexpr int kSums = 3;  // a segment's rows in the workspace, each of dim floats:
constexpr int kSumGrad = 0, kSumGradXhat = 1, kSumGate = 2;  // sum g, sum g * xhat, sum grad_residual * branch

constexpr int kFrameThreads = 128, kFrameSlices = 8;  // blocks of the second step: columns, and shares of the segments
constexpr int kWeightThreads = 32, kWeightSlices = 32;

constexpr int backward_blocks(int vec, int chunks) { return vec * chunks == kLargeHeld ? 1 : 2; }

__host__ __device__ __forceinline__ int64_t segments_per_frame(const AdaLNBackwardParams& p) {
  return (p.grad_tokens_per_frame + p.rows_per_segment - 1) / p.rows_per_segment;
}

// Rows that share their modulation: a whole frame of the gradients, or a part of it.
struct Segment {
  int64_t index, first_row, rows;
  int64_t gate, scale;  // where the modulation lies
};

__device__ __forceinline__ Segment segment_of(const AdaLNBackwardParams& p, int64_t index) {
  const int64_t per_frame = segments_per_frame(p);
  const int64_t frame = divide(index, per_frame);
  const int64_t skipped = (index - frame * per_frame) * p.rows_per_segment;  // tokens of the frame before this segment
  const int64_t first_row = frame * p.grad_tokens_per_frame + skipped;
  const int64_t left = p.grad_tokens_per_frame - skipped;
  const int64_t b = divide(first_row, p.tokens), n = first_row - b * p.tokens;
  return {index, first_row, left < p.rows_per_segment ? left : p.rows_per_segment, modulation_row(p.gate, b, n),
          modulation_row(p.scale, b, n)};
}

// This thread's share of the segment's sums: in registers, or, for streamed rows, in the workspace at once.
template <int kVec, int kChunks>
struct SegmentSums {
  float held[kSums][Columns<kVec, kChunks>::kHeld][kVec];
  float* workspace;  // the segment's, or nullptr: no sums are wanted

  __device__ __forceinline__ void clear(const AdaLNBackwardParams& p, const Segment& s) {
    workspace = static_cast<float*>(p.workspace);
    if (workspace) workspace += s.index * kSums * p.dim;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
      for (int i = 0; i < Columns<kVec, kChunks>::kHeld; ++i) fill(held[k][i], 0.0f);
    }
  }

  __device__ __forceinline__ void add(int k, int i, int64_t at, bool first, const float (&v)[kVec]) {
    if constexpr (kChunks != kStreamed) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) held[k][i][j] += v[j];
    } else if (workspace) {
      float sum[kVec];
      fill(sum, 0.0f);
      if (!first) load(workspace + at, sum);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] += v[j];
      store(workspace + at, sum);
    }
  }
};

template <int kVec, int kChunks>
struct BackwardRow {
  int64_t at;  // of the row's first element
  float mean, rstd;
  Columns<kVec, kChunks> columns;
  float grad_xhat[Columns<kVec, kChunks>::kHeld][kVec];  // grad_out * a
  float xhat[Columns<kVec, kChunks>::kHeld][kVec];
};

// grad_xhat and xhat of one chunk; `grad` is grad_out.
template <class X, int kVec, int kChunks>
__device__ __forceinline__ void load_chunk(const AdaLNBackwardParams& p, const Segment& s,
                                           BackwardRow<kVec, kChunks>& row, int i, int64_t column,
                                           float (&grad)[kVec]) {
  float a[kVec];
  load(static_cast<const X*>(p.x) + row.at + column, row.xhat[i]);
  load(p.grad_out, p.out_dtype, row.at + column, grad);
  load_one_plus_scale(p.scale, s.scale + column, a);
  multiply_by_weight(p.weight, column, a);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    row.xhat[i][j] = (row.xhat[i][j] - row.mean) * row.rstd;
    row.grad_xhat[i][j] = grad[j] * a[j];
  }
}

// Rows that were clipped are held in few registers or streamed: the longest rows that are held leave none for it.
template <class X, int kVec, int kChunks>
constexpr bool kCanClip = sizeof(X) == sizeof(__half) && kVec * kChunks != kLargeHeld;

// Where residual + gate * branch was clipped, its gradient is 0.
template <class X, int kVec>
__device__ __forceinline__ void clip_gradient(const AdaLNBackwardParams& p, int64_t gate_at, int64_t at, int64_t column,
                                              float (&grad)[kVec]) {
  float residual[kVec], branch[kVec], gate[kVec];
  load(static_cast<const X*>(p.residual_in) + at + column, residual);
  load(p.branch, p.branch_dtype, at + column, branch);
  load(p.gate.data, p.gate.dtype, gate_at + column, gate);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    if (!(fabsf(residual[j] + gate[j] * branch[j]) < kFloat16Overflow)) grad[j] = 0.0f;
  }
}

// What remains once the row's means are known: grad_x, grad_branch, and the gate's sum.
template <class X, int kVec, int kChunks>
__device__ __forceinline__ void write_gradients(const AdaLNBackwardParams& p, const Segment& s,
                                                BackwardRow<kVec, kChunks>& row, float mean_grad, float mean_grad_xhat,
                                                bool first, SegmentSums<kVec, kChunks>& sums) {
  row.columns.each([&](int i, int64_t column) {
    float grad[kVec], other[kVec], product[kVec];
    if constexpr (kChunks == kStreamed) load_chunk<X>(p, s, row, i, column, grad);
    fill(other, 0.0f);
    if (p.grad_residual_out) load(static_cast<const X*>(p.grad_residual_out) + row.at + column, other);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      grad[j] = row.rstd * (row.grad_xhat[i][j] - mean_grad - row.xhat[i][j] * mean_grad_xhat) + other[j];
    }
    if constexpr (kCanClip<X, kVec, kChunks>) {
      if (p.residual_in) clip_gradient<X>(p, s.gate, row.at, column, grad);
    }
    store(static_cast<X*>(p.grad_x) + row.at + column, grad);
    if (!p.branch) return;
    load(p.gate.data, p.gate.dtype, s.gate + column, other);
#pragma unroll
    for (int j = 0; j < kVec; ++j) product[j] = other[j] * grad[j];
    store(p.grad_branch, p.branch_dtype, row.at + column, product);
    load(p.branch, p.branch_dtype, row.at + column, other);
#pragma unroll
    for (int j = 0; j < kVec; ++j) product[j] = other[j] * grad[j];
    sums.add(kSumGate, i, kSumGate * p.dim + column, first, product);
  });
}

template <class X, int kVec, int kChunks>
__device__ __forceinline__ void backward_row(const AdaLNBackwardParams& p, const Segment& s, int64_t r,
                                             RowSum<2>& row_sums, SegmentSums<kVec, kChunks>& sums) {
  const bool exists = r < s.rows, first = r == 0;
  const int64_t number = s.first_row + r;
  BackwardRow<kVec, kChunks> row;
  row.at = number * p.dim;
  row.mean = exists && !p.rms ? static_cast<const float*>(p.mean)[number] : 0.0f;
  row.rstd = exists ? static_cast<const float*>(p.rstd)[number] : 0.0f;
  row.columns = {exists ? p.dim : 0};
  float totals[2] = {0.0f, 0.0f};  // of grad_xhat, and of grad_xhat * xhat
  row.columns.each([&](int i, int64_t column) {
    float grad[kVec], product[kVec];
    load_chunk<X>(p, s, row, i, column, grad);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      totals[0] += row.grad_xhat[i][j];
      totals[1] += row.grad_xhat[i][j] * row.xhat[i][j];
      product[j] = grad[j] * row.xhat[i][j];
    }
    sums.add(kSumGrad, i, kSumGrad * p.dim + column, first, grad);
    sums.add(kSumGradXhat, i, kSumGradXhat * p.dim + column, first, product);
  });
  row_sums(totals);
  const float dim = static_cast<float>(p.dim);
  write_gradients<X>(p, s, row, p.rms ? 0.0f : totals[0] / dim, totals[1] / dim, first, sums);
}

// The rows of a block add up through shared memory, row 0 first; then the segment's sums go to the workspace.
template <int kVec, int kChunks>
__device__ __forceinline__ void write_sums(const AdaLNBackwardParams& p, SegmentSums<kVec, kChunks>& sums) {
  constexpr int kHeld = Columns<kVec, kChunks>::kHeld;
  FD_DYN_SMEM(float, tile);  // [rows of the block - 1][kHeld * kVec][threads of a row]
  const int sums_wanted = p.branch ? kSums : kSumGate;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    if (k >= sums_wanted) break;
    if (blockDim.y > 1) {
      __syncthreads();  // the tile may be read still
#pragma unroll
      for (int e = 0; e < kHeld * kVec; ++e) {
        if (threadIdx.y > 0) {
          tile[((threadIdx.y - 1) * kHeld * kVec + e) * blockDim.x + threadIdx.x] = sums.held[k][e / kVec][e % kVec];
        }
      }
      __syncthreads();
    }
    if (threadIdx.y > 0) continue;
    for (unsigned y = 1; y < blockDim.y; ++y) {
#pragma unroll
      for (int e = 0; e < kHeld * kVec; ++e) {
        sums.held[k][e / kVec][e % kVec] += tile[((y - 1) * kHeld * kVec + e) * blockDim.x + threadIdx.x];
      }
    }
    Columns<kVec, kChunks>{p.dim}.each(
        [&](int i, int64_t column) { store(sums.workspace + k * p.dim + column, sums.held[k][i]); });
  }
}

template <class X, int kVec, int kChunks>
__global__ void __launch_bounds__(max_threads(kVec, kChunks), backward_blocks(kVec, kChunks))
    adaln_backward_rows_kernel(const __grid_constant__ AdaLNBackwardParams p, const int64_t segments) {
  FD_SHARED(float, scratch, [2][kMaxWarps][2]);
  RowSum<2> row_sums(scratch);
  for (int64_t index = blockIdx.x; index < segments; index += gridDim.x) {
    const Segment s = segment_of(p, index);
    SegmentSums<kVec, kChunks> sums;
    sums.clear(p, s);
    for (int64_t r = 0; r < s.rows; r += blockDim.y) backward_row<X>(p, s, r + threadIdx.y, row_sums, sums);
    if constexpr (kChunks != kStreamed) {
      if (sums.workspace) write_sums(p, sums);
    }
  }
}

// Adds what the threads of one column (threadIdx.x) hold, in the order of threadIdx.y; row 0 gets the result.
template <int kValues, int kThreads, int kSlices>
__device__ __forceinline__ void add_slices(float (&values)[kValues]) {
  FD_SHARED(float, tile, [kSlices][kValues][kThreads]);
  __syncthreads();  // the tile may be read still
#pragma unroll
  for (int k = 0; k < kValues; ++k) tile[threadIdx.y][k][threadIdx.x] = values[k];
  __syncthreads();
  if (threadIdx.y > 0) return;
  for (unsigned y = 1; y < blockDim.y; ++y) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) values[k] += tile[y][k][threadIdx.x];
  }
}

__device__ __forceinline__ void store_one(void* data, DType dtype, int64_t at, float value) {
  const float v[1] = {value};
  if (data) store(data, dtype, at, v);
}

// grad_gate, grad_shift and grad_scale: a block takes kFrameThreads columns of one frame of the gradients.
__global__ void __launch_bounds__(kFrameThreads* kFrameSlices, 1)
    adaln_backward_frames_kernel(const __grid_constant__ AdaLNBackwardParams p, const int64_t frames) {
  const int64_t tiles = (p.dim + kFrameThreads - 1) / kFrameThreads, per_frame = segments_per_frame(p);
  for (int64_t item = blockIdx.x; item < frames * tiles; item += gridDim.x) {
    const int64_t frame = divide(item, tiles);
    const int64_t column = (item - frame * tiles) * kFrameThreads + threadIdx.x;
    const float* workspace = static_cast<const float*>(p.workspace) + frame * per_frame * kSums * p.dim + column;
    float sums[kSums] = {0.0f, 0.0f, 0.0f};
    const int64_t end = column < p.dim ? divide((threadIdx.y + 1) * per_frame, blockDim.y) : 0;
    for (int64_t part = divide(threadIdx.y * per_frame, blockDim.y); part < end; ++part) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        if (k != kSumGate || p.branch) sums[k] += workspace[(part * kSums + k) * p.dim];
      }
    }
    add_slices<kSums, kFrameThreads, kFrameSlices>(sums);
    if (threadIdx.y > 0 || column >= p.dim) continue;
    const float weight = p.weight ? static_cast<const float*>(p.weight)[column] : 1.0f;
    const float bias = p.bias ? static_cast<const float*>(p.bias)[column] : 0.0f;
    const int64_t at = frame * p.dim + column;
    store_one(p.grad_shift, p.grad_shift_dtype, at, sums[kSumGrad]);
    store_one(p.grad_scale, p.grad_scale_dtype, at, weight * sums[kSumGradXhat] + bias * sums[kSumGrad]);
    store_one(p.grad_gate, p.grad_gate_dtype, at, sums[kSumGate]);
  }
}

// grad_weight and grad_bias: a block takes kWeightThreads columns of all segments.
__global__ void __launch_bounds__(kWeightThreads* kWeightSlices, 1)
    adaln_backward_weights_kernel(const __grid_constant__ AdaLNBackwardParams p, const int64_t segments) {
  const int64_t column = int64_t{blockIdx.x} * kWeightThreads + threadIdx.x;
  float sums[2] = {0.0f, 0.0f};  // of (1 + scale) * sum g, and of (1 + scale) * sum g * xhat
  const int64_t end = column < p.dim ? divide((threadIdx.y + 1) * segments, blockDim.y) : 0;
  for (int64_t index = divide(threadIdx.y * segments, blockDim.y); index < end; ++index) {
    float factor[1];
    load_one_plus_scale(p.scale, segment_of(p, index).scale + column, factor);
    const float* workspace = static_cast<const float*>(p.workspace) + index * kSums * p.dim + column;
    sums[0] += factor[0] * workspace[kSumGrad * p.dim];
    sums[1] += factor[0] * workspace[kSumGradXhat * p.dim];
  }
  add_slices<2, kWeightThreads, kWeightSlices>(sums);
  if (threadIdx.y > 0 || column >= p.dim) return;
  if (p.grad_bias) static_cast<float*>(p.grad_bias)[column] = sums[0];
  if (p.grad_weight) static_cast<float*>(p.grad_weight)[column] = sums[1];
}

}  // namespace fastdiff::cuda
