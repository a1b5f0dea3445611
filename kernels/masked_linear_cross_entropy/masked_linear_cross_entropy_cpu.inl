// Cross entropy of rows on the CPU, compiled once an instruction set (see kernels/common/vec.h).
// A row is read from memory once, in blocks that stay in the L1 cache for their maximum and their sum; the gradient then
// finds it in the L2 cache.
#include <math.h>

#include "kernels/common/exp.h"
#include "kernels/common/vec.h"
#include "kernels/masked_linear_cross_entropy/masked_linear_cross_entropy.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int kLanes = 4;  // running values enough to hide the latency of an addition
constexpr int W = Vec::kWidth;

// A part of a row: [begin, begin + size).
struct Block {
  int64_t begin, size;
};

// f(begin, end) on the parts of a row that lie between suppressed ids.
template <class F>
FD_INLINE void for_allowed(const CrossEntropyParams& p, const F& f) {
  int64_t begin = 0;
  for (int64_t k = 0; k < p.suppress_count; k++) {
    if (p.suppress[k] > begin) f(begin, p.suppress[k]);
    begin = p.suppress[k] + 1;
  }
  if (begin < p.vocab) f(begin, p.vocab);
}

template <class T>
float maximum(const T* z, int64_t size) {
  if (size < W) {
    float m = to_float(z[0]);
    for (int64_t i = 1; i < size; i++) m = to_float(z[i]) > m ? to_float(z[i]) : m;
    return m;
  }
  Vec m[kLanes];
  for (int k = 0; k < kLanes; k++) m[k] = Vec::load(z);
  int64_t i = 0;
  for (; i + kLanes * W <= size; i += kLanes * W)
    for (int k = 0; k < kLanes; k++) m[k] = max(m[k], Vec::load(z + i + k * W));
  for (; i + W <= size; i += W) m[0] = max(m[0], Vec::load(z + i));
  m[0] = max(m[0], Vec::load(z + size - W));  // seen twice in part, which a maximum does not mind
  return max(max(m[0], m[1]), max(m[2], m[3])).max();
}

struct Sums {
  float exponentials, differences;  // Σ exp(z − m), Σ (z − m)
};

template <class T>
Sums sums(const T* z, float maximum, int64_t size) {
  const Vec m = Vec::set(maximum);
  Vec e[kLanes], d[kLanes];
  for (int k = 0; k < kLanes; k++) e[k] = d[k] = Vec::set(0);
  int64_t i = 0;
  for (; i + kLanes * W <= size; i += kLanes * W)
    for (int k = 0; k < kLanes; k++) {
      const Vec x = Vec::load(z + i + k * W) - m;
      e[k] = e[k] + exp(x);
      d[k] = d[k] + x;
    }
  for (int k = 0; i < size; i += W, k++) {
    const int64_t n = size - i < W ? size - i : W;
    const Vec x = Vec::load(z + i, n) - m;
    e[k] = e[k] + exp(x).first(n);
    d[k] = d[k] + x.first(n);
  }
  return {((e[0] + e[1]) + (e[2] + e[3])).sum(), ((d[0] + d[1]) + (d[2] + d[3])).sum()};
}

// What one pass over a row leaves: the softmax's maximum and Σ exp(z − maximum) over all ids but the first of the maximum,
// so that nothing is lost where that sum is far below one.
struct RowSoftmax {
  float maximum;
  int64_t argmax;
  double others;
  double logit_sum;  // Σ z over the allowed ids
};

template <class T>
RowSoftmax row_softmax(const CrossEntropyParams& p, const T* z) {
  float top = -INFINITY;
  Block best{0, 0};
  double best_sum = 0, rest = 0, logit_sum = 0;  // rest: of all blocks but the best one, in units of exp(top)
  for_allowed(p, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t size = end - i < kBlock ? end - i : kBlock;
      const float m = maximum(z + i, size);
      const float shift = m == -INFINITY ? 0 : m;
      const Sums s = sums(z + i, shift, size);
      logit_sum += double(shift) * double(size) + s.differences;
      if (m > top) {
        rest = (rest + best_sum) * ::exp(double(top) - m);
        best_sum = s.exponentials;
        best = {i, size};
        top = m;
      } else if (s.exponentials != 0) {  // NaN too
        rest += s.exponentials * ::exp(double(shift) - top);
      }
    }
  });
  RowSoftmax r{top, -1, NAN, logit_sum};
  for (int64_t i = best.begin; r.argmax < 0 && i < best.begin + best.size; i++)
    if (to_float(z[i]) == top) r.argmax = i;
  if (r.argmax < 0 || top == INFINITY) return r;  // no distribution
  const int64_t after = r.argmax + 1;
  r.others = rest + sums(z + best.begin, top, r.argmax - best.begin).exponentials +
             sums(z + after, top, best.begin + best.size - after).exponentials;
  return r;
}

bool is_allowed(const CrossEntropyParams& p, int64_t id) {
  if (id < 0 || id >= p.vocab) return false;
  for (int64_t k = 0; k < p.suppress_count; k++)
    if (p.suppress[k] == id) return false;
  return true;
}

// weight · (p − (1 − ε)·[target] − ε/|A|), in place of the logits.
template <class T>
void write_gradient(const CrossEntropyParams& p, const RowSoftmax& r, double weight, int64_t target, T* z) {
  const double norm = 1 / (1 + r.others), uniform = p.label_smoothing / double(p.vocab - p.suppress_count);
  const double x = target >= 0 ? double(to_float(z[target])) - r.maximum : 0;
  // p[target] − 1 without the cancellation at p = 1
  const double below_one = target == r.argmax ? -r.others * norm : (::exp(x) - 1 - r.others) * norm;
  const Vec m = Vec::set(r.maximum), a = Vec::set(float(weight * norm)), b = Vec::set(float(-weight * uniform));
  for_allowed(p, [&](int64_t begin, int64_t end) {
    for_lanes<Vec>(end - begin, [&](int64_t i, auto n) {
      T* at = z + begin + i;
      store(fma(exp(load<Vec>(at, n) - m), a, b), at, n);
    });
  });
  for (int64_t k = 0; k < p.suppress_count; k++) from_float(0, z + p.suppress[k]);
  if (target >= 0) from_float(float(weight * (below_one + p.label_smoothing - uniform)), z + target);
}

template <class T>
void cross_entropy_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    T* z = static_cast<T*>(p.logits) + row * p.row_stride;
    const int64_t target = is_allowed(p, p.targets[row]) ? p.targets[row] : -1;
    RowSoftmax r = row_softmax(p, z);
    if (target < 0) r.others = NAN;
    const double allowed = double(p.vocab - p.suppress_count);
    double loss = log1p(r.others) + (double(r.maximum) - to_float(z[target < 0 ? 0 : target]));
    if (p.label_smoothing > 0) loss += p.label_smoothing * (to_float(z[target < 0 ? 0 : target]) - r.logit_sum / allowed);
    p.row_loss[row] = target < 0 ? NAN : float(loss);
    if (p.want_grad) write_gradient(p, r, p.row_weight ? p.row_weight[row] : 1.0, target, z);
  }
}

}  // namespace

void cross_entropy(const CrossEntropyParams& p, const ParallelFor& parallel_for) {
  with_type<Vec>(p.dtype, [&](auto type) {
    parallel_for(0, p.rows, 16384 / p.vocab, [&](int64_t begin, int64_t end) {
      cross_entropy_rows<typename decltype(type)::type>(p, begin, end);
    });
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
