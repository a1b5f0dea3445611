// eos_log_prob's launch functions, for the race check.
#include <cstdio>
#include <vector>

#include "head_product.h"
#include "kernels/eos_log_prob/eos_log_prob_cuda.h"
#include "race.h"

namespace {

using namespace fastdiff;

struct Case {
  int64_t rows, vocab;
  bool head;  // eos_log_prob
};

// Warps with and without a block of ids, and more rows than a CUDA block has warps.
constexpr Case kCases[] = {{6, 2100, false}, {3, 7, false}, {6, 1100, true}, {3, 2100, true}};

int run_case(const Case& c) {
  constexpr int64_t kDim = 12, kEnd[] = {0, 4}, kExcluded[] = {0, 1, 3, 4};
  const std::vector<float> logits = numbers(c.rows * c.vocab), hidden = numbers(c.rows * kDim);
  const std::vector<float> weight = numbers(c.vocab * kDim);
  std::vector<float> result(c.rows), tile(c.rows * kLogitBlock);
  EosLogProbParams p{};
  p.logits = logits.data();
  p.batch_stride = c.rows * c.vocab;
  p.row_stride = c.vocab;
  p.batch = 1;
  p.length = c.rows;
  p.vocab = c.vocab;
  p.end_tokens = kEnd;
  p.end_count = 2;
  p.excluded = kExcluded;
  p.excluded_count = 4;
  p.end_log_prob = result.data();
  std::vector<double> workspace(cuda::eos_log_prob_workspace_bytes(p) / 8);
  p.workspace = workspace.data();
  cuda_on_cpu::HeadOperands operands{hidden.data(), weight.data(), nullptr, kDim, kDim, p.dtype};
  const HeadProduct product{cuda_on_cpu::run_head_product, &operands};
  return c.head ? cuda::eos_log_prob(p, {tile.data(), kLogitBlock}, nullptr, product)
                : cuda::eos_log_prob_from_logits(p, nullptr);
}

}  // namespace

int race_eos_log_prob() {
  const int64_t max_grid = cuda_on_cpu::config().max_grid;
  for (const Case& c : kCases) {
    cuda_on_cpu::config().max_grid = 1;  // a CUDA block takes all rows, one after the other
    const int status = run_case(c);
    cuda_on_cpu::config().max_grid = max_grid;
    std::printf("%s [%ld, %ld]: status %d\n", c.head ? "eos_log_prob" : "eos_log_prob_from_logits",
                static_cast<long>(c.rows), static_cast<long>(c.vocab), status);
    if (status) return 1;
  }
  return 0;
}
