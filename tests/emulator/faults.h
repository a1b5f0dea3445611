// Kernels with one seeded fault each, and their right twins: what the detectors must catch, and must not.
#pragma once

namespace cuda_on_cpu::faults {

// `in` and `out` have n floats, n a multiple of 32. 0: ran; 1: there is no fault of that name.
int run(const char* name, const float* in, float* out, int n);

}  // namespace cuda_on_cpu::faults
