// unmask_ as an aarch64 program, for tests/ops/test_aarch64.py: reads parameters and tensors from stdin, runs one call,
// writes the new token ids and what was committed to stdout. No torch, no Python.
#include "tests/ops/aarch64.h"
#include "kernels/unmask/unmask.h"

using namespace fastdiff;

int main() {
  const auto header = read<int64_t>(6);  // batch, length, rule, order, seed, mask token id
  const int64_t batch = header[0], length = header[1], positions = batch * length;
  auto token_ids = read<int64_t>(positions);
  const auto token = read<int64_t>(positions);
  const auto log_prob = read<float>(positions), entropy = read<float>(positions), margin = read<float>(positions);
  const auto values = read<float>(batch);
  std::vector<int64_t> committed(batch);
  UnmaskParams p{};
  p.token_ids = token_ids.data();
  p.row_stride = p.length = length;
  p.batch = batch;
  p.token = token.data();
  p.log_prob = log_prob.data();
  p.entropy = entropy.data();
  p.margin = margin.data();
  p.values = values.data();
  p.seed = header[4];
  p.mask_token_id = header[5];
  p.committed = committed.data();
  p.rule = static_cast<UnmaskRule>(header[2]);
  p.order = static_cast<UnmaskOrder>(header[3]);
  cpu::unmask(p, {run_serially});
  fwrite(token_ids.data(), sizeof(int64_t), positions, stdout);
  fwrite(committed.data(), sizeof(int64_t), batch, stdout);
  return 0;
}
