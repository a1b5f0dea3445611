// Norms and rotary positions of queries and keys in a packed projection: parameters and launch functions. README.md has
// the mathematics.
#pragma once
#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/parallel_for.h"

namespace fastdiff {

struct QkNormRotaryShape {
  int64_t batch, tokens, heads, dim;  // each at least 1; dim even where there are angles
  float eps;
  DType dtype;  // of qkv and what is like it: fp32, bf16 or fp16
};

// Everything is contiguous.
struct QkNormRotaryOperands {
  const void* qkv;      // [batch, tokens, 3, heads, dim]: query, key, value
  const float* weight;  // [2, heads * dim]: of the query's norm and the key's
  const float* bias;    // [2, heads * dim]
  const float* cosine;  // [tokens, dim / 2], or nullptr: nothing turns
  const float* sine;    // the same
};

struct QkNormRotaryForwardParams {
  QkNormRotaryShape shape;
  QkNormRotaryOperands operands;
  void* out;     // like qkv
  float* stats;  // [batch * tokens, 4]: mean and 1 / deviation of query and key; or nullptr
};

// Sums over tokens are made in two steps of fixed order: each segment of kQkNormRows tokens leaves its partial sums in the
// workspace, and a second pass adds them in order.
constexpr int64_t kQkNormRows = 64;
struct QkNormRotaryBackwardParams {
  QkNormRotaryShape shape;
  QkNormRotaryOperands operands;
  const void* grad_out;    // like qkv
  const float* stats;      // as the forward pass left them
  void* grad_qkv;          // like qkv
  float* grad_parameters;  // [4, heads * dim]: query's weight and bias, key's weight and bias; nullptr: not wanted
  float* workspace;        // [segments, 4, heads * dim] where it is wanted
};

inline int64_t qk_norm_rotary_segments(const QkNormRotaryShape& s) {
  return (s.batch * s.tokens + kQkNormRows - 1) / kQkNormRows;
}

namespace cpu {
void qk_norm_rotary_forward(const QkNormRotaryForwardParams& params, const ParallelFor& parallel_for);
void qk_norm_rotary_backward(const QkNormRotaryBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

}  // namespace fastdiff
