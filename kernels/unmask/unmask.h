// unmask_: parameters and launch functions of every native backend. README.md has the rules.
#pragma once
#include <cstdint>

#include "kernels/common/parallel_for.h"

namespace fastdiff {

// What unmask_ reads its candidates' order from, best first; ties go to the lower position.
enum class UnmaskOrder : int32_t { kConfidence = 0, kMargin = 1, kEntropy = 2, kRandom = 3 };
enum class UnmaskRule : int32_t { kCount = 0, kThreshold = 1, kFactor = 2, kEntropyBudget = 3, kAncestral = 4 };

struct UnmaskParams {
  int64_t* token_ids;  // [batch, length], written in place
  int64_t row_stride;  // in elements
  int64_t batch;
  int64_t length;
  const int64_t* token;     // the sample: [batch * length], or [row_count] where rows is given
  const float* log_prob;
  const float* entropy;
  const float* margin;
  const int64_t* rows;      // [row_count] flat positions b * length + l, no position twice, or -1; nullptr: all. What
                            // lies outside [0, batch * length) counts as -1
  int64_t row_count;
  const int64_t* block_start;  // [batch] first position that may be committed, or nullptr: 0
  const int64_t* block_end;    // [batch] position after the last one, or nullptr: length
  const bool* active;          // [batch], or nullptr: all are
  const float* values;         // [batch] the rule's number, or nullptr: `value`
  double value;                // count, threshold, factor, entropy budget (nats) or probability
  const int64_t* seed_at;      // one number in the device's memory, or nullptr: `seed`
  const int64_t* step_at;      // the same for `step`
  const int64_t* sequence_ids;  // [batch], or nullptr: b
  int64_t seed;
  int64_t step;
  int64_t mask_token_id;
  int64_t* committed;  // [batch]: how many positions were written
  void* workspace;     // as many bytes as the backend's unmask_workspace_bytes says, aligned to 8
  UnmaskRule rule;
  UnmaskOrder order;
};

namespace cpu {
void unmask(const UnmaskParams& params, const ParallelFor& parallel_for);
int64_t unmask_workspace_bytes(const UnmaskParams& params);
}  // namespace cpu

}  // namespace fastdiff
