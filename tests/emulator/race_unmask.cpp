// unmask_'s launch functions, for the race check.
#include <cstdio>
#include <vector>

#include "kernels/unmask/unmask_cuda.h"
#include "race.h"

namespace {

using namespace fastdiff;

struct Case {
  int64_t batch, length;
  UnmaskRule rule;
  UnmaskOrder order;
  bool rows;  // the sample comes with positions
};

// Every rule and order; places in shared memory and in the workspace.
constexpr Case kCases[] = {
    {3, 300, UnmaskRule::kCount, UnmaskOrder::kRandom, true},
    {2, 300, UnmaskRule::kThreshold, UnmaskOrder::kConfidence, false},
    {2, 40, UnmaskRule::kFactor, UnmaskOrder::kMargin, true},
    {2, 300, UnmaskRule::kEntropyBudget, UnmaskOrder::kEntropy, false},
    {2, 300, UnmaskRule::kAncestral, UnmaskOrder::kConfidence, false},
    {2, 4100, UnmaskRule::kCount, UnmaskOrder::kConfidence, true},
};

int run_case(const Case& c) {
  constexpr int64_t kMask = 7;
  const int64_t positions = c.batch * c.length;
  std::vector<int64_t> ids(positions, kMask), token(positions, 1), rows(positions), committed(c.batch);
  std::vector<float> log_prob(positions), entropy(positions), margin(positions);
  for (int64_t i = 0; i < positions; ++i) {
    rows[i] = positions - 1 - i;
    log_prob[i] = -0.001f * static_cast<float>(i * 37 % 101);
    entropy[i] = margin[i] = 0.01f * static_cast<float>(i * 53 % 97);
  }
  UnmaskParams p{};
  p.token_ids = ids.data();
  p.row_stride = p.length = c.length;
  p.batch = c.batch;
  p.token = token.data();
  p.log_prob = log_prob.data();
  p.entropy = entropy.data();
  p.margin = margin.data();
  p.rows = c.rows ? rows.data() : nullptr;
  p.row_count = c.rows ? positions : 0;
  p.value = c.rule == UnmaskRule::kCount ? 9 : 0.95;
  p.seed = 3;
  p.mask_token_id = kMask;
  p.committed = committed.data();
  p.rule = c.rule;
  p.order = c.order;
  std::vector<int64_t> workspace((cuda::unmask_workspace_bytes(p) + 7) / 8);
  p.workspace = workspace.data();
  const int status = cuda::unmask(p, nullptr);
  std::printf("unmask [%ld, %ld], rule %d, order %d%s: status %d, %ld committed in row 0\n", c.batch, c.length,
              static_cast<int>(c.rule), static_cast<int>(c.order), c.rows ? ", rows" : "", status, committed[0]);
  return status || committed[0] < 1;
}

}  // namespace

int race_unmask() {
  for (const Case& c : kCases) {
    if (run_case(c)) return 1;
  }
  return 0;
}
