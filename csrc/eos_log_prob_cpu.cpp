// eos_log_prob's schemas, and the operators on CPU tensors.
#include "csrc/eos_log_prob.h"
#include "csrc/head_product_cpu.h"

namespace fastdiff::torch_binding {
namespace {

struct Cpu {
  // Ids a tile: with 256 rows its logits stay in a core's cache, and products of this size run as fast as larger ones.
  static constexpr int64_t kHeadTile = kLogitBlock;
  static constexpr bool kKernelHasTiles = true;
  static constexpr auto head_product = cpu_head_product;

  static int64_t workspace_bytes(const EosLogProbParams&) { return 0; }
  static void from_logits(const EosLogProbParams& p, const Tensor&) {
    cpu::eos_log_prob_from_logits(p, {run_on_torch_threads});
  }
  static void from_hidden(const EosLogProbParams& p, const EosHeadTiles& tiles, const Tensor&,
                          const HeadProduct& product) {
    cpu::eos_log_prob(p, tiles, {run_on_torch_threads}, product);
  }
};

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) {
  m.def("eos_log_prob(Tensor hidden, Tensor weight, Tensor? bias, Tensor end_token_ids, Tensor excluded_ids)"
        " -> Tensor");
  m.def("eos_log_prob_from_logits(Tensor logits, Tensor end_token_ids, Tensor excluded_ids) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { register_eos_log_prob<Cpu>(m); }

}  // namespace
}  // namespace fastdiff::torch_binding
