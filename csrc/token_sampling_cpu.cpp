// sample_tokens' and lm_head_sample's schemas, and the operators on CPU tensors.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "csrc/token_sampling.h"

namespace fastdiff::torch_binding {
namespace {

Tensor borrow(const void* data, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
              ScalarType type) {
  return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, {torch::headeronly::DeviceType::CPU, 0}, type);
}

struct Cpu {
  // Ids a tile: with 256 rows its logits stay in a core's cache, and products of this size run as fast as larger ones.
  static constexpr int64_t kHeadTile = kSampleBlock;
  static constexpr bool kKernelHasTiles = true;

  static int64_t workspace_bytes(const TokenSampleParams&) { return 0; }
  static int64_t head_workspace_bytes(const LmHeadSampleParams&) { return 0; }
  static void sample(const TokenSampleParams& p, const Tensor&) { cpu::sample_tokens(p, {run_on_torch_threads}); }
  static void head_sample(const LmHeadSampleParams& p, const Tensor&, const HeadProduct& product) {
    cpu::lm_head_sample(p, {run_on_torch_threads}, product);
  }
  // torch's product, on one thread as it is called on one of torch's own; on borrowed memory and below the dispatcher,
  // so that nothing is recorded.
  static void head_product(void* context, const HeadTile& tile) {
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
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), hidden.get(), weight.get()));
      return;
    }
    const Tensor bias = borrow(at(*head.bias, tile.begin), {ids}, {1}, type);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), bias.get(), hidden.get(), weight.get(), 1, 1));
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
