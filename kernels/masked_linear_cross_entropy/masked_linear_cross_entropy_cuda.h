// Launch functions of the CUDA backend; nothing of CUDA's headers is needed to call them.
#pragma once
#include "kernels/masked_linear_cross_entropy/masked_linear_cross_entropy.h"

struct CUstream_st;  // a cudaStream_t points to it

namespace fastdiff::cuda {

// Enqueues on `stream`; every pointer is device memory, and the current device is the stream's. Returns a cudaError_t as
// int: 0, cudaErrorInvalidValue (1) for parameters that the kernel does not take (float64, vocab < 1, a missing pointer),
// or what the launch reported. Without rows nothing is launched.
int cross_entropy(const CrossEntropyParams& params, CUstream_st* stream);

}  // namespace fastdiff::cuda
