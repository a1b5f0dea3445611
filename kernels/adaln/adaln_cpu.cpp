// Picks the instruction set of each call.
#include "kernels/adaln/adaln.h"
#include "kernels/common/isa.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(void adaln_forward(const AdaLNForwardParams&, const ParallelFor&))
FASTDIFF_ISA_DECLARE(void adaln_backward(const AdaLNBackwardParams&, const ParallelFor&))
namespace baseline {
void adaln_forward_double(const AdaLNForwardParams&, const ParallelFor&);
void adaln_backward_double(const AdaLNBackwardParams&, const ParallelFor&);
}  // namespace baseline

void adaln_forward(const AdaLNForwardParams& params, const ParallelFor& parallel_for) {
  const bool wide = params.x_dtype == DType::kFloat64;
  (wide ? &baseline::adaln_forward_double : FASTDIFF_ISA_TABLE(adaln_forward).chosen())(params, parallel_for);
}

void adaln_backward(const AdaLNBackwardParams& params, const ParallelFor& parallel_for) {
  const bool wide = params.x_dtype == DType::kFloat64;
  (wide ? &baseline::adaln_backward_double : FASTDIFF_ISA_TABLE(adaln_backward).chosen())(params, parallel_for);
}

}  // namespace fastdiff::cpu
