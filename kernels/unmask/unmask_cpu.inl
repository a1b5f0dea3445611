// unmask_ on the CPU, compiled once an instruction set: plain loops that the compiler makes vectors of.
// Every position of a row's block gets a key, kNoKey where it is no candidate; then every step is a loop over arrays that
// fit in the L1 cache. Nothing branches on whether one position is a candidate or is taken.
#include <stdlib.h>
#include <string.h>

#include "kernels/common/vec.h"
#include "kernels/unmask/unmask.h"
#include "kernels/unmask/unmask_order.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

using namespace unmasking;

constexpr int64_t kGrain = 8192;  // positions a thread should have before a second one is woken
constexpr int kLanes = 8;         // partial sums of entropies: their number is part of the result

// Arrays for the positions of one row, one block a thread's chunk.
struct Scratch {
  int32_t *key, *chosen;
  float* cost;
  uint8_t* flags;
  explicit Scratch(int64_t length) {
    const int64_t stride = (length + 63) / 64 * 64;
    key = static_cast<int32_t*>(aligned_alloc(64, (stride + 64) * (3 * sizeof(int32_t) + 1)));
    if (key == nullptr) abort();  // a few rows: as far gone as a stack overflow
    chosen = key + stride;
    cost = reinterpret_cast<float*>(chosen + stride);
    flags = reinterpret_cast<uint8_t*>(cost + stride);
  }
  ~Scratch() { free(key); }
};

// Of a row's random numbers.
struct Counter {
  uint64_t seed, sequence, begin, step;
  Philox random(int64_t i, Draw draw) const { return philox(seed, sequence, begin + i, step, draw); }
};

// One row: position `begin + i` has number i, and its sample lies at entry(i).
struct Row {
  const UnmaskParams& p;
  const Scratch& s;
  int64_t* ids;
  const int32_t* entry_of;  // -1: no sample; nullptr: entry first + i
  int64_t first, count;
  Counter counter;
  double number;

  int64_t entry(int64_t i) const { return entry_of ? entry_of[i] : first + i; }
};

int64_t clip(int64_t x, int64_t high) { return x < 0 ? 0 : x < high ? x : high; }

// entry_of: the sample's entry of each position of all rows; nullptr: b * length + l.
Row row_of(const UnmaskParams& p, const Scratch& s, const int32_t* entry_of, int64_t b) {
  const int64_t begin = p.block_start ? clip(p.block_start[b], p.length) : 0;
  const int64_t end = p.active && !p.active[b] ? 0 : p.block_end ? clip(p.block_end[b], p.length) : p.length;
  const int64_t first = b * p.length + begin;
  return {p,
          s,
          p.token_ids + b * p.row_stride + begin,
          entry_of ? entry_of + first : nullptr,
          first,
          end > begin ? end - begin : 0,
          {static_cast<uint64_t>(p.seed_at ? *p.seed_at : p.seed),
           static_cast<uint64_t>(p.sequence_ids ? p.sequence_ids[b] : b), static_cast<uint64_t>(begin),
           static_cast<uint64_t>(p.step_at ? *p.step_at : p.step)},
          p.values ? static_cast<double>(p.values[b]) : p.value};
}

bool may_commit(int64_t token, int64_t mask) { return (token >= 0) & (token != mask); }

// Where the sample of position number i lies: one after the other, or wherever `rows` put it (-1: nowhere).
struct InOrder {
  int64_t first;
  bool exists(int64_t) const { return true; }
  int64_t operator()(int64_t i) const { return first + i; }
};
struct Indexed {
  const int32_t* entry_of;
  bool exists(int64_t i) const { return entry_of[i] >= 0; }
  int64_t operator()(int64_t i) const { return entry_of[i] < 0 ? 0 : entry_of[i]; }
};

// The key of every position. Sampled tokens are read only where `check_tokens` is true: see unmask_row.
template <class Entry>
void make_keys(const Row& row, bool check_tokens, Entry entry) {
  const UnmaskParams& p = row.p;
  const int64_t *ids = row.ids, *token = p.token, mask = p.mask_token_id, count = row.count;
  int32_t* key = row.s.key;
  uint8_t* flags = row.s.flags;
  for (int64_t i = 0; i < count; i++) flags[i] = (ids[i] == mask) & entry.exists(i);
  if (check_tokens)
    for (int64_t i = 0; i < count; i++) flags[i] &= may_commit(token[entry(i)], mask);
  if (p.order == UnmaskOrder::kRandom) {
    const Counter at = row.counter;
    for (int64_t i = 0; i < count; i++) {
      const int32_t k = key_of_word(at.random(i, Draw::kOrder).word[0]);
      key[i] = flags[i] ? k : kNoKey;
    }
  } else {
    const bool negated = p.order == UnmaskOrder::kEntropy;
    const float* score = p.order == UnmaskOrder::kConfidence ? p.log_prob : negated ? p.entropy : p.margin;
    for (int64_t i = 0; i < count; i++) {
      const int32_t k = key_of(score[entry(i)], negated);
      key[i] = flags[i] ? k : kNoKey;
    }
  }
  for (int64_t i = count; i % 64 != 0; i++) key[i] = kNoKey;  // count_above reads four vectors at a time
  if (p.rule == UnmaskRule::kEntropyBudget) {
    float* cost = row.s.cost;
    for (int64_t i = 0; i < count; i++) cost[i] = cost_of(p.entropy[entry(i)]);
  }
}

