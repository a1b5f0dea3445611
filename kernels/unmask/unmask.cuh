// unmask_ on the device: one block a row. See README.md for the rules and unmask_order.h for keys and scores.
//
// A candidate's place in the order is one 64-bit number, kept for every position of the row in shared memory (in the
// workspace where the row is too long for that). A thread reads only the places that it wrote itself.
#pragma once
#include "kernels/common/reduce.cuh"
#include "kernels/unmask/unmask.h"
#include "kernels/unmask/unmask_order.h"

namespace fastdiff::cuda::unmasking {

using namespace fastdiff::unmasking;

constexpr int kUnmaskThreads = 256;
constexpr int64_t kSharedPlaces = 4096;  // positions a row whose places are kept in shared memory

// Larger first: the key, then the position, the lower first. Never 0, which stands for no candidate.
__device__ __forceinline__ uint64_t place_of(int32_t key, int64_t position) {
  return static_cast<uint64_t>(static_cast<uint32_t>(key) ^ 0x80000000u) << 32 |
         (0xffffffffu - static_cast<uint32_t>(position));
}
__device__ __forceinline__ int32_t key_at(uint64_t place) {
  return static_cast<int32_t>(static_cast<uint32_t>(place >> 32) ^ 0x80000000u);
}
__device__ __forceinline__ int64_t position_at(uint64_t place) { return 0xffffffffu - static_cast<uint32_t>(place); }

template <class T>
__device__ __forceinline__ T exchanged(T value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

struct Tally {  // candidates, and the sum of their entropies
  int64_t count;
  double entropy;
  static __device__ __forceinline__ Tally none() { return {0, 0.0}; }
  __device__ __forceinline__ Tally with_lane(int distance) const {
    return {count + exchanged(count, distance), entropy + exchanged(entropy, distance)};
  }
};

struct Extent {  // the last and the first place, and how many there are
  uint64_t low, high;
  int64_t count;
  static __device__ __forceinline__ Extent none() { return {~uint64_t{0}, 0, 0}; }
  __device__ __forceinline__ Extent with_lane(int distance) const {
    const uint64_t l = exchanged(low, distance), h = exchanged(high, distance);
    return {l < low ? l : low, h > high ? h : high, count + exchanged(count, distance)};
  }
};

// Combines a value of every thread of the block, in a fixed order; all threads must call, and all get the result.
// Each use takes the other half of `scratch`, as in reduce.cuh's RowSum.
template <class T>
class BlockReduce {
 public:
  using Scratch = T[2][kUnmaskThreads / kWarp];

  __device__ explicit BlockReduce(Scratch& scratch) : scratch_(scratch) {}

  __device__ __forceinline__ T operator()(T value) {
    value = over_warp(value);
    T* const place = scratch_[half_];
    half_ ^= 1;
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) place[threadIdx.x / kWarp] = value;
    __syncthreads();
    return over_warp(lane < kUnmaskThreads / kWarp ? place[lane] : T::none());
  }

 private:
  static __device__ __forceinline__ T over_warp(T value) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) value = value.with_lane(distance);
    return value;
  }

  Scratch& scratch_;
  int half_ = 0;
};

// One row, as all threads of its block see it.
struct UnmaskRow {
  const UnmaskParams& p;
  const int32_t* entry_of;  // of each position of the row, -1: none; nullptr: base + the position
  uint64_t* places;         // of begin, begin + 1, ...
  int64_t* ids;
  int64_t base, begin, end;
  uint64_t seed, sequence, step;
  double number;

  // f(position, its place), for this thread's positions
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int64_t l = begin + threadIdx.x; l < end; l += kUnmaskThreads) f(l, places[l - begin]);
  }
  __device__ __forceinline__ int64_t entry(int64_t l) const { return entry_of ? entry_of[l] : base + l; }
  __device__ __forceinline__ Philox random(int64_t l, Draw draw) const { return philox(seed, sequence, l, step, draw); }
  __device__ __forceinline__ bool holds_at(uint64_t place, const Before& before) const {
    return holds(p.rule, p.order, number, key_at(place), before);
  }
  __device__ __forceinline__ void commit(int64_t l) const { ids[l] = p.token[entry(l)]; }
};

__device__ __forceinline__ int64_t clip(int64_t x, int64_t high) { return x < 0 ? 0 : x < high ? x : high; }

__device__ __forceinline__ UnmaskRow row_of(const UnmaskParams& p, const int32_t* entry_of, uint64_t* places, int64_t b) {
  return {p,
          entry_of ? entry_of + b * p.length : nullptr,
          places,
          p.token_ids + b * p.row_stride,
          b * p.length,
          p.block_start ? clip(p.block_start[b], p.length) : 0,
          p.block_end ? clip(p.block_end[b], p.length) : p.length,
          static_cast<uint64_t>(p.seed_at ? *p.seed_at : p.seed),
          static_cast<uint64_t>(p.sequence_ids ? p.sequence_ids[b] : b),
          static_cast<uint64_t>(p.step_at ? *p.step_at : p.step),
          p.values ? static_cast<double>(p.values[b]) : p.value};
}

