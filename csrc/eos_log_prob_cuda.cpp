// eos_log_prob on CUDA tensors: the device guard, torch's current stream, and the launch functions.
#include "csrc/cuda_launch.h"
#include "csrc/eos_log_prob.h"
#include "csrc/head_product_cuda.h"
#include "kernels/eos_log_prob/eos_log_prob_cuda.h"

namespace fastdiff::torch_binding {
namespace {

struct Cuda {
  // Ids a tile: 256 thread blocks' worth of product for 1 024 rows, and 8 % of the logits of GPT-2's vocabulary.
  static constexpr int64_t kHeadTile = 4 * kLogitBlock;
  static constexpr bool kKernelHasTiles = false;
  static constexpr auto head_product = cuda_head_product;

  static int64_t workspace_bytes(const EosLogProbParams& p) { return cuda::eos_log_prob_workspace_bytes(p); }
  static void from_logits(const EosLogProbParams& p, const Tensor& logits) {
    launch_on(logits, "eos_log_prob_from_logits",
              [&](CUstream_st* stream) { return cuda::eos_log_prob_from_logits(p, stream); });
  }
  static void from_hidden(const EosLogProbParams& p, const EosHeadTiles& tiles, const Tensor& hidden,
                          const HeadProduct& product) {
    launch_on(hidden, "eos_log_prob",
              [&](CUstream_st* stream) { return cuda::eos_log_prob(p, tiles, stream, product); });
  }
};

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { register_eos_log_prob<Cuda>(m); }

}  // namespace
}  // namespace fastdiff::torch_binding