struct Extent {  // of the candidates' keys, and how many there are
  int32_t low, high;
  int64_t count;
};

Extent extent_of(const Row& row) {
  const int32_t* key = row.s.key;
  const int64_t size = row.count;
  int32_t low = INT32_MAX, high = INT32_MIN, count = 0;
  for (int64_t i = 0; i < size; i++) {
    const int32_t below = static_cast<int32_t>(static_cast<uint32_t>(key[i]) - 1u);  // kNoKey wraps to the largest
    low = below < low ? below : low;
    high = key[i] > high ? key[i] : high;
    count += key[i] > kNoKey;
  }
  return {count > 0 ? low + 1 : low, high, count};
}

int64_t count_above(const Row& row, int32_t limit) {
  typedef int32_t Ints __attribute__((vector_size(sizeof(Vec))));
  constexpr int kWidth = Vec::kWidth;
  Ints n[4] = {};
  for (int64_t i = 0; i < row.count; i += 4 * kWidth)  // kNoKey after the last
    for (int k = 0; k < 4; k++) {
      Ints key;
      memcpy(&key, row.s.key + i + k * kWidth, sizeof key);
      n[k] -= key > limit;
    }
  const Ints sums = (n[0] + n[1]) + (n[2] + n[3]);
  int64_t total = 0;
  for (int k = 0; k < kWidth; k++) total += sums[k];
  return total;
}

// Always the same lanes in the same order: sums do not depend on the instruction set.
double cost_above(const Row& row, int32_t limit) {
  const int32_t* key = row.s.key;
  const float* cost = row.s.cost;
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= row.count; i += kLanes)
    for (int j = 0; j < kLanes; j++) lane[j] += key[i + j] > limit ? static_cast<double>(cost[i + j]) : 0.0;
  for (int j = 0; i + j < row.count; j++) lane[j] += key[i + j] > limit ? static_cast<double>(cost[i + j]) : 0.0;
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

// Leaves the positions i for which take(i) is true in s.chosen, in order; returns how many. All are judged first, which
// the compiler makes vectors of; then 64 flags at a time become the bits of a word, most of them zero.
template <class F>
int64_t list(const Row& row, const F& take) {
  uint8_t* flags = row.s.flags;
  int32_t* chosen = row.s.chosen;
  const int32_t count = static_cast<int32_t>(row.count);  // 32 bits, as the keys have: vectors of one width
  for (int32_t i = 0; i < count; i++) flags[i] = take(i);
  memset(flags + count, 0, 63);
  int64_t n = 0;
  for (int32_t i = 0; i < count; i += 64) {
    uint64_t bits = 0;
    for (int j = 0; j < 8; j++) {
      uint64_t word;
      memcpy(&word, flags + i + 8 * j, sizeof word);
      bits |= (word * 0x0102040810204080u >> 56) << (8 * j);  // a bit from each of eight bytes
    }
    for (; bits != 0; bits &= bits - 1) chosen[n++] = i + __builtin_ctzll(bits);
  }
  return n;
}

// Where the committed end: keys above `above` are in, and those from `from` on at positions below `end`.
struct Cut {
  int32_t above, from, end;
};

