// Self-attention on one packed projection, compiled once an instruction set (see kernels/common/vec.h). A thread
// takes one head after the other: what is packed, the scores of a block and the sums stay in its caches.
#include <math.h>
#include <stdlib.h>

#include "kernels/common/exp.h"
#include "kernels/common/lanes.h"
#include "kernels/common/vec.h"
#include "kernels/qgfd/qgfd.h"
#include "kernels/qgfd/qgfd_cpu_tiles.inl"  // packing, threads' scratch, one step of a product
#include "kernels/self_attention/self_attention.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------- products
// As `tile` of qgfd_cpu_tiles.inl, of fewer rows: a head of 49 tokens is seven tiles of seven rows, with no padding.
template <class Math, int kHeight, int kVectors>
__attribute__((noinline)) void short_tile(int64_t steps, const typename Math::Element* a, int64_t a_row, int64_t a_step,
                                          const typename Math::Element* b, float* c, int64_t c_row, bool add) {
  Vec sum[kHeight][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sum[r][v] = add ? Vec::load(c + r * c_row + v * W) : Vec::set(0);
  for (int64_t k = 0; k < steps; k++, a += a_step, b += kPanel) {
    typename Math::Operand right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) right[v] = Math::load(b + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; r++) {
      const auto left = Math::broadcast(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sum[r][v] = Math::multiply_add(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sum[r][v].store(c + r * c_row + v * W);
}

template <class Math, int kVectors>
FD_INLINE void tile_of(int64_t height, int64_t steps, const typename Math::Element* a, int64_t a_row, int64_t a_step,
                       const typename Math::Element* b, float* c, int64_t c_row, bool add) {
  switch (height) {
    case 1: return short_tile<Math, 1, kVectors>(steps, a, a_row, a_step, b, c, c_row, add);
    case 2: return short_tile<Math, 2, kVectors>(steps, a, a_row, a_step, b, c, c_row, add);
    case 3: return short_tile<Math, 3, kVectors>(steps, a, a_row, a_step, b, c, c_row, add);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 4: return short_tile<Math, 4, kVectors>(steps, a, a_row, a_step, b, c, c_row, add);
    case 5: return short_tile<Math, 5, kVectors>(steps, a, a_row, a_step, b, c, c_row, add);
    case 6: return short_tile<Math, 6, kVectors>(steps, a, a_row, a_step, b, c, c_row, add);
    case 7: return short_tile<Math, 7, kVectors>(steps, a, a_row, a_step, b, c, c_row, add);
#endif
    default: return short_tile<Math, kTileRows, kVectors>(steps, a, a_row, a_step, b, c, c_row, add);
  }
}

// C[rows, columns] (+)= A[rows, steps] B[steps, columns]: any number of rows; whole vectors of columns are written.
template <class Math>
void exact_product(int64_t rows, int64_t columns, int64_t steps, const typename Math::Element* a, int64_t a_row,
                   int64_t a_step, const typename Math::Element* b, int64_t b_panel, float* c, int64_t c_row,
                   bool add) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, height = (rows + tiles - 1) / tiles;
  for (int64_t column = 0; column < columns; column += kPanel, b += b_panel)
    for (int64_t r = 0; r < rows; r += height) {
      const int64_t these = smaller(height, rows - r);
      float* const at = c + r * c_row + column;
      if (columns - column > W)
        tile_of<Math, 2>(these, steps, a + r * a_row, a_row, a_step, b, at, c_row, add);
      else
        tile_of<Math, 1>(these, steps, a + r * a_row, a_row, a_step, b, at, c_row, add);
    }
}

// ---------------------------------------------------------------------------------------------------- one head
template <class Math, class T>
struct PackedHead {
  using Element = typename Math::Element;
  using Weight = typename Math::Weight;
  static constexpr int kUnit = Math::kUnit;
  static constexpr bool kRounds = kUnit == 2;

  const SelfAttentionShape& s;
  const int64_t dim_steps, width;     // of a product over d; a row of d numbers in whole vectors
  const int64_t across, panel;        // of an operand [d, tokens], and of a panel of one [tokens, d]
  const int64_t block, padded;        // rows at once; tokens in whole panels

  explicit PackedHead(const SelfAttentionShape& shape)
      : s(shape),
        dim_steps(steps_of(s.dim, kUnit)),
        width(round_up(s.dim, W)),
        across(round_up(s.tokens, kPanel) * dim_steps),
        panel(steps_of(s.tokens, kUnit) * kPanel),
        block(block_of(s.tokens)),
        padded(round_up(s.tokens, kPanel)) {}

  // Blocks of nearly the same size, at most kRows; even, so that pairs of rows lie in one block.
  static int64_t block_of(int64_t tokens) {
    const int64_t blocks = (tokens + kRows - 1) / kRows;
    return round_up((tokens + blocks - 1) / blocks, 2);
  }
  int64_t right_size() const { return (s.dim + kPanel - 1) / kPanel * panel; }
  int64_t rows_of_pairs() const { return round_up(s.tokens, kUnit); }

  Rows<T> part(const void* qkv, int64_t b, int64_t h, int64_t which) const {
    return {static_cast<const T*>(qkv) + ((b * s.tokens * 3 + which) * s.heads + h) * s.dim, 3 * s.heads * s.dim};
  }
  Rows<T> rows(const void* out, int64_t b, int64_t h) const {
    return {static_cast<const T*>(out) + (b * s.tokens * s.heads + h) * s.dim, s.heads * s.dim};
  }
  void store_rows(const float* sums, int64_t count, float by, const Rows<T>& to, int64_t row) const {
    for (int64_t r = 0; r < count; r++)
      for_lanes<Vec>(s.dim, [&](int64_t c, auto n) {
        store(load<Vec>(sums + r * width + c, n) * Vec::set(by), const_cast<T*>(to.row(row + r)) + c, n);
      });
  }
};

// ---------------------------------------------------------------------------------------------------- forward
template <class Math, class T>
struct SelfAttentionForward : PackedHead<Math, T> {
  using Base = PackedHead<Math, T>;
  using typename Base::Element, typename Base::Weight;
  using Base::s, Base::dim_steps, Base::width, Base::across, Base::panel, Base::block, Base::padded, Base::kUnit;

  const SelfAttentionForwardParams& p;
  const int64_t stride;  // of the scores; not a power of 2, which would meet few of the cache's sets
  explicit SelfAttentionForward(const SelfAttentionForwardParams& params)
      : Base(params.shape), p(params), stride(padded + W) {}

  struct Memory {
    Element *keys, *values, *queries;
    float *scores, *sums;
    Weight* weights;
  };
  Memory lay_out(Pieces& pieces) const {
    Memory m{};
    m.keys = pieces.take<Element>(across);
    m.values = pieces.take<Element>(this->right_size());
    m.queries = pieces.take<Element>(block * dim_steps);
    m.scores = pieces.take<float>(block * stride);
    m.sums = pieces.take<float>(block * width);
    m.weights = Base::kRounds ? pieces.take<Weight>(block * stride) : reinterpret_cast<Weight*>(m.scores);
    return m;
  }

  // A block of queries of one head: few long heads have work for many threads.
  int64_t parts() const { return (s.tokens + block - 1) / block; }

  void begin(const Memory& m, int64_t b, int64_t h) const {
    pack_transposed<Math>(this->part(p.qkv, b, h, 1), 0, s.tokens, padded, s.dim, m.keys);
    pack_right(this->part(p.qkv, b, h, 2), 0, s.tokens, this->rows_of_pairs(), s.dim, m.values, panel);
  }

  void run(const Memory& m, int64_t b, int64_t h, int64_t index) const {
    const int64_t row = index * block, count = smaller(block, s.tokens - row);
    const Rows<T> to = this->rows(p.out, b, h);
    float* const lse = p.lse == nullptr ? nullptr : p.lse + (b * s.heads + h) * s.tokens + row;
    pack_left(this->part(p.qkv, b, h, 0), row, s.tokens, count, s.dim, m.queries);
    exact_product<Math>(count, s.tokens, dim_steps, m.queries, dim_steps, 1, m.keys, dim_steps * kPanel, m.scores,
                        stride, false);
    float inverse[kRows];
    for (int64_t r = 0; r < count; r++) {
      float top;
      const float sum = weigh(m.scores + r * stride, m.weights + r * stride, &top);
      inverse[r] = 1.0f / sum;
      if (lse != nullptr) lse[r] = top * s.scale + logf(sum);
    }
    exact_product<Math>(count, s.dim, steps_of(s.tokens, kUnit), reinterpret_cast<const Element*>(m.weights),
                        stride / kUnit, 1, m.values, panel, m.sums, width, false);
    for (int64_t r = 0; r < count; r++) this->store_rows(m.sums + r * width, 1, inverse[r], to, row + r);
  }

  // weights = exp(scale (score - top)), and 0 for what pads the row; returns the sum of the unrounded ones.
  FD_INLINE float weigh(float* score, Weight* weights, float* top) const {
    const int64_t size = round_up(s.tokens, W);
    for (int64_t i = s.tokens; i < size; i++) score[i] = -__builtin_inff();
    Vec largest = Vec::load(score);
    for (int64_t i = W; i < size; i += W) largest = max(Vec::load(score + i), largest);
    *top = largest.max();
    const Vec minus = Vec::set(*top), by = Vec::set(s.scale);
    Vec sum = Vec::set(0);
    for (int64_t i = 0; i < size; i += W) {
      const Vec weight = exp((Vec::load(score + i) - minus) * by);
      weight.store(weights + i);
      sum = sum + weight;
    }
    return sum.sum();
  }
};

// ---------------------------------------------------------------------------------------------------- backward
// The weights are made again with keys as rows and queries as columns, so that the gradients of key and value are plain
// products and only dS has to be read down its columns.
template <class Math, class T>
struct SelfAttentionBackward : PackedHead<Math, T> {
  using Base = PackedHead<Math, T>;
  using typename Base::Element, typename Base::Weight;
  using Base::s, Base::dim_steps, Base::width, Base::across, Base::panel, Base::block, Base::padded, Base::kUnit;
  static constexpr bool kRounds = Base::kRounds;
  static constexpr int64_t kBlockStride = kColumns + W;

  const SelfAttentionBackwardParams& p;
  explicit SelfAttentionBackward(const SelfAttentionBackwardParams& params) : Base(params.shape), p(params) {}

  struct Memory {
    Element *queries_across, *grads_across, *queries, *grads, *keys;  // right operands
    Element *key_rows, *value_rows;                                   // left operands, of a block
    float *scores, *grad_scores;                                      // [block, kBlockStride]
    Weight *weights, *grad_weights;  // the same memory where they are not rounded
    Element* pairs;                  // grad_weights, neighbouring keys in an element
    float *grad_query, *grad_key, *grad_value, *lse, *delta;
  };
  Memory lay_out(Pieces& pieces) const {
    Memory m{};
    m.queries_across = pieces.take<Element>(across);
    m.grads_across = pieces.take<Element>(across);
    m.queries = pieces.take<Element>(this->right_size());
    m.grads = pieces.take<Element>(this->right_size());
    m.keys = pieces.take<Element>(this->right_size());
    m.key_rows = pieces.take<Element>(block * dim_steps);
    m.value_rows = pieces.take<Element>(block * dim_steps);
    m.scores = pieces.take<float>(block * kBlockStride);
    m.grad_scores = pieces.take<float>(block * kBlockStride);
    m.weights = reinterpret_cast<Weight*>(m.scores);
    m.grad_weights = reinterpret_cast<Weight*>(m.grad_scores);
    if (kRounds) {
      m.weights = pieces.take<Weight>(block * kBlockStride);
      m.grad_weights = pieces.take<Weight>(block * kBlockStride);
    }
    m.pairs = pieces.take<Element>(kRounds ? block / 2 * kBlockStride : 0);
    m.grad_query = pieces.take<float>(s.tokens * width);
    m.grad_key = pieces.take<float>(block * width);
    m.grad_value = pieces.take<float>(block * width);
    m.lse = pieces.take<float>(padded);
    m.delta = pieces.take<float>(padded);
    return m;
  }

  int64_t parts() const { return 1; }  // a head: all of its keys give to the gradient of each query

  void run(const Memory& m, int64_t b, int64_t h, int64_t) const {
    const Rows<T> key = this->part(p.qkv, b, h, 1), value = this->part(p.qkv, b, h, 2);
    for (int64_t row = 0; row < s.tokens; row += block) {
      const int64_t count = smaller(block, s.tokens - row);
      pack_left(key, row, s.tokens, count, s.dim, m.key_rows);
      pack_left(value, row, s.tokens, count, s.dim, m.value_rows);
      for (int64_t column = 0; column < s.tokens; column += kColumns)
        add_block(m, row, count, column, smaller(kColumns, s.tokens - column));
      this->store_rows(m.grad_key, count, s.scale, this->part(p.grad_qkv, b, h, 1), row);
      this->store_rows(m.grad_value, count, 1.0f, this->part(p.grad_qkv, b, h, 2), row);
    }
    this->store_rows(m.grad_query, s.tokens, s.scale, this->part(p.grad_qkv, b, h, 0), 0);
  }

  void begin(const Memory& m, int64_t b, int64_t h) const {
    const Rows<T> query = this->part(p.qkv, b, h, 0), key = this->part(p.qkv, b, h, 1);
    const Rows<T> grad = this->rows(p.grad_out, b, h), out = this->rows(p.out, b, h);
    const int64_t pairs = this->rows_of_pairs();
    pack_transposed<Math>(query, 0, s.tokens, padded, s.dim, m.queries_across);
    pack_transposed<Math>(grad, 0, s.tokens, padded, s.dim, m.grads_across);
    pack_right(query, 0, s.tokens, pairs, s.dim, m.queries, panel);
    pack_right(grad, 0, s.tokens, pairs, s.dim, m.grads, panel);
    pack_right(key, 0, s.tokens, pairs, s.dim, m.keys, panel);
    const float* const lse = p.lse + (b * s.heads + h) * s.tokens;
    for (int64_t i = 0; i < padded; i++) {
      m.lse[i] = i < s.tokens ? lse[i] : 0.0f;
      if (i >= s.tokens) {
        m.delta[i] = 0;
        continue;
      }
      const T *const g = grad.row(i), *const o = out.row(i);
      Vec sum = Vec::set(0);
      for_lanes<Vec>(s.dim, [&](int64_t c, auto n) { sum = fma(load<Vec>(g + c, n), load<Vec>(o + c, n), sum); });
      m.delta[i] = sum.sum();
    }
  }

  // What `count` keys and `size` queries give to all three gradients.
  void add_block(const Memory& m, int64_t row, int64_t count, int64_t column, int64_t size) const {
    const int64_t steps = steps_of(size, kUnit), stride = kBlockStride / kUnit;
    const bool first = column == 0;
    exact_product<Math>(count, size, dim_steps, m.key_rows, dim_steps, 1, m.queries_across + column * dim_steps,
                        dim_steps * kPanel, m.scores, kBlockStride, false);
    exact_product<Math>(count, size, dim_steps, m.value_rows, dim_steps, 1, m.grads_across + column * dim_steps,
                        dim_steps * kPanel, m.grad_scores, kBlockStride, false);
    for (int64_t r = 0; r < count; r++) differentiate(m, r * kBlockStride, column, round_up(size, W));
    exact_product<Math>(count, s.dim, steps, reinterpret_cast<const Element*>(m.weights), stride, 1,
                        m.grads + column / kUnit * kPanel, panel, m.grad_value, width, !first);
    exact_product<Math>(count, s.dim, steps, reinterpret_cast<const Element*>(m.grad_weights), stride, 1,
                        m.queries + column / kUnit * kPanel, panel, m.grad_key, width, !first);
    pair_rows(m, count, round_up(size, W));
    const Element* const down = kRounds ? m.pairs : reinterpret_cast<const Element*>(m.grad_weights);
    exact_product<Math>(size, s.dim, steps_of(count, kUnit), down, 1, kBlockStride, m.keys + row / kUnit * kPanel,
                        panel, m.grad_query + column * width, width, row > 0);
  }

  // One key's weights, and dS = weight (dP - delta).
  FD_INLINE void differentiate(const Memory& m, int64_t at, int64_t column, int64_t size) const {
    const Vec by = Vec::set(s.scale), zero = Vec::set(0);
    for (int64_t c = 0; c < size; c += W) {
      const Vec log_weight = fma(Vec::load(m.scores + at + c), by, zero - Vec::load(m.lse + column + c));
      const Vec weight = exp(min(zero, log_weight));  // above 0 by rounding alone; NaN stays
      const Vec grad = weight * (Vec::load(m.grad_scores + at + c) - Vec::load(m.delta + column + c));
      weight.store(m.weights + at + c);
      grad.store(m.grad_weights + at + c);
    }
  }

  void pair_rows(const Memory& m, int64_t count, int64_t size) const {
    if constexpr (kRounds)
      for (int64_t r = 0; r < count; r += 2) {
        const Weight* const at = m.grad_weights + r * kBlockStride;
        for (int64_t c = 0; c < size; c += W) {
          const Vec other = r + 1 < count ? Vec::load(at + kBlockStride + c) : Vec::set(0);
          interleave(Vec::load(at + c), other).store(reinterpret_cast<float*>(m.pairs + r / 2 * kBlockStride + c));
        }
      }
  }
};

// A thread takes parts of heads, one after the other; its memory serves all of them.
template <class Pass>
void for_all_parts(const Pass& pass, const ParallelFor& parallel_for) {
  Pieces measure(nullptr);
  pass.lay_out(measure);
  const int64_t heads = pass.s.heads, parts = pass.parts();
  parallel_for(0, pass.s.batch * heads * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(measure.used());
    Pieces pieces(scratch.memory());
    const auto memory = pass.lay_out(pieces);
    for (int64_t i = begin; i < end; i++) {
      const int64_t head = i / parts, part = i % parts;
      if (i == begin || part == 0) pass.begin(memory, head / heads, head % heads);
      pass.run(memory, head / heads, head % heads, part);
    }
  });
}

#if defined(__AVX512BF16__)
using MathOfBf16 = Bf16Pairs;
#else
using MathOfBf16 = Fp32;
#endif

}  // namespace

void self_attention_forward(const SelfAttentionForwardParams& p, const ParallelFor& parallel_for) {
  const DType dtype = p.shape.dtype;
  if (dtype == DType::kFloat32) for_all_parts(SelfAttentionForward<Fp32, float>(p), parallel_for);
  if (dtype == DType::kBFloat16) for_all_parts(SelfAttentionForward<MathOfBf16, BF16>(p), parallel_for);
  if (dtype == DType::kFloat16) for_all_parts(SelfAttentionForward<Fp32, F16>(p), parallel_for);
}

void self_attention_backward(const SelfAttentionBackwardParams& p, const ParallelFor& parallel_for) {
  const DType dtype = p.shape.dtype;
  if (dtype == DType::kFloat32) for_all_parts(SelfAttentionBackward<Fp32, float>(p), parallel_for);
  if (dtype == DType::kBFloat16) for_all_parts(SelfAttentionBackward<MathOfBf16, BF16>(p), parallel_for);
  if (dtype == DType::kFloat16) for_all_parts(SelfAttentionBackward<Fp32, F16>(p), parallel_for);
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
