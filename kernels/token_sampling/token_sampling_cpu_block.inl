// What one block of 1 024 ids leaves behind, and what is looked up in a block again.
namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kCells = kSampleBlock / kSampleCell;

struct Record {
  float max;            // -Inf where no id of the block is allowed
  float cell[kCells];   // tempered weights exp((z - max) / T), a sum every kSampleCell ids; where they are asked for
  double sum;           // of exp(z - max); NaN where a logit is NaN or +Inf
  double weighted;      // of exp(z - max) (z - max)
  double tempered;      // of the tempered weights; where T > 0
};

// Which exponentials a temperature needs: none but those of the statistics, or a second one an id.
enum class Temper { kZero, kOne, kOther };

// z: `n` logits, a multiple of kSampleCell.
template <Temper kTemper, bool kWithCells, class T>
FD_INLINE Record block_record(const T* z, int64_t n, float inverse) {
  constexpr int kWidth = Vec::kWidth;
  Record r;
  r.max = block_maximum(z, n);
  // A block of -Inf alone is measured from 0, so that a NaN among them still shows.
  const Vec from = Vec::set(r.max == -INFINITY ? 0.0f : r.max), floor = Vec::set(kExpFloor), scale = Vec::set(inverse);
  DoubleSum sum, weighted, tempered;
  for (int64_t c = 0; c < n; c += kSampleCell) {
    const Vec zero = Vec::set(0);
    Vec s[2] = {zero, zero}, q[2] = {zero, zero}, t[2] = {zero, zero};
    for (int64_t i = c; i < c + kSampleCell; i += 2 * kWidth) {
#pragma GCC unroll 2
      for (int k = 0; k < 2; k++) {
        __builtin_prefetch(z + n + i + k * kWidth);  // the next block: else memory waits while this one is computed
        const Vec x = max(floor, Vec::load(z + i + k * kWidth) - from);  // NaN stays
        const Vec w = exp_above_floor(x);
        s[k] = s[k] + w;
        q[k] = fma(w, x, q[k]);
        if constexpr (kTemper == Temper::kOther) t[k] = t[k] + exp((Vec::load(z + i + k * kWidth) - from) * scale);
      }
    }
    sum.add(s[0] + s[1]);
    weighted.add(q[0] + q[1]);
    if constexpr (kTemper == Temper::kOther) tempered.add(t[0] + t[1]);
    if constexpr (kWithCells) r.cell[c / kSampleCell] = kTemper == Temper::kOther ? (t[0] + t[1]).sum() : (s[0] + s[1]).sum();
  }
  r.sum = sum.total();
  r.weighted = weighted.total();
  r.tempered = kTemper == Temper::kOther ? tempered.total() : r.sum;
  return r;
}

template <bool kWithCells, class T>
FD_INLINE Record block_record(Temper temper, const T* z, int64_t n, float inverse) {
  return temper == Temper::kOther ? block_record<Temper::kOther, kWithCells>(z, n, inverse)
                                  : block_record<Temper::kOne, kWithCells>(z, n, inverse);
}

// What the block of the row's maximum says beyond its record: the first argmax, and everything else without it, so that
// a certain row keeps the digits of what little is left.
struct Peak {
  int64_t argmax;  // in the block
  float second;    // the largest logit but the argmax
  double others;   // sum of exp(z - max) but the argmax's
};

// `copy`: kSampleBlock floats to work in.
template <class T>
Peak find_peak(const T* z, int64_t n, float maximum, float* copy) {
  Peak p{n, 0, 0};
  for (int64_t i = 0; i < n; i += Vec::kWidth) Vec::load(z + i).store(copy + i);
  for (int64_t i = n - 1; i >= 0; i--)
    if (copy[i] == maximum) p.argmax = i;
  copy[p.argmax] = -INFINITY;
  Vec second = Vec::set(-INFINITY);
  DoubleSum others;
  for (int64_t i = 0; i < n; i += Vec::kWidth) {
    const Vec v = Vec::load(copy + i);
    second = max(v, second);
    others.add(exp(v - Vec::set(maximum)));
  }
  p.second = second.max();
  p.others = others.total();
  return p;
}

// The first id whose inclusive sum of weights exceeds `target`; the last with a weight where rounding leaves none.
// Ids below `threshold` have no weight.
template <class T>
int64_t scan(const T* z, int64_t n, float maximum, float inverse, float threshold, double target, float* weights) {
  for (int64_t i = 0; i < n; i += Vec::kWidth) {
    const Vec v = Vec::load(z + i);
    keep_at_least(v, Vec::set(threshold), exp((v - Vec::set(maximum)) * Vec::set(inverse))).store(weights + i);
  }
  double sum = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; i++) {
    if (weights[i] <= 0) continue;
    sum += weights[i];
    last = i;
    if (sum > target) break;
  }
  return last;
}

}  // namespace
}  // namespace fastdiff::cpu::FASTDIFF_ISA
