// One pass over M, its parameters and its launch: every hop and every gradient is one of these.
#pragma once
#include "kernels/qgfd/qgfd.h"
#include "kernels/qgfd/qgfd_masks.cuh"

namespace fastdiff::cuda::qgfd {

enum class Kind {
  kFirstHop,  // weights exp(s - running maximum), divided by their sum at the end; writes the log-sum-exp
  kHop,       // weights exp(s - lse)
  kGradient,  // weights exp(s - lse) (sum_j h_j u_{j-1} - delta)
};

// [batch, heads, rows, dim] to be written, or nothing where data is nullptr.
struct Result {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// h_j and u_j, j = 1 ... hops.
struct Chain {
  Operand value, grad_out;
  const void *passes, *mixed;  // y_1, y_2, ...; u_j of the mixed hops below the last one, in order
  const void* h;               // h_1, h_2, ..., without h_hops where that is grad_out
  QgfdRecurrence recurrence;
  Operand layout;     // of each of these: [batch, heads, queries, dim] contiguous
  int64_t pass_bytes;  // of each

  __host__ __device__ Operand at(const void* passes_of, int64_t index) const {
    Operand o = layout;
    o.data = static_cast<const char*>(passes_of) + index * pass_bytes;
    return o;
  }
  __host__ __device__ bool mixes(int64_t j) const { return recurrence.first_mixed <= j && j <= recurrence.last_mixed; }
  __host__ __device__ Operand gradient(int64_t j) const {  // h_j
    return j == recurrence.hops && !mixes(j) ? grad_out : at(h, j - 1);
  }
  __host__ __device__ Operand factor(int64_t j) const {  // u_j, j < hops
    if (j == 0) return value;
    return mixes(j) ? at(mixed, j - recurrence.first_mixed) : at(passes, j - 1);
  }
};

// What becomes of a row's sum.
struct Output {
  float factor;   // y = round(factor * sum)
  Result plain;   // y
  Result mixed;   // round(alpha * y + beta * base + addend)
  float alpha, beta;
  Operand base;         // [batch, heads or kv_heads, rows, dim], or data nullptr
  const float* addend;  // [batch, heads, rows, dim] contiguous, or nullptr
  float* running;       // the same: + running_weight * y, or = where fresh; or nullptr
  float running_weight;
  bool fresh;
  float* lse;  // [batch, heads, rows], of kFirstHop, or nullptr
};

struct Pass {
  int64_t batch, heads;
  int rows, columns, dim;
  bool transposed;    // rows are keys and columns queries: products with the transposed M
  Operand left, right;  // s = left rightᵀ: query and key, or key and query
  Operand values;       // of the columns: u_{j-1}, or h_j where transposed; kGradient: `right`
  Masks masks;
  float scale;         // > 0, of the scores, times log2(e)
  const float* lse;    // [batch, heads, queries], of kHop and kGradient
  const float* delta;  // the same, of kGradient
  Chain chain;         // of kGradient
  Output out;
  int resident;  // of the left operands (left; kGradient: then one a hop) that stay in shared memory: all or none
};

constexpr int64_t kSharedLimit = 99 << 10;  // what a block may have on every target

// Returns a cudaError_t. `pass.resident` is chosen here.
int run_pass(const Pass& pass, Kind kind, DType dtype, Stream stream);

}  // namespace fastdiff::cuda::qgfd
