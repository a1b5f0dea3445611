// sample_tokens and lm_head_sample on CUDA tensors: the device guard, torch's current stream, and the launch functions.
#include "csrc/cuda_launch.h"
#include "csrc/head_product_cuda.h"
#include "csrc/token_sampling.h"
#include "kernels/token_sampling/token_sampling_cuda.h"

namespace fastdiff::torch_binding {
namespace {

struct Cuda {
  // Ids a tile: two launches each, so more than on the CPU. The logits of 256 rows take 8 MiB in 16 bits.
  static constexpr int64_t kHeadTile = 16 * kSampleBlock;
  static constexpr bool kKernelHasTiles = false;
  static constexpr auto head_product = cuda_head_product;

  static int64_t workspace_bytes(const TokenSampleParams& p) { return cuda::sample_tokens_workspace_bytes(p); }
  static int64_t head_workspace_bytes(const LmHeadSampleParams& p) { return cuda::lm_head_sample_workspace_bytes(p); }
  static void sample(const TokenSampleParams& p, const Tensor& logits) {
    launch_on(logits, "sample_tokens", [&](CUstream_st* stream) { return cuda::sample_tokens(p, stream); });
  }
  static void head_sample(const LmHeadSampleParams& p, const Tensor& hidden, const HeadProduct& product) {
    launch_on(hidden, "lm_head_sample",
              [&](CUstream_st* stream) { return cuda::lm_head_sample(p, stream, product); });
  }
};

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { register_token_sampling<Cuda>(m); }

}  // namespace
}  // namespace fastdiff::torch_binding
