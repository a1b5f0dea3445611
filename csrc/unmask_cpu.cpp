// unmask_'s schema, and the operator on CPU tensors.
#include "csrc/unmask.h"

namespace fastdiff::torch_binding {
namespace {

void run_on_torch_threads(int64_t begin, int64_t end, int64_t grain, cpu::ParallelFor::Body body, const void* closure) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { body(closure, b, e); });
}

struct Cpu {
  static void unmask(const UnmaskParams& p, const Tensor&) { cpu::unmask(p, {run_on_torch_threads}); }
  static int64_t workspace_bytes(const UnmaskParams& p) { return cpu::unmask_workspace_bytes(p); }
};

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) { m.def(UNMASK_SCHEMA); }
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("unmask_", TORCH_BOX(&unmask<Cpu>)); }

}  // namespace
}  // namespace fastdiff::torch_binding
