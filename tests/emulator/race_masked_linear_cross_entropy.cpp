// The row kernel of the masked loss: one warp and many, rows that start anywhere, suppressed ids, smoothing, no gradient.
#include <cstdio>
#include <vector>

#include "cuda_on_cpu.h"
#include "kernels/masked_linear_cross_entropy/masked_linear_cross_entropy_cuda.h"
#include "race.h"

namespace {

using namespace fastdiff;

struct Case {
  int64_t rows, vocab;
  double smoothing;
  bool suppress, gradient;
};

constexpr Case kCases[] = {{3, 5, 0.0, false, true},    {3, 31, 0.1, true, true},  {2, 1025, 0.0, true, true},
                           {3, 5003, 0.1, false, true}, {2, 5003, 0.0, true, true}, {2, 5003, 0.1, true, false}};

int run_case(const Case& c) {
  std::vector<float> logits(c.rows * c.vocab), weight(c.rows, 0.5f), loss(c.rows);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 13);
  const std::vector<int64_t> targets(c.rows, 2), suppress{0, 3, c.vocab - 1};
  CrossEntropyParams p{};
  p.logits = logits.data();
  p.row_stride = p.vocab = c.vocab;
  p.rows = c.rows;
  p.targets = targets.data();
  p.row_weight = weight.data();
  p.suppress = suppress.data();
  p.suppress_count = c.suppress ? 3 : 0;
  p.row_loss = loss.data();
  p.label_smoothing = c.smoothing;
  p.want_grad = c.gradient;
  return cuda::cross_entropy(p, nullptr);
}

}  // namespace

int race_masked_linear_cross_entropy() {
  for (const Case& c : kCases) {
    const int status = run_case(c);
    std::printf("cross entropy [%ld, %ld]%s%s%s: status %d\n", static_cast<long>(c.rows), static_cast<long>(c.vocab),
                c.smoothing > 0 ? ", smoothed" : "", c.suppress ? ", suppressed ids" : "",
                c.gradient ? "" : ", no gradient", status);
    if (status) return 1;
  }
  return 0;
}
