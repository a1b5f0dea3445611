#include "faults.h"

#include <cstring>

#include "kernels/common/cuda_dtype.cuh"
#include "kernels/common/mma.cuh"

namespace cuda_on_cpu::faults {
namespace {

constexpr int kThreads = 128;

// out[i] = in[n - 1 - i], through shared memory
template <bool kBarrier>
__global__ void reverse(const float* in, float* out) {
  FD_SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = in[threadIdx.x];
  if constexpr (kBarrier) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

// Both halves meet a barrier, but not the same one.
__global__ void two_barriers(float* out) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    out[threadIdx.x] = 2.0f;
    __syncthreads();
  }
}

__global__ void divergent_shuffle(const float* in, float* out) {
  float v = in[threadIdx.x];
  if (threadIdx.x % 2) v = __shfl_xor_sync(0xffffffffu, v, 2);
  out[threadIdx.x] = v;
}

// The grid covers n + 1 elements.
__global__ void read_past_the_end(const float* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) out[i % n] = in[i];
}

__global__ void write_past_static_shared(float* out) {
  FD_SHARED(float, tile, [kThreads]);
  tile[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void fill_dynamic_shared(float* out) {
  FD_DYN_SMEM(float, tile);
  tile[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void read_uninitialised_shared(float* out) {
  FD_DYN_SMEM(float, tile);
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void load_vectors(const float* in, float* out) {
  float v[4];
  fastdiff::cuda::load(in + 4 * threadIdx.x, v);
  fastdiff::cuda::store(out + 4 * threadIdx.x, v);
}

// A cast that the kernels' own load() does not guard; UBSan sees it.
__global__ void cast_to_vector(const float* in, float* out) {
  using Four = fastdiff::cuda::Pack<float, 4>;
  reinterpret_cast<Four*>(out)[threadIdx.x] = reinterpret_cast<const Four*>(in)[threadIdx.x];
}

__global__ void too_much_static_shared(float* out) {
  FD_SHARED(float, tile, [64 << 10]);
  tile[threadIdx.x] = 1.0f;
  out[threadIdx.x] = tile[threadIdx.x];
}

// out[i] = in[n - 1 - i], copied to shared memory past the registers
template <bool kWait, bool kBarrier>
__global__ void reverse_copied(const float* in, float* out) {
  FD_SHARED(float, tile, [kThreads]);
  using fastdiff::cuda::copy_async_16;
  if (threadIdx.x < kThreads / 4) copy_async_16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  fastdiff::cuda::copy_async_commit();
  if constexpr (kWait) fastdiff::cuda::copy_async_wait<0>();
  if constexpr (kBarrier) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
  fastdiff::cuda::copy_async_wait<0>();
}

// The first half waits for the older of two groups, and reads the younger one.
__global__ void wait_for_the_wrong_group(const float* in, float* out) {
  FD_SHARED(float, tile, [2][kThreads]);
  for (int half = 0; half < 2; ++half) {
    if (threadIdx.x < kThreads / 4) {
      fastdiff::cuda::copy_async_16(tile[half] + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    }
    fastdiff::cuda::copy_async_commit();
  }
  fastdiff::cuda::copy_async_wait<1>();
  __syncthreads();
  out[threadIdx.x] = threadIdx.x < kThreads / 2 ? tile[1][threadIdx.x] : tile[0][threadIdx.x];
  fastdiff::cuda::copy_async_wait<0>();
}

__global__ void copy_without_wait(const float* in) {
  FD_SHARED(float, tile, [kThreads]);
  if (threadIdx.x < kThreads / 4) fastdiff::cuda::copy_async_16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
}

// Every block adds to one cell without an atomic operation or another block's end.
__global__ void cross_block_race(float* out) {
  if (threadIdx.x == 0) out[0] += 1.0f;
}

__global__ void one_cell_a_block(float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] += 1.0f;
}

}  // namespace

int run(const char* name, const float* in, float* out, int n) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  const fastdiff::cuda::Stream stream = nullptr;
  const dim3 one(1), threads(kThreads);
  if (is("reverse")) {
    FD_LAUNCH(reverse<true>, one, threads, 0, stream, in, out);
  } else if (is("removed_barrier")) {
    FD_LAUNCH(reverse<false>, one, threads, 0, stream, in, out);
  } else if (is("divergent_barrier")) {
    FD_LAUNCH(divergent_barrier, one, threads, 0, stream, out);
  } else if (is("two_barriers")) {
    FD_LAUNCH(two_barriers, one, threads, 0, stream, out);
  } else if (is("divergent_shuffle")) {
    FD_LAUNCH(divergent_shuffle, one, threads, 0, stream, in, out);
  } else if (is("read_past_the_end")) {
    FD_LAUNCH(read_past_the_end, dim3(n / 32 + 1), dim3(32), 0, stream, in, out, n);
  } else if (is("write_past_static_shared")) {
    FD_LAUNCH(write_past_static_shared, one, threads, 0, stream, out);
  } else if (is("dynamic_shared")) {
    FD_LAUNCH(fill_dynamic_shared, one, threads, kThreads * 4, stream, out);
  } else if (is("write_past_dynamic_shared")) {
    FD_LAUNCH(fill_dynamic_shared, one, threads, kThreads * 4 - 4, stream, out);
  } else if (is("uninitialised_shared")) {
    FD_LAUNCH(read_uninitialised_shared, one, threads, kThreads * 4, stream, out);
  } else if (is("vectors")) {
    FD_LAUNCH(load_vectors, one, dim3(32), 0, stream, in, out);
  } else if (is("misaligned_vector")) {
    FD_LAUNCH(load_vectors, one, dim3(16), 0, stream, in + 1, out);
  } else if (is("misaligned_cast")) {
    FD_LAUNCH(cast_to_vector, one, dim3(16), 0, stream, in + 1, out);
  } else if (is("too_much_static_shared")) {
    FD_LAUNCH(too_much_static_shared, one, threads, 0, stream, out);
  } else if (is("too_much_dynamic_shared")) {
    FD_LAUNCH(fill_dynamic_shared, one, threads, 100 << 10, stream, out);
  } else if (is("reverse_copied")) {
    FD_LAUNCH((reverse_copied<true, true>), one, threads, 0, stream, in, out);
  } else if (is("copy_read_before_wait")) {
    FD_LAUNCH((reverse_copied<false, true>), one, threads, 0, stream, in, out);
  } else if (is("copy_read_before_barrier")) {
    FD_LAUNCH((reverse_copied<true, false>), one, threads, 0, stream, in, out);
  } else if (is("wait_for_the_wrong_group")) {
    FD_LAUNCH(wait_for_the_wrong_group, one, threads, 0, stream, in, out);
  } else if (is("copy_without_wait")) {
    FD_LAUNCH(copy_without_wait, one, threads, 0, stream, in);
  } else if (is("misaligned_copy")) {
    FD_LAUNCH((reverse_copied<true, true>), one, threads, 0, stream, in + 1, out);
  } else if (is("cross_block_race")) {
    FD_LAUNCH(cross_block_race, dim3(8), dim3(32), 0, stream, out);
  } else if (is("one_cell_a_block")) {
    FD_LAUNCH(one_cell_a_block, dim3(8), dim3(32), 0, stream, out);
  } else {
    return 1;
  }
  return 0;
}

}  // namespace cuda_on_cpu::faults
