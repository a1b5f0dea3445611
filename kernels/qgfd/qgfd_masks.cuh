// Who attends to whom, query by query and tile by tile.
#pragma once
#include "kernels/common/warp.cuh"
#include "kernels/qgfd/qgfd_tiles.cuh"

namespace fastdiff::cuda::qgfd {

constexpr int kNone = 0x7fffffff;  // an index beyond every row and column

struct Interval {
  int begin, end;

  __device__ __forceinline__ bool has(int i) const { return begin <= i && i < end; }
};

// The least and the greatest begin and end of the intervals of a tile's queries. An empty interval is {kNone, 0}: it
// widens nothing, and leaves no key that all attend to.
struct QueryTile {
  int first_begin, last_begin, first_end, last_end;
};
// Whether any key of a tile may be attended to, and whether all 64 are keys that may be.
struct KeyTile {
  uint8_t any, all;
};

struct Masks {
  const uint8_t* key_mask;
  const int32_t *row_begin, *row_end;
  int64_t begin_batch_stride, end_batch_stride;
  int queries, keys;
  const QueryTile* query_tiles;  // [batch, tiles of queries], or nullptr: every query attends to all keys
  const KeyTile* key_tiles;      // [batch, tiles of keys], or nullptr: every key may be attended to

  // The keys that a query attends to, but for key_mask. Queries beyond the last attend to nothing.
  __device__ __forceinline__ Interval interval(int64_t batch, int query) const {
    if (query >= queries) return {kNone, 0};
    Interval keys_of{0, keys};
    if (row_begin) keys_of.begin = max(keys_of.begin, row_begin[batch * begin_batch_stride + query]);
    if (row_end) keys_of.end = min(keys_of.end, row_end[batch * end_batch_stride + query]);
    return keys_of.begin < keys_of.end ? keys_of : Interval{kNone, 0};
  }
  __device__ __forceinline__ bool attended(int64_t batch, int key) const {
    return key < keys && (!key_mask || key_mask[batch * keys + key]);
  }
  __host__ __device__ __forceinline__ static int tiles(int rows) { return (rows + kTile - 1) / kTile; }

  __device__ __forceinline__ QueryTile query_tile(int64_t batch, int tile) const {
    return query_tiles ? query_tiles[batch * tiles(queries) + tile] : QueryTile{0, 0, keys, keys};
  }
  __device__ __forceinline__ KeyTile key_tile(int64_t batch, int tile) const {
    if (key_tiles) return key_tiles[batch * tiles(keys) + tile];
    return {1, static_cast<uint8_t>(kTile * (tile + 1) <= keys)};
  }
};

// The tiles of columns that a tile of rows needs. Rows are queries and columns keys, or, transposed, the other way round.
class Plan {
 public:
  __device__ __forceinline__ Plan(const Masks& masks, int64_t batch, int row_tile, bool transposed)
      : masks_(masks), batch_(batch), row_(kTile * row_tile), transposed_(transposed) {
    count_ = Masks::tiles(transposed ? masks.queries : masks.keys);
    if (transposed) {
      keys_ = masks.key_tile(batch, row_tile);
      if (!keys_.any) count_ = 0;
    } else {
      queries_ = masks.query_tile(batch, row_tile);
      count_ = min(count_, Masks::tiles(queries_.last_end));
    }
  }

  // The first one needed from `tile` on; count() where there is none.
  __device__ __forceinline__ int next(int tile) const {
    if (transposed_) {
      for (; tile < count_; ++tile) {
        const QueryTile q = masks_.query_tile(batch_, tile);
        if (q.first_begin < row_ + kTile && q.last_end > row_) break;
      }
    } else {
      tile = max(tile, queries_.first_begin / kTile);
      while (tile < count_ && !masks_.key_tile(batch_, tile).any) ++tile;
    }
    return min(tile, count_);
  }
  __device__ __forceinline__ int count() const { return count_; }

  // Whether every row has weights for every column of a tile.
  __device__ __forceinline__ bool full(int tile) const {
    const QueryTile q = transposed_ ? masks_.query_tile(batch_, tile) : queries_;
    const KeyTile k = transposed_ ? keys_ : masks_.key_tile(batch_, tile);
    const int first_key = transposed_ ? row_ : kTile * tile, first_query = transposed_ ? kTile * tile : row_;
    return k.all && q.last_begin <= first_key && first_key + kTile <= q.first_end &&
           (!transposed_ || first_query + kTile <= masks_.queries);  // rows beyond the last are not stored
  }

 private:
  const Masks& masks_;
  int64_t batch_;
  int row_, count_;
  bool transposed_;
  QueryTile queries_{};
  KeyTile keys_{};
};

}  // namespace fastdiff::cuda::qgfd
