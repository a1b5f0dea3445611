// Cross entropy of rows of logits, and its gradient in their place. README.md has the mathematics.
#pragma once
#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/parallel_for.h"

namespace fastdiff {

struct CrossEntropyParams {
  void* logits;               // [rows, vocab]; where want_grad, the gradient takes their place, in their dtype
  int64_t row_stride;         // in elements
  int64_t rows;
  int64_t vocab;
  const int64_t* targets;     // [rows]; a row whose target is no allowed id becomes NaN, loss and gradient
  const float* row_weight;    // [rows] factors of the gradient, or nullptr: ones
  const int64_t* suppress;    // ids that leave the distribution, ascending, no id twice, fewer than vocab
  int64_t suppress_count;
  float* row_loss;            // [rows], without row_weight
  double label_smoothing;     // in [0, 1)
  DType dtype;                // of the logits: float32, bfloat16 or float16
  bool want_grad;
};

namespace cpu {
void cross_entropy(const CrossEntropyParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

}  // namespace fastdiff
