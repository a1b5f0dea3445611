// scale_shift's launch function, as Python calls it.
#include "kernels/scale_shift/scale_shift.h"
#include "launch.h"

extern "C" {

long fd_size_of_scale_shift_params() { return sizeof(fastdiff::ScaleShiftParams); }

int fd_scale_shift(const fastdiff::ScaleShiftParams* p) {
  return cuda_on_cpu::guarded([&] { return fastdiff::cuda::scale_shift(*p, nullptr); });
}

}  // extern "C"
