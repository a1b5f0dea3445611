// scale_shift: parameters and launch functions of every native backend. README.md has the mathematics.
#pragma once
#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/parallel_for.h"

struct CUstream_st;  // a cudaStream_t points to it

namespace fastdiff {

struct ScaleShiftParams {
  const void* x;      // [batch, tokens, dim], contiguous as all operands
  const void* scale;  // [batch, dim]
  const void* shift;  // [batch, dim]
  void* out;          // like x
  int64_t batch;
  int64_t tokens;
  int64_t dim;  // at least 1
  DType dtype;  // of all operands: fp32, bf16 or fp16
};

namespace cpu {
void scale_shift(const ScaleShiftParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
// Enqueues on `stream`; every pointer is device memory. Returns a cudaError_t as int: 0, cudaErrorInvalidValue (1) for
// parameters that do not fit, or what the launch reported.
int scale_shift(const ScaleShiftParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace fastdiff
