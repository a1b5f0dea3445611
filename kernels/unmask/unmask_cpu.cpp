// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/unmask/unmask.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(void unmask(const UnmaskParams&, const ParallelFor&))

void unmask(const UnmaskParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(unmask).chosen()(params, parallel_for);
}

// The sample's entry of every position, where the sample comes with positions.
int64_t unmask_workspace_bytes(const UnmaskParams& params) {
  return params.rows ? params.batch * params.length * static_cast<int64_t>(sizeof(int32_t)) : 0;
}

}  // namespace fastdiff::cpu
