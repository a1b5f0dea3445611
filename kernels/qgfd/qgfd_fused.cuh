// Every hop of a (batch, head) in one block: M, un-normalised, and two u_j stay in shared memory.
#pragma once
#include "kernels/qgfd/qgfd_pass.h"

namespace fastdiff::cuda::qgfd {

constexpr int kFusedWarps = 8;    // at most, one for 16 rows
constexpr int kFusedRows = 128;  // at most: a warp has its rows' scores in registers, all columns

__host__ __device__ __forceinline__ int round_up(int64_t size, int step) {
  return static_cast<int>((size + step - 1) / step * step);
}
template <class T>
__host__ __device__ __forceinline__ int fused_stride(int64_t size) {
  return round_up(size, 16) + kPiece<T>;
}
template <class T>
int64_t fused_shared_bytes(int64_t length, int64_t dim) {
  const int64_t rows = round_up(length, 16), row = fused_stride<T>(length) + 2 * fused_stride<T>(dim);
  return rows * (row * static_cast<int64_t>(sizeof(T)) + static_cast<int64_t>(sizeof(float)));
}

struct Fused {
  QgfdForwardParams params;
  Operand query, key, value;
  Masks masks;
};

template <class T>
class FusedBlock {
 public:
  static constexpr int kParts = kFusedRows / kTile, kN = kTile / 8;

  __device__ __forceinline__ FusedBlock(const Fused& f, unsigned char* shared, int64_t item) : f_(f) {
    const QgfdMatrix& m = f.params.matrix;
    batch_ = item / m.heads;
    head_ = item - batch_ * m.heads;
    length_ = static_cast<int>(m.queries);
    dim_ = static_cast<int>(m.dim);
    rows_ = round_up(length_, 16);
    stride_ = fused_stride<T>(dim_);
    matrix_stride_ = fused_stride<T>(length_);
    inverse_ = reinterpret_cast<float*>(shared);
    matrix_ = reinterpret_cast<T*>(inverse_ + rows_);
    even_ = matrix_ + rows_ * matrix_stride_;
    odd_ = even_ + rows_ * stride_;
  }

