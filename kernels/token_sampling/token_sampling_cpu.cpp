// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/token_sampling/token_sampling.h"

#define FASTDIFF_DECLARE(ISA)                                                                 \
  namespace ISA {                                                                             \
  void sample_tokens(const TokenSampleParams&, const ParallelFor&);                           \
  void lm_head_sample(const LmHeadSampleParams&, const ParallelFor&, const HeadProduct&);     \
  }

namespace fastdiff::cpu {

FASTDIFF_DECLARE(baseline)
#if defined(__x86_64__)
FASTDIFF_DECLARE(avx2)
FASTDIFF_DECLARE(avx512)
FASTDIFF_DECLARE(avx512_bf16)
#define FASTDIFF_TABLE(function) {{&baseline::function, &avx2::function, &avx512::function, &avx512_bf16::function}}
#else
#define FASTDIFF_TABLE(function) {{&baseline::function, nullptr, nullptr, nullptr}}
#endif

void sample_tokens(const TokenSampleParams& params, const ParallelFor& parallel_for) {
  static constexpr IsaTable<decltype(baseline::sample_tokens)> table = FASTDIFF_TABLE(sample_tokens);
  table.chosen()(params, parallel_for);
}

void lm_head_sample(const LmHeadSampleParams& params, const ParallelFor& parallel_for, const HeadProduct& product) {
  static constexpr IsaTable<decltype(baseline::lm_head_sample)> table = FASTDIFF_TABLE(lm_head_sample);
  table.chosen()(params, parallel_for, product);
}

}  // namespace fastdiff::cpu
