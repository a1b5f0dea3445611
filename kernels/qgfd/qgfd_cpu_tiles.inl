// The products under QGFD attention, in tiles that stay in a core's caches: C[rows, columns] (+)= A[rows, k] * B[k, columns].
//
// B lies in panels of kPanel columns, [panel][k][kPanel], so that a tile reads it one vector after the other; A is read
// one number at a time with any strides, so that a transposed A costs nothing. In Fp32 a step of k is one number. In
// Bf16Pairs it is two neighbouring ones in 32 bits, which the CPU multiplies and adds in one instruction.

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int W = Vec::kWidth;
// A tile's sums stay in registers: 8 x 2 vectors of 32 registers, 4 x 2 of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;
constexpr int kPanel = kTileVectors * W;
constexpr int64_t kRows = 64;      // of a block: queries of a forward pass, keys of a backward pass
constexpr int64_t kColumns = 128;  // of a block of scores; a multiple of every kPanel

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
FD_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FD_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Fp32 {
  using Element = float;  // of operands as they are packed
  using Weight = float;   // of a probability: kUnit of them are an Element
  using Operand = Vec;
  static constexpr int kUnit = 1;
  static FD_INLINE Vec load(const float* p) { return Vec::load(p); }
  static FD_INLINE Vec broadcast(float x) { return Vec::set(x); }
  static FD_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  using Element = uint32_t;
  using Weight = BF16;
  using Operand = __m512bh;
  static constexpr int kUnit = 2;
  static FD_INLINE __m512bh load(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static FD_INLINE __m512bh broadcast(uint32_t x) { return (__m512bh)_mm512_set1_epi32(int(x)); }
  static FD_INLINE Vec multiply_add(__m512bh a, __m512bh b, Vec sum) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }
};
#endif

