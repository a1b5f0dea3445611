// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/qk_norm_rotary/qk_norm_rotary.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(void qk_norm_rotary_forward(const QkNormRotaryForwardParams&, const ParallelFor&))
FASTDIFF_ISA_DECLARE(void qk_norm_rotary_backward(const QkNormRotaryBackwardParams&, const ParallelFor&))

void qk_norm_rotary_forward(const QkNormRotaryForwardParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(qk_norm_rotary_forward).chosen()(params, parallel_for);
}
void qk_norm_rotary_backward(const QkNormRotaryBackwardParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(qk_norm_rotary_backward).chosen()(params, parallel_for);
}

}  // namespace fastdiff::cpu
