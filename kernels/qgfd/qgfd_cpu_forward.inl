// The hops forward. Where a head's weights fit in memory they are made once and kept for all hops; longer heads make
// them again in each hop, a block at a time, from the row maxima and sums that the first hop leaves.

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kKeptBytes = int64_t(64) << 20;         // of the weights that are kept at once, of all threads
constexpr int64_t kKeptBytesApart = int64_t(4) << 20;     // of a head, where each thread takes heads of its own
constexpr int64_t kEnoughBlocks = 64;                     // of rows, for threads that share heads
constexpr int64_t kPanelKeys = 4096;                      // a block of queries with so many keys stays in a core's cache

// weights = exp(scale (s - top)), rounded to their type, where s lies or elsewhere; returns a sum in each lane of the
// unrounded ones. size a multiple of W.
template <class Weight>
FD_INLINE Vec exponentials(const float* s, int64_t size, float scale, float top, Weight* weights) {
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
  return sum[0] + sum[1];
}

// A maximum in each lane.
FD_INLINE Vec maximum(const float* s, int64_t size) {
  Vec m[2] = {Vec::load(s), Vec::load(s)};
  int64_t i = 0;
  for (; i + 2 * W <= size; i += 2 * W)
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++) m[k] = max(Vec::load(s + i + k * W), m[k]);
  for (; i < size; i += W) m[0] = max(Vec::load(s + i), m[0]);
  return max(m[0], m[1]);
}

FD_INLINE void scale_row(float* row, int64_t size, float by) {
  for (int64_t i = 0; i < size; i += W) (Vec::load(row + i) * Vec::set(by)).store(row + i);
}

template <class Math, class T>
struct Forward {
  using Element = typename Math::Element;
  using Weight = typename Math::Weight;
  static constexpr bool kInPlace = Math::kUnit == 1;  // scores become weights where they are

  const QgfdForwardParams& p;
  const QgfdMatrix& m;
  const int64_t dim_steps, dim_panels, width;  // of a product over d; of an output row in whole vectors
  const int64_t padded_keys, padded_queries;
  const int64_t weights_of_head;
  const bool kept;         // the weights of the first hop serve the others
  const bool panelled;     // the first hop has all scores of a block of queries at once, so that it knows their maxima
  const bool apart;        // each thread takes heads of its own; else threads share `together` heads at once
  const int64_t together;

  explicit Forward(const QgfdForwardParams& params)
      : p(params),
        m(params.matrix),
        dim_steps(steps_of(m.dim, Math::kUnit)),
        dim_panels((m.dim + kPanel - 1) / kPanel),
        width(round_up(m.dim, W)),
        padded_keys(round_up(larger(m.keys, 1), kPanel)),
        padded_queries(round_up(m.queries, kRows)),
        weights_of_head(padded_queries * round_up(padded_keys, kColumns)),
        kept(p.recurrence.hops > 1 && kept_bytes() <= kKeptBytes),
        panelled(kept || padded_keys <= kPanelKeys),
        apart(heads_apart(m) && !(kept && kept_bytes() > kKeptBytesApart)),
        together(kept ? larger(1, smaller(kEnoughBlocks * kRows / padded_queries, kKeptBytes / kept_bytes())) : 1) {}

  int64_t kept_bytes() const { return weights_of_head * int64_t(sizeof(Weight)); }

  // What all threads of a head share.
  struct Head {
    int64_t b, h;
    Rows<T> query, key, value;
    Rows<T> from;        // u_{j-1}
    Element* keys;       // transposed, the scores' right operand
    Element* values;     // u_{j-1}, the weights' right operand
    int64_t value_panel;
    float* key_bias;     // 0 or -Inf a key; only where there is a key_mask
    bool* block_seen;    // whether it leaves any key of a block of kColumns
    float *top, *inverse;  // a row: largest score (unscaled), 1 / sum of weights
    T* hop[2];           // u_1, u_2, ... one after the other
    Weight* weights;     // kept: blocks of [kRows, kColumns], those of a row one after the other
    Intervals see;
  };
  // What a thread has of its own.
  struct Block {
    Element* query;   // [kRows, dim_steps]
    float* scores;    // blocks of [kRows, kColumns]: one, or those of all keys (panelled) where they are not kept
    Weight* weights;  // [kRows, kColumns], where they are neither kept nor the scores themselves
    float* sums;      // [kRows, width]
    float* lanes;     // [kRows, W]: a row's maxima, then its sums of weights
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
    head.weights = pieces.template take<Weight>(kept ? weights_of_head : 0);
  }
  void lay_out(Pieces& pieces, Block& block) const {
    block.query = pieces.template take<Element>(kRows * dim_steps);
    block.scores = pieces.template take<float>(
        kept && kInPlace ? 0 : kRows * (panelled ? round_up(padded_keys, kColumns) : kColumns));
    block.weights = pieces.template take<Weight>(kept || kInPlace ? 0 : kRows * kColumns);
    block.sums = pieces.template take<float>(kRows * width);
    block.lanes = pieces.template take<float>(kRows * W);
  }
  template <class Part>
  int64_t bytes() const {
    Pieces measure(nullptr);
    Part part{};
    lay_out(measure, part);
    return measure.used();
  }
  int64_t bytes_of_head() const { return bytes<Head>(); }

