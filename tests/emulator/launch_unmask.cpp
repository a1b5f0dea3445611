// unmask_'s launch functions, as Python calls them.
#include "kernels/unmask/unmask_cuda.h"
#include "launch.h"

extern "C" {

long fd_size_of_unmask_params() { return sizeof(fastdiff::UnmaskParams); }
long fd_unmask_workspace_bytes(const fastdiff::UnmaskParams* p) { return fastdiff::cuda::unmask_workspace_bytes(*p); }
int fd_unmask(const fastdiff::UnmaskParams* p) {
  return cuda_on_cpu::guarded([&] { return fastdiff::cuda::unmask(*p, nullptr); });
}

}  // extern "C"
