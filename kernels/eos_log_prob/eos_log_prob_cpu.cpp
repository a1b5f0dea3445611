// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/eos_log_prob/eos_log_prob.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(void eos_log_prob_from_logits(const EosLogProbParams&, const ParallelFor&))
FASTDIFF_ISA_DECLARE(void eos_log_prob(const EosLogProbParams&, const EosHeadTiles&, const ParallelFor&,
                                       const HeadProduct&))

void eos_log_prob_from_logits(const EosLogProbParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(eos_log_prob_from_logits).chosen()(params, parallel_for);
}

void eos_log_prob(const EosLogProbParams& params, const EosHeadTiles& tiles, const ParallelFor& parallel_for,
                  const HeadProduct& product) {
  FASTDIFF_ISA_TABLE(eos_log_prob).chosen()(params, tiles, parallel_for, product);
}

}  // namespace fastdiff::cpu
