#include "mma_products.h"

#include "kernels/common/mma.cuh"

namespace cuda_on_cpu {
namespace {

using namespace fastdiff::cuda;

// c = a bᵀ or a b, by one warp: a [16, 16], b [16, 16] both copied to shared memory; c [16, 16]
template <class T, bool kTransposed>
__global__ void product(const T* a, const T* b, float* c) {
  FD_SHARED(T, tiles, [2][16][24]);
  const int lane = threadIdx.x % 32, row = lane / 2, column = lane % 2 * 8;
  copy_async_16(&tiles[0][row][column], a + 16 * row + column, true);
  copy_async_16(&tiles[1][row][column], b + 16 * row + column, true);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  uint32_t left[4], right[4];
  ldmatrix_x4(left, &tiles[0][lane % 16][lane / 16 * 8]);
  if constexpr (kTransposed) {
    ldmatrix_x4(right, &tiles[1][lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
  } else {
    ldmatrix_x4_trans(right, &tiles[1][lane % 16][lane / 16 * 8]);
  }
  for (int half = 0; half < 2; ++half) {
    float d[4] = {};
    mma_m16n8k16<T>(d, left, right[2 * half], right[2 * half + 1]);
    for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

__global__ void zero_filled(const float* in, float* out) {
  FD_SHARED(float, tile, [128]);
  copy_async_16(tile + 4 * threadIdx.x, threadIdx.x % 2 ? in + 4 * threadIdx.x : nullptr, threadIdx.x % 2);
  copy_async_commit();
  copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = tile[4 * threadIdx.x + i];
}

template <class T>
void run(bool transposed, const void* a, const void* b, float* c) {
  const auto *left = static_cast<const T*>(a), *right = static_cast<const T*>(b);
  if (transposed) {
    FD_LAUNCH((product<T, true>), dim3(1), dim3(32), 0, Stream{}, left, right, c);
  } else {
    FD_LAUNCH((product<T, false>), dim3(1), dim3(32), 0, Stream{}, left, right, c);
  }
}

}  // namespace

void run_product(bool bfloat16, bool transposed, const void* a, const void* b, float* c) {
  bfloat16 ? run<__nv_bfloat16>(transposed, a, b, c) : run<__half>(transposed, a, b, c);
}
void run_zero_filled(const float* in, float* out) {
  FD_LAUNCH(zero_filled, dim3(1), dim3(32), 0, Stream{}, in, out);
}

}  // namespace cuda_on_cpu
