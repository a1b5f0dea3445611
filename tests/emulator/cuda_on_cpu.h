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
#ifdef EMULATOR_ASAN  // each access becomes many instructions: compiled once a function, not once a call
#define __forceinline__ inline
#else
#define __forceinline__ inline __attribute__((always_inline))
#endif

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
template <class Kernel>
int allow_shared(Kernel*, int64_t) {  // the launch checks the chip's limit
  return 0;
}
}  // namespace fastdiff::cuda

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::barrier({"__syncthreads", file, line});
}
inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return cuda_on_cpu::barrier({"__syncthreads_or", file, line}, predicate != 0);
}

inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::exchange(mask, nullptr, 0, {"__syncwarp", file, line}, true);
}

namespace cuda_on_cpu {

// What the lane `source` gave; the caller's own value where there is no such lane.
template <class T>
inline T shuffled(unsigned mask, T value, int source, const Site& site) {
  static_assert(sizeof(T) <= Exchange::kBytes && std::is_trivially_copyable_v<T>);
  auto* slots = exchange(mask, &value, sizeof(T), site, false);
  Unwatched scope;
  if (source >= 0 && source < static_cast<int>(kWarpSize)) __builtin_memcpy(&value, slots[source], sizeof(T));
  return value;
}
inline int lane() { return static_cast<int>(g_block->current->lane); }

}  // namespace cuda_on_cpu

#define FD_SHUFFLE(name, Index, source)                                                                         \
  template <class T>                                                                                            \
  inline T name(unsigned mask, T value, Index index, const char* file = __builtin_FILE(),                       \
                int line = __builtin_LINE()) {                                                                  \
    return cuda_on_cpu::shuffled(mask, value, source, {#name, file, line});                                     \
  }
FD_SHUFFLE(__shfl_sync, int, index & 31)
FD_SHUFFLE(__shfl_xor_sync, int, cuda_on_cpu::lane() ^ index)
FD_SHUFFLE(__shfl_up_sync, unsigned, cuda_on_cpu::lane() - static_cast<int>(index))
FD_SHUFFLE(__shfl_down_sync, unsigned, cuda_on_cpu::lane() + static_cast<int>(index))
#undef FD_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  const unsigned char mine = predicate != 0;
  auto* slots = cuda_on_cpu::exchange(mask, &mine, 1, {"__ballot_sync", file, line}, false);
  cuda_on_cpu::Unwatched scope;
  unsigned votes = 0;
  for (unsigned i = 0; i < cuda_on_cpu::kWarpSize; ++i) votes |= (mask >> i & 1u) && slots[i][0] ? 1u << i : 0u;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

// Atomic, and in no order: ThreadSanitizer takes them neither for races nor for barriers. Integers only, as kernels
// have no float atomics.
template <class T>
inline T atomicAdd(T* at, T value) {
  static_assert(std::is_integral_v<T>);
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
template <class T>
inline T atomicOr(T* at, T value) {
  static_assert(std::is_integral_v<T>);
  return __atomic_fetch_or(at, value, __ATOMIC_RELAXED);
}

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
