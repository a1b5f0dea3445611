// What a block of 1 024 ids of a row leaves behind, and a row's parts put together. A warp reads a block once, 32 ids a lane,
// all in registers; another warp adds up a row.
#pragma once
#include "kernels/common/logit_block.cuh"
#include "kernels/eos_log_prob/eos_log_prob.h"
#include "kernels/eos_log_prob/log_share.h"

namespace fastdiff::cuda::eos {

constexpr int kBlockWarps = 4;  // of a CUDA block of eos_blocks_kernel
constexpr int kRowWarps = 4;    // rows of a CUDA block of eos_rows_kernel

// A part that has no id at all is measured from 0, so that a NaN among the -inf still shows.
__device__ __forceinline__ float origin(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// The others of a block: 16 terms in fp32, then fp64; NaN where one is NaN or +inf.
__device__ __forceinline__ void add_others(const BlockLogits& z, EosPart& part) {
  float maximum = -kInfinity;
#pragma unroll
  for (int c = 0; c < kCells; ++c) {
#pragma unroll
    for (int k = 0; k < kLaneIds; ++k) maximum = fmaxf(maximum, z[c][k]);
  }
  part.other_max = warp_max(maximum);
  const float from = origin(part.other_max);
  float half[2] = {};
#pragma unroll
  for (int c = 0; c < kCells; ++c) {
#pragma unroll
    for (int k = 0; k < kLaneIds; ++k) half[2 * c / kCells] += expf(z[c][k] - from);
  }
  part.other_sum = warp_sum(static_cast<double>(half[0]) + static_cast<double>(half[1]));
}

// The end tokens among the ids first <= id < last, in fp64 throughout: they are few.
__device__ __forceinline__ void add_end_tokens(const EosLogProbParams& p, const LogitTile& tile, int64_t row,
                                               int64_t first, int64_t last, EosPart& part) {
  part.end_max = -kInfinity;
  part.end_sum = 0.0;
  const IdRange range = ids_between({p.end_tokens, p.end_count}, first, last);
  if (range.from == range.to) return;
  const auto logit = [&](int64_t i) {
    const int64_t id = p.end_tokens[i];
    float z[1] = {-kInfinity};
    if (id >= first && id < last) load(tile.logits, p.dtype, row + id - tile.begin, z);  // else not in order
    return z[0];
  };
  float maximum = -kInfinity;
  for (int64_t i = range.from + lane_id(); i < range.to; i += kWarp) maximum = fmaxf(maximum, logit(i));
  part.end_max = warp_max(maximum);
  double sum = 0.0;
  for (int64_t i = range.from + lane_id(); i < range.to; i += kWarp) {
    sum += exp(static_cast<double>(logit(i)) - origin(part.end_max));
  }
  part.end_sum = warp_sum(sum);
}

// A warp for every block of ids of every row.
__global__ __launch_bounds__(kBlockWarps * kWarp) void eos_blocks_kernel(const EosLogProbParams p, const LogitTile tile) {
  FD_SHARED(uint32_t, masks, [kBlockWarps][kWarp]);
  const int warp = threadIdx.x / kWarp;
  const int64_t blocks = blocks_of(tile.end - tile.begin), work = p.batch * p.length * blocks;
  for (int64_t i = int64_t{blockIdx.x} * kBlockWarps + warp; i < work; i += int64_t{gridDim.x} * kBlockWarps) {
    const int64_t row = divide(i, blocks), first = tile.begin + (i - row * blocks) * kLogitBlock;
    const int64_t last = first + kLogitBlock < tile.end ? first + kLogitBlock : tile.end;
    const int64_t row_at = row_offset(p.length, tile.batch_stride, tile.row_stride, row);
    BlockLogits z;
    load_allowed(tile, p.dtype, {p.excluded, p.excluded_count}, row_at, first, masks[warp], z);
    EosPart part;
    add_others(z, part);
    add_end_tokens(p, tile, row_at, first, last, part);
    if (lane_id() == 0) {
      static_cast<EosPart*>(p.workspace)[row * blocks_of(p.vocab) + first / kLogitBlock] = part;
    }
  }
}

// A warp for every row: lane l adds up the blocks l, l + 32, …, then the lanes are added up, an order that the vocabulary
// alone decides.
__global__ __launch_bounds__(kRowWarps * kWarp) void eos_rows_kernel(const EosLogProbParams p) {
  const int64_t rows = p.batch * p.length, blocks = blocks_of(p.vocab), step = int64_t{gridDim.x} * kRowWarps;
  for (int64_t row = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp; row < rows; row += step) {
    const EosPart* parts = static_cast<const EosPart*>(p.workspace) + row * blocks;
    float end_max = -kInfinity, other_max = -kInfinity;
    for (int64_t b = lane_id(); b < blocks; b += kWarp) {
      end_max = fmaxf(end_max, parts[b].end_max);
      other_max = fmaxf(other_max, parts[b].other_max);
    }
    end_max = warp_max(end_max);
    other_max = warp_max(other_max);
    const double end_from = origin(end_max), other_from = origin(other_max);
    double end_sum = 0.0, other_sum = 0.0;
    for (int64_t b = lane_id(); b < blocks; b += kWarp) {
      const EosPart& part = parts[b];
      if (part.end_sum != 0.0) end_sum += part.end_sum * exp(part.end_max - end_from);
      if (part.other_sum != 0.0) other_sum += part.other_sum * exp(part.other_max - other_from);
    }
    end_sum = warp_sum(end_sum);
    other_sum = warp_sum(other_sum);
    if (lane_id() == 0) p.end_log_prob[row] = log_share(end_max, end_sum, other_max, other_sum);
  }
}

}  // namespace fastdiff::cuda::eos
