// Launch functions of the CUDA backend; nothing of CUDA's headers is needed to call them.
#pragma once
#include "kernels/eos_log_prob/eos_log_prob.h"

struct CUstream_st;  // a cudaStream_t points to it

namespace fastdiff::cuda {

// Enqueue on `stream`; every pointer is device memory, and the current device is the stream's. They return a
// cudaError_t as int: 0, cudaErrorInvalidValue (1) for parameters that these kernels do not take (float64, no
// vocabulary, no end token, a missing operand), or what the launch reported. Nothing synchronises with the host. Without
// rows nothing is launched.
int eos_log_prob_from_logits(const EosLogProbParams& params, CUstream_st* stream);
// `product.run` must enqueue on the same stream.
int eos_log_prob(const EosLogProbParams& params, const EosHeadTiles& tiles, CUstream_st* stream,
                 const HeadProduct& product);

// How many bytes params.workspace must hold, a multiple of 8, for parameters with batch, length and vocab set.
int64_t eos_log_prob_workspace_bytes(const EosLogProbParams& params);

}  // namespace fastdiff::cuda
