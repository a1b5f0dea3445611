// The tail of the normal distribution, for the exact GELU: Φ(−a) = exp(−a²/2) · t · P(t) with t = 1 / (1 + 0.3 a).
// P is minimax in relative error on 0 <= a <= kNormalFarthest, beyond which exp(−a²/2) is 0 in fp32: 3.5e-9.
#pragma once
#include <math.h>

#include "kernels/common/host_device.h"

namespace fastdiff {

constexpr float kNormalFarthest = 14.8f;
constexpr float kNormalSlope = 0.3f;
constexpr float kNormalDensityAtZero = 0.398942280f;  // 1 / √(2π)

FD_HOST_DEVICE float line(float t, float slope, float constant) { return fmaf(slope, t, constant); }
FD_HOST_DEVICE float horner(float sum, float t, float constant) { return fmaf(sum, t, constant); }

// P(t); a vector type brings its own `line` and `horner`.
template <class V>
FD_HOST_DEVICE V normal_tail(V t) {
  V sum = line(t, -0.0206271913f, 0.112456515f);
  sum = horner(horner(sum, t, -0.228264555f), t, 0.191855177f);
  sum = horner(horner(sum, t, -0.079484731f), t, 0.0961911827f);
  sum = horner(horner(sum, t, 0.0783772096f), t, 0.110238224f);
  return horner(horner(sum, t, 0.119571462f), t, 0.119686708f);
}

}  // namespace fastdiff
