// Cross entropy of rows on the device, one block a row, two passes: the softmax's normaliser, then the gradient in place.
// See README.md for the mathematics.
//
// Rows need no alignment (V is odd in GPT-2's vocabulary): a row's accesses are vectors between a head and a tail of
// single elements.
#pragma once
#include <cmath>

#include "kernels/common/cuda_dtype.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/masked_linear_cross_entropy/masked_linear_cross_entropy.h"

namespace fastdiff::cuda {

constexpr int kLossThreads = 512;

// The elements of a row as this thread's chunks of kVec aligned neighbours, and the head and tail around them.
template <class T>
struct RowChunks {
  static constexpr int kVec = kVectorBytes / static_cast<int>(sizeof(T));
  T* row;
  int64_t size;
  int64_t head;   // elements before the first aligned one
  int64_t whole;  // elements in whole vectors

  __device__ __forceinline__ RowChunks(T* row, int64_t size) : row(row), size(size) {
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % kVectorBytes) / int64_t{sizeof(T)};
    head = past == 0 ? 0 : kVec - past;
    head = head < size ? head : size;
    whole = (size - head) / kVec * kVec;
  }

  // f(index, values), values float[kVec] or float[1], to which the caller may write; kStore puts them back.
  template <bool kStore, class F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int64_t i = head + int64_t{threadIdx.x} * kVec; i < head + whole; i += int64_t{blockDim.x} * kVec)
      visit<kStore, kVec>(i, f);
    const int64_t tail = size - head - whole;
    for (int64_t k = threadIdx.x; k < head + tail; k += blockDim.x)
      visit<kStore, 1>(k < head ? k : whole + k, f);
  }

 private:
  template <bool kStore, int kN, class F>
  __device__ __forceinline__ void visit(int64_t i, const F& f) const {
    float values[kN];
    load(row + i, values);
    f(i, values);
    if constexpr (kStore) store(row + i, values);
  }
};

// Part of a row's softmax: its maximum, the first id that has it, and Σ exp(z − maximum) over the others, to which the
// 1 of that id is never added, so that it keeps its digits where it is far below one.
struct PartialSoftmax {
  float maximum;
  int argmax;
  float others;

  static __device__ __forceinline__ PartialSoftmax of_none() { return {-INFINITY, 2147483647, 0.0f}; }

  __device__ __forceinline__ bool before(const PartialSoftmax& b) const {
    return maximum > b.maximum || (maximum == b.maximum && argmax < b.argmax);
  }

  // Both ways round the same numbers: the order of the two is made by `before`.
  __device__ __forceinline__ PartialSoftmax merged(const PartialSoftmax& b) const {
    const PartialSoftmax& first = b.before(*this) ? b : *this;
    const PartialSoftmax& second = b.before(*this) ? *this : b;
    PartialSoftmax r = first;
    if (second.maximum == -INFINITY) {
      r.others += second.others;  // 0, or NaN
    } else {
      r.others += (1.0f + second.others) * expf(second.maximum - first.maximum);
    }
    return r;
  }

  template <int kN>
  __device__ __forceinline__ void add(int64_t index, const float (&z)[kN]) {
    float top = z[0];
    int at = 0;
#pragma unroll
    for (int j = 1; j < kN; ++j) {
      if (z[j] > top) {
        top = z[j];
        at = j;
      }
    }
    const bool rises = top > maximum;
    if (rises) {
      others = (maximum == -INFINITY ? others : (1.0f + others) * expf(maximum - top));
      maximum = top;
      argmax = static_cast<int>(index) + at;
    }
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      if (!(rises && j == at) && z[j] != -INFINITY) others += expf(z[j] - maximum);
    }
  }
};

__device__ __forceinline__ PartialSoftmax warp_merge(PartialSoftmax mine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    PartialSoftmax other;
    other.maximum = __shfl_xor_sync(0xffffffffu, mine.maximum, distance);
    other.argmax = __shfl_xor_sync(0xffffffffu, mine.argmax, distance);
    other.others = __shfl_xor_sync(0xffffffffu, mine.others, distance);
    mine = mine.merged(other);
  }
  return mine;
}

// What label smoothing needs: Σ (z − z[target]) over ids that are not −inf, and how many are.
struct PartialSum {
  float differences, infinite;

  template <int kN>
  __device__ __forceinline__ void add(float at_target, const float (&z)[kN]) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const bool is_infinite = z[j] == -INFINITY;
      differences += is_infinite ? 0.0f : z[j] - at_target;
      infinite += is_infinite ? 1.0f : 0.0f;
    }
  }
};

__device__ __forceinline__ PartialSum warp_merge(PartialSum mine) {
  return {warp_sum(mine.differences), warp_sum(mine.infinite)};
}

