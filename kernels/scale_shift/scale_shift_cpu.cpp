// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/scale_shift/scale_shift.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(void scale_shift(const ScaleShiftParams&, const ParallelFor&))

void scale_shift(const ScaleShiftParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(scale_shift).chosen()(params, parallel_for);
}

}  // namespace fastdiff::cpu
