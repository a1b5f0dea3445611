// How Python calls launch functions: each launch*.cpp wraps an operator's in extern "C" functions that return 0, a
// cudaError_t, or -1 with fd_error().
#pragma once
#include <cstdio>
#include <exception>

namespace cuda_on_cpu {

inline char g_error[1024];

template <class F>
int guarded(const F& f) {
  try {
    return f();
  } catch (const std::exception& e) {
    std::snprintf(g_error, sizeof g_error, "%s", e.what());
    return -1;
  }
}

}  // namespace cuda_on_cpu
