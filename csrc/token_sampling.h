// sample_tokens' and lm_head_sample's torch operators, for any backend: checks, allocation, and the parameters of
// kernels/token_sampling/token_sampling.h. Users come through fastdiff/ops/token_sampling.py, which checks with kinder
// messages; the checks here keep a direct call of torch.ops.fastdiff.* from reading out of bounds.
#pragma once
#include <tuple>

#include "csrc/head_product.h"
#include "kernels/token_sampling/token_sampling.h"

namespace fastdiff::torch_binding {

using Samples = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

#define FASTDIFF_SAMPLE_ARGUMENTS                                                                                    \
  OptionalTensor suppress_tokens, OptionalTensor end_token_ids, OptionalTensor seeds, int64_t seed,                 \
      OptionalTensor steps, int64_t step, OptionalTensor sequence_ids, OptionalTensor positions

struct SampleArguments {
  const OptionalTensor& temperatures;
  double temperature;
  const OptionalTensor &suppress_tokens, &end_token_ids, &seeds;
  int64_t seed;
  const OptionalTensor& steps;
  int64_t step;
  const OptionalTensor &sequence_ids, &positions;
};

// What both operators share; `like` is logits or hidden, [B, L, any].
inline TokenSampleParams sample_params(const Tensor& like, int64_t vocab, const SampleArguments& a) {
  TokenSampleParams p{};
  p.batch = like.size(0);
  p.length = like.size(1);
  p.vocab = vocab;
  p.dtype = dtype_of(like, "the input");
  STD_TORCH_CHECK(vocab > 0 && p.dtype != DType::kFloat64, "the input does not fit; expected a vocabulary and float32, "
                  "bfloat16 or float16");
  const int64_t rows = p.batch * p.length;
  p.temperatures = numbers<float>(a.temperatures, like, rows, "temperatures");
  if (p.temperatures != nullptr && on_cpu(like))
    for (int64_t r = 0; r < rows; r++)
      STD_TORCH_CHECK(p.temperatures[r] >= 0, "temperatures has ", p.temperatures[r], "; expected numbers of 0 or more");
  p.temperature = a.temperature;
  STD_TORCH_CHECK(a.temperature >= 0, "temperature is ", a.temperature, "; expected 0 or more");
  p.suppress = ids(a.suppress_tokens, like, vocab, "suppress_tokens");
  p.suppress_count = a.suppress_tokens ? a.suppress_tokens->numel() : 0;
  p.end_tokens = ids(a.end_token_ids, like, vocab, "end_token_ids");
  p.end_count = a.end_token_ids ? a.end_token_ids->numel() : 0;
  p.seed_at = numbers<int64_t>(a.seeds, like, 1, "seed");
  p.step_at = numbers<int64_t>(a.steps, like, 1, "step");
  p.seed = a.seed;
  p.step = a.step;
  p.sequence_ids = numbers<int64_t>(a.sequence_ids, like, rows, "sequence_ids");
  p.positions = numbers<int64_t>(a.positions, like, rows, "positions");
  p.top_p = 1;
  return p;
}

inline Samples new_samples(TokenSampleParams& p, const Tensor& like, bool with_end) {
  const auto floats = [&](bool wanted) {
    return wanted ? empty(like, {p.batch, p.length}, ScalarType::Float) : empty(like, {0}, ScalarType::Float);
  };
  Tensor token = empty(like, {p.batch, p.length}, ScalarType::Long);
  Tensor log_prob = floats(true), entropy = floats(true), margin = floats(true), end_log_prob = floats(with_end);
  p.token = static_cast<int64_t*>(token.mutable_data_ptr());
  p.log_prob = static_cast<float*>(log_prob.mutable_data_ptr());
  p.entropy = static_cast<float*>(entropy.mutable_data_ptr());
  p.margin = static_cast<float*>(margin.mutable_data_ptr());
  if (with_end) p.end_log_prob = static_cast<float*>(end_log_prob.mutable_data_ptr());
  return {token, log_prob, entropy, margin, end_log_prob};
}

template <class Backend>
Samples sample_tokens(Tensor logits, OptionalTensor temperatures, double temperature, int64_t top_k, double top_p,
                      FASTDIFF_SAMPLE_ARGUMENTS) {
  check_aligned(logits, "logits");
  STD_TORCH_CHECK(logits.dim() == 3 && (logits.stride(2) == 1 || logits.size(2) == 1),
                  "logits do not fit; expected [B, L, V] with a contiguous last dimension");
  STD_TORCH_CHECK(top_k >= 0 && top_p > 0 && top_p <= 1, "top_k is ", top_k, " and top_p ", top_p,
                  "; expected top_k >= 0 and 0 < top_p <= 1");
  TokenSampleParams p = sample_params(logits, logits.size(2),
                                      {temperatures, temperature, suppress_tokens, end_token_ids, seeds, seed, steps,
                                       step, sequence_ids, positions});
  p.logits = logits.const_data_ptr();
  p.batch_stride = logits.stride(0);
  p.row_stride = logits.stride(1);
  p.top_k = top_k;
  p.top_p = top_p;
  Samples result = new_samples(p, logits, end_token_ids.has_value());
  if (p.batch * p.length == 0) return result;
  Tensor workspace = empty(logits, {Backend::workspace_bytes(p) / 8}, ScalarType::Long);
  p.workspace = workspace.mutable_data_ptr();
  Backend::sample(p, logits);
  return result;
}

template <class Backend>
Samples lm_head_sample(Tensor hidden, Tensor weight, OptionalTensor bias, OptionalTensor temperatures,
                       double temperature, FASTDIFF_SAMPLE_ARGUMENTS) {
  check_head(hidden, weight, bias);
  const int64_t dim = hidden.size(2), rows = hidden.size(0) * hidden.size(1);
  LmHeadSampleParams h{};
  h.sample = sample_params(hidden, weight.size(0),
                           {temperatures, temperature, suppress_tokens, end_token_ids, seeds, seed, steps, step,
                            sequence_ids, positions});
  Samples result = new_samples(h.sample, hidden, end_token_ids.has_value());
  if (rows == 0) return result;
  h.hidden = hidden.const_data_ptr();
  h.weight = weight.const_data_ptr();
  h.bias = bias ? bias->const_data_ptr() : nullptr;
  h.weight_stride = weight.stride(0);
  h.dim = dim;
  h.tile_size = Backend::kHeadTile;
  const int64_t tile_elements = Backend::kKernelHasTiles ? 0 : rows * std::min(h.tile_size, weight.size(0));
  Tensor tile = empty(hidden, {tile_elements}, hidden.scalar_type());
  h.tile = tile.mutable_data_ptr();
  Tensor workspace = empty(hidden, {Backend::head_workspace_bytes(h) / 8}, ScalarType::Long);
  h.sample.workspace = workspace.mutable_data_ptr();
  Tensor flat_hidden = torch::stable::view(hidden, {rows, dim});
  Head head{flat_hidden, weight, bias};
  Backend::head_sample(h, hidden, {Backend::head_product, &head});
  return result;
}

template <class Backend, class Library>
void register_token_sampling(Library& m) {
  m.impl("sample_tokens", TORCH_BOX(&sample_tokens<Backend>));
  m.impl("lm_head_sample", TORCH_BOX(&lm_head_sample<Backend>));
}

}  // namespace fastdiff::torch_binding