// Both of all threads of the block. Ends with a barrier: scratch may be used again, and the row written.
struct LossScratch {
  PartialSoftmax softmax[kMaxWarps];
  PartialSum sum[kMaxWarps];
};
__device__ __forceinline__ void block_merge(PartialSoftmax& softmax, PartialSum& sum, LossScratch& scratch) {
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  softmax = warp_merge(softmax);
  sum = warp_merge(sum);
  if (lane == 0) {
    scratch.softmax[threadIdx.x / kWarp] = softmax;
    scratch.sum[threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  softmax = warp_merge(lane < warps ? scratch.softmax[lane] : PartialSoftmax::of_none());
  sum = warp_merge(lane < warps ? scratch.sum[lane] : PartialSum{0.0f, 0.0f});
  __syncthreads();
}

// What the second pass needs of a row.
struct RowGradient {
  float maximum, factor, shift;  // G = exp(z − maximum) · factor + shift
  int64_t target;                // G there:
  float at_target;

  template <int kN>
  __device__ __forceinline__ void operator()(int64_t index, float (&z)[kN]) const {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float value = expf(z[j] - maximum) * factor + shift;
      z[j] = index + j == target ? at_target : value;
    }
  }
};

// Suppressed ids become −inf, and then are no different from ids of probability 0. Returns whether the target is allowed.
template <class T>
__device__ __forceinline__ bool suppress_row(const CrossEntropyParams& p, T* row, int64_t target) {
  bool allowed = target >= 0 && target < p.vocab;
  for (int64_t k = threadIdx.x; k < p.suppress_count; k += blockDim.x) {
    const int64_t id = p.suppress[k];
    if (id >= 0 && id < p.vocab) row[id] = from_float<T>(-INFINITY);
  }
  __syncthreads();
  return allowed && (p.suppress_count == 0 || to_float(row[target]) != -INFINITY);
}

template <class T>
__device__ __forceinline__ void cross_entropy_row(const CrossEntropyParams& p, int64_t r, LossScratch& scratch) {
  T* row = static_cast<T*>(p.logits) + r * p.row_stride;
  const int64_t target = p.targets[r];
  const bool valid = suppress_row(p, row, target);
  const float at_target = valid ? to_float(row[target]) : NAN;
  const float epsilon = static_cast<float>(p.label_smoothing), allowed = static_cast<float>(p.vocab - p.suppress_count);

  const RowChunks<T> chunks(row, p.vocab);
  PartialSoftmax softmax = PartialSoftmax::of_none();
  PartialSum sum{0.0f, 0.0f};
  chunks.template each<false>([&](int64_t index, auto& z) {
    softmax.add(index, z);
    if (epsilon > 0.0f) sum.add(at_target, z);
  });
  block_merge(softmax, sum, scratch);

  const float others = valid && softmax.maximum > -INFINITY && softmax.maximum < INFINITY ? softmax.others : NAN;
  if (threadIdx.x == 0) {
    float loss = log1pf(others) + (softmax.maximum - at_target);
    if (epsilon > 0.0f) loss -= epsilon * (sum.differences / allowed);
    const bool unlikely = epsilon > 0.0f && sum.infinite > static_cast<float>(p.suppress_count);  // an allowed id at −inf
    p.row_loss[r] = unlikely && others == others ? INFINITY : loss;
  }
  if (!p.want_grad) return;
  const float weight = p.row_weight ? p.row_weight[r] : 1.0f;
  const float norm = 1.0f / (1.0f + others), uniform = epsilon / allowed;
  // p[target] − 1 without the cancellation at p = 1
  const float below_one =
      target == softmax.argmax ? -others * norm : (expf(at_target - softmax.maximum) - 1.0f - others) * norm;
  const RowGradient gradient{softmax.maximum, weight * norm, -weight * uniform, valid ? target : -1,
                             weight * (below_one + epsilon - uniform)};
  chunks.template each<true>(gradient);
  if (p.suppress_count == 0) return;
  __syncthreads();
  for (int64_t k = threadIdx.x; k < p.suppress_count; k += blockDim.x) {
    const int64_t id = p.suppress[k];
    if (id >= 0 && id < p.vocab) row[id] = from_float<T>(0.0f);
  }
}

template <class T>
__global__ void __launch_bounds__(kLossThreads, 2) cross_entropy_kernel(const CrossEntropyParams p) {
  FD_SHARED(LossScratch, scratch, [1]);
  for (int64_t r = blockIdx.x; r < p.rows; r += gridDim.x) cross_entropy_row<T>(p, r, scratch[0]);
}

}  // namespace fastdiff::cuda
