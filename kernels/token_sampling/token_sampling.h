// Token sampling and unmasking: parameters and launch functions of every native backend. README.md has the mathematics.
#pragma once
#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/logit_tiles.h"
#include "kernels/common/parallel_for.h"

namespace fastdiff {

constexpr int64_t kSampleBlock = kLogitBlock;  // ids a block: the unit of the cumulative sum
constexpr int64_t kSampleCell = kLogitCell;    // ids a cell: what a fused head computes again

// One step for rows (b, l): the token, and its statistics under the softmax over the allowed ids at temperature 1.
struct TokenSampleParams {
  const void* logits;     // [batch, length, vocab], last dimension contiguous; unused by lm_head_sample
  int64_t batch_stride;   // in elements
  int64_t row_stride;
  int64_t batch;
  int64_t length;
  int64_t vocab;
  const float* temperatures;      // [batch * length], or nullptr: `temperature` for all
  const int64_t* suppress;        // ids that leave the distribution, ascending, no id twice
  int64_t suppress_count;
  const int64_t* end_tokens;      // ids whose probability end_log_prob sums, ascending, no id twice
  int64_t end_count;
  const int64_t* seed_at;         // one number in the device's memory, or nullptr: `seed`
  const int64_t* step_at;         // the same for `step`
  const int64_t* sequence_ids;    // [batch * length], or nullptr: b
  const int64_t* positions;       // [batch * length], or nullptr: l
  int64_t seed;
  int64_t step;
  int64_t* token;       // these: [batch * length]
  float* log_prob;
  float* entropy;
  float* margin;
  float* end_log_prob;  // or nullptr: not asked for
  void* workspace;      // CUDA only: as many bytes as the backend's *_workspace_bytes says
  int64_t top_k;        // 0: off
  double temperature;
  double top_p;         // 1: off
  DType dtype;          // of the logits (lm_head_sample: of hidden, weight and bias, and what logits are rounded to)
};

// The same from hidden states: logits = round(hidden · weightᵀ + bias), a tile of ids at a time. top_k and top_p are off.
struct LmHeadSampleParams {
  TokenSampleParams sample;
  const void* hidden;     // [batch * length, dim] contiguous
  const void* weight;     // [vocab, dim], last dimension contiguous
  const void* bias;       // [vocab], or nullptr
  void* tile;             // CUDA only: [batch * length, tile_size] of sample.dtype, where a tile of logits lies
  int64_t weight_stride;  // elements from one id's row to the next
  int64_t dim;
  int64_t tile_size;      // a multiple of kSampleBlock
};

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
  const int64_t* seed_at;      // as above
  const int64_t* step_at;
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
void sample_tokens(const TokenSampleParams& params, const ParallelFor& parallel_for);
void lm_head_sample(const LmHeadSampleParams& params, const ParallelFor& parallel_for, const HeadProduct& product);
void unmask(const UnmaskParams& params, const ParallelFor& parallel_for);
int64_t unmask_workspace_bytes(const UnmaskParams& params);
}  // namespace cpu

}  // namespace fastdiff
