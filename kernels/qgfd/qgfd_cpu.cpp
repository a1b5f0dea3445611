// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/qgfd/qgfd.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(void qgfd_forward(const QgfdForwardParams&, const ParallelFor&))
FASTDIFF_ISA_DECLARE(void qgfd_backward(const QgfdBackwardParams&, const ParallelFor&))
FASTDIFF_ISA_DECLARE_AMX(void qgfd_forward(const QgfdForwardParams&, const ParallelFor&))
FASTDIFF_ISA_DECLARE_AMX(void qgfd_backward(const QgfdBackwardParams&, const ParallelFor&))

void qgfd_forward(const QgfdForwardParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE_AMX(qgfd_forward).chosen()(params, parallel_for);
}
void qgfd_backward(const QgfdBackwardParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE_AMX(qgfd_backward).chosen()(params, parallel_for);
}

}  // namespace fastdiff::cpu
