// The hops forward. Where a head's weights fit in the cache they are made once and kept for all hops; longer heads make
// them again in each hop, a block at a time, from the row maxima and sums that the first hop leaves.

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kKeptBytes = int64_t(4) << 20;

// p = exp(scale (s - top)) in place, or rounded into `weights`; returns the sum of the unrounded ones. size a multiple of W.
template <class Weight>
FD_INLINE float exponentials(float* s, int64_t size, float scale, float top, Weight* weights) {
  const Vec by = Vec::set(scale), minus = Vec::set(top);
  Vec sum[2] = {Vec::set(0), Vec::set(0)};
  int64_t i = 0;
  for (; i + 2 * W <= size; i += 2 * W)
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++) {
      const Vec p = exp((Vec::load(s + i + k * W) - minus) * by);  // exactly 1 at the top
      p.store(weights + i + k * W);
      sum[k] = sum[k] + p;
    }
  for (; i < size; i += W) {
    const Vec p = exp((Vec::load(s + i) - minus) * by);
    p.store(weights + i);
    sum[0] = sum[0] + p;
  }
  return (sum[0] + sum[1]).sum();
}

FD_INLINE float maximum(const float* s, int64_t size) {
  Vec m[2] = {Vec::load(s), Vec::load(s)};
  int64_t i = 0;
  for (; i + 2 * W <= size; i += 2 * W)
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++) m[k] = max(Vec::load(s + i + k * W), m[k]);
  for (; i < size; i += W) m[0] = max(Vec::load(s + i), m[0]);
  return max(m[0], m[1]).max();
}

FD_INLINE void scale_row(float* row, int64_t size, float by) {
  for (int64_t i = 0; i < size; i += W) (Vec::load(row + i) * Vec::set(by)).store(row + i);
}

// One head's forward pass, or its share of a thread.
template <class Math, class T>
struct Forward {
  using Element = typename Math::Element;
  using Weight = typename Math::Weight;

  const QgfdForwardParams& p;
  const QgfdMatrix& m;
  const bool kept;
  const int64_t dim_steps, dim_panels, width;  // of a product over d; of an output row in whole vectors
  const int64_t padded_keys, padded_queries;

  explicit Forward(const QgfdForwardParams& params)
      : p(params),
        m(params.matrix),
        kept(round_up(m.queries, kRows) * round_up(m.keys, kPanel) * int64_t(sizeof(Weight)) <= kKeptBytes),
        dim_steps(steps_of(m.dim, Math::kUnit)),
        dim_panels((m.dim + kPanel - 1) / kPanel),
        width(round_up(m.dim, W)),
        padded_keys(round_up(larger(m.keys, 1), kPanel)),
        padded_queries(round_up(m.queries, kRows)) {}

  // What all threads of a head share.
  struct Head {
    int64_t b, h;
    Rows<T> query, key;
    Element* keys;       // transposed, the scores' right operand
    Element* values;     // u_{j-1}, the weights' right operand
    int64_t value_panel;
    float* key_bias;     // 0 or -Inf a key; only where there is a key_mask
    bool* block_seen;    // whether it leaves any key of a block of kColumns
    float *top, *inverse;  // a row: largest score (unscaled), 1 / sum of weights
    T* hop[2];           // u_1, u_2, ... one after the other
    Weight* weights;     // kept: [padded_queries, padded_keys]
    Intervals see;
  };
  // What a thread has of its own.
  struct Block {
    Element* query;   // [kRows, dim_steps]
    float* scores;    // [kRows, kColumns], kept: [kRows, padded_keys] where weights are narrower
    Weight* weights;  // [kRows, kColumns] where they are not the scores themselves
    float* sums;      // [kRows, width]
  };

