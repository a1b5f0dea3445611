// The gradients. Weights are made again with keys as rows and queries as columns, M^T = exp(scale k q^T - lse), a block at
// a time: g_{j-1} = M^T h_j for the hops but the first, then one pass for all that is left, of width hops * d. Where a
// head's weights fit in the cache the first of these passes leaves them for the others.

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kStride = kColumns + 16;  // of a block of scores: read down its columns, too, which a power of 2 slows
constexpr int64_t kKeptBytesBackward = int64_t(2) << 20;

template <class Math, class T>
struct Backward {
  using Element = typename Math::Element;
  using Weight = typename Math::Weight;
  static constexpr int kUnit = Math::kUnit;

  const QgfdBackwardParams& p;
  const QgfdMatrix& m;
  const QgfdRecurrence& recurrence;
  const int64_t dim_steps, dim_panels, width;
  const int64_t padded_keys, padded_queries, query_blocks;
  const int64_t segments;  // of the keys: the queries' gradient is the sum of what each gives, in order
  const bool shared;       // by all threads, so that each segment wants its own sums
  const bool kept;

  explicit Backward(const QgfdBackwardParams& params)
      : p(params),
        m(params.matrix),
        recurrence(params.recurrence),
        dim_steps(steps_of(m.dim, kUnit)),
        dim_panels((m.dim + kPanel - 1) / kPanel),
        width(round_up(m.dim, W)),
        padded_keys(round_up(m.keys, kRows)),
        padded_queries(round_up(m.queries, kPanel)),
        query_blocks((padded_queries + kColumns - 1) / kColumns),
        segments(smaller(16, larger(1, (padded_keys / kRows + 3) / 4))),
        shared(!heads_apart(m)),
        kept(recurrence.hops > 1 && padded_keys * padded_queries * int64_t(sizeof(Weight)) <= kKeptBytesBackward) {}

  // What all threads of a head share.
  struct Head {
    int64_t b, h;
    Rows<T> query, key, value;
    Element* queries_across;  // transposed, the scores' right operand
    Element* queries;         // the right operand of dK = dS^T Q
    Element* keys;            // the right operand of dQ = dS K
    Element* grads_across;    // h_1 ... h_hops, each transposed: the right operand of u h^T
    Element* grad;            // h_j, the right operand of M^T h
    T *g, *h_rows;            // g_j and h_j as rows
    float* grad_value;        // [keys, dim]: what the mixtures give, where there are any
    float *lse, *delta;       // 0 beyond the queries
    float *first, *last;      // what a query sees
    Extent* seen;             // by each block of queries
    Weight* kept;             // M^T, [padded_keys, kept_stride()]
    bool made;                // whether it is there
    float* grad_query;        // [buffers(), padded_queries, width]
  };
  // What a thread has of its own: one block of keys.
  struct Block {
    Element* keys;     // left operand
    Element* values;   // u_0 ... u_{hops-1}, left operands
    T* mixture;        // [kRows, dim]
    float *scores, *grad_scores;
    Weight *weights, *grad_weights;  // the same memory where they are not rounded
    Element* grad_pairs;             // grad_weights, neighbouring keys in an element
    float *sums, *grad_key;
  };
  static constexpr bool kRounds = Math::kUnit == 2;

