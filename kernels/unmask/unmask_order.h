// What comes before what in unmask_, for host and device alike: keys, scores, and when a rule holds. See README.md.
#pragma once
#include <math.h>
#include <stdint.h>

#include "kernels/common/philox.h"
#include "kernels/unmask/unmask.h"

namespace fastdiff::unmasking {

constexpr int32_t kNoKey = INT32_MIN;       // no candidate
constexpr int32_t kNanKey = INT32_MIN + 1;  // after every number, minus infinity too

// A float's key, ordered as the floats are; -0 is 0. Integers throughout, so flushed subnormals change nothing.
FD_HOST_DEVICE int32_t key_of(float x, bool negated) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits = negated ? bits ^ INT32_MIN : bits;
  const int32_t number = bits == INT32_MIN ? 0 : bits ^ ((bits >> 31) & INT32_MAX);
  return (bits & INT32_MAX) > 0x7f800000 ? kNanKey : number;
}

FD_HOST_DEVICE float value_of(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & INT32_MAX);
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

FD_HOST_DEVICE int32_t key_of_word(uint32_t word) { return static_cast<int32_t>(word >> 1); }
FD_HOST_DEVICE double value_of_word(int32_t key) { return key * 0x1p-31; }

// The score c in the domain in which the rule `threshold` compares: log c for confidence and entropy.
FD_HOST_DEVICE double compared(UnmaskOrder order, int32_t key) {
  return order == UnmaskOrder::kRandom ? value_of_word(key) : static_cast<double>(value_of(key));
}
FD_HOST_DEVICE bool is_logarithmic(UnmaskOrder order) {
  return order == UnmaskOrder::kConfidence || order == UnmaskOrder::kEntropy;
}

// Whether a row's first candidate is committed where the rule takes none.
FD_HOST_DEVICE bool commits_at_least_one(UnmaskRule rule) { return rule != UnmaskRule::kAncestral; }

// What a candidate's entropy adds to the sum of entropy_budget: such that sums never fall.
FD_HOST_DEVICE float cost_of(float entropy) {
  const float cost = entropy > 0.0f ? entropy : 0.0f;
  return entropy != entropy ? HUGE_VALF : cost;
}

// The candidates before a place in the order.
struct Before {
  int64_t count;
  double entropy;
};

// count, factor, entropy_budget: whether a candidate at this place is committed. Once false, false for all that follow.
FD_HOST_DEVICE bool holds(UnmaskRule rule, UnmaskOrder order, double number, int32_t key, const Before& before) {
  if (rule == UnmaskRule::kCount) return static_cast<double>(before.count) < number;
  if (rule == UnmaskRule::kEntropyBudget) return before.entropy <= number;
  const double score = compared(order, key);
  return (is_logarithmic(order) ? exp(score) : score) > 1.0 - number / static_cast<double>(before.count + 2);
}

}  // namespace fastdiff::unmasking
