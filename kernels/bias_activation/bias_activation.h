// bias_activation: parameters and launch functions of every native backend. README.md has the mathematics.
#pragma once
#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/parallel_for.h"

struct CUstream_st;  // a cudaStream_t points to it

namespace fastdiff {

// Each is act(v) = v · gate(v). The numbers are part of the schemas.
enum class Activation : int32_t { kGelu = 0, kGeluTanh = 1, kSilu = 2 };

// out = act(x + bias), or with `up` act(x + bias) · (up + up_bias).
struct BiasActivationParams {
  const void* x;        // [rows, dim], contiguous as all operands
  const void* bias;     // [dim] float (double where x is), or nullptr
  const void* up;       // like x, or nullptr
  const void* up_bias;  // [dim] float (double where x is), or nullptr
  void* out;            // like x; may be x or up
  int64_t rows;
  int64_t dim;  // at least 1
  Activation activation;
  DType dtype;  // of x, up and out: fp32, bf16, fp16; fp64 on the CPU
};

// Gradients. The sums over rows are made in two steps of fixed order: each segment of `rows_per_segment` rows leaves its
// partial sums in the workspace, and a second pass adds them in order.
struct BiasActivationBackwardParams {
  const void* grad_out;  // like x
  const void* x;
  const void* bias;
  const void* up;
  const void* up_bias;
  void* grad_x;        // like x
  void* grad_up;       // like x; where there is `up`
  void* grad_bias;     // [dim] float (double where x is), or nullptr: not wanted
  void* grad_up_bias;  // the same
  void* workspace;     // bias_activation_workspace_bytes(params)
  int64_t rows;
  int64_t dim;
  int64_t rows_per_segment;
  Activation activation;
  DType dtype;
};

inline int64_t bias_activation_segments(const BiasActivationBackwardParams& p) {
  return (p.rows + p.rows_per_segment - 1) / p.rows_per_segment;
}

// A segment has a row of sums, and a second one where there is `up`.
inline int64_t bias_activation_workspace_bytes(const BiasActivationBackwardParams& p) {
  const int64_t element = p.dtype == DType::kFloat64 ? 8 : 4;
  return p.grad_bias || p.grad_up_bias ? bias_activation_segments(p) * (p.up ? 2 : 1) * p.dim * element : 0;
}

namespace cpu {
void bias_activation(const BiasActivationParams& params, const ParallelFor& parallel_for);
void bias_activation_backward(const BiasActivationBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
// Enqueue on `stream`; every pointer is device memory. They return a cudaError_t as int: 0, cudaErrorInvalidValue (1)
// for parameters that do not fit, or what the launch reported. Without rows nothing is launched, nor written.
int bias_activation(const BiasActivationParams& params, CUstream_st* stream);
int bias_activation_backward(const BiasActivationBackwardParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace fastdiff
