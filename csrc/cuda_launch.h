// How an operator on CUDA tensors launches: on the tensor's device, on torch's current stream there.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "csrc/tensors.h"

struct CUstream_st;

namespace fastdiff::torch_binding {

// launch(stream) returns a cudaError_t; products that torch makes inside run under the same guard, on the same stream.
template <class F>
void launch_on(const Tensor& like, const char* name, const F& launch) {
  const auto device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = torch::stable::accelerator::getCurrentStream(device).nativeHandle();
  const int error = launch(static_cast<CUstream_st*>(stream));
  STD_TORCH_CHECK(error == 0, "fastdiff::", name, " could not be launched: CUDA error ", error);
}

}  // namespace fastdiff::torch_binding
