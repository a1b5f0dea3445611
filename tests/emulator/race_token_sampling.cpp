// Token sampling's launch functions, for the race check.
#include <cstdio>
#include <vector>

#include "head_product.h"
#include "kernels/token_sampling/token_sampling_cuda.h"
#include "race.h"

namespace {

using namespace fastdiff;

struct Case {
  int64_t rows, vocab;
  double temperature, top_p;
  int64_t top_k;
  bool head;  // lm_head_sample
};

// Warps with and without a block of ids, thresholds of several digits, more rows than a CUDA block's.
constexpr Case kCases[] = {
    {5, 2100, 1.0, 1.0, 0, false},  {2, 2100, 0.7, 0.9, 40, false}, {3, 5, 0.0, 0.9, 2, false},
    {3, 1100, 0.5, 1.0, 0, true},   {2, 7, 0.0, 1.0, 0, true},
};

int run_case(const Case& c) {
  constexpr int64_t kDim = 12, kSuppress[] = {1, 3}, kEnd[] = {0, 4};
  const std::vector<float> logits = numbers(c.rows * c.vocab), hidden = numbers(c.rows * kDim);
  const std::vector<float> weight = numbers(c.vocab * kDim);
  std::vector<int64_t> token(c.rows);
  std::vector<float> floats(4 * c.rows), tile(c.rows * kSampleBlock);
  LmHeadSampleParams h{};
  TokenSampleParams& p = h.sample;
  p.logits = logits.data();
  p.batch_stride = c.rows * c.vocab;
  p.row_stride = c.vocab;
  p.batch = 1;
  p.length = c.rows;
  p.vocab = c.vocab;
  p.suppress = kSuppress;
  p.end_tokens = kEnd;
  p.suppress_count = p.end_count = 2;
  p.token = token.data();
  p.log_prob = floats.data();
  p.entropy = floats.data() + c.rows;
  p.margin = floats.data() + 2 * c.rows;
  p.end_log_prob = floats.data() + 3 * c.rows;
  p.temperature = c.temperature;
  p.top_k = c.top_k;
  p.top_p = c.top_p;
  h.hidden = hidden.data();
  h.weight = weight.data();
  h.tile = tile.data();
  h.weight_stride = h.dim = kDim;
  h.tile_size = kSampleBlock;
  const int64_t bytes = c.head ? cuda::lm_head_sample_workspace_bytes(h) : cuda::sample_tokens_workspace_bytes(p);
  std::vector<double> workspace(bytes / 8 + 1);
  p.workspace = workspace.data();
  cuda_on_cpu::HeadOperands operands{h.hidden, h.weight, h.bias, h.weight_stride, h.dim, p.dtype};
  if (c.head) return cuda::lm_head_sample(h, nullptr, {cuda_on_cpu::run_head_product, &operands});
  return cuda::sample_tokens(p, nullptr);
}

}  // namespace

int race_token_sampling() {
  const int64_t max_grid = cuda_on_cpu::config().max_grid;
  for (const Case& c : kCases) {
    cuda_on_cpu::config().max_grid = 1;  // a CUDA block takes all rows, one after the other
    const int status = run_case(c);
    cuda_on_cpu::config().max_grid = max_grid;
    std::printf("%s [%ld, %ld], T %g, top-k %ld, top-p %g: status %d\n", c.head ? "lm_head_sample" : "sample_tokens",
                c.rows, c.vocab, c.temperature, c.top_k, c.top_p, status);
    if (status) return 1;
  }
  return 0;
}
