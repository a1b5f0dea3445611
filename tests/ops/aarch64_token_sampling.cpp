// sample_tokens as an aarch64 program, for tests/ops/test_aarch64.py: reads parameters and logits from stdin, runs one
// call, writes the results to stdout. No torch, no Python.
#include "tests/ops/aarch64.h"
#include "kernels/token_sampling/token_sampling.h"

using namespace fastdiff;

int main() {
  int64_t header[4];  // rows, vocab, dtype, top_k
  double settings[2];  // temperature, top_p
  if (fread(header, sizeof header, 1, stdin) != 1 || fread(settings, sizeof settings, 1, stdin) != 1) return 2;
  const int64_t rows = header[0], vocab = header[1];
  const std::vector<char> logits = read(rows * vocab * dtype_size(static_cast<DType>(header[2])));
  std::vector<int64_t> token(rows);
  std::vector<float> log_prob(rows), entropy(rows), margin(rows);
  TokenSampleParams p{};
  p.logits = logits.data();
  p.batch = rows;
  p.length = 1;
  p.batch_stride = p.row_stride = p.vocab = vocab;
  p.dtype = static_cast<DType>(header[2]);
  p.top_k = header[3];
  p.temperature = settings[0];
  p.top_p = settings[1];
  p.seed = 1;
  p.token = token.data();
  p.log_prob = log_prob.data();
  p.entropy = entropy.data();
  p.margin = margin.data();
  cpu::sample_tokens(p, cpu::ParallelFor{run_serially});
  fwrite(token.data(), 8, rows, stdout);
  for (const auto* result : {&log_prob, &entropy, &margin}) fwrite(result->data(), 4, rows, stdout);
  return 0;
}
