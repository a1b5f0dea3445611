// What a .cu file says to nvcc and to the emulator alike. Under nvcc these are the CUDA constructs they look like; any
// other compiler gets the emulator (tests/emulator/cuda_on_cpu.h), which runs one fiber a CUDA thread.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// FD_LAUNCH((kernel<A, B>), grid, block, dynamic_shared_bytes, stream, arguments...)
#define FD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
// FD_SHARED(float, name, [2][32]): an array in static shared memory.
#define FD_SHARED(T, name, dimensions) __shared__ __align__(16) T name dimensions
// FD_DYN_SMEM(float, name): a pointer to the dynamic shared memory of the launch.
#define FD_DYN_SMEM(T, name)                                     \
  extern __shared__ __align__(16) unsigned char fd_dyn_smem_[]; \
  T* const name = reinterpret_cast<T*>(fd_dyn_smem_)
// Vector accesses fault on the device where they are misaligned; the emulator reports block, thread and line.
#define FD_CHECK_ALIGNED(pointer, bytes) ((void)0)

namespace fastdiff::cuda {
using Stream = cudaStream_t;
inline int launch_status() { return static_cast<int>(cudaGetLastError()); }
constexpr int kInvalidValue = static_cast<int>(cudaErrorInvalidValue);
inline int64_t max_grid() { return 2147483647; }  // blocks in x; kernels loop over work beyond that
// To be called before a launch with that much dynamic shared memory: beyond 48 KiB a kernel must be given leave.
template <class Kernel>
int allow_shared(Kernel* kernel, int64_t bytes) {
  if (bytes <= 48 << 10) return 0;
  return static_cast<int>(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}
}  // namespace fastdiff::cuda

#else

#include "cuda_on_cpu.h"

#endif
