// conv_activation on the CPU, compiled once an instruction set (see kernels/common/vec.h). A thread takes two vectors of
// channels of one sample after the other: their grid lies in its caches, as floats with a border of zeros.
#include <math.h>
#include <stdlib.h>

#include "kernels/bias_activation/gelu_table.h"
#include "kernels/bias_activation/normal_tail.h"
#include "kernels/common/exp.h"
#include "kernels/common/vec.h"
#include "kernels/conv_activation/conv_activation.h"

#include "kernels/bias_activation/gates_cpu.inl"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t W = Vec::kWidth, kCell = 2 * W;  // channels of a block: a cache line of 16-bit numbers with AVX-512
constexpr int64_t kGrain = 8192;                   // elements a thread should have before a second one is woken

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

FD_INLINE void add_cell(Vec left, Vec right, float* cell) {
  (Vec::load(cell) + left).store(cell);
  (Vec::load(cell + W) + right).store(cell + W);
}

template <class T>
constexpr bool kShortOf = false;
template <>
constexpr bool kShortOf<BF16> = true;

// A grid of cells with a border, whose zeros nobody overwrites.
class Grid {
 public:
  Grid(const ConvActivationShape& s, int64_t grids) : width(s.columns + 2), size(width * (s.rows + 2) * kCell) {
    const int64_t bytes = (grids * size * int64_t(sizeof(float)) + 63) / 64 * 64;
    memory_ = static_cast<float*>(aligned_alloc(64, bytes));
    if (memory_ == nullptr) abort();  // as far gone as a stack overflow: kernels have no way to report
    memset(memory_, 0, bytes);
  }
  ~Grid() { free(memory_); }
  Grid(const Grid&) = delete;
  Grid& operator=(const Grid&) = delete;

  float* grid(int64_t i) const { return memory_ + i * size; }
  int64_t around(int64_t row, int64_t column) const { return (row * width + column) * kCell; }  // upper left of 3 × 3
  int64_t cell(int64_t row, int64_t column) const { return around(row + 1, column + 1); }
  int64_t tap(int64_t k) const { return (k / 3 * width + k % 3) * kCell; }  // from `around`

  const int64_t width, size;

 private:
  float* memory_;
};

// Channels [first, first + count) of one sample; count = kCell but for the last block of a row.
template <bool kWhole>
struct Block {
  int64_t first, count;

  template <class T>
  FD_INLINE Vec take(const T* row, int64_t v) const {  // zeros beyond the last channel
    if constexpr (kWhole) return Vec::load(row + first + v * W);
    const int64_t n = lanes(v);
    return n > 0 ? load<Vec>(row + first + v * W, n) : Vec::set(0);
  }
  FD_INLINE Vec number(const float* row, int64_t v) const { return row ? take(row, v) : Vec::set(0); }
  template <class T>
  FD_INLINE void put(Vec a, Vec b, T* row) const {
    if constexpr (kWhole) return put_two<false>(a, b, row + first);
    store(a, row + first, lanes(0));
    if (lanes(1) > 0) store(b, row + first + W, lanes(1));
  }
  FD_INLINE int64_t lanes(int64_t v) const {
    const int64_t n = count - v * W;
    return n < 0 ? 0 : n < W ? n : W;
  }
};

template <bool kWhole, class T>
void fill(const Grid& g, const ConvActivationShape& s, const Block<kWhole>& block, const T* from, const float* bias,
          float* to) {
  const Vec left = block.number(bias, 0), right = block.number(bias, 1);
  for (int64_t r = 0; r < s.rows; r++)
    for (int64_t c = 0; c < s.columns; c++, from += s.dim) {
      float* const cell = to + g.cell(r, c);
      __builtin_prefetch(from + block.first + kCell);  // of the next block: no prefetcher follows these strides
      (block.take(from, 0) + left).store(cell);
      (block.take(from, 1) + right).store(cell + W);
    }
}

// sum[c] += the 3 × 3 window of each of kTokens neighbours: what they share is loaded once.
template <int kTokens>
FD_INLINE void add_windows(const Grid& g, const float* window, const Vec (&weight)[9], Vec (&sum)[kTokens]) {
#pragma GCC unroll 3
  for (int i = 0; i < 3; i++) {
    const float* const row = window + i * g.width * kCell;
#pragma GCC unroll 8
    for (int j = 0; j < kTokens + 2; j++) {
      const Vec x = Vec::load(row + j * kCell);
#pragma GCC unroll 4
      for (int c = 0; c < kTokens; c++)
        if (j - c >= 0 && j - c < 3) sum[c] = fma(x, weight[3 * i + j - c], sum[c]);
    }
  }
}

// The convolution of one vector of channels, from grid to grid.
FD_INLINE void convolve(const Grid& g, const ConvActivationShape& s, const float* from, const Vec (&weight)[9], Vec bias,
                        float* to) {
  constexpr int kTokens = 4;
  for (int64_t r = 0; r < s.rows; r++) {
    int64_t c = 0;
    for (; c + kTokens <= s.columns; c += kTokens) {
      Vec sum[kTokens] = {bias, bias, bias, bias};
      add_windows(g, from + g.around(r, c), weight, sum);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; t++) sum[t].store(to + g.cell(r, c + t));
    }
    for (; c < s.columns; c++) {
      Vec sum[1] = {bias};
      add_windows(g, from + g.around(r, c), weight, sum);
      sum[0].store(to + g.cell(r, c));
    }
  }
}

