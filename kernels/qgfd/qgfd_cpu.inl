// QGFD attention on the CPU, compiled once an instruction set (see kernels/common/vec.h).
#include "kernels/common/exp.h"
#include "kernels/common/vec.h"
#include "kernels/qgfd/qgfd.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
int64_t qgfd_forward_workspace_bytes(const QgfdForwardParams&) { return 0; }
int64_t qgfd_backward_workspace_bytes(const QgfdBackwardParams&) { return 0; }
void qgfd_forward(const QgfdForwardParams&, const ParallelFor&) {}
void qgfd_backward(const QgfdBackwardParams&, const ParallelFor&) {}
}
