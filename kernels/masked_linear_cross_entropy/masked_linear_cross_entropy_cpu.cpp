// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/masked_linear_cross_entropy/masked_linear_cross_entropy.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(void cross_entropy(const CrossEntropyParams&, const ParallelFor&))

void cross_entropy(const CrossEntropyParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(cross_entropy).chosen()(params, parallel_for);
}

}  // namespace fastdiff::cpu
