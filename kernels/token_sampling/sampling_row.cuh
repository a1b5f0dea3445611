// What the blocks of a row left behind, put together: the row's statistics and its draw. One warp a row; where the
// logits are gone (lm_head_sample), a CUDA block, whose warps compute those of the drawn cell again.
#pragma once
#include "kernels/common/philox.h"
#include "kernels/token_sampling/sampling_block.cuh"

namespace fastdiff::cuda::sampling {

constexpr int kRowWarps = 4;   // rows of a CUDA block of sample_rows_kernel
constexpr int kHeadWarps = 8;  // warps a row of head_rows_kernel
constexpr int kHeadIds = 4;    // ids whose products a warp takes at once

struct RowStatistics {
  float maximum, second;
  int64_t argmax;
  double others, weighted, end;  // as a block's, around the row's maximum
  bool valid, argmax_is_end;
};

// Lane l adds up the blocks l, l + 32, …, then the lanes are added up: an order that the vocabulary alone decides.
__device__ __forceinline__ RowStatistics combine(const BlockRecord* records, int64_t blocks) {
  RowStatistics s{};
  float maximum = -kInfinity;
  bool bad = false;
  for (int64_t b = lane_id(); b < blocks; b += kWarp) {
    maximum = fmaxf(maximum, records[b].maximum);
    bad = bad || records[b].bad;
  }
  s.maximum = warp_max(maximum);
  s.valid = !warp_any(bad) && s.maximum > -kInfinity;
  if (!s.valid) return s;

  int64_t first = blocks;
  for (int64_t b = lane_id(); b < blocks; b += kWarp) {
    if (records[b].maximum == s.maximum && b < first) first = b;
  }
  first = warp_min(first);
  s.argmax = first * kSampleBlock + records[first].argmax;
  s.argmax_is_end = records[first].argmax_is_end;

  float second = -kInfinity;
  double others = 0.0, weighted = 0.0, end = 0.0;
  for (int64_t b = lane_id(); b < blocks; b += kWarp) {
    const BlockRecord& r = records[b];
    if (r.maximum == -kInfinity) continue;
    const bool own = b == first;  // the row's argmax is in it; the argmax of another block is one of the others
    const double x = static_cast<double>(r.maximum) - s.maximum, scale = exp(x);
    second = fmaxf(second, own ? r.second : r.maximum);
    others += (r.others + (own ? 0 : 1)) * scale;
    weighted += (r.weighted + (r.others + 1) * x) * scale;
    end += (r.end + (!own && r.argmax_is_end)) * scale;
  }
  s.second = warp_max(second);
  s.others = warp_sum(others);
  s.weighted = warp_sum(weighted);
  s.end = warp_sum(end);
  return s;
}

// A cell of kSampleCell ids that a draw fell on, and what is left of its target: the drawn id is the first of the cell
// whose inclusive sum of exp((z - maximum) / T) exceeds it.
struct DrawnCell {
  int64_t first;  // id
  double target;
  float maximum;  // of the block
};

__device__ __forceinline__ DrawnCell draw_cell(const BlockRecord* records, int64_t blocks, float maximum, float inverse,
                                               double u) {
  const auto block_sum = [&](int64_t b) {
    double sum = 0.0;
    for (int c = 0; c < kCells; ++c) sum += records[b].cell[c];
    return sum;
  };
  const auto block_weight = [&](int64_t b) {
    return block_sum(b) * exp((static_cast<double>(records[b].maximum) - maximum) * inverse);
  };
  double wanted = 0.0;
  const Choice<double> block = choose<double>(blocks, [&](double all) { return wanted = u * all; }, block_weight);
  // (wanted - before) · exp((maximum of the row - of the block) / T), written so that nothing overflows
  const double in_block = (wanted - block.before) / block.weight * block_sum(block.index);
  const BlockRecord& r = records[block.index];
  const Choice<double> cell =
      choose<double>(kCells, [&](double) { return in_block; }, [&](int64_t c) { return r.cell[c]; });
  return {block.index * kSampleBlock + cell.index * kSampleCell, in_block - cell.before, r.maximum};
}

struct Drawn {
  int64_t id;
  float logit;
};

// z(i): logit of the cell's id i, -inf where it is not allowed. -1 where no id has a weight above zero, which a cell
// whose logits were computed again may show.
template <class Logit>
__device__ __forceinline__ Drawn draw_id(const DrawnCell& cell, float threshold, float inverse, const Logit& z) {
  const auto weight = [&](int64_t i) -> double {
    const float logit = z(i);
    return logit >= threshold ? expf((logit - cell.maximum) * inverse) : 0.0f;
  };
  const Choice<double> id = choose<double>(kSampleCell, [&](double) { return cell.target; }, weight);
  return id.index < 0 ? Drawn{-1, 0.0f} : Drawn{cell.first + id.index, z(id.index)};
}

__device__ __forceinline__ double uniform_of(const TokenSampleParams& p, int64_t row) {
  const int64_t b = divide(row, p.length);
  const int64_t seed = p.seed_at ? *p.seed_at : p.seed, step = p.step_at ? *p.step_at : p.step;
  const int64_t sequence = p.sequence_ids ? p.sequence_ids[row] : b;
  const int64_t position = p.positions ? p.positions[row] : row - b * p.length;
  return uniform53(philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(sequence),
                          static_cast<uint64_t>(position), static_cast<uint64_t>(step), Draw::kToken));
}

__device__ __forceinline__ bool is_allowed(const TokenSampleParams& p, int64_t id) {
  return id < p.vocab && !has_id(suppressed_ids(p), id);
}

