// Self-attention on one packed projection: parameters and launch functions. README.md has the mathematics.
#pragma once
#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/parallel_for.h"

namespace fastdiff {

struct SelfAttentionShape {
  int64_t batch, tokens, heads, dim;  // each at least 1
  float scale;                        // > 0
  DType dtype;                        // of everything but lse: fp32, bf16 or fp16
};

// Everything is contiguous.
struct SelfAttentionForwardParams {
  SelfAttentionShape shape;
  const void* qkv;  // [batch, tokens, 3, heads, dim]: query, key, value
  void* out;        // [batch, tokens, heads, dim]
  float* lse;       // [batch, heads, tokens]: log sum exp of a row's scaled scores, or nullptr
};

struct SelfAttentionBackwardParams {
  SelfAttentionShape shape;
  const void* grad_out;  // like out
  const void* qkv;
  const void* out;  // as the forward pass left it, and lse
  const float* lse;
  void* grad_qkv;  // like qkv
};

namespace cpu {
void self_attention_forward(const SelfAttentionForwardParams& params, const ParallelFor& parallel_for);
void self_attention_backward(const SelfAttentionBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

}  // namespace fastdiff
