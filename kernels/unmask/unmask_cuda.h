// Launch functions of unmask_'s CUDA backend; nothing of CUDA's headers is needed to call them.
#pragma once
#include "kernels/unmask/unmask.h"

struct CUstream_st;  // a cudaStream_t points to it

namespace fastdiff::cuda {

// Enqueues on `stream`, without synchronisation; every pointer is device memory, and the current device is the stream's.
// Returns a cudaError_t as int: 0, cudaErrorInvalidValue (1) for parameters that do not fit, or what a launch reported.
int unmask(const UnmaskParams& params, CUstream_st* stream);
// What params.workspace must hold; reads batch, length and whether rows is null.
int64_t unmask_workspace_bytes(const UnmaskParams& params);

}  // namespace fastdiff::cuda
