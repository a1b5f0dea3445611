// Launch functions of the CUDA backend; nothing of CUDA's headers is needed to call them.
#pragma once
#include "kernels/qgfd/qgfd.h"

struct CUstream_st;  // a cudaStream_t points to it

namespace fastdiff::cuda {

// How a forward pass runs: one pass over M a hop, or every hop in one launch with M in shared memory. The two round the
// weights of 16-bit operands differently (README.md), and sum in another order.
enum class QgfdPath { kByShape, kPasses, kFused };

// Enqueue on `stream`; every pointer is device memory, and the current device is the stream's. They return a
// cudaError_t as int: 0, cudaErrorInvalidValue (1) for parameters that these kernels do not take (float64, a head size
// that is not a multiple of 8 up to 256, kFused where M does not fit), or what a launch reported. Nothing synchronises
// with the host, and results do not depend on the device.
int qgfd_forward(const QgfdForwardParams& params, CUstream_st* stream, QgfdPath path = QgfdPath::kByShape);
int qgfd_backward(const QgfdBackwardParams& params, CUstream_st* stream);

// Whether kByShape is kFused: several hops, at most 128 positions, and M and two u_j fit in the shared memory that a
// block has on every target (99 KiB).
bool qgfd_fuses(const QgfdForwardParams& params);

// How many bytes params.workspace must hold, for parameters with all but `out` and `workspace` set.
int64_t qgfd_forward_workspace_bytes(const QgfdForwardParams& params, QgfdPath path = QgfdPath::kByShape);
int64_t qgfd_backward_workspace_bytes(const QgfdBackwardParams& params);

}  // namespace fastdiff::cuda
