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

struct Sums {
  DoubleSum sum, weighted, tempered;
};

// Adds up kCount cells, one sum of each kind for all of them. `next`: logits that are needed soon.
template <Temper kTemper, int kCount, class T>
FD_INLINE void add_cells(const T* z, const T* next, Vec from, Vec scale, Sums* sums, float* cell) {
  constexpr int kWidth = Vec::kWidth;
  const Vec zero = Vec::set(0), floor = Vec::set(kTermFloor);
  Vec sum = zero, weighted = zero, tempered = zero;
  for (int64_t c = 0; c < kCount * kSampleCell; c += kSampleCell) {
    Vec s[2] = {zero, zero}, q[2] = {zero, zero}, t[2] = {zero, zero};
    for (int64_t i = c; i < c + kSampleCell; i += 2 * kWidth) {
      Vec v[2];
      load_two(z + i, v, v + 1);
#pragma GCC unroll 2
      for (int k = 0; k < 2; k++) {
        // else memory waits while this block is computed
        if (k == 0 || sizeof(T) == 4) __builtin_prefetch(next + i + k * kWidth);
        const Vec below = v[k] - from, x = max(floor, below);  // NaN stays
        const Vec w = exp_of_term(x);
        s[k] = s[k] + w;
        q[k] = fma(w, x, q[k]);
        if constexpr (kTemper == Temper::kOther) t[k] = t[k] + exp_of_term(max(floor, below * scale));
      }
    }
    const Vec of_cell = s[0] + s[1], tempered_of_cell = t[0] + t[1];
    sum = sum + of_cell;
    weighted = weighted + (q[0] + q[1]);
    tempered = tempered + tempered_of_cell;
    if (cell != nullptr) cell[c / kSampleCell] = (kTemper == Temper::kOther ? tempered_of_cell : of_cell).sum();
  }
  sums->sum.add(sum);
  sums->weighted.add(weighted);
  if constexpr (kTemper == Temper::kOther) sums->tempered.add(tempered);
}

// z: `n` logits, a multiple of kSampleCell.
template <Temper kTemper, bool kWithCells, class T>
FD_INLINE Record block_record(const T* z, int64_t n, float inverse) {
  // as many as leave 16 terms a lane, which are added up in fp32
  constexpr int kAtOnce = Vec::kWidth * 16 > kSampleCell ? Vec::kWidth * 16 / kSampleCell : 1;
  Record r;
  r.max = block_maximum(z, n);
  // A block of -Inf alone is measured from 0, so that a NaN among them still shows.
  const Vec from = Vec::set(r.max == -INFINITY ? 0.0f : r.max), scale = Vec::set(inverse);
  Sums sums;
  int64_t c = 0;
  const auto cells = [&] { return kWithCells ? r.cell + c / kSampleCell : nullptr; };
  for (; c + kAtOnce * kSampleCell <= n; c += kAtOnce * kSampleCell)
    add_cells<kTemper, kAtOnce>(z + c, z + n + c, from, scale, &sums, cells());
  for (; c < n; c += kSampleCell) add_cells<kTemper, 1>(z + c, z + n + c, from, scale, &sums, cells());
  r.sum = sums.sum.total();
  r.weighted = sums.weighted.total();
  r.tempered = kTemper == Temper::kOther ? sums.tempered.total() : r.sum;
  if (r.max == -INFINITY) {  // what the floor made of nothing; NaN stays
    r.sum *= 0;
    r.weighted = r.tempered = r.sum;
    for (int64_t k = 0; kWithCells && k < kCells; k++) r.cell[k] = 0;
  }
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
  Peak p{0, 0, 0};
  for (int64_t i = 0; i < n; i += Vec::kWidth) Vec::load(z + i).store(copy + i);
  for (p.argmax = 0; p.argmax < n && copy[p.argmax] != maximum; p.argmax++) {
  }
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
