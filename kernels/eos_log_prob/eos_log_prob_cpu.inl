// eos_log_prob on the CPU, compiled once an instruction set (see kernels/common/vec.h).
// A block of 1 024 logits is read from memory once; the second pass over it hits the L1 cache.
#include <math.h>

#include "kernels/common/double_sum.h"
#include "kernels/common/exp.h"
#include "kernels/common/logit_blocks.h"
#include "kernels/eos_log_prob/eos_log_prob.h"
#include "kernels/eos_log_prob/log_share.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

// A part that has no id at all is measured from 0, so that a NaN among the -Inf still shows.
FD_INLINE float origin(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// Of `n` logits, whole cells: sum of exp(z - from).
template <class T>
FD_INLINE double exponential_sum(const T* z, int64_t n, float from) {
  constexpr int kWidth = Vec::kWidth;
  const Vec m = Vec::set(from);
  DoubleSum sum;
  for (int64_t c = 0; c < n; c += kLogitCell) {
    Vec s[2] = {Vec::set(0), Vec::set(0)};
    for (int64_t i = c; i < c + kLogitCell; i += 2 * kWidth) {
#pragma GCC unroll 2
      for (int k = 0; k < 2; k++) {
        __builtin_prefetch(z + n + i + k * kWidth);  // the next block: else memory waits while this one is computed
        s[k] = s[k] + exp(Vec::load(z + i + k * kWidth) - m);
      }
    }
    sum.add(s[0] + s[1]);
  }
  return sum.total();
}

// The end tokens among the ids first <= id < end, of which row[0] is the first: few, hence in double throughout.
template <class T>
FD_INLINE void add_end_tokens(const EosLogProbParams& p, const T* row, int64_t first, int64_t end, EosPart* part) {
  const int64_t from = first_not_below(p.end_tokens, p.end_count, first);
  const int64_t to = from + first_not_below(p.end_tokens + from, p.end_count - from, end);
  part->end_max = -INFINITY;
  part->end_sum = 0;
  for (int64_t i = from; i < to; i++) {
    const float z = to_float(row[p.end_tokens[i] - first]);
    if (z > part->end_max) part->end_max = z;
  }
  for (int64_t i = from; i < to; i++)
    part->end_sum += ::exp(double(to_float(row[p.end_tokens[i] - first])) - origin(part->end_max));
}

// Parts of the blocks that hold the ids begin <= id < end, of which row[0] is the first; parts[0] is block 0's.
template <class T>
void see_row(const EosLogProbParams& p, const T* row, int64_t begin, int64_t end, EosPart* parts, float* pad) {
  const Blocks<T> block{row, begin, end, p.excluded, p.excluded_count, pad};
  for (int64_t b = begin / kLogitBlock; b * kLogitBlock < end; b++) {
    EosPart part;
    block(b, [&](const auto* z, int64_t n) {
      part.other_max = block_maximum(z, n);
      part.other_sum = exponential_sum(z, n, origin(part.other_max));
    });
    const int64_t first = b * kLogitBlock, last = first + kLogitBlock < end ? first + kLogitBlock : end;
    add_end_tokens(p, row + (first - begin), first, last, &part);
    parts[b] = part;
  }
}

float finish_row(const EosPart* parts, int64_t blocks) {
  float end_max = -INFINITY, other_max = -INFINITY;
  for (int64_t b = 0; b < blocks; b++) {
    if (parts[b].end_max > end_max) end_max = parts[b].end_max;
    if (parts[b].other_max > other_max) other_max = parts[b].other_max;
  }
  const double end_from = origin(end_max), other_from = origin(other_max);
  double end_sum = 0, other_sum = 0;
  for (int64_t b = 0; b < blocks; b++) {
    if (parts[b].end_sum != 0) end_sum += parts[b].end_sum * ::exp(parts[b].end_max - end_from);
    if (parts[b].other_sum != 0) other_sum += parts[b].other_sum * ::exp(parts[b].other_max - other_from);
  }
  return log_share(end_max, end_sum, other_max, other_sum);
}

}  // namespace

void eos_log_prob_from_logits(const EosLogProbParams& p, const ParallelFor& parallel_for) {
  const int64_t blocks = divide_up(p.vocab, kLogitBlock);
  parallel_for(0, p.batch * p.length, divide_up(16384, p.vocab), [&](int64_t from, int64_t to) {
    const Array<EosPart> parts(blocks);
    const Array<float> pad(2 * kLogitBlock);
    with_type<Vec>(p.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      for (int64_t r = from; r < to; r++) {
        const T* row = static_cast<const T*>(p.logits) + r / p.length * p.batch_stride + r % p.length * p.row_stride;
        see_row(p, row, 0, p.vocab, parts.data, pad.data);
        p.end_log_prob[r] = finish_row(parts.data, blocks);
      }
    });
  });
}

void eos_log_prob(const EosLogProbParams& p, const EosHeadTiles& tiles, const ParallelFor& parallel_for,
                  const HeadProduct& product) {
  const int64_t rows = p.batch * p.length, blocks = divide_up(p.vocab, kLogitBlock);
  const Array<EosPart> parts(rows * blocks);
  with_type<Vec>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_head_tiles<T>(rows, p.vocab, tiles.tile_size, parallel_for, product, [&](const HeadTile& tile, float* pad) {
      for (int64_t r = 0; r < tile.rows; r++) {
        const T* row = static_cast<const T*>(tile.logits) + r * (tile.end - tile.begin);
        see_row(p, row, tile.begin, tile.end, parts.data + (tile.first_row + r) * blocks, pad);
      }
    });
  });
  parallel_for(0, rows, divide_up(16384, blocks), [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; r++) p.end_log_prob[r] = finish_row(parts.data + r * blocks, blocks);
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
