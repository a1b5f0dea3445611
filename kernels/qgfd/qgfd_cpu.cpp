// Picks the instruction set of each call.
#include "kernels/common/isa.h"
#include "kernels/qgfd/qgfd.h"

namespace fastdiff::cpu {

FASTDIFF_ISA_DECLARE(int64_t qgfd_forward_workspace_bytes(const QgfdForwardParams&))
FASTDIFF_ISA_DECLARE(int64_t qgfd_backward_workspace_bytes(const QgfdBackwardParams&))
FASTDIFF_ISA_DECLARE(void qgfd_forward(const QgfdForwardParams&, const ParallelFor&))
FASTDIFF_ISA_DECLARE(void qgfd_backward(const QgfdBackwardParams&, const ParallelFor&))

int64_t qgfd_forward_workspace_bytes(const QgfdForwardParams& params) {
  return FASTDIFF_ISA_TABLE(qgfd_forward_workspace_bytes).chosen()(params);
}
int64_t qgfd_backward_workspace_bytes(const QgfdBackwardParams& params) {
  return FASTDIFF_ISA_TABLE(qgfd_backward_workspace_bytes).chosen()(params);
}
void qgfd_forward(const QgfdForwardParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(qgfd_forward).chosen()(params, parallel_for);
}
void qgfd_backward(const QgfdBackwardParams& params, const ParallelFor& parallel_for) {
  FASTDIFF_ISA_TABLE(qgfd_backward).chosen()(params, parallel_for);
}

}  // namespace fastdiff::cpu
