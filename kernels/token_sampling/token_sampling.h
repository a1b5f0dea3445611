// Token sampling: parameters and launch functions of every native backend. README.md has the mathematics.
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

namespace cpu {
void sample_tokens(const TokenSampleParams& params, const ParallelFor& parallel_for);
void lm_head_sample(const LmHeadSampleParams& params, const ParallelFor& parallel_for, const HeadProduct& product);
}  // namespace cpu

}  // namespace fastdiff
