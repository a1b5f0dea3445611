// A block of 1 024 ids of a row of logits in a warp's registers, 32 ids a lane.
#pragma once
#include "kernels/common/cuda_dtype.cuh"
#include "kernels/common/logit_tiles.h"
#include "kernels/common/warp.cuh"

namespace fastdiff::cuda {

constexpr int kCells = static_cast<int>(kLogitBlock / kLogitCell);
constexpr int kLaneIds = static_cast<int>(kLogitCell) / kWarp;  // neighbours that a lane has of every cell

// Of kN cells: z[c][k] is id kLogitCell * c + kLaneIds * lane + k, -inf where that does not exist or is suppressed.
// The same for all dtypes and alignments, so that sums are too.
template <int kN>
using LaneLogits = float[kN][kLaneIds];
using BlockLogits = LaneLogits<kCells>;
using SuppressMask = uint32_t[kWarp];  // a bit for every id that a lane has

__device__ __forceinline__ int offset_of(int cell, int k) {
  return static_cast<int>(kLogitCell) * cell + kLaneIds * lane_id() + k;
}

// Logits of the ids begin <= id < end of all rows: the vocabulary, or a tile of it.
struct LogitTile {
  const void* logits;  // [batch, length, end - begin]
  int64_t batch_stride, row_stride;
  int64_t begin, end;  // begin: a multiple of kLogitBlock
};

// Ids in ascending order, no id twice.
struct IdList {
  const int64_t* ids;
  int64_t count;
};
struct IdRange {  // of places in a list
  int64_t from, to;
};
__device__ __forceinline__ IdRange ids_between(const IdList& list, int64_t first, int64_t last) {
  const int64_t from = count_below(list.ids, list.count, first);
  return {from, from + count_below(list.ids + from, list.count - from, last)};
}
__device__ __forceinline__ bool has_id(const IdList& list, int64_t id) {
  const int64_t place = count_below(list.ids, list.count, id);
  return place < list.count && list.ids[place] == id;
}

__host__ __device__ __forceinline__ int64_t blocks_of(int64_t ids) { return (ids + kLogitBlock - 1) / kLogitBlock; }

// Where the row b * length + l begins, in elements.
__device__ __forceinline__ int64_t row_offset(int64_t length, int64_t batch_stride, int64_t row_stride, int64_t row) {
  const int64_t b = divide(row, length);
  return b * batch_stride + (row - b * length) * row_stride;
}

// kN cells from `at` on, where the row has `ids` more.
template <int kN, class T>
__device__ __forceinline__ void load_block(const T* at, int64_t ids, LaneLogits<kN>& z) {
  const bool aligned = reinterpret_cast<uintptr_t>(at) % (kLaneIds * sizeof(T)) == 0;
  if (aligned && ids >= kN * kLogitCell) {
#pragma unroll
    for (int c = 0; c < kN; ++c) load(at + offset_of(c, 0), z[c]);
  } else {
#pragma unroll
    for (int c = 0; c < kN; ++c) {
#pragma unroll
      for (int k = 0; k < kLaneIds; ++k) {
        z[c][k] = -kInfinity;
        if (offset_of(c, k) < ids) z[c][k] = to_float(at[offset_of(c, k)]);
      }
    }
  }
}

// Suppressed ids of the cells that begin with id `first` become -inf. `mask` is the warp's own.
template <int kN>
__device__ __forceinline__ void suppress(const IdList& suppressed, int64_t first, SuppressMask& mask,
                                         LaneLogits<kN>& z) {
  if (suppressed.count == 0) return;
  const IdRange range = ids_between(suppressed, first, first + kN * kLogitCell);
  if (range.from == range.to) return;
  mask[lane_id()] = 0;
  __syncwarp();
  for (int64_t i = range.from + lane_id(); i < range.to; i += kWarp) {
    const int64_t offset = suppressed.ids[i] - first;
    if (offset < 0 || offset >= kN * kLogitCell) continue;  // a list that is not in order
    const int in_cell = static_cast<int>(offset % kLogitCell);
    const int bit = static_cast<int>(offset / kLogitCell) * kLaneIds + in_cell % kLaneIds;
    atomicOr(&mask[in_cell / kLaneIds], 1u << bit);
  }
  __syncwarp();
  const uint32_t mine = mask[lane_id()];
#pragma unroll
  for (int c = 0; c < kN; ++c) {
#pragma unroll
    for (int k = 0; k < kLaneIds; ++k) {
      if (mine >> (c * kLaneIds + k) & 1u) z[c][k] = -kInfinity;
    }
  }
}

// Cells from id `first` on, of a row that begins, with the tile's first id, at element `row`.
template <int kN>
__device__ __forceinline__ void load_allowed(const LogitTile& tile, DType dtype, const IdList& suppressed, int64_t row,
                                             int64_t first, SuppressMask& mask, LaneLogits<kN>& z) {
  const int64_t at = row + first - tile.begin, ids = tile.end - first;
  if (dtype == DType::kFloat32) {
    load_block(static_cast<const float*>(tile.logits) + at, ids, z);
  } else if (dtype == DType::kBFloat16) {
    load_block(static_cast<const __nv_bfloat16*>(tile.logits) + at, ids, z);
  } else {
    load_block(static_cast<const __half*>(tile.logits) + at, ids, z);
  }
  suppress(suppressed, first, mask, z);
}

}  // namespace fastdiff::cuda
