// Picks the instruction set of each call.
#include "kernels/adamw_ema/adamw_ema.h"
#include "kernels/common/isa.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(void adamw_ema(const AdamWParams&, const ParallelFor&))
FASTDIFF_ISA_DECLARE(void sums_of_squares(const float* const*, const int64_t*, int64_t, double*, const ParallelFor&))

void adamw_ema(const AdamWParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(adamw_ema).chosen()(params, parallel_for);
}
void sums_of_squares(const float* const* data, const int64_t* size, int64_t count, double* sums,
                     const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(sums_of_squares).chosen()(data, size, count, sums, parallel_for);
}

}  // namespace fastdiff::cpu
