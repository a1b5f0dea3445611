// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/token_sampling/token_sampling.h"

namespace fastdiff::cpu {

#define FASTDIFF_DECLARE(ISA)                               \
  namespace ISA {                                           \
  void unmask(const UnmaskParams&, const ParallelFor&); \
  }

FASTDIFF_DECLARE(baseline)
#if defined(__x86_64__)
FASTDIFF_DECLARE(avx2)
FASTDIFF_DECLARE(avx512)
FASTDIFF_DECLARE(avx512_bf16)
#define FASTDIFF_TABLE(function) {{&baseline::function, &avx2::function, &avx512::function, &avx512_bf16::function}}
#else
#define FASTDIFF_TABLE(function) {{&baseline::function, nullptr, nullptr, nullptr}}
#endif

void unmask(const UnmaskParams& params, const ParallelFor& parallel_for) {
  static constexpr IsaTable<decltype(baseline::unmask)> table = FASTDIFF_TABLE(unmask);
  table.chosen()(params, parallel_for);
}

// The sample's entry of every position, where the sample comes with positions.
int64_t unmask_workspace_bytes(const UnmaskParams& params) {
  return params.rows ? params.batch * params.length * static_cast<int64_t>(sizeof(int32_t)) : 0;
}

}  // namespace fastdiff::cpu
