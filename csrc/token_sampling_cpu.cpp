// sample_tokens' and lm_head_sample's schemas, and the operators on CPU tensors.
#include "csrc/head_product_cpu.h"
#include "csrc/token_sampling.h"

namespace fastdiff::torch_binding {
namespace {

struct Cpu {
  // Ids a tile: with 256 rows its logits stay in a core's cache, and products of this size run as fast as larger ones.
  static constexpr int64_t kHeadTile = kSampleBlock;
  static constexpr bool kKernelHasTiles = true;
  static constexpr auto head_product = cpu_head_product;

  static int64_t workspace_bytes(const TokenSampleParams&) { return 0; }
  static int64_t head_workspace_bytes(const LmHeadSampleParams&) { return 0; }
  static void sample(const TokenSampleParams& p, const Tensor&) { cpu::sample_tokens(p, {run_on_torch_threads}); }
  static void head_sample(const LmHeadSampleParams& p, const Tensor&, const HeadProduct& product) {
    cpu::lm_head_sample(p, {run_on_torch_threads}, product);
  }
};

#define ARGUMENTS                                                                                              \
  "Tensor? suppress_tokens, Tensor? end_token_ids, Tensor? seeds, int seed, Tensor? steps, int step,"        \
  " Tensor? sequence_ids, Tensor? positions) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) {
  m.def("sample_tokens(Tensor logits, Tensor? temperatures, float temperature, int top_k, float top_p, " ARGUMENTS);
  m.def("lm_head_sample(Tensor hidden, Tensor weight, Tensor? bias, Tensor? temperatures, float temperature, " ARGUMENTS);
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { register_token_sampling<Cpu>(m); }

}  // namespace
}  // namespace fastdiff::torch_binding
