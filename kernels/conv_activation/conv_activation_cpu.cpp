// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/conv_activation/conv_activation.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(void conv_activation_forward(const ConvActivationForwardParams&, const ParallelFor&))
FASTDIFF_ISA_DECLARE(void conv_activation_backward(const ConvActivationBackwardParams&, const ParallelFor&))

void conv_activation_forward(const ConvActivationForwardParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(conv_activation_forward).chosen()(params, parallel_for);
}
void conv_activation_backward(const ConvActivationBackwardParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(conv_activation_backward).chosen()(params, parallel_for);
}

}  // namespace fastdiff::cpu
