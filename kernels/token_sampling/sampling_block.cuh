// What a block of 1 024 ids leaves behind: one warp reads it once, 32 ids a lane, all in registers.
#pragma once
#include "kernels/common/logit_block.cuh"
#include "kernels/token_sampling/sampling_warp.cuh"

namespace fastdiff::cuda::sampling {

constexpr int kBlockWarps = 4;  // a CUDA block of sample_blocks_kernel

struct BlockRecord {
  double cell[kCells];  // sums of the kept ids' exp((z - maximum) / T); unwritten at T = 0
  double others;        // sum of exp(z - maximum) without the first argmax
  double weighted;      // sum of exp(z - maximum) * (z - maximum)
  double end;           // sum of exp(z - maximum) over end tokens, without the first argmax
  float maximum, second;
  int32_t argmax;       // in the block
  bool bad;             // a NaN or +inf: the rest is not written
  bool argmax_is_end;
};

struct Workspace {
  BlockRecord* records;     // [rows, blocks of the vocabulary]
  const float* thresholds;  // [rows]: ids with logits below are not drawn; nullptr: all ids are kept
};

__device__ __forceinline__ IdList suppressed_ids(const TokenSampleParams& p) { return {p.suppress, p.suppress_count}; }

// What logits are multiplied with: 1/T within float's normal numbers, 0 where T = 0.
__device__ __forceinline__ float inverse_temperature(const TokenSampleParams& p, float common, int64_t row) {
  if (!p.temperatures) return common;
  const float t = p.temperatures[row];
  return t > 0.0f ? fmaxf(fminf(1.0f / t, 3.40282347e38f), 1.17549435e-38f) : 0.0f;
}

// The lane's sum for each cell becomes the cell's sum: lanes 4 c + (0 … 3) get that of cell c. At each step a lane
// gives away the half of its cells that the other lane keeps.
__device__ __forceinline__ double cell_sum(const float (&sums)[kCells]) {
  double kept[kCells];
#pragma unroll
  for (int c = 0; c < kCells; ++c) kept[c] = sums[c];
#pragma unroll
  for (int half = kCells / 2; half > 0; half /= 2) {
    const int distance = half * (kWarp / kCells);
    const bool upper = lane_id() & distance;
#pragma unroll
    for (int c = 0; c < half; ++c) {
      const double given = __shfl_xor_sync(kAllLanes, upper ? kept[c] : kept[c + half], distance);
      kept[c] = (upper ? kept[c + half] : kept[c]) + given;
    }
  }
#pragma unroll
  for (int distance = kWarp / kCells / 2; distance > 0; distance /= 2) {
    kept[0] += __shfl_xor_sync(kAllLanes, kept[0], distance);
  }
  return kept[0];
}

// Their weight without the argmax, in fp64 throughout: they are few, and may be far below what fp32 holds.
__device__ __forceinline__ double end_weight(const TokenSampleParams& p, const LogitTile& tile, int64_t row,
                                             int64_t first, float maximum, int64_t argmax, bool& argmax_is_end) {
  double sum = 0.0;
  bool found = false;
  const int64_t last = first + kSampleBlock < tile.end ? first + kSampleBlock : tile.end;
  const IdRange range = ids_between({p.end_tokens, p.end_count}, first, last);
  for (int64_t i = range.from + lane_id(); i < range.to; i += kWarp) {
    const int64_t id = p.end_tokens[i];
    if (id < first || id >= last || has_id(suppressed_ids(p), id)) continue;
    float z[1];
    load(tile.logits, p.dtype, row + id - tile.begin, z);
    if (id == argmax) {
      found = true;
    } else {
      sum += exp(static_cast<double>(z[0]) - static_cast<double>(maximum));
    }
  }
  argmax_is_end = warp_any(found);
  return warp_sum(sum);
}

// The sums over the block; `kept` gets the lane's sums for each cell where these have the same exponentials (T = 1).
__device__ __forceinline__ void sum_block(const BlockLogits& z, float maximum, int argmax, float threshold,
                                          BlockRecord& r, float (&kept)[kCells]) {
  float second = -kInfinity;
  double others = 0.0, weighted = 0.0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float o = 0.0f, q = 0.0f;
#pragma unroll
    for (int c = half * kCells / 2; c < (half + 1) * kCells / 2; ++c) {
      kept[c] = 0.0f;
#pragma unroll
      for (int k = 0; k < kLaneIds; ++k) {
        const float x = z[c][k] - maximum, e = expf(x);
        const bool is_argmax = offset_of(c, k) == argmax;
        second = fmaxf(second, is_argmax ? -kInfinity : z[c][k]);
        o += is_argmax ? 0.0f : e;
        q += e * fmaxf(x, -1e4f);  // 0 * -inf is 0 here
        kept[c] += z[c][k] >= threshold ? e : 0.0f;
      }
    }
    others += o;
    weighted += q;
  }
  r.second = warp_max(second);
  r.others = warp_sum(others);
  r.weighted = warp_sum(weighted);
}

