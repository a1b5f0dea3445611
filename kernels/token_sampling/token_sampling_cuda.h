// Launch functions of the CUDA backend; nothing of CUDA's headers is needed to call them.
#pragma once
#include "kernels/token_sampling/token_sampling.h"

struct CUstream_st;  // a cudaStream_t points to it

namespace fastdiff::cuda {

// Enqueue on `stream`; every pointer is device memory, and the current device is the stream's. They return a
// cudaError_t as int: 0, cudaErrorInvalidValue (1) for parameters that these kernels do not take (float64, no
// vocabulary, a missing operand, a negative temperature, top_p outside (0, 1]; lm_head_sample: top-k or top-p), or what
// the launch reported. Nothing synchronises with the host. Without rows nothing is launched.
int sample_tokens(const TokenSampleParams& params, CUstream_st* stream);
// `product.run` must enqueue on the same stream.
int lm_head_sample(const LmHeadSampleParams& params, CUstream_st* stream, const HeadProduct& product);

// How many bytes params.workspace must hold, a multiple of 8, for parameters with batch, length, vocab, top_k and top_p set.
int64_t sample_tokens_workspace_bytes(const TokenSampleParams& params);
int64_t lm_head_sample_workspace_bytes(const LmHeadSampleParams& params);

}  // namespace fastdiff::cuda
