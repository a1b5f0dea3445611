// The head's product on CUDA tensors.
#pragma once
#include <array>

#include "csrc/head_product.h"

namespace fastdiff::torch_binding {

// torch's product of all rows, on the current stream.
inline void cuda_head_product(void* context, const HeadTile& tile) {
  const Head& head = *static_cast<const Head*>(context);
  const int64_t ids = tile.end - tile.begin;
  const ScalarType type = head.hidden.scalar_type();
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA, head.hidden.get_device_index());
  const Tensor out = torch::stable::from_blob(tile.logits, {tile.rows, ids}, {ids, 1}, device, type);
  Tensor weight = head.weight;
  weight = torch::stable::narrow(weight, 0, tile.begin, ids);
  OptionalTensor bias = head.bias;
  if (bias) bias = torch::stable::narrow(*bias, 0, tile.begin, ids);
  std::array<StableIValue, 4> stack{torch::stable::detail::from(head.hidden), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  FASTDIFF_TORCH_CALL(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the result's reference
}

}  // namespace fastdiff::torch_binding
