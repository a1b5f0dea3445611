// unmask_ on the CPU, compiled once an instruction set: plain loops that the compiler makes vectors of.
// The candidates of a row are gathered in the order of their positions, without branches (whether a position is one is
// as good as random); then every step is a loop over arrays that fit in the L1 cache.
#include <stdlib.h>
#include <string.h>

#include "kernels/token_sampling/token_sampling.h"
#include "kernels/token_sampling/unmask_order.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

using namespace unmasking;

constexpr int64_t kGrain = 8192;  // positions a thread should have before a second one is woken
constexpr int kLanes = 8;         // partial sums of entropies: their number is part of the result

// The candidates of one row. `sample` is where a candidate's token and scores lie, from `base` on.
struct Candidates {
  int32_t *position, *sample, *key, *chosen;
  float* cost;
  uint8_t* flags;
  int64_t count, base;
};

// Arrays for one row, one block a thread's chunk.
struct Scratch {
  int32_t* data;
  int64_t stride;
  explicit Scratch(int64_t length) : stride((length + 15) / 16 * 16) {
    data = static_cast<int32_t*>(aligned_alloc(64, (stride > 0 ? stride : 16) * (5 * sizeof(int32_t) + 1) / 64 * 64 + 64));
    if (data == nullptr) abort();  // a few rows: as far gone as a stack overflow
  }
  ~Scratch() { free(data); }
  Candidates candidates() const {
    int32_t* const cost = data + 4 * stride;
    return {data, data + stride, data + 2 * stride, data + 3 * stride, reinterpret_cast<float*>(cost),
            reinterpret_cast<uint8_t*>(cost + stride), 0, 0};
  }
};

int64_t clip(int64_t x, int64_t high) { return x < 0 ? 0 : x < high ? x : high; }

// Leaves those of begin … end - 1 for which take(i) is true in `indices`, in order; returns how many. All are judged first,
// which the compiler makes vectors of; then words of eight flags, most of them all or nothing. Nothing branches on one.
template <class F>
int64_t list(int64_t begin, int64_t end, uint8_t* flags, int32_t* indices, const F& take) {
  for (int64_t i = begin; i < end; i++) flags[i - begin] = take(i);
  int64_t n = 0, i = begin;
  for (; i + 8 <= end; i += 8) {
    const uint8_t* flag = flags + (i - begin);
    uint64_t word;
    memcpy(&word, flag, sizeof word);
    if (word == 0) continue;
    if (word == 0x0101010101010101u) {
      for (int j = 0; j < 8; j++) indices[n + j] = static_cast<int32_t>(i) + j;
      n += 8;
      continue;
    }
    for (int j = 0; j < 8; j++) {
      indices[n] = static_cast<int32_t>(i) + j;
      n += flag[j];
    }
  }
  for (; i < end; i++) {
    indices[n] = static_cast<int32_t>(i);
    n += flags[i - begin];
  }
  return n;
}

// entry_of: the sample's entry of each position of all rows, -1 where it has none; nullptr: entry b * length + l.
void collect(const UnmaskParams& p, int64_t b, const int32_t* entry_of, Candidates& c) {
  const int64_t begin = p.block_start ? clip(p.block_start[b], p.length) : 0;
  const int64_t end = p.block_end ? clip(p.block_end[b], p.length) : p.length;
  const int64_t* ids = p.token_ids + b * p.row_stride;
  const int64_t mask = p.mask_token_id;
  if (entry_of == nullptr) {
    c.base = b * p.length;
    c.sample = c.position;
    const int64_t* token = p.token + c.base;
    c.count = list(begin, end, c.flags, c.position,
                   [=](int64_t l) { return (ids[l] == mask) & (token[l] != mask) & (token[l] >= 0); });
    return;
  }
  c.base = 0;
  entry_of += b * p.length;
  c.count = list(begin, end, c.flags, c.position, [=, token = p.token](int64_t l) {
    const int64_t t = token[entry_of[l] < 0 ? 0 : entry_of[l]];
    return (ids[l] == mask) & (entry_of[l] >= 0) & (t != mask) & (t >= 0);
  });
  for (int64_t i = 0; i < c.count; i++) c.sample[i] = entry_of[c.position[i]];
}

struct Counter {  // of the row's random numbers
  uint64_t seed, sequence, step;
};

void make_keys(const UnmaskParams& p, const Counter& at, const Candidates& c) {
  if (p.order == UnmaskOrder::kRandom) {
    for (int64_t i = 0; i < c.count; i++) {
      const uint64_t position = static_cast<uint32_t>(c.position[i]);
      c.key[i] = key_of_word(philox(at.seed, at.sequence, position, at.step, Draw::kOrder).word[0]);
    }
  } else {
    const bool negated = p.order == UnmaskOrder::kEntropy;
    const float* score = p.order == UnmaskOrder::kConfidence ? p.log_prob : negated ? p.entropy : p.margin;
    score += c.base;
    for (int64_t i = 0; i < c.count; i++) c.key[i] = key_of(score[c.sample[i]], negated);
  }
  if (p.rule == UnmaskRule::kEntropyBudget)
    for (int64_t i = 0; i < c.count; i++) c.cost[i] = cost_of(p.entropy[c.base + c.sample[i]]);
}

int64_t count_above(const Candidates& c, int32_t key) {
  int32_t n = 0;
  for (int64_t i = 0; i < c.count; i++) n += c.key[i] > key;
  return n;
}