// kTileRows x kVectors vectors of C.
template <class Math, int kVectors>
__attribute__((noinline)) void tile(int64_t steps, const typename Math::Element* a, int64_t a_row, int64_t a_step,
                                    const typename Math::Element* b, float* c, int64_t c_row, bool add) {
  Vec sum[kTileRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sum[r][v] = add ? Vec::load(c + r * c_row + v * W) : Vec::set(0);
  const typename Math::Element* row[kTileRows];
  for (int r = 0; r < kTileRows; r++) row[r] = a + r * a_row;
  for (int64_t k = 0, at = 0; k < steps; k++, at += a_step, b += kPanel) {
    typename Math::Operand right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) right[v] = Math::load(b + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; r++) {
      const auto left = Math::broadcast(row[r][at]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sum[r][v] = Math::multiply_add(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sum[r][v].store(c + r * c_row + v * W);
}

// What comes from far is asked for while other numbers are multiplied: a piece of it at each tile.
struct Ahead {
  const char* at = nullptr;
  int64_t bytes_a_tile = 0;
  FD_INLINE void next() {
    for (int64_t i = 0; i < bytes_a_tile; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += bytes_a_tile;
  }
};

// rows a multiple of kTileRows; `columns` of C are wanted, and C's rows are long enough for whole vectors.
template <class Math>
void product(int64_t rows, int64_t columns, int64_t steps, const typename Math::Element* a, int64_t a_row,
             int64_t a_step, const typename Math::Element* b, int64_t b_panel, float* c, int64_t c_row, bool add,
             Ahead ahead = {}) {
  for (int64_t column = 0; column < columns; column += kPanel, b += b_panel)
    for (int64_t r = 0; r < rows; r += kTileRows) {
      ahead.next();
      float* const at = c + r * c_row + column;
      if (columns - column > W)
        tile<Math, 2>(steps, a + r * a_row, a_row, a_step, b, at, c_row, add);
      else
        tile<Math, 1>(steps, a + r * a_row, a_row, a_step, b, at, c_row, add);
    }
}

// ---------------------------------------------------------------------------------------------------- packing
// The rows of one head, [rows, dim], of elements T.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  const T* row(int64_t i) const { return data + i * stride; }
};

template <class T>
Rows<T> rows_of(const QgfdHeads& heads, int64_t b, int64_t h) {
  return {static_cast<const T*>(heads.data) + b * heads.batch_stride + h * heads.head_stride, heads.row_stride};
}

constexpr int64_t steps_of(int64_t size, int unit) { return (size + unit - 1) / unit; }

// W vectors of W lanes, seen as a square matrix of 32-bit numbers.
FD_INLINE void transpose(Vec (&square)[W]) {
#if defined(__AVX512F__)
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(square[i].v, square[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(square[i].v, square[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // u[4 a + i]: rows 4 a ... 4 a + 3 of the columns i, 4 + i, 8 + i, 12 + i
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88), b = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd), d = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
    square[i].v = _mm512_shuffle_f32x4(a, b, 0x88);
    square[8 + i].v = _mm512_shuffle_f32x4(a, b, 0xdd);
    square[4 + i].v = _mm512_shuffle_f32x4(c, d, 0x88);
    square[12 + i].v = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
#else
  float lanes[W][W], across[W];
  for (int i = 0; i < W; i++) square[i].store(lanes[i]);
  for (int i = 0; i < W; i++) {
    for (int j = 0; j < W; j++) across[j] = lanes[j][i];
    square[i] = Vec::load(across);
  }
#endif
}

// W steps of k of one row.
template <class T>
FD_INLINE Vec load_steps(const T* row, int64_t k, int64_t dim, Fp32) {
  return dim - k >= W ? Vec::load(row + k) : Vec::load(row + k, dim - k);
}

#if defined(__AVX512BF16__)
FD_INLINE Vec load_steps(const BF16* row, int64_t k, int64_t dim, Bf16Pairs) {
  const int64_t n = dim - 2 * k;
  const __mmask32 some = n >= 32 ? ~0u : (1u << n) - 1;
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, row + 2 * k))};
}

// Pairs of bf16 from two vectors that hold one each in the upper half of 32 bits.
FD_INLINE Vec interleave(Vec low, Vec high) {
  const __m512i l = _mm512_srli_epi32(_mm512_castps_si512(low.v), 16);
  return {_mm512_castsi512_ps(_mm512_or_si512(l, _mm512_castps_si512(high.v)))};
}
#endif

// As the left operand: [count, steps], k runs along a row. Rows from `end` on are zero.
template <class T>
void pack_left(Rows<T> from, int64_t begin, int64_t end, int64_t count, int64_t dim, float* to) {
  for (int64_t i = 0; i < count; i++, to += dim) {
    if (begin + i >= end) {
      for_lanes<Vec>(dim, [&](int64_t c, auto n) { store(Vec::set(0), to + c, n); });
      continue;
    }
    const T* row = from.row(begin + i);
    for_lanes<Vec>(dim, [&](int64_t c, auto n) { store(load<Vec>(row + c, n), to + c, n); });
  }
}
#if defined(__AVX512BF16__)
inline void pack_left(Rows<BF16> from, int64_t begin, int64_t end, int64_t count, int64_t dim, uint32_t* to) {
  const int64_t steps = steps_of(dim, 2);
  for (int64_t i = 0; i < count; i++, to += steps) {
    to[steps - 1] = 0;
    if (begin + i < end)
      memcpy(to, from.row(begin + i), dim * sizeof(BF16));
    else
      memset(to, 0, steps * sizeof(uint32_t));
  }
}
#endif

// As the right operand whose k runs over rows: B[k, c] = from[begin + k, c]. `rows` of them, zero from `end` on; a
// multiple of the unit.
template <class T>
void pack_right(Rows<T> from, int64_t begin, int64_t end, int64_t rows, int64_t dim, float* to, int64_t panel) {
  for (int64_t k = 0; k < rows; k++)
    for (int64_t column = 0, p = 0; column < dim; column += kPanel, p++) {
      float* const at = to + p * panel + k * kPanel;
      const int64_t width = smaller(kPanel, dim - column);
      for (int64_t c = width / W * W; c < kPanel; c += W) Vec::set(0).store(at + c);
      if (begin + k >= end) {
        for (int64_t c = 0; c < width; c += W) Vec::set(0).store(at + c);
      } else {
        const T* row = from.row(begin + k) + column;
        for_lanes<Vec>(width, [&](int64_t c, auto n) { store(load<Vec>(row + c, n), at + c, n); });
      }
    }
}
#if defined(__AVX512BF16__)
inline void pack_right(Rows<BF16> from, int64_t begin, int64_t end, int64_t rows, int64_t dim, uint32_t* to,
                       int64_t panel) {
  for (int64_t k = 0; k < rows; k += 2) {
    const BF16* first = begin + k < end ? from.row(begin + k) : nullptr;
    const BF16* second = begin + k + 1 < end ? from.row(begin + k + 1) : nullptr;
    for (int64_t column = 0, p = 0; column < dim; column += kPanel, p++) {
      uint32_t* const at = to + p * panel + k / 2 * kPanel;
      const int64_t width = smaller(kPanel, dim - column);
      for (int64_t c = 0; c < kPanel; c += W) {
        const int64_t n = smaller(W, larger(width - c, 0));
        Vec low = first ? Vec::load(first + column + c, n) : Vec::set(0);  // the number in the upper half of 32 bits
        Vec high = second ? Vec::load(second + column + c, n) : Vec::set(0);
        interleave(low, high).store(reinterpret_cast<float*>(at + c));
      }
    }
  }
}
#endif

// As the right operand whose columns are the rows: B[k, j] = from[begin + j, k]. `columns` of them, zero from `end` on; a
// multiple of kPanel.
template <class Math, class T>
void pack_transposed(Rows<T> from, int64_t begin, int64_t end, int64_t columns, int64_t dim,
                     typename Math::Element* to) {
  const int64_t steps = steps_of(dim, Math::kUnit);
  for (int64_t column = 0; column < columns; column += kPanel, to += steps * kPanel)
    for (int64_t j = 0; j < kPanel; j += W)
      for (int64_t k = 0; k < steps; k += W) {
        Vec square[W];
        for (int i = 0; i < W; i++) {
          const int64_t at = begin + column + j + i;
          square[i] = at < end ? load_steps(from.row(at), k, dim, Math{}) : Vec::set(0);
        }
        transpose(square);
        const int64_t count = smaller(W, steps - k);
        for (int64_t i = 0; i < count; i++)
          square[i].store(reinterpret_cast<float*>(to + (k + i) * kPanel + j));
      }
}

// ---------------------------------------------------------------------------------------------------- memory, threads
// One allocation, handed out in 64-byte aligned pieces: first measured (with no memory under it), then made.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(static_cast<char*>(aligned_alloc(64, round_up(bytes + 1, 64)))) {
    if (memory_ == nullptr) abort();  // as far gone as a stack overflow: kernels have no way to report
  }
  ~Scratch() { free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* memory() const { return memory_; }

 private:
  char* memory_;
};

class Pieces {
 public:
  explicit Pieces(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return memory_ == nullptr ? nullptr : piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

struct SerialFor {
  template <class F>
  void operator()(int64_t begin, int64_t end, int64_t, const F& f) const {
    if (begin < end) f(begin, end);
  }
};

// Whether each thread takes heads of its own, or all threads share one head after the other. The results are the same, bit
// for bit. A head of one's own costs memory a thread.
inline bool heads_apart(const QgfdMatrix& m) {
  const int64_t longest = larger(m.queries, m.keys);
  return longest <= 4096 && (m.batch * m.heads >= 8 || longest <= kRows);
}

template <class F>
void for_heads(const QgfdMatrix& m, const ParallelFor& parallel_for, const F& f) {
  if (heads_apart(m)) {
    parallel_for(0, m.batch * m.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f(i / m.heads, i % m.heads, SerialFor{});
    });
  } else {
    for (int64_t i = 0; i < m.batch * m.heads; i++) f(i / m.heads, i % m.heads, parallel_for);
  }
}

// ---------------------------------------------------------------------------------------------------- masks
// The keys that the queries of one sample see, key_mask apart.
struct Intervals {
  const int32_t *begin, *end;
  int64_t keys;
  int64_t first(int64_t i) const { return begin == nullptr ? 0 : larger(begin[i], 0); }
  int64_t last(int64_t i) const { return end == nullptr ? keys : smaller(end[i], keys); }
};

inline Intervals intervals_of(const QgfdMatrix& m, int64_t b) {
  return {m.row_begin == nullptr ? nullptr : m.row_begin + b * m.begin_batch_stride,
          m.row_end == nullptr ? nullptr : m.row_end + b * m.end_batch_stride, m.keys};
}

// What some, and what all of the queries [begin, end) see.
struct Extent {
  int64_t some_begin, some_end, all_begin, all_end;
};

inline Extent extent_of(const Intervals& see, int64_t begin, int64_t end) {
  if (see.begin == nullptr && see.end == nullptr) return {0, see.keys, 0, see.keys};
  Extent e{see.keys, 0, 0, see.keys};
  for (int64_t i = begin; i < end; i++) {
    const int64_t first = see.first(i), last = see.last(i);
    if (first < last) {
      e.some_begin = smaller(e.some_begin, first);
      e.some_end = larger(e.some_end, last);
    }
    e.all_begin = larger(e.all_begin, first);
    e.all_end = smaller(e.all_end, last);
  }
  return e;
}

}  // namespace
}  // namespace fastdiff::cpu::FASTDIFF_ISA