  __device__ __forceinline__ void run() {
    copy(f_.key, even_);
    copy(f_.query, odd_);
    arrive();
    const int row = threadIdx.x / kWarp * kWarpRows;
    make_rows(row);
    __syncthreads();
    copy(f_.value, even_);
    arrive();
    const int hops = static_cast<int>(f_.params.recurrence.hops);
    for (int j = 1; j <= hops; ++j) {
#pragma unroll 1
      for (int column = 0; column < dim_; column += kTile) hop(j, row, column);
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ void copy(const Operand& from, T* to) {
#pragma unroll 1
    for (int column = 0; column < dim_; column += kChunk<T>) {  // the last chunk ends where rows do
      const int width = min(kChunk<T>, round_up(dim_, 16) - column);
      copy_chunk(from, from.head<T>(batch_, head_), 0, length_, column, dim_, to + column,
                                   stride_, rows_, width);
    }
  }
  __device__ __forceinline__ void arrive() {
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }

  // 16 rows of M: exp(s - the row's maximum), and one over their sum.
  __device__ __forceinline__ void make_rows(int row) {
    float s[kParts][kN][4] = {};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part * kTile >= rows_) break;
#pragma unroll 1
      for (int k = 0; k < dim_; k += kChunk<T>) {
        multiply_rows(s[part], odd_ + row * stride_ + k, stride_, even_ + part * kTile * stride_ + k, stride_,
                      min(kChunk<T>, dim_ - k), rows_ - part * kTile);
      }
    }
    const Interval keys[2] = {f_.masks.interval(batch_, row + lane_id() / 4),
                              f_.masks.interval(batch_, row + lane_id() / 4 + 8)};
    float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {};
    each(s, [&](float& value, int half, int column) {
      const bool attends = keys[half].has(column) && f_.masks.attended(batch_, column);
      value = attends ? value * (f_.params.matrix.scale * kLog2E) : -kInfinity;
      maximum[half] = fmaxf(maximum[half], value);
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) maximum[half] = quad_max(maximum[half]);
    each(s, [&](float& value, int half, int) {
      value = exp2f(value - (maximum[half] == -kInfinity ? 0.0f : maximum[half]));
      sum[half] += value;
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      describe_row(row + lane_id() / 4 + 8 * half, maximum[half], quad_sum(sum[half]));
    }
    T* to = matrix_ + (row + lane_id() / 4) * matrix_stride_ + lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kParts * kN; ++i) {
      if (8 * i >= rows_) break;
      const float(&four)[4] = s[i / kN][i % kN];
      store(to + 8 * i, {four[0], four[1]});
      store(to + 8 * i + 8 * matrix_stride_, {four[2], four[3]});
    }
  }
  template <class F>
  __device__ __forceinline__ void each(float (&s)[kParts][kN][4], const F& f) const {
#pragma unroll
    for (int i = 0; i < kParts * kN; ++i) {
      if (8 * i >= rows_) break;
#pragma unroll
      for (int c = 0; c < 4; ++c) f(s[i / kN][i % kN][c], c / 2, 8 * i + lane_id() % 4 * 2 + c % 2);
    }
  }
  __device__ __forceinline__ void describe_row(int row, float maximum, float sum) {
    if (lane_id() % 4 != 0) return;
    inverse_[row] = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (row >= length_ || !f_.params.lse) return;
    const QgfdMatrix& m = f_.params.matrix;
    f_.params.lse[(batch_ * m.heads + head_) * length_ + row] = sum == 0.0f ? 0.0f : kLn2 * (maximum + log2f(sum));
  }

  // 64 columns of y_j and u_j, for 16 rows.
  __device__ __forceinline__ void hop(int j, int row, int column) {
    float acc[kN][4] = {};
    const T* u = (j % 2 ? even_ : odd_) + column;
    multiply_stored<0, kN>(acc, matrix_ + row * matrix_stride_, matrix_stride_, u, stride_, rows_,
                           round_up(dim_, 16) - column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + lane_id() / 4 + 8 * half;
      const float inverse = inverse_[at];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int c = column + 8 * n + lane_id() % 4 * 2;
        if (c >= round_up(dim_, 16)) break;
        write(j, at, c, acc[n][2 * half] * inverse, acc[n][2 * half + 1] * inverse);
      }
    }
  }
  __device__ __forceinline__ void write(int j, int row, int column, float first, float second) {
    const QgfdForwardParams& p = f_.params;
    const QgfdMatrix& m = p.matrix;
    const bool inside = row < length_ && column < dim_;
    const bool mixed = p.recurrence.first_mixed <= j && j <= p.recurrence.last_mixed;
    const int64_t hops = p.recurrence.hops;
    float y[2] = {to_float(from_float<T>(first)), to_float(from_float<T>(second))};
    if (inside && p.passes && (j < hops || mixed)) {
      const int64_t pass = ((j - 1) * m.batch + batch_) * m.heads + head_;
      store(static_cast<T*>(p.passes) + (pass * length_ + row) * dim_ + column, y);
    }
    if (mixed && inside) {
      const T* v = f_.value.head<T>(batch_, head_) + row * f_.value.row_stride + column;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        y[i] = fmaf(1.0f - p.recurrence.alpha, to_float(v[i]), p.recurrence.alpha * y[i]);
      }
    }
    if (j < hops) {
      store((j % 2 ? odd_ : even_) + row * stride_ + column, y);
    } else if (inside) {
      store(static_cast<T*>(p.out) + ((batch_ * length_ + row) * m.heads + head_) * dim_ + column, y);
    }
  }

  const Fused& f_;
  int64_t batch_, head_;
  int length_, dim_, rows_, stride_, matrix_stride_;  // rows_: length_ up to a multiple of 16; what lies beyond is zero
  float* inverse_;
  T *matrix_, *even_, *odd_;  // u_0 = value, u_2, ... and u_1, u_3, ...; at first key and query
};

template <class T>
__global__ __launch_bounds__(kFusedWarps* kWarp, 2) void fused_kernel(const __grid_constant__ Fused f) {
  FD_DYN_SMEM(unsigned char, shared);
  const int64_t items = f.params.matrix.batch * f.params.matrix.heads;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) FusedBlock<T>(f, shared, item).run();
}

}  // namespace fastdiff::cuda::qgfd
