// unmask_'s schema, and the operator on CPU tensors.
#include "csrc/unmask.h"

namespace fastdiff::torch_binding {
namespace {

struct Cpu {
  static void unmask(const UnmaskParams& p, const Tensor&) { cpu::unmask(p, {run_on_torch_threads}); }
  static int64_t workspace_bytes(const UnmaskParams& p) { return cpu::unmask_workspace_bytes(p); }
};

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) { m.def(UNMASK_SCHEMA); }
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("unmask_", TORCH_BOX(&unmask<Cpu>)); }

}  // namespace
}  // namespace fastdiff::torch_binding
