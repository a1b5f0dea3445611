// Fused AdaLN: parameters and launch functions of every native backend. See README.md for the mathematics.
// One POD struct serves torch (csrc/), the emulator, the NumPy test interface, and whatever else links the kernels.
#pragma once
#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/parallel_for.h"

namespace fastdiff {

// shift, scale or gate, seen as [batch, frames, dim] with tokens_per_frame = tokens / frames:
// row (b, n) reads data[b * batch_stride + (n / tokens_per_frame) * frame_stride + d], strides in elements,
// 0 where it broadcasts; the last dimension is contiguous. data == nullptr: the operand is absent.
struct Modulation {
  const void* data;
  DType dtype;
  int64_t batch_stride;
  int64_t frame_stride;
  int64_t tokens_per_frame;  // >= 1
};

// Plain:  out = norm(x) * a + c,  a = weight * (1 + scale),  c = bias * (1 + scale) + shift
// Gated (branch != nullptr): residual_out = round(x + gate * branch), then the same of residual_out. With `saturate`
// what would round beyond float16's largest number, 65504, becomes that; other dtypes are left as they are.
struct AdaLNForwardParams {
  const void* x;       // [batch, tokens, dim] contiguous; the residual where gated
  const void* branch;  // like x, its own dtype; nullptr: plain AdaLN
  Modulation gate;     // gated only
  Modulation shift;
  Modulation scale;
  const void* weight;  // [dim] float (double where x is); nullptr: ones
  const void* bias;    // [dim] float (double where x is); nullptr: zeros
  void* residual_out;  // [batch, tokens, dim] x_dtype; gated only
  void* out;           // [batch, tokens, dim] out_dtype
  void* mean;          // [batch * tokens] float (double where x is), or nullptr; not written for rms
  void* rstd;          // [batch * tokens] float (double where x is), or nullptr
  int64_t batch;
  int64_t tokens;
  int64_t dim;
  double eps;
  DType x_dtype;
  DType branch_dtype;
  DType out_dtype;
  bool rms;  // RMSNorm instead of LayerNorm
  bool saturate;
};

constexpr float kFloat16Largest = 65504.0f;
constexpr float kFloat16Overflow = 65520.0f;  // from here on rounding gives infinity

// Gradients. The sums over tokens are made in two fixed-order steps, so that nothing depends on the number of
// threads or blocks: every frame of `grad_tokens_per_frame` rows is cut into segments of `rows_per_segment` rows,
// each segment leaves its partial sums in the workspace, and a second pass adds them in order.
struct AdaLNBackwardParams {
  const void* grad_out;           // [batch, tokens, dim] out_dtype
  const void* grad_residual_out;  // [batch, tokens, dim] x_dtype, or nullptr; gated only
  const void* x;                  // what was normalised: x, or residual_out where gated
  const void* mean;               // as saved by the forward pass; unused for rms
  const void* rstd;
  const void* branch;  // gated only
  Modulation gate;     // gated only
  Modulation scale;
  const void* weight;
  const void* bias;
  // [batch, tokens, dim] float16 where the forward pass saturated: the residual that it was given; else nullptr. The
  // gradient of what was clipped is 0.
  const void* residual_in;
  void* grad_x;       // [batch, tokens, dim] x_dtype: gradient of x, or of the residual where gated
  void* grad_branch;  // [batch, tokens, dim] branch_dtype; gated only
  void* grad_gate;    // these three: [batch, tokens / grad_tokens_per_frame, dim] contiguous, or nullptr
  void* grad_shift;
  void* grad_scale;
  void* grad_weight;  // [dim] float (double where x is), or nullptr
  void* grad_bias;
  void* workspace;  // adaln_backward_workspace_bytes(params)
  int64_t batch;
  int64_t tokens;
  int64_t dim;
  int64_t grad_tokens_per_frame;  // divides tokens, and every operand's tokens_per_frame
  int64_t rows_per_segment;
  DType x_dtype;
  DType branch_dtype;
  DType out_dtype;
  DType grad_gate_dtype;
  DType grad_shift_dtype;
  DType grad_scale_dtype;
  bool rms;
};

inline int64_t adaln_backward_segments(const AdaLNBackwardParams& p) {
  const int64_t per_frame = (p.grad_tokens_per_frame + p.rows_per_segment - 1) / p.rows_per_segment;
  return p.batch * (p.tokens / p.grad_tokens_per_frame) * per_frame;
}

// Per segment three rows of dim: sum grad_out, sum grad_out * xhat, sum grad_residual * branch (gated).
inline int64_t adaln_backward_workspace_bytes(const AdaLNBackwardParams& p) {
  const bool sums = p.grad_gate || p.grad_shift || p.grad_scale || p.grad_weight || p.grad_bias;
  const int64_t element = p.x_dtype == DType::kFloat64 ? 8 : 4;
  return sums ? adaln_backward_segments(p) * 3 * p.dim * element : 0;
}

namespace cpu {
void adaln_forward(const AdaLNForwardParams& params, const ParallelFor& parallel_for);
void adaln_backward(const AdaLNBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

}  // namespace fastdiff
