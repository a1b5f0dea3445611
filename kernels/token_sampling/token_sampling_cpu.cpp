// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/token_sampling/token_sampling.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(void sample_tokens(const TokenSampleParams&, const ParallelFor&))
FASTDIFF_ISA_DECLARE(void lm_head_sample(const LmHeadSampleParams&, const ParallelFor&, const HeadProduct&))

void sample_tokens(const TokenSampleParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(sample_tokens).chosen()(params, parallel_for);
}

void lm_head_sample(const LmHeadSampleParams& params, const ParallelFor& parallel_for, const HeadProduct& product) {
  FASTDIFF_ISA_TABLE(lm_head_sample).chosen()(params, parallel_for, product);
}

}  // namespace fastdiff::cpu
