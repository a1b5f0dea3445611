// Small kernels on kernels/common/mma.cuh, for the tests of its twins.
#pragma once

namespace cuda_on_cpu {

// c = a bᵀ (transposed) or a b; a and b [16, 16] bfloat16 or float16, c [16, 16] float32
void run_product(bool bfloat16, bool transposed, const void* a, const void* b, float* c);
// out [128]: every other four of `in` copied, the rest zeros
void run_zero_filled(const float* in, float* out);

}  // namespace cuda_on_cpu