  void lay_out(Pieces& pieces, Head& head) const {
    head.keys = pieces.template take<Element>(padded_keys * dim_steps);
    head.value_panel = padded_keys / Math::kUnit * kPanel;
    head.values = pieces.template take<Element>(dim_panels * head.value_panel);
    head.key_bias = pieces.template take<float>(m.key_mask == nullptr ? 0 : padded_keys);
    head.block_seen = pieces.template take<bool>((padded_keys + kColumns - 1) / kColumns);
    head.top = pieces.template take<float>(padded_queries);
    head.inverse = pieces.template take<float>(padded_queries);
    for (int i = 0; i < 2; i++)
      head.hop[i] = pieces.template take<T>(i < p.recurrence.hops - 1 ? padded_queries * m.dim : 0);
    head.weights = pieces.template take<Weight>(kept ? padded_queries * padded_keys : 0);
  }
  void lay_out(Pieces& pieces, Block& block) const {
    block.query = pieces.template take<Element>(kRows * dim_steps);
    block.scores = pieces.template take<float>(kRows * (kept ? padded_keys : kColumns));
    block.weights = pieces.template take<Weight>(Math::kUnit == 1 ? 0 : kRows * kColumns);
    block.sums = pieces.template take<float>(kRows * width);
  }
  template <class Part>
  int64_t bytes() const {
    Pieces measure(nullptr);
    Part part{};
    lay_out(measure, part);
    return measure.used();
  }

