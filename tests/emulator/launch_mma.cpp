// The small kernels on kernels/common/mma.cuh, as Python calls them.
#include "launch.h"

#include "mma_products.h"

using cuda_on_cpu::guarded;

extern "C" {

int fd_mma_product(int bfloat16, int transposed, const void* a, const void* b, float* c) {
  return guarded([&] { return cuda_on_cpu::run_product(bfloat16 != 0, transposed != 0, a, b, c), 0; });
}
int fd_zero_filled(const float* in, float* out) {
  return guarded([&] { return cuda_on_cpu::run_zero_filled(in, out), 0; });
}

}  // extern "C"
