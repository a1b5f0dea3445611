// Rows of logits on the CPU, kLogitBlock ids at a time: what is left out, what is beyond the vocabulary, the maximum.
// Compiled once an instruction set (see vec.h).
#pragma once
#include <math.h>
#include <stdlib.h>

#include "kernels/common/logit_tiles.h"
#include "kernels/common/parallel_for.h"
#include "kernels/common/vec.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int64_t kHeadRows = 256;  // rows whose logits a tile holds: they stay in the core's cache

template <class T>
struct Array {
  T* data;
  explicit Array(int64_t n) : data(static_cast<T*>(aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64))) {
    if (data == nullptr) abort();  // as far gone as a stack overflow
  }
  ~Array() { free(data); }
  Array(const Array&) = delete;
};

FD_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where in ascending ids the first one >= id stands.
FD_INLINE int64_t first_not_below(const int64_t* ids, int64_t count, int64_t id) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = (low + count) / 2;
    if (ids[middle] < id) low = middle + 1; else count = middle;
  }
  return low;
}

// Logits of one row as blocks: whole cells, -Inf beyond the vocabulary and at suppressed ids, widened into `pad` where
// the logits themselves are not such.
template <class T>
struct Blocks {
  const T* row;      // logits of ids begin, begin + 1, …, end - 1; begin is a multiple of kLogitBlock
  int64_t begin, end;
  const int64_t* suppress;  // ascending
  int64_t suppress_count;
  float* pad;  // kLogitBlock floats

  // f(pointer to logits, how many) with the logits of block b (from id b · kLogitBlock on)
  template <class F>
  FD_INLINE auto operator()(int64_t b, const F& f) const {
    const int64_t first = b * kLogitBlock, left = end - first, n = left < kLogitBlock ? left : kLogitBlock;
    const T* z = row + (first - begin);
    int64_t s = first_not_below(suppress, suppress_count, first);
    const bool clean = s == suppress_count || suppress[s] >= first + n;
    if (clean && n % kLogitCell == 0) return f(z, n);
    for_lanes<Vec>(n, [&](int64_t i, auto k) { store(load<Vec>(z + i, k), pad + i, k); });
    const int64_t whole = divide_up(n, kLogitCell) * kLogitCell;
    for (int64_t i = n; i < whole; i++) pad[i] = -INFINITY;
    for (; s < suppress_count && suppress[s] < first + n; s++) pad[suppress[s] - first] = -INFINITY;
    return f(static_cast<const float*>(pad), whole);
  }
};

// Of whole cells; NaN is passed over.
template <class T>
FD_INLINE float block_maximum(const T* z, int64_t n) {
  Vec top[4] = {Vec::set(-INFINITY), Vec::set(-INFINITY), Vec::set(-INFINITY), Vec::set(-INFINITY)};
  for (int64_t i = 0; i < n; i += 4 * Vec::kWidth)
    for (int k = 0; k < 4; k += 2) {
      Vec a, b;
      load_two(z + i + k * Vec::kWidth, &a, &b);
      top[k] = max(a, top[k]);
      top[k + 1] = max(b, top[k + 1]);
    }
  return max(max(top[0], top[1]), max(top[2], top[3])).max();
}

// A head's logits, T each: a thread makes a tile of them, f(tile, pad) looks at it while it is in the thread's cache,
// then the next; threads wait for one another once. `pad`: 2 · kLogitBlock floats of the thread's own.
template <class T, class F>
void for_head_tiles(int64_t rows, int64_t vocab, int64_t tile_size, const ParallelFor& parallel_for,
                    const HeadProduct& product, const F& f) {
  const int64_t at_once = rows < kHeadRows ? rows : kHeadRows, parts = divide_up(rows, at_once);
  const int64_t tiles = divide_up(vocab, tile_size) * parts;
  // Two at least: torch calls the body of a loop of one outside its threads, where the product would start threads itself
  // and might split a sum among them.
  parallel_for(0, tiles < 2 ? 2 : tiles, 1, [&](int64_t from, int64_t to) {
    const Array<float> pad(2 * kLogitBlock);
    const Array<T> logits(at_once * tile_size);
    // all rows of some ids, then the next: their part of the weight stays cached
    for (int64_t i = from; i < to && i < tiles; i++) {
      const int64_t begin = i / parts * tile_size, end = begin + tile_size < vocab ? begin + tile_size : vocab;
      const int64_t first = i % parts * at_once, count = first + at_once < rows ? at_once : rows - first;
      const HeadTile tile{first, count, begin, end, logits.data};
      product.run(product.context, tile);
      f(tile, pad.data);
    }
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
