// Launch functions of the CUDA backend; nothing of CUDA's headers is needed to call them.
#pragma once
#include "kernels/adaln/adaln.h"

struct CUstream_st;  // a cudaStream_t points to it

namespace fastdiff::cuda {

// Enqueue on `stream`; every pointer is device memory, and the current device is the stream's. They return a
// cudaError_t as int: 0, cudaErrorInvalidValue (1) for parameters that these kernels do not take (float64, D < 1, a
// missing operand), or what the launch reported. Without rows nothing is launched, but for the zeros in grad_weight
// and grad_bias.
int adaln_forward(const AdaLNForwardParams& params, CUstream_st* stream);
int adaln_backward(const AdaLNBackwardParams& params, CUstream_st* stream);

}  // namespace fastdiff::cuda
