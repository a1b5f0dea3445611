// Twins of kernels/common/mma.cuh on the emulator. A copy to shared memory happens at the wait for it, and its
// destination holds NaN until then, so that a forgotten wait shows.
#pragma once
#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

EMULATOR_INTERNAL inline void enqueue_copy(const AsyncCopy& copy) {
  Unwatched scope;
  g_block->current->copies.copies.push_back(copy);
}
EMULATOR_INTERNAL inline void commit_copies() {
  Unwatched scope;
  g_block->current->copies.commit();
}
EMULATOR_INTERNAL inline bool next_copy(size_t pending, AsyncCopy& copy) {
  Unwatched scope;
  return g_block->current->copies.next(pending, copy);
}

}  // namespace cuda_on_cpu

namespace fastdiff::cuda {

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  struct Values {
    float a[4][2], b[2][2];
  } mine;
  const uint32_t registers[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int r = 0; r < 6; ++r) {
    T pair[2];
    __builtin_memcpy(pair, &registers[r], sizeof pair);
    float* values = r < 4 ? mine.a[r] : mine.b[r - 4];
    for (int i = 0; i < 2; ++i) values[i] = static_cast<float>(pair[i]);
  }
  auto* slots = ::cuda_on_cpu::exchange(~0u, &mine, sizeof mine, {"mma", file, line}, false);
  ::cuda_on_cpu::Unwatched scope;
  const auto of = [&](int lane) { return reinterpret_cast<const Values*>(slots[lane]); };
  const int group = ::cuda_on_cpu::lane() / 4, column = ::cuda_on_cpu::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) {
      const Values& row = *of(group * 4 + k % 8 / 2);
      const Values& other = *of((column + i % 2) * 4 + k % 8 / 2);
      d[i] += row.a[i / 2 + k / 8 * 2][k % 2] * other.b[k / 8][k % 2];
    }
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, const ::cuda_on_cpu::Site& site) {
  ::cuda_on_cpu::check_aligned(row, 16, site);
  uint16_t mine[8];
  __builtin_memcpy(mine, row, sizeof mine);  // watched: the kernel's own read
  auto* slots = ::cuda_on_cpu::exchange(~0u, mine, sizeof mine, site, false);
  ::cuda_on_cpu::Unwatched scope;
  const int group = ::cuda_on_cpu::lane() / 4, pair = ::cuda_on_cpu::lane() % 4 * 2;
  for (int m = 0; m < 4; ++m) {
    uint16_t two[2];
    for (int i = 0; i < 2; ++i) {
      const int from = transposed ? pair + i : group, at = transposed ? group : pair + i;
      __builtin_memcpy(&two[i], slots[8 * m + from] + 2 * at, 2);
    }
    __builtin_memcpy(&r[m], two, 4);
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, const char* file = __builtin_FILE(),
                        int line = __builtin_LINE()) {
  load_matrices(r, row, false, {"ldmatrix", file, line});
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  load_matrices(r, row, true, {"ldmatrix_trans", file, line});
}

inline void copy_async_16(void* to_shared, const void* from, bool inside, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  const ::cuda_on_cpu::Site site{"cp.async", file, line};
  ::cuda_on_cpu::check_aligned(to_shared, 16, site);
  if (inside) ::cuda_on_cpu::check_aligned(from, 16, site);
  __builtin_memset(to_shared, ::cuda_on_cpu::config().poison, 16);  // watched: a race with whoever reads here still
  ::cuda_on_cpu::enqueue_copy({to_shared, inside ? from : nullptr});
}
inline void copy_async_commit() { ::cuda_on_cpu::commit_copies(); }
template <int kPending>
inline void copy_async_wait() {
  ::cuda_on_cpu::AsyncCopy copy;
  while (::cuda_on_cpu::next_copy(kPending, copy)) {
    if (copy.from) {
      __builtin_memcpy(copy.to, copy.from, 16);
    } else {
      __builtin_memset(copy.to, 0, 16);
    }
  }
}

}  // namespace fastdiff::cuda
