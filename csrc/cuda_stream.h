// Where torch says on which CUDA stream it works: in libtorch_cuda.so, since torch 2.10. The function is looked up in the
// library that torch has loaded, since fastdiff._C_cuda must load on a torch without CUDA, too.
#pragma once
#include <dlfcn.h>

#include <cstdint>

namespace fastdiff::torch_binding {

using GetStream = int32_t(int32_t device, void** stream);  // 0, or it has failed

inline GetStream* get_stream() {
  static GetStream* const found = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<GetStream*>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  return found;
}

}  // namespace fastdiff::torch_binding