  void lay_out(Pieces& pieces, Head& head) const {
    const int64_t across = padded_queries * dim_steps;
    head.queries_across = pieces.template take<Element>(across);
    head.queries = pieces.template take<Element>(dim_panels * query_panel());
    head.keys = pieces.template take<Element>(dim_panels * key_panel());
    head.grads_across = pieces.template take<Element>(recurrence.hops * across);
    head.grad = pieces.template take<Element>(dim_panels * query_panel());
    head.g = pieces.template take<T>(recurrence.hops > 1 ? m.keys * m.dim : 0);
    head.h_rows = pieces.template take<T>(mixes() ? m.queries * m.dim : 0);
    head.grad_value = pieces.template take<float>(mixes() ? m.keys * m.dim : 0);
    head.lse = pieces.template take<float>(padded_queries);
    head.delta = pieces.template take<float>(padded_queries);
    head.first = pieces.template take<float>(padded_queries);
    head.last = pieces.template take<float>(padded_queries);
    head.seen = pieces.template take<Extent>(query_blocks);
    head.kept = pieces.template take<Weight>(kept ? padded_keys * kept_stride() : 0);
    head.grad_query = pieces.template take<float>(buffers() * padded_queries * width);
  }
  void lay_out(Pieces& pieces, Block& block) const {
    block.keys = pieces.template take<Element>(kRows * dim_steps);
    block.values = pieces.template take<Element>(recurrence.hops * kRows * dim_steps);
    block.mixture = pieces.template take<T>(kRows * m.dim);
    block.scores = pieces.template take<float>(kRows * kStride);
    block.grad_scores = pieces.template take<float>(kRows * kStride);
    block.weights = reinterpret_cast<Weight*>(block.scores);
    block.grad_weights = reinterpret_cast<Weight*>(block.grad_scores);
    if (kRounds) {
      block.weights = pieces.template take<Weight>(kRows * kStride);
      block.grad_weights = pieces.template take<Weight>(kRows * kStride);
    }
    block.grad_pairs = pieces.template take<Element>(kRounds ? kRows / kUnit * kStride : 0);
    block.sums = pieces.template take<float>(kRows * width);
    block.grad_key = pieces.template take<float>(kRows * width);
  }
  template <class Part>
  int64_t bytes() const {
    Pieces measure(nullptr);
    Part part{};
    lay_out(measure, part);
    return measure.used();
  }
  int64_t kept_stride() const { return padded_queries + 16; }
  int64_t query_panel() const { return padded_queries / kUnit * kPanel; }
  int64_t key_panel() const { return padded_keys / kUnit * kPanel; }
  int64_t buffers() const { return shared ? segments : smaller(2, segments); }
  bool mixes() const { return recurrence.first_mixed <= recurrence.last_mixed; }

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
    head.value = rows_of<T>(p.value, b, kv);
    prepare(head, parallel_for);
    Rows<T> g = rows_of<T>(p.grad_out, b, h);
    for (int64_t hop = recurrence.hops; hop >= 1; hop--) {
      const Rows<T> weighted = weigh(head, g, hop, parallel_for);
      for_query_blocks(parallel_for, [&](int64_t, int64_t i, int64_t size) {
        Element* const across = head.grads_across + (hop - 1) * padded_queries * dim_steps;
        pack_transposed<Math>(weighted, i, m.queries, size, m.dim, across + i * dim_steps);
        pack_right(weighted, i, m.queries, size, m.dim, head.grad + i / kUnit * kPanel, query_panel());
        add_delta(head, weighted, hop, i, smaller(i + size, m.queries));
      });
      if (hop == 1) break;
      for_key_blocks(parallel_for, [&](const Block& block, int64_t row) { previous_gradient(head, block, row); });
      head.made = kept;
      g = {head.g, m.dim};
    }
    const int64_t blocks = padded_keys / kRows;
    parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
      with_block([&](const Block& block) {
        for (int64_t s = begin; s < end; s++) {
          float* const sums = head.grad_query + (shared ? s : smaller(s, 1)) * padded_queries * width;
          memset(sums, 0, padded_queries * width * sizeof(float));
          for (int64_t i = s * blocks / segments; i < (s + 1) * blocks / segments; i++)
            last_gradients(head, block, i * kRows, sums);
          if (!shared && s > 0) add_grad_query(head, 1, 0, padded_queries);
        }
      });
    });
    for_query_blocks(parallel_for, [&](int64_t, int64_t i, int64_t size) {
      const int64_t end = smaller(i + size, m.queries);
      for (int64_t s = 1; shared && s < segments; s++) add_grad_query(head, s, i, end);
      store_grad_query(head, i, end);
    });
  }

  template <class F>
  void with_block(const F& f) const {
    const Scratch memory(bytes<Block>());
    Pieces pieces(memory.memory());
    Block block{};
    lay_out(pieces, block);
    [[maybe_unused]] const typename Math::Registers registers;
    f(block);
  }
  template <class For, class F>
  void for_key_blocks(const For& parallel_for, const F& f) const {
    parallel_for(0, padded_keys / kRows, 1, [&](int64_t begin, int64_t end) {
      with_block([&](const Block& block) {
        for (int64_t i = begin; i < end; i++) f(block, i * kRows);
      });
    });
  }
  // f(index, first query, queries with padding)
  template <class For, class F>
  void for_query_blocks(const For& parallel_for, const F& f) const {
    parallel_for(0, query_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f(i, i * kColumns, smaller(kColumns, padded_queries - i * kColumns));
    });
  }

  template <class For>
  void prepare(const Head& head, const For& parallel_for) const {
    const float* const lse = p.lse + (head.b * m.heads + head.h) * m.queries;
    const Intervals see = intervals_of(m, head.b);
    for_query_blocks(parallel_for, [&](int64_t block, int64_t i, int64_t size) {
      pack_transposed<Math>(head.query, i, m.queries, size, m.dim, head.queries_across + i * dim_steps);
      pack_right(head.query, i, m.queries, size, m.dim, head.queries + i / kUnit * kPanel, query_panel());
      head.seen[block] = extent_of(see, i, smaller(i + size, m.queries));
      for (int64_t j = i; j < i + size; j++) {
        const bool some = j < m.queries;
        head.lse[j] = some ? lse[j] : 0.0f;
        head.delta[j] = 0;
        head.first[j] = some ? float(see.first(j)) : 0.0f;
        head.last[j] = some ? float(see.last(j)) : float(m.keys);
      }
    });
    pack_keys(head, parallel_for);
    if (mixes()) memset(head.grad_value, 0, m.keys * m.dim * sizeof(float));
  }
  template <class For>
  void pack_keys(const Head& head, const For& parallel_for) const {
    parallel_for(0, padded_keys / kRows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kRows; i < end * kRows; i += kRows)
        pack_right(head.key, i, m.keys, kRows, m.dim, head.keys + i / kUnit * kPanel, key_panel());
    });
  }

  // h_j of g_j; what the mixture gives goes to the values' gradient.
  template <class For>
  Rows<T> weigh(const Head& head, Rows<T> g, int64_t hop, const For& parallel_for) const {
    if (!recurrence.mixed(hop)) return g;
    const Vec alpha = Vec::set(recurrence.alpha), rest = Vec::set(1 - recurrence.alpha);
    parallel_for(0, m.queries, kRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T* const row = g.row(i);
        T* const to = head.h_rows + i * m.dim;
        float* const sum = head.grad_value + i * m.dim;
        for_lanes<Vec>(m.dim, [&](int64_t c, auto n) {
          const Vec x = load<Vec>(row + c, n);
          store(fma(rest, x, load<Vec>(sum + c, n)), sum + c, n);
          store(alpha * x, to + c, n);
        });
      }
    });
    return {head.h_rows, m.dim};
  }

  Rows<T> pass(const Head& head, int64_t hop) const {  // y_hop
    if (hop > recurrence.saved()) return rows_of<T>(p.out, head.b, head.h);
    const int64_t rows = ((hop - 1) * m.batch + head.b) * m.heads + head.h;
    return {static_cast<const T*>(p.passes) + rows * m.queries * m.dim, m.dim};
  }

  void add_delta(const Head& head, Rows<T> weighted, int64_t hop, int64_t begin, int64_t end) const {
    const Rows<T> y = pass(head, hop);
    for (int64_t i = begin; i < end; i++) {
      const T *const a = weighted.row(i), *const b = y.row(i);
      Vec sum = Vec::set(0);
      for_lanes<Vec>(m.dim, [&](int64_t c, auto n) { sum = fma(load<Vec>(a + c, n), load<Vec>(b + c, n), sum); });
      head.delta[i] += sum.sum();
    }
  }

  // M^T of a block of keys and a block of queries.
  struct Weights {
    Weight* data;
    int64_t stride, size;  // queries, with padding
    const Element* left() const { return reinterpret_cast<const Element*>(data); }
  };

  // Whether the key_mask leaves any key of a block.
  bool any_key(const Head& head, int64_t row) const {
    if (m.key_mask == nullptr) return true;
    for (int64_t j = row; j < smaller(row + kRows, m.keys); j++)
      if (m.key_mask[head.b * m.keys + j]) return true;
    return false;
  }

  // M^T of the keys [row, row + kRows) and the queries of one block; size 0 where no query sees a key of them.
  Weights transposed_weights(const Head& head, const Block& block, int64_t row, int64_t index) const {
    const int64_t i = index * kColumns;
    const Extent& seen = head.seen[index];
    Weights weights{block.weights, kStride, smaller(kColumns, padded_queries - i)};
    if (kept)
      weights = {head.kept + row * kept_stride() + i, kept_stride(), weights.size};
    if (seen.some_begin >= row + kRows || seen.some_end <= row || !any_key(head, row)) weights.size = 0;
    if (head.made || weights.size == 0) return weights;
    float* const scores = kRounds ? block.scores : reinterpret_cast<float*>(weights.data);
    const int64_t stride = kRounds ? kStride : weights.stride;
    product<Math>(kRows, weights.size, dim_steps, block.keys, dim_steps, 1, head.queries_across + i * dim_steps,
                  dim_steps * kPanel, scores, stride, false);
    const bool all = seen.all_begin <= row && seen.all_end >= row + kRows;
    const Vec by = Vec::set(m.scale);
    for (int64_t r = 0; r < kRows; r++) {
      const float* const s = scores + r * stride;
      const bool some = row + r < m.keys && (m.key_mask == nullptr || m.key_mask[head.b * m.keys + row + r] != 0);
      const Vec at = Vec::set(float(row + r)), after = Vec::set(float(row + r + 1));
      for (int64_t c = 0; c < weights.size; c += W) {
        Vec weight = Vec::set(0);
        if (some) {
          const Vec log_weight = fma(Vec::load(s + c), by, Vec::set(0) - Vec::load(head.lse + i + c));
          weight = exp(min(Vec::set(0), log_weight));  // above 0 by rounding alone; NaN stays
        }
        if (some && !all) {
          weight = keep_at_least(at, Vec::load(head.first + i + c), weight);
          weight = keep_at_least(Vec::load(head.last + i + c), after, weight);
        }
        weight.store(weights.data + r * weights.stride + c);
      }
    }
    return weights;
  }

  void add_transposed(const Head& head, const Block& block, const Weights& weights, int64_t index) const {
    product<Math>(kRows, m.dim, weights.size / kUnit, weights.left(), weights.stride / kUnit, 1,
                  head.grad + index * kColumns / kUnit * kPanel, query_panel(), block.sums, width, true);
  }

  // g_{j-1} = round(M^T h_j)
  void previous_gradient(const Head& head, const Block& block, int64_t row) const {
    pack_left(head.key, row, m.keys, kRows, m.dim, block.keys);
    memset(block.sums, 0, kRows * width * sizeof(float));
    for (int64_t index = 0; index < query_blocks; index++) {
      const Weights weights = transposed_weights(head, block, row, index);
      if (weights.size > 0) add_transposed(head, block, weights, index);
    }
    for (int64_t r = 0; r < kRows && row + r < m.keys; r++)
      store_row(block.sums + r * width, 1.0f, head.g + (row + r) * m.dim);
  }
  void store_row(const float* sums, float scale, T* to) const {
    const Vec by = Vec::set(scale);
    for_lanes<Vec>(m.dim, [&](int64_t c, auto n) { store(load<Vec>(sums + c, n) * by, to + c, n); });
  }

  // u_{hop-1} of a block of keys, as a left operand.
  void pack_values(const Head& head, const Block& block, int64_t row, int64_t hop) const {
    Element* const to = block.values + (hop - 1) * kRows * dim_steps;
    if (hop == 1) return pack_left(head.value, row, m.keys, kRows, m.dim, to);
    const Rows<T> y = pass(head, hop - 1);
    if (!recurrence.mixed(hop - 1)) return pack_left(y, row, m.keys, kRows, m.dim, to);
    const Vec alpha = Vec::set(recurrence.alpha), rest = Vec::set(1 - recurrence.alpha);
    const int64_t rows = smaller(kRows, m.keys - row);
    for (int64_t r = 0; r < rows; r++) {
      const T *const a = y.row(row + r), *const v = head.value.row(row + r);
      for_lanes<Vec>(m.dim, [&](int64_t c, auto n) {
        store(fma(alpha, load<Vec>(a + c, n), rest * load<Vec>(v + c, n)), block.mixture + r * m.dim + c, n);
      });
    }
    pack_left(Rows<T>{block.mixture, m.dim}, 0, rows, kRows, m.dim, to);
  }

  // g_0 and the gradients of keys and values for a block of keys, and what it gives to the queries' gradient.
  void last_gradients(const Head& head, const Block& block, int64_t row, float* grad_query) const {
    pack_left(head.key, row, m.keys, kRows, m.dim, block.keys);
    for (int64_t hop = 1; hop <= recurrence.hops; hop++) pack_values(head, block, row, hop);
    memset(block.sums, 0, kRows * width * sizeof(float));
    memset(block.grad_key, 0, kRows * width * sizeof(float));
    for (int64_t index = 0; index < query_blocks; index++) {
      const Weights weights = transposed_weights(head, block, row, index);
      const int64_t i = index * kColumns, size = weights.size;
      if (size == 0) continue;
      add_transposed(head, block, weights, index);
      for (int64_t hop = 0; hop < recurrence.hops; hop++)
        product<Math>(kRows, size, dim_steps, block.values + hop * kRows * dim_steps, dim_steps, 1,
                      head.grads_across + (hop * padded_queries + i) * dim_steps, dim_steps * kPanel,
                      block.grad_scores, kStride, hop > 0);
      differentiate(head, block, weights, i);
      const Element* const grads = reinterpret_cast<const Element*>(block.grad_weights);
      product<Math>(kRows, m.dim, size / kUnit, grads, kStride / kUnit, 1, head.queries + i / kUnit * kPanel,
                    query_panel(), block.grad_key, width, true);
      const Element* const across = kRounds ? block.grad_pairs : grads;
      product<Math>(size, m.dim, kRows / kUnit, across, 1, kStride, head.keys + row / kUnit * kPanel, key_panel(),
                    grad_query + i * width, width, true);
    }
    store_keys_and_values(head, block, row);
  }

  // dS^T = M^T (dP^T - delta), in the forms that products want.
  void differentiate(const Head& head, const Block& block, const Weights& weights, int64_t i) const {
    const int64_t size = weights.size;
    for (int64_t r = 0; r < kRows; r++)
      for (int64_t c = 0; c < size; c += W) {
        const Vec weight = Vec::load(weights.data + r * weights.stride + c);
        const Vec grad = weight * (Vec::load(block.grad_scores + r * kStride + c) - Vec::load(head.delta + i + c));
        grad.store(block.grad_weights + r * kStride + c);
      }
    if constexpr (kRounds)
      for (int64_t r = 0; r < kRows; r += 2)
        for (int64_t c = 0; c < size; c += W) {
          const Weight* const at = block.grad_weights + r * kStride + c;
          interleave(Vec::load(at), Vec::load(at + kStride))
              .store(reinterpret_cast<float*>(block.grad_pairs + r / 2 * kStride + c));
        }
  }

  void store_keys_and_values(const Head& head, const Block& block, int64_t row) const {
    for (int64_t r = 0; r < kRows && row + r < m.keys; r++) {
      const int64_t to = ((head.b * m.keys + row + r) * m.heads + head.h) * m.dim;
      store_row(block.grad_key + r * width, m.scale, static_cast<T*>(p.grad_key) + to);
      T* const value = static_cast<T*>(p.grad_value) + to;
      store_row(block.sums + r * width, 1.0f, value);
      if (!mixes()) continue;
      const float* const more = head.grad_value + (row + r) * m.dim;
      for_lanes<Vec>(m.dim, [&](int64_t c, auto n) {
        store(load<Vec>(value + c, n) + load<Vec>(more + c, n), value + c, n);
      });
    }
  }

  // Adds a buffer's rows [begin, end) to the first buffer's.
  void add_grad_query(const Head& head, int64_t buffer, int64_t begin, int64_t end) const {
    const float* const more = head.grad_query + buffer * padded_queries * width;
    for (int64_t c = begin * width; c < end * width; c += W)
      (Vec::load(head.grad_query + c) + Vec::load(more + c)).store(head.grad_query + c);
  }
  void store_grad_query(const Head& head, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i++) {
      T* const to = static_cast<T*>(p.grad_query) + ((head.b * m.queries + i) * m.heads + head.h) * m.dim;
      store_row(head.grad_query + i * width, m.scale, to);
    }
  }
};

template <class Math, class T>
void backward(const QgfdBackwardParams& p, const ParallelFor& parallel_for) {
  const Backward<Math, T> pass(p);
  for_heads(p.matrix, parallel_for, [&](int64_t b, int64_t h, const auto& threads) { pass.run(b, h, threads); });
}

}  // namespace
}  // namespace fastdiff::cpu::FASTDIFF_ISA
