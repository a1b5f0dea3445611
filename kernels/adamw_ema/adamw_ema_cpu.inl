// AdamW with a moving average, compiled once an instruction set: plain loops, which the compiler turns into vectors.
#include <math.h>

#include "kernels/adamw_ema/adamw_ema.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int kLanes = 32;  // sums that go on side by side

void update(const AdamWPiece& piece, const AdamWParams& p) {
  float* __restrict const param = piece.param;
  float* __restrict const exp_avg = piece.exp_avg;
  float* __restrict const exp_avg_sq = piece.exp_avg_sq;
  float* __restrict const average = piece.average;
  const float* __restrict const grads = piece.grad;
  const float grad_scale = p.grad_scale, keep = p.keep, beta2 = p.beta2, eps = p.eps;
  const float grad_weight = p.grad_weight, square_weight = p.square_weight, step_size = piece.step_size, deviation = piece.deviation;
  const float average_weight = p.average_weight;
  for (int64_t i = 0; i < piece.size; i++) {
    const float grad = grads[i] * grad_scale;
    const float first = exp_avg[i] + grad_weight * (grad - exp_avg[i]);
    const float second = beta2 * exp_avg_sq[i] + square_weight * grad * grad;
    const float weight = keep * param[i] - step_size * first / (sqrtf(second) * deviation + eps);
    exp_avg[i] = first;
    exp_avg_sq[i] = second;
    param[i] = weight;
    average[i] = average[i] + average_weight * (weight - average[i]);
  }
}

double sum_of_squares(const float* data, int64_t size) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int k = 0; k < kLanes; k++) lane[k] += data[i + k] * data[i + k];
  double sum = 0;
  for (int k = 0; k < kLanes; k++) sum += lane[k];
  for (; i < size; i++) sum += double(data[i]) * double(data[i]);
  return sum;
}

}  // namespace

void adamw_ema(const AdamWParams& p, const ParallelFor& parallel_for) {
  parallel_for(0, p.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) update(p.pieces[i], p);
  });
}

void sums_of_squares(const float* const* data, const int64_t* size, int64_t count, double* sums,
                     const ParallelFor& parallel_for) {
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) sums[i] = sum_of_squares(data[i], size[i]);
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
