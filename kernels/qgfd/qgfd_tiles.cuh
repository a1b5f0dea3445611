// Products of tiles in shared memory, by one warp for 16 of their rows, and how tiles get there. 16-bit floats are
// multiplied by tensor cores, fp32 by plain fused multiply-adds (never as TF32); both hold the result in mma's layout:
// acc[n][i] is row g + 8 (i / 2), column 8 n + 2 t + i % 2 in lane 4 g + t.
#pragma once
#include "kernels/common/cuda_dtype.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/warp.cuh"

namespace fastdiff::cuda::qgfd {

constexpr int kTile = 64;  // rows, and columns, of a tile of M
constexpr int kWarpRows = 16;
constexpr int kPieceBytes = 16;
constexpr int kChunkBytes = 128;  // of a row: what a stage of the ring holds of 64 rows

template <class T>
constexpr int kPiece = kPieceBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
// 16 bytes more than a multiple of 32: eight rows of a matrix lie in different banks.
template <class T>
constexpr int kChunkStride = kChunk<T> + kPiece<T>;

// [batch, heads, rows, dim] read in place; head h of the query uses head h / group.
struct Operand {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
  int32_t group;
  bool aligned;  // every row begins at a multiple of 16 bytes

  template <class T>
  __device__ __forceinline__ const T* head(int64_t batch, int64_t head) const {
    return static_cast<const T*>(data) + batch * batch_stride + head / group * head_stride;
  }
};

// Copies `width` elements of each of `count` rows, from row `row` and column `column` on, as one thread of the block;
// what lies beyond `rows` and `dim` becomes zero. The copies may be in flight until copy_async_wait.
template <class T>
__device__ __forceinline__ void copy_chunk(const Operand& from, const T* head, int row, int rows, int column, int dim,
                                           T* to, int stride, int count = kTile, int width = kChunk<T>) {
  constexpr int kPieces = kChunk<T> / kPiece<T>;
  const auto place = [&](int i, int& r, int& c) {
    r = i / kPieces;
    c = i % kPieces * kPiece<T>;
    return row + r < rows && column + c < dim;
  };
  const T* first = head + row * from.row_stride + column;
  int r, c;
  if (from.aligned) {
#pragma unroll 4
    for (int i = threadIdx.x; i < count * kPieces; i += blockDim.x) {
      const bool inside = place(i, r, c);
      if (c >= width) continue;
      copy_async_16(to + r * stride + c, inside ? first + r * from.row_stride + c : head, inside);
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < count * kPieces; i += blockDim.x) {
    const bool inside = place(i, r, c);
    if (c >= width) continue;
    Pack<T, kPiece<T>> piece;
#pragma unroll
    for (int k = 0; k < kPiece<T>; ++k) {
      piece.element[k] = inside ? first[r * from.row_stride + c + k] : from_float<T>(0.0f);
    }
    *reinterpret_cast<Pack<T, kPiece<T>>*>(to + r * stride + c) = piece;
  }
}

__device__ __forceinline__ uint32_t pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}
__device__ __forceinline__ uint32_t pack(__half, float low, float high) {
  const __half2 two = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}

// A warp's accumulators to 16 rows of floats in shared memory.
template <int kN>
__device__ __forceinline__ void store_rows(const float (&acc)[kN][4], float* to, int stride) {
  to += lane_id() / 4 * stride + lane_id() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float two[2] = {acc[n][2 * half], acc[n][2 * half + 1]};
      store(to + 8 * half * stride + 8 * n, two);
    }
  }
}

// acc += a bᵀ: 16 rows of a, the first `columns` of the 8 kN rows of b, the first `depth` <= kChunk elements of each (up
// to a multiple of 16 they must be there).
template <class T, int kN>
__device__ __forceinline__ void multiply_rows(float (&acc)[kN][4], const T* a, int a_stride, const T* b, int b_stride,
                                              int depth, int columns = 8 * kN) {
  const int lane = lane_id();
  a += lane % 16 * a_stride + lane / 16 * 8;
  b += (lane % 8 + lane / 16 * 8) * b_stride + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < kChunk<T>; k += 16) {
    if (k >= depth) break;
    uint32_t left[4];
    ldmatrix_x4(left, a + k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      if (8 * n >= columns) break;
      uint32_t right[4];
      ldmatrix_x4(right, b + 8 * n * b_stride + k);
      mma_m16n8k16<T>(acc[n], left, right[0], right[1]);
      mma_m16n8k16<T>(acc[n + 1], left, right[2], right[3]);
    }
  }
}

