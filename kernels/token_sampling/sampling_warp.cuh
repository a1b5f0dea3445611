// The choice of a weight by its cumulative sum. Every lane of the warp must call, and every lane gets the result.
#pragma once
#include "kernels/common/warp.cuh"
#include "kernels/token_sampling/token_sampling.h"

namespace fastdiff::cuda::sampling {

template <class Sum>
struct Choice {
  int64_t index;       // -1: there is no weight above zero
  Sum before, weight;  // the sum of the weights in front of it, and its own
};

// The first of `count` weights (>= 0) whose inclusive sum exceeds target(sum of all), the weights added in order; the
// last one above zero where none does. A lane has a run of neighbours, and the runs' sums are added one after the
// other, so that the cumulative sum never decreases: a weight of zero is never chosen. weight(i) is asked for twice.
template <class Sum, class Target, class Weight>
__device__ __forceinline__ Choice<Sum> choose(int64_t count, const Target& target, const Weight& weight) {
  const int64_t run = (count + kWarp - 1) / kWarp, first = lane_id() * run;
  const int64_t end = first + run < count ? first + run : count;
  Sum own = 0;
  for (int64_t i = first; i < end; ++i) own += weight(i);
  Sum total = 0, before = 0;
#pragma unroll
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lane == lane_id()) before = total;
    total += __shfl_sync(kAllLanes, own, lane);
  }
  const Sum wanted = target(total);
  const unsigned beyond = __ballot_sync(kAllLanes, before + own > wanted);
  const unsigned above_zero = __ballot_sync(kAllLanes, own > 0);
  if (above_zero == 0) return {-1, 0, 0};
  const int chosen = beyond ? __ffs(static_cast<int>(beyond)) - 1 : kWarp - 1 - __clz(static_cast<int>(above_zero));

  Choice<Sum> choice{-1, 0, 0};
  if (lane_id() == chosen) {  // it has a weight above zero: the sum grew there
    Sum sum = before;
    for (int64_t i = first; i < end; ++i) {
      const Sum w = weight(i);
      if (!(w > 0)) continue;
      choice = {i, sum, w};
      sum += w;
      if (sum > wanted) break;
    }
  }
  choice.index = __shfl_sync(kAllLanes, choice.index, chosen);
  choice.before = __shfl_sync(kAllLanes, choice.before, chosen);
  choice.weight = __shfl_sync(kAllLanes, choice.weight, chosen);
  return choice;
}

}  // namespace fastdiff::cuda::sampling