  template <class For>
  void run(int64_t b, int64_t h, const For& parallel_for) const {
    const Scratch memory(bytes<Head>());
    Pieces pieces(memory.memory());
    Head head{};
    lay_out(pieces, head);
    const int64_t kv = h / (m.heads / m.kv_heads);
    head.b = b;
    head.h = h;
    head.query = rows_of<T>(m.query, b, h);
    head.key = rows_of<T>(m.key, b, kv);
    head.see = intervals_of(m, b);
    const int64_t blocks = (padded_keys + kColumns - 1) / kColumns;
    parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t j = i * kColumns, size = smaller(kColumns, padded_keys - j);
        pack_transposed<Math>(head.key, j, m.keys, size, m.dim, head.keys + j * dim_steps);
        head.block_seen[i] = m.key_mask == nullptr;
        if (m.key_mask == nullptr) continue;
        for (int64_t k = j; k < j + size; k++) {
          const bool some = k < m.keys && m.key_mask[b * m.keys + k];
          head.key_bias[k] = some ? 0.0f : -__builtin_inff();
          head.block_seen[i] |= some;
        }
      }
    });
    const Rows<T> value = rows_of<T>(p.value, b, kv);
    Rows<T> from = value;
    for (int64_t hop = 1; hop <= p.recurrence.hops; hop++) {
      parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t j = i * kColumns, size = smaller(kColumns, padded_keys - j);
          pack_right(from, j, m.keys, size, m.dim, head.values + j / Math::kUnit * kPanel, head.value_panel);
        }
      });
      T* const to = target(head, hop);
      const int64_t to_stride = hop == p.recurrence.hops ? m.heads * m.dim : m.dim;
      parallel_for(0, padded_queries / kRows, 1, [&](int64_t begin, int64_t end) {
        const Scratch own(bytes<Block>());
        Pieces pieces_of_block(own.memory());
        Block block{};
        lay_out(pieces_of_block, block);
        for (int64_t i = begin; i < end; i++) {
          const int64_t row = i * kRows;
          weigh(head, block, row, hop == 1);
          finish(head, block, row, hop, value, to, to_stride);
        }
      });
      from = {to, to_stride};
    }
    if (p.lse == nullptr) return;
    float* const lse = p.lse + (b * m.heads + h) * m.queries;
    for (int64_t i = 0; i < m.queries; i++)
      lse[i] = head.inverse[i] > 0 ? head.top[i] * m.scale - logf(head.inverse[i]) : 0.0f;
  }

  T* target(const Head& head, int64_t hop) const {
    if (hop == p.recurrence.hops) return static_cast<T*>(p.out) + head.b * m.queries * m.heads * m.dim + head.h * m.dim;
    return head.hop[(hop - 1) % 2];
  }

  // The scores of a block of queries with the keys [column, column + size).
  void score(const Head& head, const Block& block, int64_t row, const Extent& seen, int64_t column, int64_t size,
             float* scores, int64_t stride) const {
    if (!head.block_seen[column / kColumns]) {
      for (int64_t r = 0; r < kRows; r++)
        for (int64_t i = 0; i < size; i++) scores[r * stride + i] = -__builtin_inff();
      return;
    }
    product<Math>(kRows, size, dim_steps, block.query, dim_steps, 1, head.keys + column * dim_steps,
                  dim_steps * kPanel, scores, stride, false);
    const bool all = seen.all_begin <= column && seen.all_end >= column + size;
    if (all && m.key_mask == nullptr) return;
    for (int64_t r = 0; r < kRows && row + r < m.queries; r++) {
      float* const s = scores + r * stride;
      if (m.key_mask != nullptr)
        for (int64_t i = 0; i < size; i += W) (Vec::load(s + i) + Vec::load(head.key_bias + column + i)).store(s + i);
      if (all) continue;
      const int64_t first = larger(0, smaller(size, head.see.first(row + r) - column));
      const int64_t last = larger(first, smaller(size, head.see.last(row + r) - column));
      for (int64_t i = 0; i < first; i++) s[i] = -__builtin_inff();
      for (int64_t i = last; i < size; i++) s[i] = -__builtin_inff();
    }
  }

  // block.sums = weights of the rows from `row` on, not yet normalised, times the values.
  void weigh(const Head& head, const Block& block, int64_t row, bool first) const {
    Extent seen = extent_of(head.see, row, smaller(row + kRows, m.queries));
    seen.some_begin = seen.some_begin / kColumns * kColumns;
    seen.some_end = larger(seen.some_begin, seen.some_end);
    if (first || !kept) pack_left(head.query, row, m.queries, kRows, m.dim, block.query);
    if (kept)
      weigh_kept(head, block, row, seen, first);
    else
      weigh_in_blocks(head, block, row, seen, first);
  }

  void weigh_kept(const Head& head, const Block& block, int64_t row, const Extent& seen, bool first) const {
    Weight* const weights = head.weights + row * padded_keys;
    const int64_t begin = seen.some_begin, size = round_up(seen.some_end - begin, kPanel);
    if (first) {
      float* const scores = Math::kUnit == 1 ? reinterpret_cast<float*>(weights) : block.scores;
      for (int64_t column = begin; column < begin + size; column += kColumns)
        score(head, block, row, seen, column, smaller(kColumns, begin + size - column), scores + column, padded_keys);
      for (int64_t r = 0; r < kRows; r++) {
        float* const s = scores + r * padded_keys + begin;
        float top = size > 0 ? maximum(s, size) : 0.0f;
        if (top == -__builtin_inff()) top = 0;  // nothing to attend to
        const float sum = exponentials(s, size, m.scale, top, weights + r * padded_keys + begin);
        head.top[row + r] = top;
        head.inverse[row + r] = sum > 0 ? 1.0f / sum : sum;  // NaN stays
      }
    }
    memset(block.sums, 0, kRows * width * sizeof(float));
    for (int64_t column = begin; column < begin + size; column += kColumns)
      add_values(head, reinterpret_cast<const Element*>(weights + column), padded_keys / Math::kUnit, column,
                 smaller(kColumns, begin + size - column), block.sums);
  }

  void add_values(const Head& head, const Element* weights, int64_t stride, int64_t column, int64_t size,
                  float* sums) const {
    if (!head.block_seen[column / kColumns]) return;
    product<Math>(kRows, m.dim, size / Math::kUnit, weights, stride, 1, head.values + column / Math::kUnit * kPanel,
                  head.value_panel, sums, width, true);
  }

  void weigh_in_blocks(const Head& head, const Block& block, int64_t row, const Extent& seen, bool first) const {
    memset(block.sums, 0, kRows * width * sizeof(float));
    float* const top = head.top + row;
    float* const sum = head.inverse + row;  // while the first hop adds it up
    if (first)
      for (int64_t r = 0; r < kRows; r++) top[r] = -__builtin_inff(), sum[r] = 0;
    for (int64_t column = seen.some_begin; column < seen.some_end; column += kColumns) {
      if (!head.block_seen[column / kColumns]) continue;
      const int64_t size = smaller(kColumns, round_up(seen.some_end - column, kPanel));
      score(head, block, row, seen, column, size, block.scores, kColumns);
      Weight* const weights = Math::kUnit == 1 ? reinterpret_cast<Weight*>(block.scores) : block.weights;
      for (int64_t r = 0; r < kRows; r++) {
        float* const s = block.scores + r * kColumns;
        if (first) {
          const float larger_top = maximum(s, size);
          if (!(larger_top <= top[r])) {  // or NaN
            const float factor = top[r] > -__builtin_inff() ? expf((top[r] - larger_top) * m.scale) : 0.0f;
            scale_row(block.sums + r * width, width, factor);
            sum[r] *= factor;
            top[r] = larger_top;
          }
          const float used = top[r] == -__builtin_inff() ? 0.0f : top[r];
          sum[r] += exponentials(s, size, m.scale, used, weights + r * kColumns);
        } else {
          exponentials(s, size, m.scale, top[r], weights + r * kColumns);
        }
      }
      add_values(head, reinterpret_cast<const Element*>(weights), kColumns / Math::kUnit, column, size, block.sums);
    }
    if (first)
      for (int64_t r = 0; r < kRows; r++) {
        if (top[r] == -__builtin_inff()) top[r] = 0;
        sum[r] = sum[r] == 0 ? 0.0f : 1.0f / sum[r];
      }
  }

  // y = round(sums / sum of weights), u = its mixture with the values.
  void finish(const Head& head, const Block& block, int64_t row, int64_t hop, Rows<T> value, T* to,
              int64_t to_stride) const {
    const bool mixed = p.recurrence.mixed(hop), save = p.passes != nullptr && hop <= p.recurrence.saved();
    const int64_t head_rows = m.queries * m.dim;
    T* const passes = !save ? nullptr
                            : static_cast<T*>(p.passes) + ((hop - 1) * m.batch + head.b) * m.heads * head_rows +
                                  head.h * head_rows;
    const Vec alpha = Vec::set(p.recurrence.alpha), rest = Vec::set(1 - p.recurrence.alpha);
    for (int64_t r = 0; r < kRows && row + r < m.queries; r++) {
      const Vec by = Vec::set(head.inverse[row + r]);
      const float* const sums = block.sums + r * width;
      T* const out = to + (row + r) * to_stride;
      for_lanes<Vec>(m.dim, [&](int64_t c, auto n) { store(load<Vec>(sums + c, n) * by, out + c, n); });
      if (save) memcpy(passes + (row + r) * m.dim, out, m.dim * sizeof(T));
      if (!mixed) continue;
      const T* const v = value.row(row + r);
      for_lanes<Vec>(m.dim, [&](int64_t c, auto n) {
        store(fma(alpha, load<Vec>(out + c, n), rest * load<Vec>(v + c, n)), out + c, n);
      });
    }
  }
};

template <class Math, class T>
void forward(const QgfdForwardParams& p, const ParallelFor& parallel_for) {
  const Forward<Math, T> pass(p);
  for_heads(p.matrix, parallel_for, [&](int64_t b, int64_t h, const auto& threads) { pass.run(b, h, threads); });
}

}  // namespace
}  // namespace fastdiff::cpu::FASTDIFF_ISA
