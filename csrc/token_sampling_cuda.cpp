// sample_tokens and lm_head_sample on CUDA tensors: the device guard, torch's current stream, and the launch functions.
#include "csrc/cuda_launch.h"
#include "csrc/token_sampling.h"
#include "kernels/token_sampling/token_sampling_cuda.h"

namespace fastdiff::torch_binding {
namespace {

struct Cuda {
  // Ids a tile: two launches each, so more than on the CPU. The logits of 256 rows take 8 MiB in 16 bits.
  static constexpr int64_t kHeadTile = 16 * kSampleBlock;
  static constexpr bool kKernelHasTiles = false;

  static int64_t workspace_bytes(const TokenSampleParams& p) { return cuda::sample_tokens_workspace_bytes(p); }
  static int64_t head_workspace_bytes(const LmHeadSampleParams& p) { return cuda::lm_head_sample_workspace_bytes(p); }
  static void sample(const TokenSampleParams& p, const Tensor& logits) {
    launch_on(logits, "sample_tokens", [&](CUstream_st* stream) { return cuda::sample_tokens(p, stream); });
  }
  static void head_sample(const LmHeadSampleParams& p, const Tensor& hidden, const HeadProduct& product) {
    launch_on(hidden, "lm_head_sample",
              [&](CUstream_st* stream) { return cuda::lm_head_sample(p, stream, product); });
  }
  // torch's product of all rows, on the current stream.
  static void head_product(void* context, const HeadTile& tile) {
    const Head& head = *static_cast<const Head*>(context);
    const int64_t ids = tile.end - tile.begin;
    const torch::stable::Device device(torch::headeronly::DeviceType::CUDA,
                                       head.hidden.get_device_index());
    const Tensor out = torch::stable::from_blob(tile.logits, {tile.rows, ids}, {ids, 1}, device, head.hidden.scalar_type());
    Tensor weight = head.weight;
    weight = torch::stable::narrow(weight, 0, tile.begin, ids);
    OptionalTensor bias = head.bias;
    if (bias) bias = torch::stable::narrow(*bias, 0, tile.begin, ids);
    std::array<StableIValue, 4> stack{torch::stable::detail::from(head.hidden), torch::stable::detail::from(weight),
                                      torch::stable::detail::from(bias), torch::stable::detail::from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes the result's reference
  }
};

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { register_token_sampling<Cuda>(m); }

}  // namespace
}  // namespace fastdiff::torch_binding