// The place of position l, or 0.
__device__ __forceinline__ uint64_t find_place(const UnmaskRow& row, int64_t l) {
  const UnmaskParams& p = row.p;
  if (row.ids[l] != p.mask_token_id) return 0;
  const int64_t entry = row.entry(l);
  if (entry < 0) return 0;
  const int64_t token = p.token[entry];
  if (token < 0 || token == p.mask_token_id) return 0;
  if (p.order == UnmaskOrder::kRandom) return place_of(key_of_word(row.random(l, Draw::kOrder).word[0]), l);
  const float* const score = p.order == UnmaskOrder::kConfidence ? p.log_prob
                             : p.order == UnmaskOrder::kMargin   ? p.margin
                                                                 : p.entropy;
  return place_of(key_of(score[entry], p.order == UnmaskOrder::kEntropy), l);
}

__device__ __forceinline__ Extent find_places(const UnmaskRow& row) {
  Extent extent = Extent::none();
  for (int64_t l = row.begin + threadIdx.x; l < row.end; l += kUnmaskThreads) {
    const uint64_t place = find_place(row, l);
    row.places[l - row.begin] = place;
    if (place == 0) continue;
    extent.low = place < extent.low ? place : extent.low;
    extent.high = place > extent.high ? place : extent.high;
    extent.count += 1;
  }
  return extent;
}

// Places above `high` are committed, those up to `low` are not; at most one lies in between, with `before` before it.
struct Cut {
  uint64_t low, high;
  Before before;
};

// count, factor, entropy_budget: the last place where the rule holds, by bisection.
__device__ __forceinline__ Cut find_cut(const UnmaskRow& row, const Extent& extent, BlockReduce<Tally>& sum) {
  const bool costs = row.p.rule == UnmaskRule::kEntropyBudget;
  Cut cut{extent.low - 1, extent.high, {0, 0.0}};
  int64_t above_low = extent.count;
  while (cut.high - cut.low > 1 && above_low - cut.before.count > 1) {
    const uint64_t middle = cut.low + (cut.high - cut.low) / 2;
    Tally above = Tally::none();
    row.each([&](int64_t l, uint64_t place) {
      if (place <= middle) return;
      above.count += 1;
      if (costs) above.entropy += static_cast<double>(cost_of(row.p.entropy[row.entry(l)]));
    });
    above = sum(above);
    const Before here{above.count, above.entropy};
    if (row.holds_at(middle, here)) {
      cut.high = middle;
      cut.before = here;
    } else {
      cut.low = middle;
      above_low = here.count;
    }
  }
  return cut;
}

// Commits this thread's part of the row, and returns how many.
__device__ __forceinline__ int64_t commit_each(const UnmaskRow& row, uint64_t best, const Cut& cut) {
  const UnmaskParams& p = row.p;
  const double limit = is_logarithmic(p.order) ? log(row.number) : row.number;
  int64_t count = 0;
  row.each([&](int64_t l, uint64_t place) {
    if (place == 0) return;
    bool take;
    if (p.rule == UnmaskRule::kThreshold) {
      take = compared(p.order, key_at(place)) >= limit;
    } else if (p.rule == UnmaskRule::kAncestral) {
      take = uniform53(row.random(l, Draw::kAncestral)) < row.number;
    } else {
      take = place > cut.high || (place > cut.low && (place == best || row.holds_at(place, cut.before)));
    }
    if (!take) return;
    row.commit(l);
    count += 1;
  });
  return count;
}

__global__ void __launch_bounds__(kUnmaskThreads)
    unmask_kernel(const __grid_constant__ UnmaskParams p, const int32_t* entry_of, uint64_t* long_places) {
  FD_SHARED(Tally, scratch, [2][kUnmaskThreads / kWarp]);
  FD_SHARED(Extent, scratch_of_extents, [2][kUnmaskThreads / kWarp]);
  FD_DYN_SMEM(uint64_t, shared_places);
  BlockReduce<Tally> sum(scratch);
  BlockReduce<Extent> extent_of(scratch_of_extents);
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    int64_t committed = 0;
    if (!p.active || p.active[b]) {
      const UnmaskRow row = row_of(p, entry_of, long_places ? long_places + b * p.length : shared_places, b);
      const Extent extent = extent_of(find_places(row));
      if (extent.count > 0) {
        const bool direct = p.rule == UnmaskRule::kThreshold || p.rule == UnmaskRule::kAncestral;
        const Cut cut = direct ? Cut{} : find_cut(row, extent, sum);
        committed = sum({commit_each(row, extent.high, cut), 0.0}).count;
        if (committed == 0 && commits_at_least_one(p.rule)) {  // the first one
          committed = 1;
          if (threadIdx.x == 0) row.commit(position_at(extent.high));
        }
      }
    }
    if (threadIdx.x == 0) p.committed[b] = committed;
  }
}

// The sample's entry of every position: -1, then what rows says.
__global__ void __launch_bounds__(kUnmaskThreads) unmask_clear_kernel(int32_t* entry_of, int64_t positions) {
  const int64_t first = int64_t{blockIdx.x} * kUnmaskThreads + threadIdx.x;
  for (int64_t l = first; l < positions; l += int64_t{gridDim.x} * kUnmaskThreads) entry_of[l] = -1;
}

__global__ void __launch_bounds__(kUnmaskThreads)
    unmask_entries_kernel(const int64_t* rows, int64_t count, int32_t* entry_of, int64_t positions) {
  const int64_t first = int64_t{blockIdx.x} * kUnmaskThreads + threadIdx.x;
  for (int64_t r = first; r < count; r += int64_t{gridDim.x} * kUnmaskThreads) {
    if (rows[r] >= 0 && rows[r] < positions) entry_of[rows[r]] = static_cast<int32_t>(r);
  }
}

}  // namespace fastdiff::cuda::unmasking
