// scale_shift's launch function, for the race check.
#include <cstdio>
#include <vector>

#include "kernels/scale_shift/scale_shift.h"
#include "race.h"

int race_scale_shift() {
  using namespace fastdiff;
  constexpr int64_t kBatch = 2, kTokens = 3;
  for (const int64_t dim : {5, 64, 1028}) {  // single elements; 16 bytes at a time, once and twice
    const std::vector<float> x = numbers(kBatch * kTokens * dim), modulation = numbers(kBatch * dim);
    std::vector<float> out(x.size());
    const ScaleShiftParams p{x.data(), modulation.data(), modulation.data(), out.data(), kBatch, kTokens, dim,
                             DType::kFloat32};
    const int status = cuda::scale_shift(p, nullptr);
    std::printf("scale_shift [%ld, %ld, %ld]: status %d\n", kBatch, kTokens, dim, status);
    if (status) return 1;
  }
  return 0;
}
