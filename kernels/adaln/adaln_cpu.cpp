// Picks the instruction set of each call.
#include "kernels/adaln/adaln.h"
#include "kernels/common/isa.h"

#define FASTDIFF_DECLARE(ISA)                                        \
  namespace ISA {                                                    \
  void adaln_forward(const AdaLNForwardParams&, const ParallelFor&);   \
  void adaln_backward(const AdaLNBackwardParams&, const ParallelFor&); \
  }

namespace fastdiff::cpu {

FASTDIFF_DECLARE(baseline)
namespace baseline {
void adaln_forward_double(const AdaLNForwardParams&, const ParallelFor&);
void adaln_backward_double(const AdaLNBackwardParams&, const ParallelFor&);
}  // namespace baseline

#if defined(__x86_64__)
FASTDIFF_DECLARE(avx2)
FASTDIFF_DECLARE(avx512)
FASTDIFF_DECLARE(avx512_bf16)
#define FASTDIFF_TABLE(function) {{&baseline::function, &avx2::function, &avx512::function, &avx512_bf16::function}}
#else
#define FASTDIFF_TABLE(function) {{&baseline::function, nullptr, nullptr, nullptr}}
#endif

void adaln_forward(const AdaLNForwardParams& params, const ParallelFor& parallel_for) {
  static constexpr IsaTable<decltype(baseline::adaln_forward)> table = FASTDIFF_TABLE(adaln_forward);
  const auto run = params.x_dtype == DType::kFloat64 ? &baseline::adaln_forward_double : table.chosen();
  run(params, parallel_for);
}

void adaln_backward(const AdaLNBackwardParams& params, const ParallelFor& parallel_for) {
  static constexpr IsaTable<decltype(baseline::adaln_backward)> table = FASTDIFF_TABLE(adaln_backward);
  const auto run = params.x_dtype == DType::kFloat64 ? &baseline::adaln_backward_double : table.chosen();
  run(params, parallel_for);
}

}  // namespace fastdiff::cpu
