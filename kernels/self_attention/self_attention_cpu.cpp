// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/self_attention/self_attention.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(void self_attention_forward(const SelfAttentionForwardParams&, const ParallelFor&))
FASTDIFF_ISA_DECLARE(void self_attention_backward(const SelfAttentionBackwardParams&, const ParallelFor&))

void self_attention_forward(const SelfAttentionForwardParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(self_attention_forward).chosen()(params, parallel_for);
}
void self_attention_backward(const SelfAttentionBackwardParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(self_attention_backward).chosen()(params, parallel_for);
}

}  // namespace fastdiff::cpu
