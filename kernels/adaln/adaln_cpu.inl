// AdaLN on the CPU, compiled once an instruction set (see kernels/common/vec.h).
// A row is read from memory once; the passes over it after that hit the L1 cache.
#include <math.h>
#include <stdlib.h>

#include "kernels/adaln/adaln.h"
#include "kernels/common/tuning.h"
#include "kernels/common/vec.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

// Rows of whole cache lines.
template <class T>
bool streamable(const void* rows, int64_t dim) {
  return dim * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(rows) % 64 == 0;
}

// Rows of the arithmetic's type, 64-byte aligned, one block a thread's chunk.
template <class S>
struct Scratch {
  S* data;
  int64_t stride;
  Scratch(int64_t rows, int64_t dim) : stride((dim + 15) / 16 * 16) {
    data = static_cast<S*>(aligned_alloc(64, (rows * stride * sizeof(S) + 63) / 64 * 64));
    if (data == nullptr && rows > 0) abort();  // a few rows: as far gone as a stack overflow
  }
  ~Scratch() { free(data); }
  S* row(int64_t i) const { return data + i * stride; }
};

// ------------------------------------------------------------------------------------------------ modulation
inline int64_t modulation_offset(const Modulation& m, int64_t b, int64_t n) {
  return b * m.batch_stride + n / m.tokens_per_frame * m.frame_stride;
}

// dst = constant + the modulation's row, or the constant alone where the operand is absent
template <class V>
void widen_row(const Modulation& m, int64_t offset, typename V::Scalar constant, int64_t dim, typename V::Scalar* dst) {
  const V k = V::set(constant);
  if (m.data == nullptr) {
    for_lanes<V>(dim, [&](int64_t i, auto n) { store(k, dst + i, n); });
    return;
  }
  with_type<V>(m.dtype, [&](auto type) {
    const auto* src = static_cast<const typename decltype(type)::type*>(m.data) + offset;
    for_lanes<V>(dim, [&](int64_t i, auto n) { store(k + load<V>(src + i, n), dst + i, n); });
  });
}

// The rows a = weight·(1 + scale), c = bias·(1 + scale) + shift and gate that hold for a token, made anew only where
// the token's modulation rows change: once a sample, a frame or a token.
template <class V>
struct ModulationRows {
  using S = typename V::Scalar;
  const Modulation &scale, &shift, &gate;
  const S *weight, *bias;
  int64_t tokens, dim;
  S *a, *c, *g;  // c and g may be absent
  int64_t scale_at = -1, shift_at = -1, gate_at = -1;

  // Makes the rows for row r of all; returns how many rows from there on share them.
  int64_t move_to(int64_t r) {
    const int64_t b = r / tokens, n = r % tokens;
    const int64_t s = modulation_offset(scale, b, n), t = modulation_offset(shift, b, n);
    const bool new_scale = s != scale_at, new_shift = c != nullptr && (t != shift_at || (new_scale && bias != nullptr));
    if (new_scale || (new_shift && bias != nullptr)) widen_row<V>(scale, s, 1, dim, a);
    if (new_shift) {
      widen_row<V>(shift, t, 0, dim, c);
      if (bias != nullptr)
        for_lanes<V>(dim, [&](int64_t i, auto k) {
          store(fma(load<V>(bias + i, k), load<V>(a + i, k), load<V>(c + i, k)), c + i, k);
        });
    }
    if (weight != nullptr && (new_scale || (new_shift && bias != nullptr)))
      for_lanes<V>(dim, [&](int64_t i, auto k) { store(load<V>(weight + i, k) * load<V>(a + i, k), a + i, k); });
    scale_at = s;
    shift_at = t;
    if (g != nullptr) {
      const int64_t u = modulation_offset(gate, b, n);
      if (u != gate_at) widen_row<V>(gate, u, 0, dim, g);
      gate_at = u;
    }
    int64_t run = tokens - n;
    const Modulation* const operands[] = {&scale, &shift, &gate};
    for (const Modulation* m : operands)
      if (m->frame_stride != 0) {
        const int64_t left = m->tokens_per_frame - n % m->tokens_per_frame;
        run = left < run ? left : run;
      }
    return run;
  }
};

}  // namespace
}  // namespace fastdiff::cpu::FASTDIFF_ISA

#include "kernels/adaln/adaln_cpu_forward.inl"
#include "kernels/adaln/adaln_cpu_backward.inl"

namespace fastdiff::cpu::FASTDIFF_ISA {

void adaln_forward(const AdaLNForwardParams& p, const ParallelFor& parallel_for) { forward<Vec>(p, parallel_for); }
void adaln_backward(const AdaLNBackwardParams& p, const ParallelFor& parallel_for) { backward<Vec>(p, parallel_for); }

#if defined(FASTDIFF_ISA_BASELINE)  // the double kernel is wanted once
void adaln_forward_double(const AdaLNForwardParams& p, const ParallelFor& parallel_for) {
  forward<VecDouble>(p, parallel_for);
}
void adaln_backward_double(const AdaLNBackwardParams& p, const ParallelFor& parallel_for) {
  backward<VecDouble>(p, parallel_for);
}
#endif

}  // namespace fastdiff::cpu::FASTDIFF_ISA
