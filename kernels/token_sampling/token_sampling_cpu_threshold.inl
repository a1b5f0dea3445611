// The logit that top-k and top-p cut at, without sorting the vocabulary: a sample of the row says between which two values
// the cut must lie, one pass packs the logits between them together (and adds up what lies above), and bisection over the
// float's bits finds the cut among those few. Where the sample misled, the pass is made again on the other side.
#include <float.h>

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

// Floats in the order of their values, as integers, and back.
FD_INLINE int32_t key_of(float f) {
  int32_t i;
  memcpy(&i, &f, 4);
  return i ^ ((i >> 31) & 0x7fffffff);
}
FD_INLINE float from_key(int32_t i) {
  i ^= (i >> 31) & 0x7fffffff;
  float f;
  memcpy(&f, &i, 4);
  return f;
}

struct Work {  // for one row after another
  float* values;     // [vocab + kWidth]
  float* weights;    // the same
  int64_t* offsets;  // [blocks + 1]: where a block's packed values begin
  double* above;     // [blocks]: tempered weights of its logits >= high
};

struct Span {  // what one pass found: the logits in [low, high), and those above
  float low, high;
  int64_t packed;
  double mass;         // tempered weights of the packed logits, and of those above: of passes for top-p
  double mass_above;
  double count_above;  // of passes for top-k
};

template <class T>
struct RowView {
  const Blocks<T>& blocks;
  int64_t block_count;
  float maximum, inverse;
  FD_INLINE Vec weight(Vec v) const { return exp((v - Vec::set(maximum)) * Vec::set(inverse)); }
};

double sum_of(const float* x, int64_t n) {
  DoubleSum sum;
  for_lanes<Vec>(n, [&](int64_t i, auto k) { sum.add(load<Vec>(x + i, k)); });
  return sum.total();
}

// Sum of weights[i] where values[i] >= cut.
double sum_at_least(const float* values, const float* weights, int64_t n, float cut) {
  const Vec c = Vec::set(cut), zero = Vec::set(0);
  DoubleSum sum;
  const int64_t whole = n / (8 * Vec::kWidth) * (8 * Vec::kWidth);
  for (int64_t i = 0; i < whole; i += 8 * Vec::kWidth) {
    Vec s[2] = {zero, zero};
#pragma GCC unroll 8
    for (int64_t k = 0; k < 8; k++) {
      const int64_t at = i + k * Vec::kWidth;
      s[k % 2] = s[k % 2] + keep_at_least(Vec::load(values + at), c, Vec::load(weights + at));
    }
    sum.add(s[0] + s[1]);
  }
  for_lanes<Vec>(n - whole, [&](int64_t i, auto k) {
    sum.add(keep_at_least(load<Vec>(values + whole + i, k), c, load<Vec>(weights + whole + i, k)));
  });
  return sum.total();
}

// The largest cut in [low, high) whose weights reach `target`, low where none does; to `resolution` steps of a float.
float largest_cut(const float* values, const float* weights, int64_t n, float low, float high, double target,
                  int64_t resolution = 1) {
  int64_t yes = key_of(low), no = key_of(high);
  while (no - yes > resolution) {
    const int64_t middle = yes + (no - yes) / 2;
    if (sum_at_least(values, weights, n, from_key(int32_t(middle))) >= target) yes = middle; else no = middle;
  }
  return from_key(int32_t(yes));
}

// The tempered weights of the packed logits.
template <class T>
void weigh(const RowView<T>& row, const Span& span, const Work& work) {
  for_lanes<Vec>(span.packed, [&](int64_t i, auto n) {
    store(row.weight(load<Vec>(work.values + i, n)), work.weights + i, n);
  });
}

// What a pass adds up of the logits above the span: how many they are, or their weights.
enum class Above { kCount, kMass };

template <Above kAbove, class T>
Span pack(const RowView<T>& row, float low, float high, const Work& work) {
  Span span{low, high, 0, 0, 0, 0};
  const Vec l = Vec::set(low), h = Vec::set(high), one = Vec::set(1);
  for (int64_t b = 0; b < row.block_count; b++) {
    work.offsets[b] = span.packed;
    row.blocks(b, [&](const auto* z, int64_t n) {
      DoubleSum above;
      for (int64_t c = 0; c < n; c += kSampleCell) {
        Vec s[2] = {Vec::set(0), Vec::set(0)};
#pragma GCC unroll 4
        for (int64_t i = 0; i < kSampleCell / Vec::kWidth; i++) {
          __builtin_prefetch(z + n + c + i * Vec::kWidth);
          const Vec v = Vec::load(z + c + i * Vec::kWidth);
          s[i % 2] = s[i % 2] + keep_at_least(v, h, kAbove == Above::kMass ? row.weight(v) : one);
          span.packed += pack_between(v, l, h, v, work.values + span.packed);
        }
        above.add(s[0] + s[1]);
      }
      work.above[b] = above.total();
    });
    (kAbove == Above::kMass ? span.mass_above : span.count_above) += work.above[b];
  }
  work.offsets[row.block_count] = span.packed;
  if (kAbove == Above::kCount) return span;
  weigh(row, span, work);
  span.mass = sum_of(work.weights, span.packed);
  return span;
}

constexpr int64_t kLines = 256, kSample = kLines * 16;  // logits looked at: lines of 16, evenly spread

