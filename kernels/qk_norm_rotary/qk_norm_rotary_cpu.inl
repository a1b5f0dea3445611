// qk_norm_rotary on the CPU, compiled once an instruction set (see kernels/common/vec.h).
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/common/vec.h"
#include "kernels/qk_norm_rotary/qk_norm_rotary.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // elements a thread should have before a second one is woken

// Rows of floats of one thread.
class Rows {
 public:
  Rows(int64_t count, int64_t dim) : stride_((dim + 15) / 16 * 16) {
    memory_ = static_cast<float*>(aligned_alloc(64, count * stride_ * sizeof(float)));
    if (memory_ == nullptr) abort();  // as far gone as a stack overflow: kernels have no way to report
  }
  ~Rows() { free(memory_); }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;
  float* row(int64_t i) const { return memory_ + i * stride_; }

 private:
  int64_t stride_;
  float* memory_;
};

// Mean and variance of a row, in two passes.
template <class T>
FD_INLINE void moments(const T* x, int64_t dim, float* mean, float* variance) {
  Vec sum = Vec::set(0);
  for_lanes<Vec>(dim, [&](int64_t i, auto n) { sum = sum + load<Vec>(x + i, n); });
  *mean = sum.sum() / float(dim);
  Vec square = Vec::set(0);
  const Vec m = Vec::set(*mean);
  for_lanes<Vec>(dim, [&](int64_t i, auto n) {
    Vec d = load<Vec>(x + i, n) - m;
    if constexpr (!__is_same(decltype(n), Whole)) d = d.first(n);
    square = fma(d, d, square);
  });
  *variance = square.sum() / float(dim);
}

// The operands of one token's query (which = 0) or key (1).
template <class T>
struct Token {
  const QkNormRotaryShape& s;
  const T* x;
  const float *weight, *bias, *cosine, *sine;  // [heads * dim], [dim / 2]
  float mean, rstd;

  Token(const QkNormRotaryShape& shape, const QkNormRotaryOperands& o, int64_t row, int64_t which) : s(shape) {
    const int64_t width = s.heads * s.dim, place = row % s.tokens * (s.dim / 2);
    x = static_cast<const T*>(o.qkv) + (3 * row + which) * width;
    weight = o.weight + which * width;
    bias = o.bias + which * width;
    cosine = o.cosine ? o.cosine + place : nullptr;
    sine = o.sine ? o.sine + place : nullptr;
  }
  template <class N>
  FD_INLINE Vec unit(int64_t i, N n) const {  // (x - mean) / deviation
    return (load<Vec>(x + i, n) - Vec::set(mean)) * Vec::set(rstd);
  }
  template <class N>
  FD_INLINE Vec normed(int64_t i, N n) const {
    return fma(unit(i, n), load<Vec>(weight + i, n), load<Vec>(bias + i, n));
  }
};

template <class T>
void forward_token(const Token<T>& token, T* out) {
  const QkNormRotaryShape& s = token.s;
  if (token.cosine == nullptr) {
    for_lanes<Vec>(s.heads * s.dim, [&](int64_t i, auto n) { store(token.normed(i, n), out + i, n); });
    return;
  }
  const int64_t half = s.dim / 2;
  for (int64_t first = 0; first < s.heads * s.dim; first += s.dim)
    for_lanes<Vec>(half, [&](int64_t i, auto n) {
      const Vec a = token.normed(first + i, n), b = token.normed(first + half + i, n);
      const Vec c = load<Vec>(token.cosine + i, n), d = load<Vec>(token.sine + i, n);
      store(a * c - b * d, out + first + i, n);
      store(fma(b, c, a * d), out + first + half + i, n);
    });
}

// The gradient of the norm's result, and what of it enters the gradient of x: g · weight is left in `left`, its sums with
// and without the unit row in the results. Gradients of weight and bias are added to `sums` and `sums + width`.
template <bool kSums, class T, class N>
FD_INLINE void take_gradient(const Token<T>& token, Vec g, int64_t i, N n, float* left, float* sums, int64_t width,
                             Vec* total, Vec* with_unit) {
  const Vec unit = token.unit(i, n), scaled = g * load<Vec>(token.weight + i, n);
  store(scaled, left + i, n);
  *total = *total + scaled;  // lanes beyond the row have gradients of 0
  *with_unit = fma(scaled, unit, *with_unit);
  if constexpr (kSums) {
    store(fma(g, unit, load<Vec>(sums + i, n)), sums + i, n);
    store(g + load<Vec>(sums + width + i, n), sums + width + i, n);
  }
}

