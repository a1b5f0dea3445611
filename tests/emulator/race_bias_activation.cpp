// bias_activation's launch functions, for the race check.
#include <cstdio>
#include <vector>

#include "kernels/bias_activation/bias_activation.h"
#include "race.h"

int race_bias_activation() {
  using namespace fastdiff;
  constexpr int64_t kRows = 37, kSegment = 16;
  for (const int64_t dim : {5, 64, 132}) {  // single elements; 16 bytes at a time, in one tile and in two
    for (const bool gated : {false, true}) {
      const std::vector<float> x = numbers(kRows * dim), bias = numbers(dim);
      std::vector<float> out(x.size()), other(x.size()), sums(2 * dim), workspace(2 * dim * (kRows / kSegment + 1));
      const float *const up = gated ? x.data() : nullptr, *const up_bias = gated ? bias.data() : nullptr;
      const BiasActivationParams p{x.data(), bias.data(), up,  up_bias,           out.data(),
                                   kRows,    dim,         Activation::kGelu, DType::kFloat32};
      int status = cuda::bias_activation(p, nullptr);
      const BiasActivationBackwardParams q{
          x.data(), x.data(),    bias.data(), up,       up_bias,           out.data(),           gated ? other.data() : nullptr,
          sums.data(), gated ? sums.data() + dim : nullptr, workspace.data(), kRows, dim, kSegment, Activation::kGeluTanh,
          DType::kFloat32};
      status = status ? status : cuda::bias_activation_backward(q, nullptr);
      std::printf("bias_activation [%ld, %ld]%s: status %d\n", kRows, dim, gated ? " gated" : "", status);
      if (status) return 1;
    }
  }
  return 0;
}
