// QGFD attention on the CPU, compiled once an instruction set (see kernels/common/vec.h).
#include <math.h>
#include <stdlib.h>

#include "kernels/common/amx.h"
#include "kernels/common/exp.h"
#include "kernels/common/lanes.h"
#include "kernels/common/vec.h"
#include "kernels/qgfd/qgfd.h"

#include "kernels/qgfd/qgfd_cpu_tiles.inl"
#include "kernels/qgfd/qgfd_cpu_forward.inl"
#include "kernels/qgfd/qgfd_cpu_backward.inl"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

#if defined(FD_HAS_AMX)
using MathOfBf16 = Bf16Tiles;
#elif defined(__AVX512BF16__)
using MathOfBf16 = Bf16Pairs;
#else
using MathOfBf16 = Fp32;
#endif

}  // namespace

void qgfd_forward(const QgfdForwardParams& p, const ParallelFor& parallel_for) {
  if (p.matrix.dtype == DType::kFloat32) forward<Fp32, float>(p, parallel_for);
  if (p.matrix.dtype == DType::kBFloat16) forward<MathOfBf16, BF16>(p, parallel_for);
  if (p.matrix.dtype == DType::kFloat16) forward<Fp32, F16>(p, parallel_for);
}

void qgfd_backward(const QgfdBackwardParams& p, const ParallelFor& parallel_for) {
  if (p.matrix.dtype == DType::kFloat32) backward<Fp32, float>(p, parallel_for);
  if (p.matrix.dtype == DType::kBFloat16) backward<MathOfBf16, BF16>(p, parallel_for);
  if (p.matrix.dtype == DType::kFloat16) backward<Fp32, F16>(p, parallel_for);
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
