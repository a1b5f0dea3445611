// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/masked_loss/masked_loss.h"

#define FASTDIFF_DECLARE(ISA)                                           \
  namespace ISA {                                                       \
  void cross_entropy(const CrossEntropyParams&, const ParallelFor&);    \
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

void cross_entropy(const CrossEntropyParams& params, const ParallelFor& parallel_for) {
  static constexpr IsaTable<decltype(baseline::cross_entropy)> table = FASTDIFF_TABLE(cross_entropy);
  table.chosen()(params, parallel_for);
}

}  // namespace fastdiff::cpu
