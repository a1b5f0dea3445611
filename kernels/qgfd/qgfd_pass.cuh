// The loop of every pass: 64 rows of M against all tiles of 64 columns that they need. Scores, weights and sums stay in
// registers; operands stream through a ring of shared memory in chunks of 64 rows x 128 bytes, so that no size depends
// on the head size but that of the left operands that stay.
#pragma once
#include "kernels/qgfd/qgfd_pass.h"

namespace fastdiff::cuda::qgfd {

constexpr int kThreads = 128;  // 4 warps of 16 rows
constexpr int kStages = 3;     // of the ring: one is read while the copies to the next two are in flight

struct Columns {  // what the rows must know of a tile's columns
  float lse[kTile], delta[kTile];
  int begin[kTile], end[kTile];  // which rows have weights for each
};

template <class T>
constexpr int kChunkElements = kTile * kChunkStride<T>;

__host__ __device__ __forceinline__ int resident_stride(int dim, int chunk, int piece) {
  return (dim + chunk - 1) / chunk * chunk + piece;
}

template <class T, int kOut, Kind kKind>
class PassBlock {
 public:
  static constexpr int kN = kTile / 8, kOutN = kOut / 8;  // blocks of 8 columns
  static constexpr int kChunkN = kChunk<T> / 8;

  __device__ __forceinline__ PassBlock(const Pass& p, unsigned char* shared, int64_t item) : p_(p) {
    const int splits = (p.dim + kOut - 1) / kOut, tiles = Masks::tiles(p.rows);
    out0_ = static_cast<int>(item % splits) * kOut;
    const int64_t tile = item / splits;
    row0_ = static_cast<int>(tile % tiles) * kTile;
    head_ = tile / tiles % p.heads;
    batch_ = tile / tiles / p.heads;
    columns_ = reinterpret_cast<Columns*>(shared);
    ring_ = reinterpret_cast<T*>(shared + 2 * sizeof(Columns));
    stage_elements_ = kChunkElements<T> * (p.resident ? 1 : 2);
    resident_ = ring_ + kStages * stage_elements_;
    weights_ = resident_ + p.resident * kTile * resident_stride(p.dim, kChunk<T>, kPiece<T>) +
               threadIdx.x / kWarp * Weights<T>::kStored;
    chunks_ = (p.dim + kChunk<T> - 1) / kChunk<T>;
    products_ = chunks_ * (kKind == Kind::kGradient ? 1 + static_cast<int>(p.chain.recurrence.hops) : 1);
    value_chunks_ = (min(kOut, p.dim - out0_) + kChunk<T> - 1) / kChunk<T>;
  }

  __device__ __forceinline__ void run() {
    const Plan plan(p_.masks, batch_, row0_ / kTile, p_.transposed);
    copy_resident();
    next_tile_ = plan.next(0);
    int tile = next_tile_;
#pragma unroll 1
    for (int s = 0; s < kStages - 1; ++s) copy_ahead(plan);
    describe_rows();
    describe_columns(tile, 0);
    float acc[kOutN][4] = {}, maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {};
    for (int turn = 0; tile < plan.count(); turn ^= 1) {
      const int following = plan.next(tile + 1);
      float w[kN][4] = {}, outer[kN][4] = {};
#pragma unroll 1
      for (int step = 0; step < products_; ++step) {
        const T* chunk = next_chunk(plan);
        if (step == 0) describe_columns(following, turn ^ 1);
        if (kKind != Kind::kGradient || step < chunks_) {
          multiply(w, step, chunk);
        } else {
          multiply(outer, step, chunk);
        }
      }
      if (!plan.full(tile)) mask(w, kTile * tile, columns_[turn]);
      weigh(w, outer, columns_[turn], maximum, sum, acc);
      Weights<T> weights;
      weights.set(w, weights_);
#pragma unroll 1
      for (int i = 0; i < value_chunks_; ++i) add_values<0>(acc, weights, i, next_chunk(plan));
      tile = following;
    }
    copy_async_wait<0>();
    finish(acc, maximum, sum);
  }