  // The heads [first, first + count), count <= kEnoughBlocks.
  template <class For>
  void run(int64_t first, int64_t count, char* memory, const For& parallel_for) const {
    Head heads[kEnoughBlocks];
    Pieces pieces(memory);
    for (int64_t i = 0; i < count; i++) {
      Head& head = heads[i];
      lay_out(pieces, head);
      head.b = (first + i) / m.heads;
      head.h = (first + i) % m.heads;
      const int64_t kv = head.h / (m.heads / m.kv_heads);
      head.query = rows_of<T>(m.query, head.b, head.h);
      head.key = rows_of<T>(m.key, head.b, kv);
      head.value = head.from = rows_of<T>(p.value, head.b, kv);
      head.see = intervals_of(m, head.b);
    }
    const int64_t blocks = (padded_keys + kColumns - 1) / kColumns, row_blocks = padded_queries / kRows;
    parallel_for(0, count * blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) pack_keys(heads[i / blocks], i % blocks);
    });
    for (int64_t hop = 1; hop <= p.recurrence.hops; hop++) {
      parallel_for(0, count * blocks, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const Head& head = heads[i / blocks];
          const int64_t j = i % blocks * kColumns, size = smaller(kColumns, padded_keys - j);
          pack_right(head.from, j, m.keys, size, m.dim, head.values + j / Math::kUnit * kPanel, head.value_panel);
        }
      });
      parallel_for(0, count * row_blocks, 1, [&](int64_t begin, int64_t end) {
        const Scratch own(bytes<Block>());
        Pieces pieces_of_block(own.memory());
        Block block{};
        lay_out(pieces_of_block, block);
        for (int64_t i = begin; i < end; i++) {
          // From both ends in turn, so that under a causal mask every stretch of blocks costs about the same.
          const int64_t turn = i % row_blocks, row = (turn % 2 == 0 ? turn / 2 : row_blocks - 1 - turn / 2) * kRows;
          weigh(heads[i / row_blocks], block, row, hop == 1);
          finish(heads[i / row_blocks], block, row, hop);
        }
      });
      for (int64_t i = 0; i < count; i++) heads[i].from = {target(heads[i], hop), target_stride(hop)};
    }
  }

  void pack_keys(Head& head, int64_t index) const {
    const int64_t j = index * kColumns, size = smaller(kColumns, padded_keys - j);
    pack_transposed<Math>(head.key, j, m.keys, size, m.dim, head.keys + j * dim_steps);
    head.block_seen[index] = m.key_mask == nullptr;
    if (m.key_mask == nullptr) return;
    for (int64_t k = j; k < j + size; k++) {
      const bool some = k < m.keys && m.key_mask[head.b * m.keys + k];
      head.key_bias[k] = some ? 0.0f : -__builtin_inff();
      head.block_seen[index] |= some;
    }
  }

  // Where u_hop goes.
  T* target(const Head& head, int64_t hop) const {
    if (hop < p.recurrence.hops) return head.hop[(hop - 1) % 2];
    return static_cast<T*>(p.out) + head.b * m.queries * m.heads * m.dim + head.h * m.dim;
  }
  int64_t target_stride(int64_t hop) const { return hop < p.recurrence.hops ? m.dim : m.heads * m.dim; }

  // The scores of a block of queries with the keys [column, column + size): [kRows, kColumns].
  void score(const Head& head, const Block& block, int64_t row, const Extent& seen, int64_t column, int64_t size,
             float* scores) const {
    product<Math>(kRows, size, dim_steps, block.query, dim_steps, 1, head.keys + column * dim_steps,
                  dim_steps * kPanel, scores, kColumns, false);
    const bool all = seen.all_begin <= column && seen.all_end >= column + size;
    if (all && m.key_mask == nullptr) return;
    for (int64_t r = 0; r < kRows && row + r < m.queries; r++) {
      float* const s = scores + r * kColumns;
      if (m.key_mask != nullptr)
        for (int64_t i = 0; i < size; i += W) (Vec::load(s + i) + Vec::load(head.key_bias + column + i)).store(s + i);
      if (all) continue;
      const int64_t first = larger(0, smaller(size, head.see.first(row + r) - column));
      const int64_t last = larger(first, smaller(size, head.see.last(row + r) - column));
      for (int64_t i = 0; i < first; i++) s[i] = -__builtin_inff();
      for (int64_t i = last; i < size; i++) s[i] = -__builtin_inff();
    }
  }

  // f(column, size) for every block of keys that some of the queries see.
  template <class F>
  FD_INLINE void for_columns(const Head& head, const Extent& seen, const F& f) const {
    for (int64_t column = seen.some_begin; column < seen.some_end; column += kColumns)
      if (head.block_seen[column / kColumns]) f(column, smaller(kColumns, round_up(seen.some_end - column, kPanel)));
  }

  Weight* weights_at(const Head& head, const Block& block, int64_t row, int64_t column) const {
    if (kept) return head.weights + row * round_up(padded_keys, kColumns) + column * kRows;
    return kInPlace ? reinterpret_cast<Weight*>(scores_at(head, block, row, column)) : block.weights;
  }
  float* scores_at(const Head& head, const Block& block, int64_t row, int64_t column) const {
    if (kept && kInPlace) return reinterpret_cast<float*>(weights_at(head, block, row, column));
    return block.scores + (panelled ? column * kRows : 0);
  }

  // block.sums = weights of the rows from `row` on, not yet normalised, times the values.
  void weigh(const Head& head, const Block& block, int64_t row, bool first) const {
    Extent seen = extent_of(head.see, row, smaller(row + kRows, m.queries));
    seen.some_begin = seen.some_begin / kColumns * kColumns;
    seen.some_end = larger(seen.some_begin, seen.some_end);
    memset(block.sums, 0, kRows * width * sizeof(float));
    if (first || !kept) pack_left(head.query, row, m.queries, kRows, m.dim, block.query);
    if (first)
      panelled ? weigh_panel(head, block, row, seen) : weigh_online(head, block, row, seen);
    else
      for_columns(head, seen, [&](int64_t column, int64_t size) {
        Weight* weights = weights_at(head, block, row, column);
        if (!kept) {  // in a cache that is near: the same memory for each block
          weights = weights_at(head, block, row, 0);
          float* const scores = scores_at(head, block, row, 0);
          score(head, block, row, seen, column, size, scores);
          for (int64_t r = 0; r < kRows; r++)
            exponentials(scores + r * kColumns, size, m.scale, head.top[row + r], weights + r * kColumns);
        }
        add_values(head, weights, column, size, block.sums, kept);
      });
  }

  // far: the weights come from memory, so that those of the next block are asked for.
  void add_values(const Head& head, const Weight* weights, int64_t column, int64_t size, float* sums,
                  bool far = false) const {
    const int64_t tiles = kRows / kTileRows * dim_panels, bytes = kRows * kColumns * int64_t(sizeof(Weight));
    const Ahead ahead{reinterpret_cast<const char*>(weights) + bytes, far ? bytes / tiles : 0};
    product<Math>(kRows, m.dim, size / Math::kUnit, reinterpret_cast<const Element*>(weights), kColumns / Math::kUnit,
                  1, head.values + column / Math::kUnit * kPanel, head.value_panel, sums, width, true, ahead);
  }

  // The first hop, from all scores of the rows.
  void weigh_panel(const Head& head, const Block& block, int64_t row, const Extent& seen) const {
    float* const top = head.top + row;
    for (int64_t i = 0; i < kRows * W; i += W) Vec::set(-__builtin_inff()).store(block.lanes + i);
    for_columns(head, seen, [&](int64_t column, int64_t size) {
      float* const scores = scores_at(head, block, row, column);
      score(head, block, row, seen, column, size, scores);
      for (int64_t r = 0; r < kRows; r++) {  // of a NaN the sum tells
        float* const lanes = block.lanes + r * W;
        max(maximum(scores + r * kColumns, size), Vec::load(lanes)).store(lanes);
      }
    });
    for (int64_t r = 0; r < kRows; r++) {
      top[r] = Vec::load(block.lanes + r * W).max();
      if (top[r] == -__builtin_inff()) top[r] = 0;  // nothing to attend to
      Vec::set(0).store(block.lanes + r * W);
    }
    for_columns(head, seen, [&](int64_t column, int64_t size) {
      const float* const scores = scores_at(head, block, row, column);
      Weight* const weights = weights_at(head, block, row, column);
      for (int64_t r = 0; r < kRows; r++) {
        const Vec sum = exponentials(scores + r * kColumns, size, m.scale, top[r], weights + r * kColumns);
        (Vec::load(block.lanes + r * W) + sum).store(block.lanes + r * W);
      }
      add_values(head, weights, column, size, block.sums);
    });
    for (int64_t r = 0; r < kRows; r++) head.inverse[row + r] = Vec::load(block.lanes + r * W).sum();
    end_first_hop(head, row);
  }

  // The first hop, a block of scores at a time: what was added up is scaled down where the maximum grows.
  void weigh_online(const Head& head, const Block& block, int64_t row, const Extent& seen) const {
    float* const top = head.top + row;
    float* const sum = head.inverse + row;
    for (int64_t r = 0; r < kRows; r++) top[r] = -__builtin_inff(), sum[r] = 0;
    float* const scores = scores_at(head, block, row, 0);
    Weight* const weights = weights_at(head, block, row, 0);
    for_columns(head, seen, [&](int64_t column, int64_t size) {
      score(head, block, row, seen, column, size, scores);
      for (int64_t r = 0; r < kRows; r++) {
        float* const s = scores + r * kColumns;
        const float larger_top = maximum(s, size).max();
        if (!(larger_top <= top[r])) {  // or NaN
          const float factor = top[r] > -__builtin_inff() ? expf((top[r] - larger_top) * m.scale) : 0.0f;
          scale_row(block.sums + r * width, width, factor);
          sum[r] *= factor;
          top[r] = larger_top;
        }
        const float used = top[r] == -__builtin_inff() ? 0.0f : top[r];
        sum[r] += exponentials(s, size, m.scale, used, weights + r * kColumns).sum();
      }
      add_values(head, weights, column, size, block.sums);
    });
    for (int64_t r = 0; r < kRows; r++)
      if (top[r] == -__builtin_inff()) top[r] = 0;
    end_first_hop(head, row);
  }

  // The sums of weights become their inverses, and the log-sum-exp.
  void end_first_hop(const Head& head, int64_t row) const {
    for (int64_t i = row; i < row + kRows; i++) {
      const float sum = head.inverse[i];
      head.inverse[i] = sum == 0 ? 0.0f : 1.0f / sum;  // NaN stays
      if (p.lse == nullptr || i >= m.queries) continue;
      p.lse[(head.b * m.heads + head.h) * m.queries + i] = sum > 0 ? head.top[i] * m.scale + logf(sum) : 0.0f;
    }
  }

  // y = round(sums / sum of weights), u = its mixture with the values.
  void finish(const Head& head, const Block& block, int64_t row, int64_t hop) const {
    T* const to = target(head, hop);
    const int64_t to_stride = target_stride(hop);
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
      const T* const v = head.value.row(row + r);
      for_lanes<Vec>(m.dim, [&](int64_t c, auto n) {
        store(fma(alpha, load<Vec>(out + c, n), rest * load<Vec>(v + c, n)), out + c, n);
      });
    }
  }
};

template <class Math, class T>
void forward(const QgfdForwardParams& p, const ParallelFor& parallel_for) {
  const Forward<Math, T> pass(p);
  const int64_t heads = p.matrix.batch * p.matrix.heads, bytes = pass.bytes_of_head();
  if (pass.apart) {
    parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      const Scratch memory(bytes);
      for (int64_t i = begin; i < end; i++) pass.run(i, 1, memory.memory(), SerialFor{});
    });
    return;
  }
  const Scratch memory(bytes * smaller(pass.together, heads));
  for (int64_t i = 0; i < heads; i += pass.together)
    pass.run(i, smaller(pass.together, heads - i), memory.memory(), parallel_for);
}

}  // namespace
}  // namespace fastdiff::cpu::FASTDIFF_ISA
