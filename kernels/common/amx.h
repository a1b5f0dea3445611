// Tiles of AMX: eight registers of 16 rows x 64 bytes, and C += A B in which A has 16 rows of 16 pairs of bf16, B the
// pairs of 16 rows of k (lower half: the first of a pair) for 16 columns, and C 16 x 16 floats.
//
// FASTDIFF_AMX_TWIN, which the tests define, puts plain C++ with the same meaning in their place. Either way a tile's
// number is a literal.
#pragma once
#include "kernels/common/vec.h"

#if defined(FASTDIFF_AMX_TWIN) || defined(__AMX_BF16__)
#define FD_HAS_AMX 1

namespace fastdiff::cpu::FASTDIFF_ISA {

#if defined(FASTDIFF_AMX_TWIN)
struct TileTwin {
  uint32_t row[16][16];
};
inline thread_local TileTwin tile_twins[8];
inline thread_local bool tiles_configured = false;
inline thread_local int64_t tile_products = 0;  // since the thread began

inline void move_tile(int number, const void* from, void* to, int64_t stride) {
  if (!tiles_configured) __builtin_trap();
  for (int r = 0; r < 16; r++) {
    if (from != nullptr) memcpy(tile_twins[number].row[r], static_cast<const char*>(from) + r * stride, 64);
    if (to != nullptr) memcpy(static_cast<char*>(to) + r * stride, tile_twins[number].row[r], 64);
  }
}
// TDPBF16PS: sums of the first and of the second numbers of the pairs apart, then both to C.
inline void multiply_tiles(int c, int a, int b) {
  if (!tiles_configured) __builtin_trap();
  tile_products++;
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      float first = 0, second = 0;
      for (int k = 0; k < 16; k++) {
        const uint32_t x = tile_twins[a].row[m][k], y = tile_twins[b].row[k][n];
        first += bits_to_float(x << 16) * bits_to_float(y << 16);
        second += bits_to_float(x & 0xffff0000) * bits_to_float(y & 0xffff0000);
      }
      uint32_t& sum = tile_twins[c].row[m][n];
      sum = float_to_bits(bits_to_float(sum) + (first + second));
    }
}
#define FD_TILE_ZERO(number) memset(&tile_twins[number], 0, sizeof(TileTwin))
#define FD_TILE_LOAD(number, from, stride) move_tile(number, from, nullptr, stride)
#define FD_TILE_STORE(number, to, stride) move_tile(number, nullptr, to, stride)
#define FD_TILE_MULTIPLY_ADD(c, a, b) multiply_tiles(c, a, b)
#else
#define FD_TILE_ZERO(number) _tile_zero(number)
#define FD_TILE_LOAD(number, from, stride) _tile_loadd(number, from, stride)
#define FD_TILE_STORE(number, to, stride) _tile_stored(number, to, stride)
#define FD_TILE_MULTIPLY_ADD(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

// The calling thread's tiles, all of 16 rows x 64 bytes, for as long as this lives.
class Tiles {
 public:
  FD_INLINE Tiles() {
#if defined(FASTDIFF_AMX_TWIN)
    tiles_configured = true;
#else
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    asm volatile("" ::"m"(config) : "memory");  // GCC's intrinsic names only its first bytes
    _tile_loadconfig(&config);
#endif
  }
  FD_INLINE ~Tiles() {
#if defined(FASTDIFF_AMX_TWIN)
    tiles_configured = false;
#else
    _tile_release();
#endif
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// C [32, 32] (+)= A [32, 2 steps] * B [2 steps, 32], steps a multiple of 16; strides in elements.
__attribute__((noinline)) inline void multiply_add_32x32(int64_t steps, const uint32_t* a, int64_t a_row,
                                                         const uint32_t* b, int64_t b_row, float* c, int64_t c_row,
                                                         bool add) {
  asm volatile("" ::: "memory");  // the intrinsics do not say that they read memory
  const int64_t a_bytes = a_row * 4, b_bytes = b_row * 4, c_bytes = c_row * 4;
  float* const lower = c + 16 * c_row;
  if (add) {
    FD_TILE_LOAD(0, c, c_bytes);
    FD_TILE_LOAD(1, c + 16, c_bytes);
    FD_TILE_LOAD(2, lower, c_bytes);
    FD_TILE_LOAD(3, lower + 16, c_bytes);
  } else {
    FD_TILE_ZERO(0);
    FD_TILE_ZERO(1);
    FD_TILE_ZERO(2);
    FD_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < steps; k += 16) {
    FD_TILE_LOAD(4, a + k, a_bytes);
    FD_TILE_LOAD(5, a + 16 * a_row + k, a_bytes);
    FD_TILE_LOAD(6, b + k * b_row, b_bytes);
    FD_TILE_LOAD(7, b + k * b_row + 16, b_bytes);
    FD_TILE_MULTIPLY_ADD(0, 4, 6);
    FD_TILE_MULTIPLY_ADD(1, 4, 7);
    FD_TILE_MULTIPLY_ADD(2, 5, 6);
    FD_TILE_MULTIPLY_ADD(3, 5, 7);
  }
  FD_TILE_STORE(0, c, c_bytes);
  FD_TILE_STORE(1, c + 16, c_bytes);
  FD_TILE_STORE(2, lower, c_bytes);
  FD_TILE_STORE(3, lower + 16, c_bytes);
  asm volatile("" ::: "memory");
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
#endif