template <class T, Activation kActivation, bool kWhole>
void forward_block(const ConvActivationForwardParams& p, const Grid& g, int64_t sample, const Block<kWhole>& block) {
  const ConvActivationShape& s = p.shape;
  const int64_t at = sample * s.rows * s.columns * s.dim;
  float *const in = g.grid(0), *const value = g.grid(1);
  fill(g, s, block, static_cast<const T*>(p.x) + at, p.x_bias, in);
  for (int64_t v = 0; v < 2; v++) {
    Vec weight[9];
#pragma GCC unroll 9
    for (int k = 0; k < 9; k++) weight[k] = block.take(p.weight + k * s.dim, v);
    convolve(g, s, in + v * W, weight, block.number(p.bias, v), value + v * W);
  }
  T* out = static_cast<T*>(p.out) + at;
  using Gate = Act<kActivation, kShortOf<T>, Vec>;
  for (int64_t r = 0; r < s.rows; r++)
    for (int64_t c = 0; c < s.columns; c++, out += s.dim) {
      const float* const cell = value + g.cell(r, c);
      const Vec a = Vec::load(cell), b = Vec::load(cell + W);
      block.put(a * Gate::gate(a), b * Gate::gate(b), out);
    }
}

// sums[k] += Σ grad · x at place k of each window, for one vector of channels.
FD_INLINE void add_weight_gradient(const Grid& g, const ConvActivationShape& s, const float* x, const float* grad,
                                   float* sums) {
  constexpr int kTokens = 4;
  Vec sum[9];
#pragma GCC unroll 9
  for (int k = 0; k < 9; k++) sum[k] = Vec::load(sums + k * kCell);
  const auto add = [&](auto tokens, int64_t r, int64_t c) __attribute__((always_inline)) {
    constexpr int kCount = decltype(tokens)::value;
    Vec d[kCount];
#pragma GCC unroll 4
    for (int t = 0; t < kCount; t++) d[t] = Vec::load(grad + g.cell(r, c + t));
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
      const float* const row = x + g.around(r + i, c);
#pragma GCC unroll 8
      for (int j = 0; j < kCount + 2; j++) {
        const Vec value = Vec::load(row + j * kCell);
#pragma GCC unroll 4
        for (int t = 0; t < kCount; t++)
          if (j - t >= 0 && j - t < 3) sum[3 * i + j - t] = fma(value, d[t], sum[3 * i + j - t]);
      }
    }
  };
  for (int64_t r = 0; r < s.rows; r++) {
    int64_t c = 0;
    for (; c + kTokens <= s.columns; c += kTokens) add(Number<kTokens>{}, r, c);
    for (; c < s.columns; c++) add(Number<1>{}, r, c);
  }
#pragma GCC unroll 9
  for (int k = 0; k < 9; k++) sum[k].store(sums + k * kCell);
}

// Sums are added to `sums`, [kConvSums, kCell].
template <class T, Activation kActivation, bool kSums, bool kWhole>
void backward_block(const ConvActivationBackwardParams& p, const Grid& g, int64_t sample, const Block<kWhole>& block,
                    float* sums) {
  const ConvActivationShape& s = p.shape;
  const int64_t at = sample * s.rows * s.columns * s.dim;
  float *const in = g.grid(0), *const value = g.grid(1), *const grad = g.grid(2);
  fill(g, s, block, static_cast<const T*>(p.x) + at, p.x_bias, in);
  Vec weight[9];
  for (int64_t v = 0; v < 2; v++) {
#pragma GCC unroll 9
    for (int k = 0; k < 9; k++) weight[k] = block.take(p.weight + k * s.dim, v);
    convolve(g, s, in + v * W, weight, block.number(p.bias, v), value + v * W);
  }
  // the gradient before the activation
  const T* grad_out = static_cast<const T*>(p.grad_out) + at;
  Vec left = Vec::set(0), right = Vec::set(0);
  using Gate = Act<kActivation, kShortOf<T>, Vec>;
  for (int64_t r = 0; r < s.rows; r++)
    for (int64_t c = 0; c < s.columns; c++, grad_out += s.dim) {
      const int64_t cell = g.cell(r, c);
      const Vec a = block.take(grad_out, 0) * Gate::derivative(Vec::load(value + cell));
      const Vec b = block.take(grad_out, 1) * Gate::derivative(Vec::load(value + cell + W));
      a.store(grad + cell);
      b.store(grad + cell + W);
      left = left + a;
      right = right + b;
    }
  if constexpr (kSums) {
    add_cell(left, right, sums + 9 * kCell);
    for (int64_t v = 0; v < 2; v++) add_weight_gradient(g, s, in + v * W, grad + v * W, sums + v * W);
  }
  for (int64_t v = 0; v < 2; v++) {
#pragma GCC unroll 9
    for (int k = 0; k < 9; k++) weight[k] = block.take(p.weight + (8 - k) * s.dim, v);
    convolve(g, s, grad + v * W, weight, Vec::set(0), value + v * W);
  }
  T* out = static_cast<T*>(p.grad_x) + at;
  left = right = Vec::set(0);
  for (int64_t r = 0; r < s.rows; r++)
    for (int64_t c = 0; c < s.columns; c++, out += s.dim) {
      const float* const cell = value + g.cell(r, c);
      const Vec a = Vec::load(cell), b = Vec::load(cell + W);
      block.put(a, b, out);
      left = left + a;
      right = right + b;
    }
  if constexpr (kSums) add_cell(left, right, sums + 10 * kCell);
}