// One lane writes; drawn.id -1: the argmax.
__device__ __forceinline__ void write_row(const TokenSampleParams& p, int64_t row, const RowStatistics& s,
                                          const Drawn& drawn) {
  const float nan = __builtin_nanf("");
  const double log_normaliser = log1p(s.others);
  const bool is_argmax = drawn.id < 0 || drawn.id == s.argmax;
  const double above = is_argmax ? 0.0 : static_cast<double>(drawn.logit) - s.maximum;
  const double log_end = s.argmax_is_end ? log1p(s.end) : log(s.end);
  p.token[row] = !s.valid ? -1 : is_argmax ? s.argmax : drawn.id;
  p.log_prob[row] = s.valid ? static_cast<float>(above - log_normaliser) : nan;
  p.entropy[row] = s.valid ? static_cast<float>(log_normaliser - s.weighted / (1.0 + s.others)) : nan;
  const double gap = static_cast<double>(s.second) - s.maximum;
  p.margin[row] = s.valid ? static_cast<float>((0.0 - expm1(gap)) / (1.0 + s.others)) : nan;
  if (p.end_log_prob) p.end_log_prob[row] = s.valid ? static_cast<float>(log_end - log_normaliser) : nan;
}

// A warp for every row; the logits are there.
__global__ __launch_bounds__(kRowWarps * kWarp, 4) void sample_rows_kernel(const TokenSampleParams p, const Workspace w,
                                                                        float common_inverse) {
  const int64_t rows = p.batch * p.length, blocks = blocks_of(p.vocab);
  const int64_t step = int64_t{gridDim.x} * kRowWarps;
  for (int64_t row = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp; row < rows; row += step) {
    const BlockRecord* records = w.records + row * blocks;
    const float inverse = inverse_temperature(p, common_inverse, row);
    const RowStatistics s = combine(records, blocks);
    Drawn drawn{-1, 0.0f};
    if (s.valid && inverse != 0.0f) {
      const DrawnCell cell = draw_cell(records, blocks, s.maximum, inverse, uniform_of(p, row));
      const int64_t at = row_offset(p.length, p.batch_stride, p.row_stride, row) + cell.first;
      const auto logit = [&](int64_t i) {
        float z[1] = {-kInfinity};
        if (is_allowed(p, cell.first + i)) load(p.logits, p.dtype, at + i, z);
        return z[0];
      };
      drawn = draw_id(cell, w.thresholds ? w.thresholds[row] : -kInfinity, inverse, logit);
    }
    if (lane_id() == 0) write_row(p, row, s, drawn);
  }
}

// Logits of kHeadIds ids of the cell from its id i on: products in fp32, added in an order that `dim` alone decides.
template <class T, int kVec>
__device__ __forceinline__ void head_logits(const LmHeadSampleParams& h, const T* hidden, int64_t first, int i,
                                            float* cell_logits) {
  const TokenSampleParams& p = h.sample;
  const T* weight = static_cast<const T*>(h.weight);
  float sums[kHeadIds] = {};
  for (int64_t d = lane_id() * kVec; d < h.dim; d += kWarp * kVec) {
    float x[kVec];
    load(hidden + d, x);
#pragma unroll
    for (int n = 0; n < kHeadIds; ++n) {
      if (first + i + n >= p.vocab) break;
      float v[kVec];
      load(weight + (first + i + n) * h.weight_stride + d, v);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sums[n] += x[j] * v[j];
    }
  }
#pragma unroll
  for (int n = 0; n < kHeadIds; ++n) {
    const float sum = warp_reduce(sums[n], [](float a, float b) { return a + b; });
    const int64_t id = first + i + n;
    if (lane_id() != n) continue;
    float z = -kInfinity;
    if (is_allowed(p, id)) {
      const float bias = h.bias ? to_float(static_cast<const T*>(h.bias)[id]) : 0.0f;
      z = to_float(from_float<T>(sum + bias));
    }
    cell_logits[i + n] = z;
  }
}

// A CUDA block for every row.
template <class T, int kVec>
__global__ __launch_bounds__(kHeadWarps * kWarp, 2) void head_rows_kernel(const LmHeadSampleParams h, const Workspace w,
                                                                       float common_inverse) {
  FD_SHARED(float, cell_logits, [kSampleCell]);
  FD_SHARED(int64_t, drawn_cell, [1]);
  const TokenSampleParams& p = h.sample;
  const int warp = threadIdx.x / kWarp;
  const int64_t blocks = blocks_of(p.vocab);
  for (int64_t row = blockIdx.x; row < p.batch * p.length; row += gridDim.x) {
    const float inverse = inverse_temperature(p, common_inverse, row);
    RowStatistics s{};
    DrawnCell cell{-1, 0.0, 0.0f};
    if (warp == 0) {
      const BlockRecord* records = w.records + row * blocks;
      s = combine(records, blocks);
      if (s.valid && inverse != 0.0f) cell = draw_cell(records, blocks, s.maximum, inverse, uniform_of(p, row));
      if (lane_id() == 0) drawn_cell[0] = cell.first;
    }
    __syncthreads();
    const int64_t first = drawn_cell[0];
    if (first >= 0) {
      const T* hidden = static_cast<const T*>(h.hidden) + row * h.dim;
      for (int i = warp * kHeadIds; i < kSampleCell; i += kHeadWarps * kHeadIds) {
        head_logits<T, kVec>(h, hidden, first, i, cell_logits);
      }
    }
    __syncthreads();
    if (warp == 0) {  // the others wait for it at the next row's first barrier, before they write to cell_logits again
      Drawn drawn{-1, 0.0f};
      if (first >= 0) drawn = draw_id(cell, -kInfinity, inverse, [&](int64_t i) { return cell_logits[i]; });
      if (lane_id() == 0) write_row(p, row, s, drawn);
    }
  }
}

}  // namespace fastdiff::cuda::sampling