template <class T>
void take_sample(const RowView<T>& row, int64_t vocab, float* values) {
  for (int64_t line = 0; line < kLines; line++) {
    const T* from = row.blocks.row + (vocab - 16) * line / (kLines - 1);
    for (int64_t i = 0; i < 16; i += Vec::kWidth)  // NaN and -Inf (where suppressed) become the least float
      max(Vec::load(from + i), Vec::set(-FLT_MAX)).store(values + line * 16 + i);
  }
}

constexpr int64_t kCoarse = 1 << 13;  // guesses need no more than three digits

// The sample's value of a rank (the largest is 1), -FLT_MAX or INFINITY beyond its ends; `ones` is kSample ones.
float ranked(const float* sample, const float* ones, double rank) {
  return rank < 1 ? INFINITY : largest_cut(sample, ones, kSample, -FLT_MAX, INFINITY, rank, kCoarse);
}

constexpr double kSlack = 16;  // ranks of the sample that a guess gives way on each side: its own chance

// Between which values the k-th largest logit lies, most probably.
void guess_top_k(const float* sample, const float* ones, int64_t vocab, int64_t top_k, float* low, float* high) {
  const double rank = double(top_k) * kSample / vocab, spread = 4 * sqrt(rank) + kSlack;
  *low = ranked(sample, ones, rank + spread);
  *high = ranked(sample, ones, rank - spread);
}

// The same for top-p. Looked at from below: the logits that are cut off are many and small, so that a sample tells
// their mass well, even where a few large ones have most of the row's mass and are not in it.
template <class T>
void guess_top_p(const RowView<T>& row, const float* sample, float* weights, const float* ones, int64_t vocab,
                 double rest, float* low, float* high) {
  for (int64_t i = 0; i < kSample; i += Vec::kWidth) row.weight(Vec::load(sample + i)).store(weights + i);
  const double all = sum_of(weights, kSample), share = rest * kSample / vocab;
  const auto rank_of = [&](double mass) {
    if (mass <= 0) return 0.0;
    const float cut = largest_cut(sample, weights, kSample, -FLT_MAX, INFINITY, mass, kCoarse);
    return sum_at_least(sample, ones, kSample, cut);
  };
  *low = ranked(sample, ones, rank_of(all - 0.9 * share) + kSlack);
  *high = ranked(sample, ones, rank_of(all - 1.1 * share) - kSlack);
}

// Packs around the cut. side(span) < 0: the cut lies below the span, > 0: above it, 0: inside. The guess, then what lies
// on the side that it pointed to, then (only rounding can lead there) everything.
template <Above kAbove, class T, class F>
Span pack_around(const RowView<T>& row, float low, float high, const Work& work, const F& side) {
  if (!(low < high)) high = INFINITY;
  const Span guess = pack<kAbove>(row, low, high, work);
  const int where = side(guess);
  if (where == 0) return guess;
  const Span other = where > 0 ? pack<kAbove>(row, high, INFINITY, work) : pack<kAbove>(row, -FLT_MAX, low, work);
  return side(other) == 0 ? other : pack<kAbove>(row, -FLT_MAX, INFINITY, work);
}

// Cuts a row: returns the smallest logit kept, and leaves the kept ids' tempered weights in the records.
// `total`: the sum of all tempered weights, measured from the row's maximum; allowed: how many ids are.
template <class T>
float cut_row(const RowView<T>& row, int64_t vocab, int64_t allowed, int64_t top_k, double top_p, double total,
              const Work& work, Record* records) {
  const bool sampled = vocab > 4 * kSample, by_count = top_k > 0 && top_k < allowed, by_mass = top_p < 1;
  float low = -FLT_MAX, high = INFINITY, cut = -FLT_MAX;
  float* const ones = work.weights + kSample;
  if (sampled) {
    take_sample(row, vocab, work.values);
    for (int64_t i = 0; i < kSample; i++) ones[i] = 1;
  }
  Span span{};
  if (by_count) {
    if (sampled) guess_top_k(work.values, ones, vocab, top_k, &low, &high);
    span = pack_around<Above::kCount>(row, low, high, work, [&](const Span& s) {
      return s.count_above >= top_k ? 1 : s.count_above + s.packed < top_k ? -1 : 0;
    });
    for (int64_t i = 0; i < span.packed; i++) work.weights[i] = 1;
    cut = largest_cut(work.values, work.weights, span.packed, span.low, span.high, top_k - span.count_above);
    if (span.high < INFINITY) span = pack<Above::kMass>(row, cut, INFINITY, work); else weigh(row, span, work);
    if (by_mass) {
      const double target = top_p * sum_at_least(work.values, work.weights, span.packed, cut);
      cut = largest_cut(work.values, work.weights, span.packed, cut, INFINITY, target);
    }
  } else {
    const double target = top_p * total;
    if (sampled) guess_top_p(row, work.values, work.weights, ones, vocab, (1 - top_p) * total, &low, &high);
    span = pack_around<Above::kMass>(row, low, high, work, [&](const Span& s) {
      return s.mass_above >= target ? 1 : s.mass_above + s.mass < target ? -1 : 0;
    });
    cut = largest_cut(work.values, work.weights, span.packed, span.low, span.high, target - span.mass_above);
  }
  for (int64_t b = 0; b < row.block_count; b++) {
    const int64_t first = work.offsets[b], n = work.offsets[b + 1] - first;
    records[b].tempered = work.above[b] + sum_at_least(work.values + first, work.weights + first, n, cut);
  }
  return cut;
}

}  // namespace
}  // namespace fastdiff::cpu::FASTDIFF_ISA
