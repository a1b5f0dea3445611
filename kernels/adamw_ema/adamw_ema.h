// AdamW and a moving average of the weights in one pass over all of a model's tensors. README.md has the mathematics.
#pragma once
#include <cstdint>

#include "kernels/common/parallel_for.h"

namespace fastdiff {

constexpr int64_t kAdamWPiece = 8192;  // the most elements of a piece

// Some elements of one tensor: its pieces follow each other, all but the last of kAdamWPiece elements.
struct AdamWPiece {
  float* param;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* average;   // of the weights
  int64_t size;
  float step_size;  // lr / (1 - beta1^t)
  float deviation;  // 1 / sqrt(1 - beta2^t)
};

struct AdamWParams {
  const AdamWPiece* pieces;
  int64_t count;
  float grad_scale;  // every gradient is multiplied by it first
  float keep;        // 1 - lr * weight_decay
  float beta2, eps;
  float grad_weight, square_weight;  // 1 - beta1, 1 - beta2: rounded once, they are small
  float average_weight;  // of the new weights: 1 - decay
};

namespace cpu {
void adamw_ema(const AdamWParams& params, const ParallelFor& parallel_for);
// sums[i] = sum of squares of data[i], size[i] <= kAdamWPiece elements.
void sums_of_squares(const float* const* data, const int64_t* size, int64_t count, double* sums,
                     const ParallelFor& parallel_for);
}  // namespace cpu

}  // namespace fastdiff
