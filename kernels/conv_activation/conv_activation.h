// A depthwise 3×3 convolution with its activation: parameters and launch functions. README.md has the mathematics.
#pragma once
#include <cstdint>

#include "kernels/bias_activation/bias_activation.h"  // Activation
#include "kernels/common/dtype.h"
#include "kernels/common/parallel_for.h"

namespace fastdiff {

struct ConvActivationShape {
  int64_t batch, rows, columns, dim;  // each at least 1
  Activation activation;
  DType dtype;  // of x, out and their gradients: fp32, bf16 or fp16
};

// Everything is contiguous. What is nullptr is zero.
struct ConvActivationForwardParams {
  ConvActivationShape shape;
  const void* x;        // [batch, rows, columns, dim]
  const float* x_bias;  // [dim] or nullptr: added to x, within the grid
  const float* weight;  // [9, dim]: of the places around a token, row by row
  const float* bias;    // [dim] or nullptr
  void* out;            // like x
};

// Sums over tokens are made in two steps of fixed order: each segment of kConvSamples samples leaves its partial sums in the
// workspace, and a second pass adds them in order.
constexpr int64_t kConvSamples = 8, kConvSums = 11;
struct ConvActivationBackwardParams {
  ConvActivationShape shape;
  const void* grad_out;  // like x
  const void* x;
  const float* x_bias;
  const float* weight;
  const float* bias;
  void* grad_x;            // like x
  float* grad_parameters;  // [kConvSums, dim]: of weight, bias and x_bias; nullptr: not wanted
  float* workspace;        // [segments, kConvSums, dim] where it is wanted
};

inline int64_t conv_activation_segments(const ConvActivationShape& s) {
  return (s.batch + kConvSamples - 1) / kConvSamples;
}

namespace cpu {
void conv_activation_forward(const ConvActivationForwardParams& params, const ParallelFor& parallel_for);
void conv_activation_backward(const ConvActivationBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

}  // namespace fastdiff
