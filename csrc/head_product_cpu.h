// The head's product on CPU tensors.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "csrc/head_product.h"

namespace fastdiff::torch_binding {

inline Tensor borrow(const void* data, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                     ScalarType type) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU, 0);
  return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, cpu, type);
}

// torch's product, on one thread as it is called on one of torch's own; on borrowed memory and below the dispatcher,
// so that nothing is recorded.
inline void cpu_head_product(void* context, const HeadTile& tile) {
  const Head& head = *static_cast<const Head*>(context);
  const ScalarType type = head.hidden.scalar_type();
  const int64_t dim = head.hidden.size(1), ids = tile.end - tile.begin, stride = head.weight.stride(0);
  const int64_t item = dtype_size(dtype_of(type, "hidden"));
  const auto at = [&](const Tensor& t, int64_t elements) {
    return static_cast<const char*>(t.const_data_ptr()) + elements * item;
  };
  const Tensor out = borrow(tile.logits, {tile.rows, ids}, {ids, 1}, type);
  const Tensor hidden = borrow(at(head.hidden, tile.first_row * dim), {tile.rows, dim}, {dim, 1}, type);
  const Tensor weight = borrow(at(head.weight, tile.begin * stride), {dim, ids}, {1, stride}, type);
  if (!head.bias) {
    FASTDIFF_TORCH_CALL(aoti_torch_cpu_mm_out(out.get(), hidden.get(), weight.get()));
    return;
  }
  const Tensor bias = borrow(at(*head.bias, tile.begin), {ids}, {1}, type);
  FASTDIFF_TORCH_CALL(aoti_torch_cpu_addmm_out(out.get(), bias.get(), hidden.get(), weight.get(), 1, 1));
}

}  // namespace fastdiff::torch_binding