 private:
  __device__ __forceinline__ int lane_row(int half) const {
    return row0_ + threadIdx.x / kWarp * kWarpRows + lane_id() / 4 + 8 * half;
  }
  __device__ __forceinline__ int64_t head_rows(int rows) const { return (batch_ * p_.heads + head_) * rows; }

  // The operands of products: pair 0 makes the scores, pair j the product h_j u_{j-1}ᵀ.
  __device__ __forceinline__ Operand left(int pair) const {
    if (kKind != Kind::kGradient || pair == 0) return p_.left;
    return p_.transposed ? p_.chain.factor(pair - 1) : p_.chain.gradient(pair);
  }
  __device__ __forceinline__ Operand right(int pair) const {
    if (kKind != Kind::kGradient || pair == 0) return p_.right;
    return p_.transposed ? p_.chain.gradient(pair) : p_.chain.factor(pair - 1);
  }

  __device__ __forceinline__ void copy(const Operand& from, int row, int rows, int column, T* to, int stride) {
    copy_chunk(from, from.head<T>(batch_, head_), row, rows, column, p_.dim, to, stride);
  }
  __device__ __forceinline__ void copy_resident() {
    const int stride = resident_stride(p_.dim, kChunk<T>, kPiece<T>);
#pragma unroll 1
    for (int i = 0; i < p_.resident * chunks_; ++i) {
      const int pair = i / chunks_, column = (i - pair * chunks_) * kChunk<T>;
      copy(left(pair), row0_, p_.rows, column, resident_ + pair * kTile * stride + column, stride);
    }
  }
  // Starts the copies of the step after the last one started.
  __device__ __forceinline__ void copy_ahead(const Plan& plan) {
    if (next_tile_ < plan.count()) {
      T* to = ring_ + copy_stage_ * stage_elements_;
      const bool values = next_step_ >= products_;
      const int pair = next_step_ / chunks_, chunk = values ? next_step_ - products_ : next_step_ - pair * chunks_;
      const int column = (values ? out0_ : 0) + chunk * kChunk<T>;
#pragma unroll 1
      for (int side = 0; side < (values || p_.resident ? 1 : 2); ++side) {
        const Operand from = values ? p_.values : side == 0 ? right(pair) : left(pair);
        copy(from, side == 0 ? kTile * next_tile_ : row0_, side == 0 ? p_.columns : p_.rows, column,
             to + side * kChunkElements<T>, kChunkStride<T>);
      }
      if (++next_step_ == products_ + value_chunks_) {
        next_step_ = 0;
        next_tile_ = plan.next(next_tile_ + 1);
      }
    }
    copy_stage_ = copy_stage_ + 1 == kStages ? 0 : copy_stage_ + 1;
    copy_async_commit();
  }
  // The chunk of the next step. After its barrier nobody reads the stage that the next copies go to.
  __device__ __forceinline__ const T* next_chunk(const Plan& plan) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    copy_ahead(plan);
    const T* chunk = ring_ + stage_ * stage_elements_;
    stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
    return chunk;
  }

  __device__ __forceinline__ void multiply(float (&acc)[kN][4], int step, const T* chunk) const {
    const int pair = step / chunks_, column = (step - pair * chunks_) * kChunk<T>;
    const int row = threadIdx.x / kWarp * kWarpRows;
    const T* rows = chunk + kChunkElements<T> + row * kChunkStride<T>;
    int stride = kChunkStride<T>;
    if (p_.resident) {
      stride = resident_stride(p_.dim, kChunk<T>, kPiece<T>);
      rows = resident_ + (pair * kTile + row) * stride + column;
    }
    multiply_rows(acc, rows, stride, chunk, kChunkStride<T>, min(kChunk<T>, p_.dim - column));
  }
  template <int kI>
  __device__ __forceinline__ void add_values(float (&acc)[kOutN][4], const Weights<T>& weights, int index,
                                             const T* chunk) {
    if (index == kI) {
      multiply_values<kI * kChunkN, kChunkN>(acc, weights, chunk, kChunkStride<T>);
    } else if constexpr ((kI + 2) * kChunkN <= kOutN) {
      add_values<kI + 1>(acc, weights, index, chunk);
    }
  }

