// QGFD attention: parameters and launch functions of every native backend. See README.md for the mathematics.
//
//   M = softmax(scale * query * key^T, masks) row by row; a row that attends to nothing is zero
//   u_0 = value;  y_j = round(M * u_{j-1});  u_j = mixed(j) ? round(alpha * y_j + (1 - alpha) * value) : y_j
//   out = u_hops,   j = 1 ... hops,   mixed(j) = first_mixed <= j <= last_mixed
#pragma once
#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/parallel_for.h"

namespace fastdiff {

// [batch, heads, rows, dim] read in place: strides in elements, the last dimension contiguous.
struct QgfdHeads {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

// M. Query i of sample b attends to the keys j with row_begin <= j < row_end and key_mask[b, j].
struct QgfdMatrix {
  QgfdHeads query;  // [batch, heads, queries, dim]
  QgfdHeads key;    // [batch, kv_heads, keys, dim]; query head h uses head h / (heads / kv_heads)
  const uint8_t* key_mask;   // [batch, keys] contiguous, or nullptr: all
  const int32_t* row_begin;  // [batch or 1, queries] contiguous, or nullptr: 0
  const int32_t* row_end;    // the same, or nullptr: keys
  int64_t begin_batch_stride;  // queries, or 0 where one row serves every sample
  int64_t end_batch_stride;
  int64_t batch, heads, kv_heads, queries, keys, dim;
  float scale;  // > 0
  DType dtype;  // of everything but lse
};

struct QgfdRecurrence {
  int64_t hops;  // >= 1; more than one, or a mixed one, only where queries == keys
  int64_t first_mixed, last_mixed;  // none: first_mixed > last_mixed
  float alpha;

  bool mixed(int64_t hop) const { return first_mixed <= hop && hop <= last_mixed; }
  // y_j that the backward pass needs beside `out`: the last is `out` itself, unless it was mixed.
  int64_t saved() const { return mixed(hops) ? hops : hops - 1; }
};

struct QgfdForwardParams {
  QgfdMatrix matrix;
  QgfdRecurrence recurrence;
  QgfdHeads value;  // [batch, kv_heads, keys, dim]
  void* out;        // [batch, queries, heads, dim] contiguous
  float* lse;       // [batch, heads, queries]: log sum exp of a row's scaled scores (0 for a row without keys), or nullptr
  void* passes;     // [saved(), batch, heads, queries, dim] contiguous: y_1, y_2, ..., or nullptr
  void* workspace;  // <backend>::qgfd_forward_workspace_bytes(params)
};

// With g_hops = grad_out:  h_j = mixed(j) ? round(alpha * g_j) : g_j,  g_{j-1} = round(M^T h_j),
// grad_value = g_0 + sum over mixed j of (1 - alpha) g_j,
// dS = M (.) (sum_j h_j u_{j-1}^T - delta),  delta = sum_j rowsum(h_j (.) y_j)  in fp32,
// grad_query = scale * dS * key,  grad_key = scale * dS^T * query.
struct QgfdBackwardParams {
  QgfdMatrix matrix;
  QgfdRecurrence recurrence;
  QgfdHeads value;
  QgfdHeads out;       // as the forward pass left it
  QgfdHeads grad_out;  // [batch, heads, queries, dim]
  const float* lse;
  const void* passes;
  void* grad_query;  // [batch, queries, heads, dim] contiguous
  void* grad_key;    // [batch, keys, heads, dim] contiguous: one a query head; the caller adds up the heads of a group
  void* grad_value;  // the same
  void* workspace;   // <backend>::qgfd_backward_workspace_bytes(params)
};

namespace cpu {
// These take no workspace: each thread has a scratch of its own.
void qgfd_forward(const QgfdForwardParams& params, const ParallelFor& parallel_for);
void qgfd_backward(const QgfdBackwardParams& params, const ParallelFor& parallel_for);
}  // namespace cpu

}  // namespace fastdiff