template <Activation kValue>
struct Chosen {
  static constexpr Activation value = kValue;
};
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
template <class F>
void with_activation(Activation activation, const F& f) {
  if (activation == Activation::kGelu) f(Chosen<Activation::kGelu>{});
  if (activation == Activation::kGeluTanh) f(Chosen<Activation::kGeluTanh>{});
  if (activation == Activation::kSilu) f(Chosen<Activation::kSilu>{});
}
template <class F>
void with_block(const ConvActivationShape& s, int64_t index, const F& f) {
  const int64_t first = index * kCell, left = s.dim - first;
  if (left >= kCell)
    f(Block<true>{first, kCell});
  else
    f(Block<false>{first, left});
}

// Adds the segments' sums in order, for columns [begin, end) of all rows of sums together.
void finish_columns(const ConvActivationBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t segments = conv_activation_segments(p.shape), stride = kConvSums * p.shape.dim;
  for_lanes<Vec>(end - begin, [&](int64_t i, auto n) {
    Vec total = Vec::set(0);
    for (int64_t s = 0; s < segments; s++) total = total + load<Vec>(p.workspace + s * stride + begin + i, n);
    store(total, p.grad_parameters + begin + i, n);
  });
}

template <class T, Activation kActivation, bool kSums>
void backward_segment(const ConvActivationBackwardParams& p, const Grid& g, int64_t segment, int64_t index) {
  const ConvActivationShape& s = p.shape;
  alignas(64) float sums[kConvSums * kCell];
  memset(sums, 0, sizeof sums);
  const int64_t begin = segment * kConvSamples, end = begin + kConvSamples < s.batch ? begin + kConvSamples : s.batch;
  with_block(s, index, [&](const auto& block) {
    for (int64_t b = begin; b < end; b++) backward_block<T, kActivation, kSums>(p, g, b, block, sums);
    if constexpr (kSums)
      for (int64_t k = 0; k < kConvSums; k++)
        for (int64_t v = 0; v < 2; v++)
          if (block.lanes(v) > 0)
            store(Vec::load(sums + k * kCell + v * W),
                  p.workspace + (segment * kConvSums + k) * s.dim + block.first + v * W, block.lanes(v));
  });
}

}  // namespace

void conv_activation_forward(const ConvActivationForwardParams& p, const ParallelFor& parallel_for) {
  const ConvActivationShape& s = p.shape;
  const int64_t blocks = (s.dim + kCell - 1) / kCell;
  with_type<Vec>(s.dtype, [&](auto type) {
    with_activation(s.activation, [&](auto activation) {
      using T = typename decltype(type)::type;
      parallel_for(0, s.batch * blocks, kGrain / (s.rows * s.columns * kCell), [&](int64_t begin, int64_t end) {
        const Grid grid(s, 2);
        for (int64_t i = begin; i < end; i++)
          with_block(s, i % blocks, [&](const auto& block) {
            forward_block<T, decltype(activation)::value>(p, grid, i / blocks, block);
          });
      });
    });
  });
}

void conv_activation_backward(const ConvActivationBackwardParams& p, const ParallelFor& parallel_for) {
  const ConvActivationShape& s = p.shape;
  const int64_t blocks = (s.dim + kCell - 1) / kCell, segments = conv_activation_segments(s);
  const auto run = [&](auto type, auto activation, auto sums) {
    const int64_t of_segment = kConvSamples * s.rows * s.columns * kCell;
    parallel_for(0, segments * blocks, kGrain / of_segment, [&](int64_t begin, int64_t end) {
      const Grid grid(s, 3);
      for (int64_t i = begin; i < end; i++)
        backward_segment<typename decltype(type)::type, decltype(activation)::value, decltype(sums)::value>(
            p, grid, i / blocks, i % blocks);
    });
  };
  with_type<Vec>(s.dtype, [&](auto type) {
    with_activation(s.activation, [&](auto activation) {
      if (p.grad_parameters)
        run(type, activation, Flag<true>{});
      else
        run(type, activation, Flag<false>{});
    });
  });
  if (p.grad_parameters) {
    constexpr int64_t kColumns = 256;
    const int64_t columns = kConvSums * s.dim, pieces = (columns + kColumns - 1) / kColumns;
    parallel_for(0, pieces, kGrain / (kColumns * segments), [&](int64_t first, int64_t last) {
      const int64_t end = last * kColumns;
      finish_columns(p, first * kColumns, end < columns ? end : columns);
    });
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
