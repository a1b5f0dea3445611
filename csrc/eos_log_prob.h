// eos_log_prob as torch operators: checks, and the parameters of kernels/eos_log_prob/eos_log_prob.h. Users come
// through fastdiff/ops/eos_log_prob.py, which checks with kinder messages; the checks here keep a direct call of
// torch.ops.fastdiff.* from reading out of bounds.
#pragma once
#include "csrc/head_product.h"
#include "kernels/eos_log_prob/eos_log_prob.h"

namespace fastdiff::torch_binding {

// What both operators share; `like` is logits or hidden, [B, L, any].
inline EosLogProbParams eos_params(const Tensor& like, int64_t vocab, const Tensor& end_token_ids,
                                   const Tensor& excluded_ids) {
  EosLogProbParams p{};
  p.batch = like.size(0);
  p.length = like.size(1);
  p.vocab = vocab;
  p.dtype = dtype_of(like, "the input");
  STD_TORCH_CHECK(vocab > 0 && p.dtype != DType::kFloat64, "the input does not fit; expected a vocabulary and float32, "
                  "bfloat16 or float16");
  check_device(end_token_ids, like, "end_token_ids");
  check_device(excluded_ids, like, "excluded_ids");
  p.end_tokens = ids(end_token_ids, like, vocab, "end_token_ids");
  p.end_count = end_token_ids.numel();
  p.excluded = ids(excluded_ids, like, vocab, "excluded_ids");
  p.excluded_count = excluded_ids.numel();
  return p;
}

inline Tensor new_result(EosLogProbParams& p, const Tensor& like) {
  Tensor result = empty(like, {p.batch, p.length}, ScalarType::Float);
  p.end_log_prob = static_cast<float*>(result.mutable_data_ptr());
  return result;
}

template <class Backend>
Tensor eos_log_prob_from_logits(Tensor logits, Tensor end_token_ids, Tensor excluded_ids) {
  check_aligned(logits, "logits");
  STD_TORCH_CHECK(logits.dim() == 3 && (logits.stride(2) == 1 || logits.size(2) == 1),
                  "logits do not fit; expected [B, L, V] with a contiguous last dimension");
  EosLogProbParams p = eos_params(logits, logits.size(2), end_token_ids, excluded_ids);
  p.logits = logits.const_data_ptr();
  p.batch_stride = logits.stride(0);
  p.row_stride = logits.stride(1);
  Tensor result = new_result(p, logits);
  if (p.batch * p.length == 0) return result;
  Tensor workspace = empty(logits, {Backend::workspace_bytes(p) / 8}, ScalarType::Long);
  p.workspace = workspace.mutable_data_ptr();
  Backend::from_logits(p, logits);
  return result;
}

template <class Backend>
Tensor eos_log_prob(Tensor hidden, Tensor weight, OptionalTensor bias, Tensor end_token_ids, Tensor excluded_ids) {
  check_head(hidden, weight, bias);
  EosLogProbParams p = eos_params(hidden, weight.size(0), end_token_ids, excluded_ids);
  const int64_t rows = p.batch * p.length;
  Tensor result = new_result(p, hidden);
  if (rows == 0) return result;
  EosHeadTiles tiles{nullptr, Backend::kHeadTile};
  const int64_t tile_elements = Backend::kKernelHasTiles ? 0 : rows * std::min(tiles.tile_size, p.vocab);
  Tensor tile = empty(hidden, {tile_elements}, hidden.scalar_type());
  tiles.logits = tile.mutable_data_ptr();
  Tensor workspace = empty(hidden, {Backend::workspace_bytes(p) / 8}, ScalarType::Long);
  p.workspace = workspace.mutable_data_ptr();
  Tensor flat_hidden = torch::stable::view(hidden, {rows, hidden.size(2)});
  Head head{flat_hidden, weight, bias};
  Backend::from_hidden(p, tiles, hidden, {Backend::head_product, &head});
  return result;
}

template <class Backend, class Library>
void register_eos_log_prob(Library& m) {
  m.impl("eos_log_prob", TORCH_BOX(&eos_log_prob<Backend>));
  m.impl("eos_log_prob_from_logits", TORCH_BOX(&eos_log_prob_from_logits<Backend>));
}

}  // namespace fastdiff::torch_binding
