// The smallest logit that top-k, then top-p, keep of each row: exact, without sorting. A radix select over keys that
// order as the logits do, eight bits a pass from the top; the row is read again each pass (from the L2 cache).
#pragma once
#include "kernels/token_sampling/sampling_block.cuh"

namespace fastdiff::cuda::sampling {

constexpr int kThresholdThreads = 256;
constexpr int kThresholdWarps = kThresholdThreads / kWarp;
constexpr int kChunkCells = 4;  // that a warp has in registers
constexpr int kDigits = 256;
constexpr int kCopies = 8;  // of a bin, in neighbouring banks: lanes that fall on one bin wait less for each other

// Sums are of integers, so that the order of the atomics does not matter.
using Sum = unsigned long long;

struct ThresholdTask {
  float* thresholds;  // [rows]
  float unit;         // weights are counted in 1/unit: a power of two, so small that no sum overflows
  float common_inverse;
  int passes;         // until all bits are seen in which logits of this dtype differ
};

struct SelectScratch {
  Sum bins[kDigits * kCopies];
  Sum totals[kDigits];  // from the largest digit down
  Sum below;            // what the chosen digit leaves to be found
  uint32_t digit;
  float maxima[kThresholdWarps];
  SuppressMask masks[kThresholdWarps];
};

// A float's place in the order of all floats.
__device__ __forceinline__ uint32_t key_of(float z) {
  const uint32_t bits = __float_as_uint(z);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
// The float whose key begins with the `bits` highest bits `prefix`, and whose mantissa ends in zeros.
__device__ __forceinline__ float float_of(uint32_t prefix, int bits) {
  const uint32_t rest = bits < 32 ? 0xffffffffu >> bits : 0u, high = prefix << (32 - bits);
  return __uint_as_float(high >> 31 ? high & 0x7fffffffu : ~(high | rest));
}

// f(z) for the logits of the row; ids beyond its end and suppressed ones are -inf.
template <class F>
__device__ __forceinline__ void each_logit(const TokenSampleParams& p, const LogitTile& tile, int64_t row_at,
                                           SelectScratch& scratch, const F& f) {
  const int warp = threadIdx.x / kWarp;
  constexpr int64_t kIds = kChunkCells * kSampleCell;
  for (int64_t first = warp * kIds; first < tile.end; first += kThresholdWarps * kIds) {
    LaneLogits<kChunkCells> z;
    load_allowed(tile, p.dtype, suppressed_ids(p), row_at, first, scratch.masks[warp], z);
#pragma unroll
    for (int c = 0; c < kChunkCells; ++c) {
#pragma unroll
      for (int k = 0; k < kLaneIds; ++k) f(z[c][k]);
    }
  }
}

// The largest logit z with sum(weight of {logits >= z}) >= wanted(sum of all), which is at most the sum of all. Logits
// of weight 0 are not looked at.
template <class Each, class Weight, class Wanted>
__device__ __forceinline__ float radix_select(int passes, SelectScratch& s, const Each& each, const Weight& weight,
                              const Wanted& wanted) {
  const int thread = threadIdx.x;
  uint32_t prefix = 0;
  Sum left = 0;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = 24 - 8 * pass;
    for (int i = thread; i < kDigits * kCopies; i += kThresholdThreads) s.bins[i] = 0;
    __syncthreads();
    each([&](float z) {
      const uint32_t key = key_of(z);
      if (pass > 0 && key >> shift >> 8 != prefix) return;
      const Sum w = weight(z);
      if (w) atomicAdd(&s.bins[(key >> shift & 255u) * kCopies + lane_id() % kCopies], w);
    });
    __syncthreads();
    if (thread < kDigits) {
      Sum total = 0;
      for (int copy = 0; copy < kCopies; ++copy) total += s.bins[thread * kCopies + copy];
      s.totals[kDigits - 1 - thread] = total;
    }
    __syncthreads();
    if (thread < kWarp) {
      const auto target = [&](Sum total) { return (pass == 0 ? wanted(total) : left) - 1; };
      Sum all = 0;
      const Choice<Sum> choice = choose<Sum>(kDigits, [&](Sum total) { return target(all = total); },
                                             [&](int64_t i) { return s.totals[i]; });
      if (thread == 0) {
        s.digit = static_cast<uint32_t>(kDigits - 1 - choice.index);
        s.below = target(all) + 1 - choice.before;
      }
    }
    __syncthreads();
    prefix = prefix << 8 | s.digit;
    left = s.below;
  }
  return float_of(prefix, 8 * passes);
}

// A CUDA block for every row.
__global__ __launch_bounds__(kThresholdThreads, 2) void sample_threshold_kernel(const TokenSampleParams p,
                                                                                const LogitTile tile,
                                                                                const ThresholdTask task) {
  FD_SHARED(SelectScratch, scratch, [1]);
  SelectScratch& s = scratch[0];
  const int warp = threadIdx.x / kWarp;
  for (int64_t row = blockIdx.x; row < p.batch * p.length; row += gridDim.x) {
    const int64_t row_at = row_offset(p.length, tile.batch_stride, tile.row_stride, row);
    const auto each = [&](const auto& f) { each_logit(p, tile, row_at, s, f); };

    float maximum = -kInfinity;
    bool bad = false;
    each([&](float z) {
      maximum = fmaxf(maximum, z);
      bad = bad || !(z < kInfinity);
    });
    maximum = warp_max(maximum);
    if (lane_id() == 0) s.maxima[warp] = maximum;
    bad = __syncthreads_or(bad);
    maximum = warp_max(lane_id() < kThresholdWarps ? s.maxima[lane_id()] : -kInfinity);

    float threshold = -kInfinity;
    const float inverse = inverse_temperature(p, task.common_inverse, row);
    if (!bad && maximum > -kInfinity && inverse != 0.0f) {
      if (p.top_k > 0 && p.top_k < p.vocab - p.suppress_count) {
        threshold = radix_select(task.passes, s, each, [](float) { return Sum{1}; },
                                 [&](Sum) { return static_cast<Sum>(p.top_k); });
      }
      if (p.top_p < 1.0) {
        const auto weight = [&](float z) {
          return z >= threshold ? static_cast<Sum>(expf((z - maximum) * inverse) * task.unit) : Sum{0};
        };
        const auto wanted = [&](Sum total) {
          const Sum share = static_cast<Sum>(ceil(p.top_p * static_cast<double>(total)));
          return share < 1 ? Sum{1} : share > total ? total : share;
        };
        threshold = radix_select(task.passes, s, each, weight, wanted);
      }
    }
    if (threadIdx.x == 0) task.thresholds[row] = threshold;
    __syncthreads();  // the next row writes to the scratch
  }
}

}  // namespace fastdiff::cuda::sampling
