// Functions of host and device alike.
#pragma once

#if defined(__CUDACC__)
#define FD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FD_HOST_DEVICE inline __attribute__((always_inline))
#endif
