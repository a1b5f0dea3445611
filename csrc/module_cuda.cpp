// The module fastdiff._C_cuda: importing it registers the torch operators on CUDA tensors (csrc/*_cuda.cpp).
#include <pybind11/pybind11.h>

#include "csrc/cuda_stream.h"

PYBIND11_MODULE(_C_cuda, m) {
  m.attr("architectures") = FASTDIFF_CUDA_ARCHS_BUILT;
  m.attr("nvcc_version") = FASTDIFF_NVCC_VERSION;
  m.def("finds_stream", [] { return fastdiff::torch_binding::get_stream() != nullptr; },
        "Whether this torch has CUDA, and says on which stream it works.");
}
