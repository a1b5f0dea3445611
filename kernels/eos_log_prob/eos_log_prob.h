// The log-probability that a position holds an end token: parameters and launch functions of every native backend.
// README.md has the mathematics.
#pragma once
#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/logit_tiles.h"
#include "kernels/common/parallel_for.h"

namespace fastdiff {

struct EosLogProbParams {
  const void* logits;    // [batch, length, vocab], last dimension contiguous; unused by eos_log_prob
  int64_t batch_stride;  // in elements
  int64_t row_stride;
  int64_t batch;
  int64_t length;
  int64_t vocab;
  const int64_t* end_tokens;  // ids whose joint probability is wanted, ascending, no id twice
  int64_t end_count;
  const int64_t* excluded;    // ids that are not among the others: the end tokens and the suppressed ids; the same
  int64_t excluded_count;
  float* end_log_prob;  // [batch * length]
  void* workspace;      // CUDA only: as many bytes as eos_log_prob_workspace_bytes says, aligned to 8
  DType dtype;          // of the logits (eos_log_prob: of what the product leaves)
};

// How the logits of eos_log_prob come: the product of all rows, tile_size ids at a time.
struct EosHeadTiles {
  void* logits;       // CUDA only: [batch * length, tile_size], where a tile lies
  int64_t tile_size;  // a multiple of kLogitBlock
};

// What is known of one block of a row's ids: weights exp(z - maximum) of the end tokens, and of the others, apart.
struct EosPart {
  double end_sum;    // NaN where a logit is NaN or +inf, 0 where all are -inf
  double other_sum;
  float end_max;
  float other_max;
};

namespace cpu {
void eos_log_prob_from_logits(const EosLogProbParams& params, const ParallelFor& parallel_for);
void eos_log_prob(const EosLogProbParams& params, const EosHeadTiles& tiles, const ParallelFor& parallel_for,
                  const HeadProduct& product);
}  // namespace cpu

}  // namespace fastdiff
