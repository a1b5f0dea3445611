// How an operator on CUDA tensors launches: on the tensor's device, on torch's current stream there.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "csrc/cuda_stream.h"
#include "csrc/tensors.h"

struct CUstream_st;

namespace fastdiff::torch_binding {

inline CUstream_st* current_stream(int32_t device) {
  STD_TORCH_CHECK(get_stream() != nullptr, "torch has no aoti_torch_get_current_cuda_stream; expected torch >= "
                  FASTDIFF_OLDEST_TORCH " with CUDA: install one, or use FASTDIFF_BACKEND=triton");
  void* stream = nullptr;
  FASTDIFF_TORCH_CALL(get_stream()(device, &stream));
  return static_cast<CUstream_st*>(stream);
}

// launch(stream) returns a cudaError_t; products that torch makes inside run under the same guard, on the same stream.
template <class F>
void launch_on(const Tensor& like, const char* name, const F& launch) {
  const auto device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = launch(current_stream(device));
  STD_TORCH_CHECK(error == 0, "fastdiff::", name, " could not be launched: CUDA error ", error);
}

}  // namespace fastdiff::torch_binding