template <int kN>
__device__ __forceinline__ void multiply_rows(float (&acc)[kN][4], const float* a, int a_stride, const float* b,
                                              int b_stride, int depth, int columns = 8 * kN) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll 1
  for (int k = 0; k < depth; k += 4) {
    float left[2][4];
    load(a + g * a_stride + k, left[0]);
    load(a + (g + 8) * a_stride + k, left[1]);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (8 * n >= columns) break;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float right[4];
        load(b + (8 * n + 2 * t + c) * b_stride + k, right);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[n][c] = fmaf(left[0][i], right[i], acc[n][c]);
          acc[n][2 + c] = fmaf(left[1][i], right[i], acc[n][2 + c]);
        }
      }
    }
  }
}

// Weights, 16 rows x 64 columns in mma's layout, become the left operand of a product: 16-bit ones in registers, fp32
// ones in shared memory of the warp's own.
template <class T>
struct Weights {
  static constexpr int kStored = 0;  // elements in shared memory, a warp
  uint32_t fragment[4][4];

  __device__ __forceinline__ void set(const float (&w)[8][4], T*) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 2 * k + i / 2, c = i % 2 * 2;
        fragment[k][i] = pack(T(), w[n][c], w[n][c + 1]);
      }
    }
  }
};
constexpr int kWeightStride = kTile + 4;
template <>
struct Weights<float> {
  static constexpr int kStored = kWarpRows * kWeightStride;
  const float* stored;

  __device__ __forceinline__ void set(const float (&w)[8][4], float* to) {
    stored = to;
    __syncwarp();  // the others have read what was there
    store_rows(w, to, kWeightStride);
    __syncwarp();
  }
};
// acc[kFirst...] += left b: 16 columns of weights, 16 rows of b, of whose 8 kN columns the first `columns` count.
template <class T, int kFirst, int kN, int kAll>
__device__ __forceinline__ void multiply_fragment(float (&acc)[kAll][4], const uint32_t (&left)[4], const T* b,
                                                  int b_stride, int columns = 8 * kN) {
  const int lane = lane_id();
  b += lane % 16 * b_stride + lane / 16 * 8;
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    if (8 * n >= columns) break;
    uint32_t right[4];
    ldmatrix_x4_trans(right, b + 8 * n);
    mma_m16n8k16<T>(acc[kFirst + n], left, right[0], right[1]);
    mma_m16n8k16<T>(acc[kFirst + n + 1], left, right[2], right[3]);
  }
}

// acc[kFirst...] += weights b for weights in shared memory, 16 rows x `depth` columns, a multiple of 16.
template <int kFirst, int kN, class T, int kAll>
__device__ __forceinline__ void multiply_stored(float (&acc)[kAll][4], const T* weights, int stride, const T* b,
                                                int b_stride, int depth, int columns = 8 * kN) {
  const int lane = lane_id();
  weights += lane % 16 * stride + lane / 16 * 8;
#pragma unroll 1
  for (int k = 0; k < depth; k += 16) {
    uint32_t left[4];
    ldmatrix_x4(left, weights + k);
    multiply_fragment<T, kFirst, kN>(acc, left, b + k * b_stride, b_stride, columns);
  }
}

template <int kFirst, int kN, int kAll>
__device__ __forceinline__ void multiply_stored(float (&acc)[kAll][4], const float* weights, int stride, const float* b,
                                                int b_stride, int depth, int columns = 8 * kN) {
  weights += lane_id() / 4 * stride;
  b += lane_id() % 4 * 2;
#pragma unroll 1
  for (int k = 0; k < depth; k += 4) {
    float left[2][4];
    load(weights + k, left[0]);
    load(weights + 8 * stride + k, left[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (8 * n >= columns) break;
        float right[2];
        load(b + (k + i) * b_stride + 8 * n, right);
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[kFirst + n][c] = fmaf(left[c / 2][i], right[c % 2], acc[kFirst + n][c]);
      }
    }
  }
}

// acc[kFirst...] += weights b: 64 rows of b with 8 kN columns.
template <int kFirst, int kN, class T, int kAll>
__device__ __forceinline__ void multiply_values(float (&acc)[kAll][4], const Weights<T>& weights, const T* b,
                                                int b_stride) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    multiply_fragment<T, kFirst, kN>(acc, weights.fragment[k], b + 16 * k * b_stride, b_stride);
  }
}
template <int kFirst, int kN, int kAll>
__device__ __forceinline__ void multiply_values(float (&acc)[kAll][4], const Weights<float>& weights, const float* b,
                                                int b_stride) {
  multiply_stored<kFirst, kN>(acc, weights.stored, kWeightStride, b, b_stride, kTile);
}

// The sum, or maximum, over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}
__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

}  // namespace fastdiff::cuda::qgfd
