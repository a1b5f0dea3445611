// Picks the instruction set of each call.
#include "kernels/bias_activation/bias_activation.h"
#include "kernels/common/isa.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(void bias_activation(const BiasActivationParams&, const ParallelFor&))
FASTDIFF_ISA_DECLARE(void bias_activation_backward(const BiasActivationBackwardParams&, const ParallelFor&))
namespace baseline {
void bias_activation_double(const BiasActivationParams&, const ParallelFor&);
void bias_activation_backward_double(const BiasActivationBackwardParams&, const ParallelFor&);
}  // namespace baseline

void bias_activation(const BiasActivationParams& params, const ParallelFor& parallel_for) {
  const bool wide = params.dtype == DType::kFloat64;
  (wide ? &baseline::bias_activation_double : FASTDIFF_ISA_TABLE(bias_activation).chosen())(params, parallel_for);
}

void bias_activation_backward(const BiasActivationBackwardParams& params, const ParallelFor& parallel_for) {
  const bool wide = params.dtype == DType::kFloat64;
  (wide ? &baseline::bias_activation_backward_double : FASTDIFF_ISA_TABLE(bias_activation_backward).chosen())(
      params, parallel_for);
}

}  // namespace fastdiff::cpu