__device__ __forceinline__ void tempered_sums(const BlockLogits& z, float maximum, float inverse, float threshold,
                                              float (&kept)[kCells]) {
#pragma unroll
  for (int c = 0; c < kCells; ++c) {
    kept[c] = 0.0f;
#pragma unroll
    for (int k = 0; k < kLaneIds; ++k) {
      kept[c] += z[c][k] >= threshold ? expf((z[c][k] - maximum) * inverse) : 0.0f;
    }
  }
}

// The largest logit and its first place in the block.
__device__ __forceinline__ void find_maximum(const BlockLogits& z, BlockRecord& r) {
  float maximum = -kInfinity;
  bool bad = false;
#pragma unroll
  for (int c = 0; c < kCells; ++c) {
#pragma unroll
    for (int k = 0; k < kLaneIds; ++k) {
      maximum = fmaxf(maximum, z[c][k]);
      bad = bad || !(z[c][k] < kInfinity);
    }
  }
  r.maximum = warp_max(maximum);
  r.bad = warp_any(bad);
  int place = static_cast<int>(kSampleBlock);
#pragma unroll
  for (int c = kCells - 1; c >= 0; --c) {
#pragma unroll
    for (int k = kLaneIds - 1; k >= 0; --k) {
      if (z[c][k] == r.maximum) place = offset_of(c, k);
    }
  }
  r.argmax = warp_min(place);
}

// A warp for every block of ids of every row.
__global__ __launch_bounds__(kBlockWarps * kWarp) void sample_blocks_kernel(const TokenSampleParams p,
                                                                            const LogitTile tile, const Workspace w,
                                                                            float common_inverse) {
  FD_SHARED(uint32_t, masks, [kBlockWarps][kWarp]);
  const int warp = threadIdx.x / kWarp;
  const int64_t blocks = blocks_of(tile.end - tile.begin), work = p.batch * p.length * blocks;
  for (int64_t i = int64_t{blockIdx.x} * kBlockWarps + warp; i < work; i += int64_t{gridDim.x} * kBlockWarps) {
    const int64_t row = divide(i, blocks), first = tile.begin + (i - row * blocks) * kSampleBlock;
    const int64_t row_at = row_offset(p.length, tile.batch_stride, tile.row_stride, row);
    BlockLogits z;
    load_allowed(tile, p.dtype, suppressed_ids(p), row_at, first, masks[warp], z);

    BlockRecord r{};
    find_maximum(z, r);
    const float inverse = inverse_temperature(p, common_inverse, row);
    double cell = 0.0;
    if (!r.bad && r.maximum > -kInfinity) {
      const float threshold = w.thresholds ? w.thresholds[row] : -kInfinity;
      float kept[kCells];
      sum_block(z, r.maximum, r.argmax, threshold, r, kept);
      if (inverse != 0.0f && inverse != 1.0f) tempered_sums(z, r.maximum, inverse, threshold, kept);
      if (inverse != 0.0f) cell = cell_sum(kept);
      if (p.end_log_prob) r.end = end_weight(p, tile, row_at, first, r.maximum, first + r.argmax, r.argmax_is_end);
    }
    BlockRecord& to = w.records[row * blocks_of(p.vocab) + first / kSampleBlock];
    constexpr int kLanesACell = kWarp / kCells;
    if (inverse != 0.0f && lane_id() % kLanesACell == 0) to.cell[lane_id() / kLanesACell] = cell;
    if (lane_id() != 0) continue;
    to.others = r.others;
    to.weighted = r.weighted;
    to.end = r.end;
    to.maximum = r.maximum;
    to.second = r.second;
    to.argmax = r.argmax;
    to.bad = r.bad;
    to.argmax_is_end = r.argmax_is_end;
  }
}

}  // namespace fastdiff::cuda::sampling