// count, factor, entropy_budget: the last place where the rule holds. The first one is in, whatever the rule says of it.
Cut find_cut(const Row& row, const Extent& extent) {
  const UnmaskParams& p = row.p;
  const bool costs = p.rule == UnmaskRule::kEntropyBudget;
  int64_t low = int64_t{extent.low} - 1, high = extent.high;  // it holds at `high`, not at `low`
  int64_t above_low = extent.count;
  Before before{0, 0.0};  // `high`
  while (high - low > 1 && above_low - before.count > 1) {
    const int64_t middle = low + (high - low) / 2;
    const int32_t key = static_cast<int32_t>(middle);
    const Before here{count_above(row, key), costs ? cost_above(row, key) : 0.0};
    if (holds(p.rule, p.order, row.number, key, here)) {
      high = middle;
      before = here;
    } else {
      low = middle;
      above_low = here.count;
    }
  }
  const int32_t *key = row.s.key, above = static_cast<int32_t>(high), from = static_cast<int32_t>(low + 1);
  if (above_low - before.count == 1 && p.rule != UnmaskRule::kFactor) return {above, from, INT32_MAX};
  // Equal keys, or one candidate whose score decides: one after the other.
  const int64_t n = list(row, [=](int32_t i) { return (key[i] >= from) & (key[i] <= above); });
  Cut cut{above, from, 0};
  for (int64_t k = 0; k < n; k++) {
    const int32_t i = row.s.chosen[k];
    if (before.count > 0 && !holds(p.rule, p.order, row.number, key[i], before)) break;
    cut.end = i + 1;
    before.count++;
    if (costs) before.entropy += row.s.cost[i];
  }
  return cut;
}

// Leaves the positions that the rule commits in s.chosen; returns how many.
int64_t apply_rule(const Row& row, const Extent& extent) {
  const UnmaskParams& p = row.p;
  const int32_t* key = row.s.key;
  const double number = row.number;
  if (p.rule == UnmaskRule::kThreshold && p.order == UnmaskOrder::kRandom)
    return list(row, [=](int32_t i) { return (key[i] != kNoKey) & (value_of_word(key[i]) >= number); });
  if (p.rule == UnmaskRule::kThreshold) {
    const double limit = is_logarithmic(p.order) ? log(number) : number;
    return list(row, [=](int32_t i) { return static_cast<double>(value_of(key[i])) >= limit; });  // kNoKey is a NaN
  }
  if (p.rule == UnmaskRule::kAncestral)
    return list(row, [=, at = row.counter](int32_t i) {
      return (key[i] != kNoKey) & (uniform53(at.random(i, Draw::kAncestral)) < number);
    });
  const Cut cut = find_cut(row, extent);
  return list(row, [=](int32_t i) {
    return (key[i] > cut.above) | ((key[i] >= cut.from) & (i < cut.end));
  });
}

// The positions to commit, where `check_tokens` among those whose sampled token may be committed; returns how many.
int64_t choose(const Row& row, bool check_tokens) {
  if (row.entry_of) {
    make_keys(row, check_tokens, Indexed{row.entry_of});
  } else {
    make_keys(row, check_tokens, InOrder{row.first});
  }
  const Extent extent = extent_of(row);
  if (extent.count == 0) return 0;
  const int64_t n = apply_rule(row, extent);
  if (n > 0 || !commits_at_least_one(row.p.rule)) return n;
  int32_t i = 0;  // the first one, at least
  while (row.s.key[i] != extent.high) i++;
  row.s.chosen[0] = i;
  return 1;
}

// Tokens are read only where they are to be committed: what a rule takes of all masked positions it also takes of those
// whose token may be committed, as long as all that it took may be. Otherwise, which is rare, the row is done again.
int64_t unmask_row(const Row& row) {
  const int64_t* token = row.p.token;
  int64_t n = choose(row, false);
  bool fits = true;
  for (int64_t k = 0; k < n; k++) fits &= may_commit(token[row.entry(row.s.chosen[k])], row.p.mask_token_id);
  if (!fits) n = choose(row, true);
  for (int64_t k = 0; k < n; k++) row.ids[row.s.chosen[k]] = token[row.entry(row.s.chosen[k])];
  return n;
}

// The sample's entry of every position.
const int32_t* make_entries(const UnmaskParams& p, const ParallelFor& parallel_for) {
  int32_t* entry_of = static_cast<int32_t*>(p.workspace);
  const int64_t positions = p.batch * p.length;
  parallel_for(0, positions, 4 * kGrain, [&](int64_t begin, int64_t end) {
    memset(entry_of + begin, 0xff, (end - begin) * sizeof(int32_t));
  });
  parallel_for(0, p.row_count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      if (p.rows[r] >= 0 && p.rows[r] < positions) entry_of[p.rows[r]] = static_cast<int32_t>(r);
  });
  return entry_of;
}

}  // namespace

void unmask(const UnmaskParams& p, const ParallelFor& parallel_for) {
  const int32_t* entry_of = p.rows ? make_entries(p, parallel_for) : nullptr;
  const int64_t rows_a_chunk = p.length > 0 ? kGrain / p.length : p.batch;
  parallel_for(0, p.batch, rows_a_chunk, [&](int64_t begin, int64_t end) {
    const Scratch scratch(p.length);
    for (int64_t b = begin; b < end; b++) p.committed[b] = unmask_row(row_of(p, scratch, entry_of, b));
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