// Always the same lanes in the same order: sums do not depend on the instruction set.
double cost_above(const Candidates& c, int32_t key) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= c.count; i += kLanes)
    for (int j = 0; j < kLanes; j++) lane[j] += c.key[i + j] > key ? static_cast<double>(c.cost[i + j]) : 0.0;
  for (int j = 0; i + j < c.count; j++) lane[j] += c.key[i + j] > key ? static_cast<double>(c.cost[i + j]) : 0.0;
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

struct Range {
  int32_t low, high;
};

Range range_of_keys(const Candidates& c) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < c.count; i++) {
    low = c.key[i] < low ? c.key[i] : low;
    high = c.key[i] > high ? c.key[i] : high;
  }
  return {low, high};
}

// Where the committed end: keys above `above` are in, and those from `from` on at indices below `end`.
struct Cut {
  int32_t above, from;
  int64_t end;
};

// The last place where the rule holds. The first candidate is in, whatever the rule says of it.
Cut find_cut(const UnmaskParams& p, double number, const Candidates& c) {
  const Range range = range_of_keys(c);
  int64_t low = int64_t{range.low} - 1, high = range.high;  // it holds at `high`, not at `low`
  int64_t above_low = c.count;
  Before before{0, 0.0};  // `high`
  while (high - low > 1 && above_low - before.count > 1) {
    const int64_t middle = low + (high - low) / 2;
    const int32_t key = static_cast<int32_t>(middle);
    const Before here{count_above(c, key), p.rule == UnmaskRule::kEntropyBudget ? cost_above(c, key) : 0.0};
    if (holds(p.rule, p.order, number, key, here)) {
      high = middle;
      before = here;
    } else {
      low = middle;
      above_low = here.count;
    }
  }
  // One candidate, or equal keys: one after the other.
  const int32_t above = static_cast<int32_t>(high), from = static_cast<int32_t>(low + 1);
  Cut cut{above, from, 0};
  const int64_t n = list(0, c.count, c.flags, c.chosen, [=, keys = c.key](int64_t i) {
    return (keys[i] >= from) & (keys[i] <= above);
  });
  for (int64_t k = 0; k < n; k++) {
    const int32_t i = c.chosen[k];
    if (before.count > 0 && !holds(p.rule, p.order, number, c.key[i], before)) break;
    cut.end = i + 1;
    before.count++;
    if (p.rule == UnmaskRule::kEntropyBudget) before.entropy += c.cost[i];
  }
  return cut;
}

int64_t first_of(const Candidates& c) {
  const int32_t best = range_of_keys(c).high;
  int64_t i = 0;
  while (c.key[i] != best) i++;
  return i;
}

// Leaves the indices of the committed in c.chosen; returns how many.
int64_t apply_rule(const UnmaskParams& p, const Counter& at, double number, const Candidates& c) {
  const int32_t *key = c.key, *position = c.position;
  int64_t n = 0;
  if (p.rule == UnmaskRule::kThreshold && p.order == UnmaskOrder::kRandom) {
    n = list(0, c.count, c.flags, c.chosen, [=](int64_t i) { return value_of_word(key[i]) >= number; });
  } else if (p.rule == UnmaskRule::kThreshold) {
    const double limit = is_logarithmic(p.order) ? log(number) : number;
    n = list(0, c.count, c.flags, c.chosen, [=](int64_t i) { return static_cast<double>(value_of(key[i])) >= limit; });
  } else if (p.rule == UnmaskRule::kAncestral) {
    n = list(0, c.count, c.flags, c.chosen, [=](int64_t i) {
      const uint64_t l = static_cast<uint32_t>(position[i]);
      return uniform53(philox(at.seed, at.sequence, l, at.step, Draw::kAncestral)) < number;
    });
  } else {
    const Cut cut = find_cut(p, number, c);
    const int32_t end = static_cast<int32_t>(cut.end);
    return list(0, c.count, c.flags, c.chosen, [=](int64_t i) {
      return (key[i] > cut.above) | ((key[i] >= cut.from) & (static_cast<int32_t>(i) < end));
    });
  }
  if (n > 0) return n;
  c.chosen[0] = static_cast<int32_t>(first_of(c));
  return 1;
}

void unmask_row(const UnmaskParams& p, int64_t b, const int32_t* entry_of, Candidates c) {
  p.committed[b] = 0;
  if (p.active && !p.active[b]) return;
  collect(p, b, entry_of, c);
  if (c.count == 0) return;
  const Counter at{static_cast<uint64_t>(p.seed_at ? *p.seed_at : p.seed),
                   static_cast<uint64_t>(p.sequence_ids ? p.sequence_ids[b] : b),
                   static_cast<uint64_t>(p.step_at ? *p.step_at : p.step)};
  make_keys(p, at, c);
  const int64_t n = apply_rule(p, at, p.values ? p.values[b] : p.value, c);
  int64_t* ids = p.token_ids + b * p.row_stride;
  for (int64_t k = 0; k < n; k++) {
    const int32_t i = c.chosen[k];
    ids[c.position[i]] = p.token[c.base + c.sample[i]];
  }
  p.committed[b] = n;
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
    for (int64_t b = begin; b < end; b++) unmask_row(p, b, entry_of, scratch.candidates());
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
