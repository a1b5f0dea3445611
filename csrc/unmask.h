// unmask_ as a torch operator, for any backend: checks, allocation, and the parameters of unmask.h.
// Users come through fastdiff/ops/unmask.py, which checks with kinder messages; the checks here keep a direct call of
// torch.ops.fastdiff.unmask_ from reading or writing out of bounds.
#pragma once
#include "csrc/tensors.h"
#include "kernels/unmask/unmask.h"

namespace fastdiff::torch_binding {

#define UNMASK_SCHEMA                                                                                             \
  "unmask_(Tensor(a!) token_ids, Tensor token, Tensor log_prob, Tensor entropy, Tensor margin, Tensor? rows, "    \
  "Tensor? block_start, Tensor? block_end, Tensor? active, int rule, int order, Tensor? values, float value, "    \
  "int mask_token_id, Tensor? seeds, int seed, Tensor? steps, int step, Tensor? sequence_ids) -> Tensor"

// Of `size` elements, and apart from what is written.
template <class T>
const T* unmask_operand(const Tensor& t, const Tensor& token_ids, const Span& written, int64_t size, const char* name) {
  check_device(t, token_ids, name);
  constexpr ScalarType type = std::is_same_v<T, float> ? ScalarType::Float
                              : std::is_same_v<T, bool> ? ScalarType::Bool
                                                        : ScalarType::Long;
  STD_TORCH_CHECK(t.scalar_type() == type && t.numel() == size && t.is_contiguous(), name,
                  " does not fit; expected contiguous, of the documented dtype and of ", size, " elements");
  const T* data = static_cast<const T*>(t.const_data_ptr());
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + size * sizeof(T);
  STD_TORCH_CHECK(begin >= written.end || written.begin >= end, "token_ids overlaps ", name,
                  "; expected memory of its own");
  return data;
}

template <class T>
const T* unmask_operand(const OptionalTensor& t, const Tensor& token_ids, const Span& written, int64_t size,
                        const char* name) {
  return t ? unmask_operand<T>(*t, token_ids, written, size, name) : nullptr;
}

template <class Backend>
Tensor unmask(Tensor token_ids, Tensor token, Tensor log_prob, Tensor entropy, Tensor margin, OptionalTensor rows,
              OptionalTensor block_start, OptionalTensor block_end, OptionalTensor active, int64_t rule, int64_t order,
              OptionalTensor values, double value, int64_t mask_token_id, OptionalTensor seeds, int64_t seed,
              OptionalTensor steps, int64_t step, OptionalTensor sequence_ids) {
  check_aligned(token_ids, "token_ids");
  STD_TORCH_CHECK(token_ids.dim() == 2 && token_ids.scalar_type() == ScalarType::Long,
                  "token_ids does not fit; expected int64 [B, L]");
  const int64_t batch = token_ids.size(0), length = token_ids.size(1);
  STD_TORCH_CHECK((length <= 1 || token_ids.stride(1) == 1) && (batch <= 1 || token_ids.stride(0) >= length),
                  "token_ids does not fit; expected a contiguous last dimension and rows that do not overlap");
  const int64_t entries = rows ? rows->numel() : batch * length;
  STD_TORCH_CHECK(length <= INT32_MAX && entries <= INT32_MAX,
                  "token_ids or the sample is too large; expected at most 2^31 - 1 positions a row and entries");
  STD_TORCH_CHECK(rule >= 0 && rule <= 4 && order >= 0 && order <= 3, "rule or order is unknown; expected 0-4, 0-3");
  const Span written = span_of(token_ids);
  UnmaskParams p{};
  p.token = unmask_operand<int64_t>(token, token_ids, written, entries, "token");
  p.log_prob = unmask_operand<float>(log_prob, token_ids, written, entries, "log_prob");
  p.entropy = unmask_operand<float>(entropy, token_ids, written, entries, "entropy");
  p.margin = unmask_operand<float>(margin, token_ids, written, entries, "margin");
  p.rows = unmask_operand<int64_t>(rows, token_ids, written, entries, "rows");
  p.block_start = unmask_operand<int64_t>(block_start, token_ids, written, batch, "block_start");
  p.block_end = unmask_operand<int64_t>(block_end, token_ids, written, batch, "block_end");
  p.active = unmask_operand<bool>(active, token_ids, written, batch, "active");
  p.values = unmask_operand<float>(values, token_ids, written, batch, "values");
  p.seed_at = unmask_operand<int64_t>(seeds, token_ids, written, 1, "seeds");
  p.step_at = unmask_operand<int64_t>(steps, token_ids, written, 1, "steps");
  p.sequence_ids = unmask_operand<int64_t>(sequence_ids, token_ids, written, batch, "sequence_ids");
  p.row_stride = token_ids.stride(0);
  p.batch = batch;
  p.length = length;
  p.row_count = rows ? entries : 0;
  p.value = value;
  p.seed = seed;
  p.step = step;
  p.mask_token_id = mask_token_id;
  p.rule = static_cast<UnmaskRule>(rule);
  p.order = static_cast<UnmaskOrder>(order);
  Tensor committed = empty(token_ids, {batch}, ScalarType::Long);
  if (batch * length == 0 || entries == 0) return torch::stable::zero_(committed);
  p.token_ids = static_cast<int64_t*>(token_ids.mutable_data_ptr());
  p.committed = static_cast<int64_t*>(committed.mutable_data_ptr());
  const int64_t words = (Backend::workspace_bytes(p) + 7) / 8;
  std::optional<Tensor> workspace;  // an allocation costs as much as a short call
  if (words > 0) workspace = empty(token_ids, {words}, ScalarType::Long);
  if (words > 0) p.workspace = workspace->mutable_data_ptr();
  Backend::unmask(p, token_ids);
  return committed;
}

}  // namespace fastdiff::torch_binding
