// bias_activation on the CPU, compiled once an instruction set (see kernels/common/vec.h).
#include <math.h>

#include "kernels/bias_activation/bias_activation.h"
#include "kernels/bias_activation/gelu_table.h"
#include "kernels/bias_activation/normal_tail.h"
#include "kernels/common/exp.h"
#include "kernels/common/vec.h"

#include "kernels/bias_activation/gates_cpu.inl"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // elements a thread should have before a second one is woken
constexpr int64_t kBlock = 4;     // rows that share the loads of the bias and the loads and stores of the sums

template <class T>
constexpr bool kIsBF16 = false;
template <>
constexpr bool kIsBF16<BF16> = true;

// A row that is added to others, or is not there: -0 is what changes no number, -0 included.
template <class V, class N>
FD_INLINE V load_bias(const typename V::Scalar* bias, int64_t i, N n) {
  return bias ? load<V>(bias + i, n) : V::set(-0.0f);
}

template <class V, class T, Activation kActivation, bool kGated>
void forward_rows(const BiasActivationParams& p, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const S *bias = static_cast<const S*>(p.bias), *up_bias = static_cast<const S*>(p.up_bias);
  for (int64_t row = begin; row < end; row++) {
    const T* const x = static_cast<const T*>(p.x) + row * p.dim;
    const T* const up = kGated ? static_cast<const T*>(p.up) + row * p.dim : nullptr;
    T* const out = static_cast<T*>(p.out) + row * p.dim;
    for_lanes<V>(p.dim, [&](int64_t i, auto n) __attribute__((always_inline)) {
      const V v = load<V>(x + i, n) + load_bias<V>(bias, i, n);
      V result = v * Act<kActivation, kIsBF16<T>, V>::gate(v);
      if constexpr (kGated) result = result * (load<V>(up + i, n) + load_bias<V>(up_bias, i, n));
      store(result, out + i, n);
    });
  }
}

// kRows rows from `row` on. Their sums are added to `sums`: of grad_x, then, where gated, of grad_up.
template <class V, class T, Activation kActivation, bool kGated, bool kSums, int kRows>
void backward_rows(const BiasActivationBackwardParams& p, int64_t row, typename V::Scalar* sums) {
  using S = typename V::Scalar;
  const int64_t at = row * p.dim;
  const S *bias = static_cast<const S*>(p.bias), *up_bias = static_cast<const S*>(p.up_bias);
  const T *const grad_out = static_cast<const T*>(p.grad_out) + at, *const x = static_cast<const T*>(p.x) + at;
  const T* const up = kGated ? static_cast<const T*>(p.up) + at : nullptr;
  T *const grad_x = static_cast<T*>(p.grad_x) + at, *const grad_up = kGated ? static_cast<T*>(p.grad_up) + at : nullptr;
  for_lanes<V>(p.dim, [&](int64_t i, auto n) __attribute__((always_inline)) {
    const V b = load_bias<V>(bias, i, n), ub = load_bias<V>(kGated ? up_bias : nullptr, i, n);
    V sum = V::set(0), up_sum = V::set(0);
#pragma GCC unroll 4
    for (int64_t k = 0; k < kRows * p.dim; k += p.dim) {  // lanes beyond the row load a gradient of 0
      const V v = load<V>(x + k + i, n) + b;
      V grad = load<V>(grad_out + k + i, n);
      if constexpr (kGated) {
        const Taken<V> act = Act<kActivation, kIsBF16<T>, V>::take(v);
        const V grad_of_up = grad * (v * act.gate);
        store(grad_of_up, grad_up + k + i, n);
        up_sum = up_sum + grad_of_up;
        grad = grad * (load<V>(up + k + i, n) + ub) * act.derivative;
      } else {
        grad = grad * Act<kActivation, kIsBF16<T>, V>::derivative(v);
      }
      store(grad, grad_x + k + i, n);
      sum = sum + grad;
    }
    if constexpr (kSums) store(load<V>(sums + i, n) + sum, sums + i, n);
    if constexpr (kSums && kGated) store(load<V>(sums + p.dim + i, n) + up_sum, sums + p.dim + i, n);
  });
}

template <class V, class T, Activation kActivation, bool kGated, bool kSums>
void backward_segment(const BiasActivationBackwardParams& p, int64_t begin, int64_t end, typename V::Scalar* sums) {
  if constexpr (kSums)
    for_lanes<V>((kGated ? 2 : 1) * p.dim, [&](int64_t i, auto n) { store(V::set(0), sums + i, n); });
  int64_t row = begin;
  for (; row + kBlock <= end; row += kBlock) backward_rows<V, T, kActivation, kGated, kSums, kBlock>(p, row, sums);
  for (; row < end; row++) backward_rows<V, T, kActivation, kGated, kSums, 1>(p, row, sums);
}

