// scale_shift on the CPU, compiled once an instruction set (see kernels/common/vec.h).
#include "kernels/common/tuning.h"
#include "kernels/common/vec.h"
#include "kernels/scale_shift/scale_shift.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

template <class T>
void scale_shift_rows(const ScaleShiftParams& p, int64_t begin, int64_t end) {
  const Vec one = Vec::set(1);
  for (int64_t row = begin; row < end; row++) {
    const int64_t sample = row / p.tokens;
    const T* const x = static_cast<const T*>(p.x) + row * p.dim;
    const T* const scale = static_cast<const T*>(p.scale) + sample * p.dim;
    const T* const shift = static_cast<const T*>(p.shift) + sample * p.dim;
    T* const out = static_cast<T*>(p.out) + row * p.dim;
    for_lanes<Vec>(p.dim, [&](int64_t i, auto n) {
      store(fma(load<Vec>(x + i, n), one + load<Vec>(scale + i, n), load<Vec>(shift + i, n)), out + i, n);
    });
  }
}

}  // namespace

void scale_shift(const ScaleShiftParams& p, const ParallelFor& parallel_for) {
  with_type<Vec>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(0, p.batch * p.tokens, thread_grain() / p.dim,
                 [&](int64_t begin, int64_t end) { scale_shift_rows<T>(p, begin, end); });
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