template <bool kSums, class T>
void backward_token(const Token<T>& token, const T* grad, T* out, float* left, float* sums) {
  const QkNormRotaryShape& s = token.s;
  const int64_t width = s.heads * s.dim, half = s.dim / 2;
  Vec total = Vec::set(0), with_unit = Vec::set(0);
  if (token.cosine == nullptr) {
    for_lanes<Vec>(width, [&](int64_t i, auto n) {
      take_gradient<kSums>(token, load<Vec>(grad + i, n), i, n, left, sums, width, &total, &with_unit);
    });
  } else {
    for (int64_t first = 0; first < width; first += s.dim)
      for_lanes<Vec>(half, [&](int64_t i, auto n) {
        const Vec a = load<Vec>(grad + first + i, n), b = load<Vec>(grad + first + half + i, n);
        const Vec c = load<Vec>(token.cosine + i, n), d = load<Vec>(token.sine + i, n);
        take_gradient<kSums>(token, fma(a, c, b * d), first + i, n, left, sums, width, &total, &with_unit);
        take_gradient<kSums>(token, b * c - a * d, first + half + i, n, left, sums, width, &total, &with_unit);
      });
  }
  const Vec mean = Vec::set(total.sum() / float(width)), slope = Vec::set(with_unit.sum() / float(width));
  const Vec rstd = Vec::set(token.rstd);
  for_lanes<Vec>(width, [&](int64_t i, auto n) {
    store((load<Vec>(left + i, n) - mean - token.unit(i, n) * slope) * rstd, out + i, n);
  });
}

template <class T, bool kSums>
void backward_segment(const QkNormRotaryBackwardParams& p, int64_t segment, float* left) {
  const QkNormRotaryShape& s = p.shape;
  const int64_t width = s.heads * s.dim, all = s.batch * s.tokens;
  float* const sums = kSums ? p.workspace + segment * 4 * width : nullptr;
  if constexpr (kSums) memset(sums, 0, 4 * width * sizeof(float));
  const int64_t begin = segment * kQkNormRows, end = begin + kQkNormRows < all ? begin + kQkNormRows : all;
  for (int64_t row = begin; row < end; row++) {
    const T* const grad = static_cast<const T*>(p.grad_out) + 3 * row * width;
    T* const out = static_cast<T*>(p.grad_qkv) + 3 * row * width;
    for (int64_t which = 0; which < 2; which++) {
      Token<T> token(s, p.operands, row, which);
      token.mean = p.stats[4 * row + 2 * which];
      token.rstd = p.stats[4 * row + 2 * which + 1];
      backward_token<kSums>(token, grad + which * width, out + which * width, left, kSums ? sums + 2 * which * width : sums);
    }
    memcpy(out + 2 * width, grad + 2 * width, width * sizeof(T));
  }
}

// Adds the segments' sums in order, for columns [begin, end) of all rows of sums together.
void finish_columns(const QkNormRotaryBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t segments = qk_norm_rotary_segments(p.shape), stride = 4 * p.shape.heads * p.shape.dim;
  for_lanes<Vec>(end - begin, [&](int64_t i, auto n) {
    Vec total = Vec::set(0);
    for (int64_t s = 0; s < segments; s++) total = total + load<Vec>(p.workspace + s * stride + begin + i, n);
    store(total, p.grad_parameters + begin + i, n);
  });
}

}  // namespace

void qk_norm_rotary_forward(const QkNormRotaryForwardParams& p, const ParallelFor& parallel_for) {
  const QkNormRotaryShape& s = p.shape;
  const int64_t width = s.heads * s.dim;
  with_type<Vec>(s.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(0, s.batch * s.tokens, kGrain / (3 * width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        T* const out = static_cast<T*>(p.out) + 3 * row * width;
        for (int64_t which = 0; which < 2; which++) {
          Token<T> token(s, p.operands, row, which);
          float variance;
          moments(token.x, width, &token.mean, &variance);
          token.rstd = 1 / sqrtf(variance + s.eps);
          if (p.stats) {
            p.stats[4 * row + 2 * which] = token.mean;
            p.stats[4 * row + 2 * which + 1] = token.rstd;
          }
          forward_token(token, out + which * width);
        }
        memcpy(out + 2 * width, static_cast<const T*>(p.operands.qkv) + (3 * row + 2) * width, width * sizeof(T));
      }
    });
  });
}

void qk_norm_rotary_backward(const QkNormRotaryBackwardParams& p, const ParallelFor& parallel_for) {
  const QkNormRotaryShape& s = p.shape;
  const int64_t width = s.heads * s.dim, segments = qk_norm_rotary_segments(s);
  with_type<Vec>(s.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(0, segments, kGrain / (3 * width * kQkNormRows), [&](int64_t begin, int64_t end) {
      const Rows left(1, width);
      for (int64_t i = begin; i < end; i++) {
        if (p.grad_parameters)
          backward_segment<T, true>(p, i, left.row(0));
        else
          backward_segment<T, false>(p, i, left.row(0));
      }
    });
  });
  if (p.grad_parameters) {
    constexpr int64_t kColumns = 256;
    const int64_t columns = 4 * width, pieces = (columns + kColumns - 1) / kColumns;
    parallel_for(0, pieces, kGrain / (kColumns * segments), [&](int64_t first, int64_t last) {
      const int64_t end = last * kColumns;
      finish_columns(p, first * kColumns, end < columns ? end : columns);
    });
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