// Adds the segments' sums in order, for columns [begin, end).
template <class V>
void finish_columns(const BiasActivationBackwardParams& p, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const int64_t kinds = p.up ? 2 : 1, segments = bias_activation_segments(p);
  for (int64_t kind = 0; kind < kinds; kind++) {
    S* const out = static_cast<S*>(kind == 0 ? p.grad_bias : p.grad_up_bias);
    if (out == nullptr) continue;
    const S* const sums = static_cast<const S*>(p.workspace) + kind * p.dim + begin;
    for_lanes<V>(end - begin, [&](int64_t i, auto n) {
      V total = V::set(0);
      for (int64_t s = 0; s < segments; s++) total = total + load<V>(sums + s * kinds * p.dim + i, n);
      store(total, out + begin + i, n);
    });
  }
}

// Calls f with the compile-time constants of a call.
template <Activation kValue>
struct Chosen {
  static constexpr Activation value = kValue;
};
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
template <class F>
void with_activation(Activation activation, const F& f) {
  if (activation == Activation::kGelu) f(Chosen<Activation::kGelu>{});
  if (activation == Activation::kGeluTanh) f(Chosen<Activation::kGeluTanh>{});
  if (activation == Activation::kSilu) f(Chosen<Activation::kSilu>{});
}
template <class F>
void with_flag(bool flag, const F& f) {
  if (flag)
    f(Flag<true>{});
  else
    f(Flag<false>{});
}

template <class V>
void forward(const BiasActivationParams& p, const ParallelFor& parallel_for) {
  with_type<V>(p.dtype, [&](auto type) {
    with_activation(p.activation, [&](auto activation) {
      with_flag(p.up != nullptr, [&](auto gated) {
        using T = typename decltype(type)::type;
        parallel_for(0, p.rows, kGrain / p.dim, [&](int64_t begin, int64_t end) {
          forward_rows<V, T, decltype(activation)::value, decltype(gated)::value>(p, begin, end);
        });
      });
    });
  });
}

template <class V, class T, Activation kActivation, bool kGated, bool kSums>
void backward_typed(const BiasActivationBackwardParams& p, const ParallelFor& parallel_for) {
  using S = typename V::Scalar;
  const int64_t stride = (kGated ? 2 : 1) * p.dim;
  parallel_for(0, bias_activation_segments(p), kGrain / (p.dim * p.rows_per_segment), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; s++) {
      const int64_t begin = s * p.rows_per_segment, end = begin + p.rows_per_segment;
      S* const sums = kSums ? static_cast<S*>(p.workspace) + s * stride : nullptr;
      backward_segment<V, T, kActivation, kGated, kSums>(p, begin, end < p.rows ? end : p.rows, sums);
    }
  });
  if constexpr (kSums) {
    constexpr int64_t kColumns = 256;
    const int64_t blocks = (p.dim + kColumns - 1) / kColumns;
    parallel_for(0, blocks, kGrain / (kColumns * bias_activation_segments(p)), [&](int64_t first, int64_t last) {
      const int64_t end = last * kColumns;
      finish_columns<V>(p, first * kColumns, end < p.dim ? end : p.dim);
    });
  }
}

template <class V>
void backward(const BiasActivationBackwardParams& p, const ParallelFor& parallel_for) {
  with_type<V>(p.dtype, [&](auto type) {
    with_activation(p.activation, [&](auto activation) {
      with_flag(p.up != nullptr, [&](auto gated) {
        with_flag(p.grad_bias || p.grad_up_bias, [&](auto sums) {
          backward_typed<V, typename decltype(type)::type, decltype(activation)::value, decltype(gated)::value,
                         decltype(sums)::value>(p, parallel_for);
        });
      });
    });
  });
}

}  // namespace

void bias_activation(const BiasActivationParams& p, const ParallelFor& parallel_for) { forward<Vec>(p, parallel_for); }
void bias_activation_backward(const BiasActivationBackwardParams& p, const ParallelFor& parallel_for) {
  backward<Vec>(p, parallel_for);
}

#if defined(FASTDIFF_ISA_BASELINE)  // the double kernel is wanted once
void bias_activation_double(const BiasActivationParams& p, const ParallelFor& parallel_for) {
  forward<VecDouble>(p, parallel_for);
}
void bias_activation_backward_double(const BiasActivationBackwardParams& p, const ParallelFor& parallel_for) {
  backward<VecDouble>(p, parallel_for);
}
#endif

}  // namespace fastdiff::cpu::FASTDIFF_ISA
