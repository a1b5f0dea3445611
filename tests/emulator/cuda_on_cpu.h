// CUDA's words for host compilers: a .cu file that includes kernels/common/launch.cuh runs on the CPU, one fiber a CUDA
// thread, one block at a time. It finds wrong results, reads of uninitialised shared memory, barriers that not all
// threads reach, misaligned vector accesses, too much shared memory; AddressSanitizer adds accesses out of bounds,
// ThreadSanitizer every race. It knows nothing of the device's memory model, its fast-math functions or its speed.
#pragma once
#if defined(__CUDACC__)
#error "cuda_on_cpu.h is for host compilers; nvcc has the real thing"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#include "block.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))

#define threadIdx (::cuda_on_cpu::g_block->current->index)
#define blockIdx (::cuda_on_cpu::g_block->index)
#define blockDim (::cuda_on_cpu::g_block->size)
#define gridDim (::cuda_on_cpu::g_block->grid)

#define FD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                   \
  do {                                                                                              \
    (void)(stream);                                                                                 \
    const auto fd_call = [&] { (kernel)(__VA_ARGS__); };                                            \
    using fd_call_type = std::remove_const_t<decltype(fd_call)>;                                    \
    ::cuda_on_cpu::launch(                                                                          \
        (grid), (block), (shared_bytes),                                                            \
        [](const void* closure) { (*static_cast<const fd_call_type*>(closure))(); }, &fd_call);     \
  } while (false)
#define FD_SHARED(T, name, dimensions)                                                              \
  using fd_type_of_##name = T dimensions;                                                           \
  static char fd_key_of_##name;                                                                     \
  auto& name = *static_cast<fd_type_of_##name*>(::cuda_on_cpu::static_shared(                       \
      &fd_key_of_##name, sizeof(fd_type_of_##name), {"shared " #name, __FILE__, __LINE__}))
#define FD_DYN_SMEM(T, name) T* const name = reinterpret_cast<T*>(::cuda_on_cpu::g_block->dynamic_shared)
#define FD_CHECK_ALIGNED(pointer, bytes) \
  ::cuda_on_cpu::check_aligned((pointer), (bytes), {"a vector access", __FILE__, __LINE__})

struct CUstream_st;
namespace fastdiff::cuda {
using Stream = CUstream_st*;
inline int launch_status() { return 0; }  // faults are exceptions here
constexpr int kInvalidValue = 1;          // cudaErrorInvalidValue
inline int64_t max_grid() { return ::cuda_on_cpu::config().max_grid; }
}  // namespace fastdiff::cuda

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::barrier({"__syncthreads", file, line});
}

inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::exchange(mask, nullptr, 0, {"__syncwarp", file, line}, true);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int distance, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= cuda_on_cpu::Exchange::kBytes && std::is_trivially_copyable_v<T>);
  const unsigned lane = cuda_on_cpu::g_block->current->lane;
  auto* slots = cuda_on_cpu::exchange(mask, &value, sizeof(T), {"__shfl_xor_sync", file, line}, false);
  cuda_on_cpu::Unwatched scope;
  __builtin_memcpy(&value, slots[lane ^ static_cast<unsigned>(distance)], sizeof(T));
  return value;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