  __device__ __forceinline__ void weigh(float (&w)[kN][4], const float (&outer)[kN][4], const Columns& columns,
                                        float (&maximum)[2], float (&sum)[2], float (&acc)[kOutN][4]) const {
    if constexpr (kKind == Kind::kFirstHop) {
      exponentiate_online(w, maximum, sum, acc);
    } else {
      exponentiate(w, columns);
      if constexpr (kKind == Kind::kGradient) differentiate(w, outer, columns);
    }
  }
  __device__ __forceinline__ Interval allowed(int index, bool query) const {
    if (query) return p_.masks.interval(batch_, index);
    return p_.masks.attended(batch_, index) ? Interval{0, kNone} : Interval{kNone, 0};
  }
  __device__ __forceinline__ void describe_rows() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_row(half);
      row_[half] = allowed(row, !p_.transposed);
      const bool known = kKind != Kind::kFirstHop && !p_.transposed && row < p_.rows;
      row_lse_[half] = known ? kLog2E * p_.lse[head_rows(p_.rows) + row] : 0.0f;
      row_delta_[half] = known && kKind == Kind::kGradient ? p_.delta[head_rows(p_.rows) + row] : 0.0f;
    }
  }
  __device__ __forceinline__ void describe_columns(int tile, int turn) {
    if (threadIdx.x >= kTile) return;
    Columns& c = columns_[turn];
    const int i = threadIdx.x, column = kTile * tile + i;
    const Interval rows = column < p_.columns ? allowed(column, p_.transposed) : Interval{kNone, 0};
    c.begin[i] = rows.begin;
    c.end[i] = rows.end;
    if (kKind == Kind::kFirstHop) return;
    const bool known = p_.transposed && column < p_.columns;
    c.lse[i] = known ? kLog2E * p_.lse[head_rows(p_.columns) + column] : 0.0f;
    if (kKind == Kind::kGradient) c.delta[i] = known ? p_.delta[head_rows(p_.columns) + column] : 0.0f;
  }

  // Scores without weight become -inf.
  __device__ __forceinline__ void mask(float (&s)[kN][4], int first, const Columns& columns) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = 8 * n + lane_id() % 4 * 2 + i % 2;
        const Interval rows{columns.begin[c], columns.end[c]};
        if (!row_[i / 2].has(first + c) || !rows.has(lane_row(i / 2))) s[n][i] = -kInfinity;
      }
    }
  }
  __device__ __forceinline__ void exponentiate(float (&w)[kN][4], const Columns& columns) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float lse = row_lse_[i / 2] + columns.lse[8 * n + lane_id() % 4 * 2 + i % 2];  // one of them is 0
        const float power = fmaf(w[n][i], p_.scale, -lse);
        w[n][i] = exp2f(power > 0.0f ? 0.0f : power);  // above 0 by rounding alone; NaN stays
      }
    }
  }
  __device__ __forceinline__ void differentiate(float (&w)[kN][4], const float (&outer)[kN][4],
                                                const Columns& columns) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float delta = row_delta_[i / 2] + columns.delta[8 * n + lane_id() % 4 * 2 + i % 2];
        w[n][i] *= outer[n][i] - delta;
      }
    }
  }
  // Weights relative to each row's maximum so far; what was summed up before is scaled to it.
  __device__ __forceinline__ void exponentiate_online(float (&w)[kN][4], float (&maximum)[2], float (&sum)[2],
                                                      float (&acc)[kOutN][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = maximum[half];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
          w[n][c] *= p_.scale;
          top = fmaxf(top, w[n][c]);
        }
      }
      top = quad_max(top);
      const float from = top == -kInfinity ? 0.0f : top;  // nothing to attend to so far
      const float shrink = exp2f(maximum[half] - from);
      maximum[half] = top;
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < kOutN; ++n) {
        acc[n][2 * half] *= shrink;
        acc[n][2 * half + 1] *= shrink;
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) sum[half] += w[n][c] = exp2f(w[n][c] - from);
      }
    }
  }

  // The sums go through shared memory, so that a lane writes eight neighbours of a row.
  __device__ __forceinline__ void finish(float (&acc)[kOutN][4], const float (&maximum)[2], const float (&sum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float factor = p_.out.factor;
      if constexpr (kKind == Kind::kFirstHop) {
        const float total = quad_sum(sum[half]);
        const int row = lane_row(half);
        factor = total == 0.0f ? 0.0f : factor / total;  // NaN stays
        if (p_.out.lse && out0_ == 0 && lane_id() % 4 == 0 && row < p_.rows) {
          p_.out.lse[head_rows(p_.rows) + row] = total == 0.0f ? 0.0f : kLn2 * (maximum[half] + log2f(total));
        }
      }
#pragma unroll
      for (int n = 0; n < kOutN; ++n) {
        acc[n][2 * half] *= factor;
        acc[n][2 * half + 1] *= factor;
      }
    }
    constexpr int kStride = kOut + 4, kEight = kOut / 8;
    const int first = threadIdx.x / kWarp * kWarpRows;
    float* rows = reinterpret_cast<float*>(ring_) + first * kStride;
    __syncthreads();  // every warp has read its last chunk
    store_rows(acc, rows, kStride);
    __syncwarp();
#pragma unroll 1
    for (int i = lane_id(); i < kWarpRows * kEight; i += kWarp) {
      const int row = i / kEight, column = i % kEight * 8;
      if (row0_ + first + row >= p_.rows || out0_ + column >= p_.dim) continue;
      float y[8];
      load(rows + row * kStride + column, y);
      write(y, row0_ + first + row, out0_ + column);
    }
  }
  __device__ __forceinline__ T* place(const Result& r, int row, int column) const {
    return static_cast<T*>(r.data) + batch_ * r.batch_stride + head_ * r.head_stride + row * r.row_stride + column;
  }
  __device__ __forceinline__ void write(float (&y)[8], int row, int column) const {
    const Output& o = p_.out;
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = to_float(from_float<T>(y[i]));
    if (o.plain.data) store(place(o.plain, row, column), y);
    const int64_t at = (head_rows(p_.rows) + row) * p_.dim + column;
    if (o.running) {
      float total[8] = {};
      if (!o.fresh) load(o.running + at, total);
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i] = fmaf(o.running_weight, y[i], total[i]);
      store(o.running + at, total);
    }
    if (!o.mixed.data) return;
    float addend[8] = {};
    if (o.addend) load(o.addend + at, addend);
    const T* base = o.base.data ? o.base.head<T>(batch_, head_) + row * o.base.row_stride + column : nullptr;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      y[i] = fmaf(o.alpha, y[i], addend[i]);
      if (base) y[i] = fmaf(o.beta, to_float(base[i]), y[i]);
    }
    store(place(o.mixed, row, column), y);
  }

  const Pass& p_;
  T *ring_, *resident_, *weights_;
  Columns* columns_;
  int64_t batch_, head_;
  int row0_, out0_, chunks_, products_, value_chunks_, stage_elements_;
  int next_tile_ = 0, next_step_ = 0, copy_stage_ = 0, stage_ = 0;
  Interval row_[2];
  float row_lse_[2], row_delta_[2];
};

// Types, whose names a compiler's reports show.
struct FirstHop {
  static constexpr Kind kKind = Kind::kFirstHop;
};
struct Hop {
  static constexpr Kind kKind = Kind::kHop;
};
struct Gradient {
  static constexpr Kind kKind = Kind::kGradient;
};

// How many blocks a multiprocessor is to hold, as far as registers go without spilling.
template <class T, int kOut, class Does>
constexpr int kBlocks = sizeof(T) == 2 && kOut == 64 && Does::kKind != Kind::kGradient ? 3 : 2;

template <class T, int kOut, class Does>
__global__ __launch_bounds__(kThreads, (kBlocks<T, kOut, Does>)) void pass_kernel(const __grid_constant__ Pass p) {
  FD_DYN_SMEM(unsigned char, shared);
  const int64_t items = p.batch * p.heads * Masks::tiles(p.rows) * ((p.dim + kOut - 1) / kOut);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    PassBlock<T, kOut, Does::kKind>(p, shared, item).run();
    __syncthreads();  // the next item's copies go where this one's were read
  }
}

}  // namespace fastdiff::cuda::qgfd
