// What the tiles of masks hold, looked at once for all passes.
#pragma once
#include "kernels/qgfd/qgfd_masks.cuh"

namespace fastdiff::cuda::qgfd {

// A warp a tile: those of queries, then those of keys, of each sample.
__global__ __launch_bounds__(128) void mask_tiles_kernel(const __grid_constant__ Masks m, int64_t batch,
                                                         QueryTile* query_tiles, KeyTile* key_tiles) {
  const int of_queries = Masks::tiles(m.queries), of_keys = Masks::tiles(m.keys), all = of_queries + of_keys;
  const int64_t step = int64_t{gridDim.x} * (blockDim.x / kWarp);
  for (int64_t i = int64_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp; i < batch * all; i += step) {
    const int64_t b = i / all;
    const int tile = static_cast<int>(i - b * all);
    if (tile >= of_queries) {
      const int first = kTile * (tile - of_queries) + lane_id();
      const int attended = m.attended(b, first) + m.attended(b, first + kWarp);
      const uint8_t any = warp_any(attended > 0), all_of = !warp_any(attended < 2);
      if (lane_id() == 0) key_tiles[b * of_keys + tile - of_queries] = {any, all_of};
      continue;
    }
    QueryTile t{kNone, 0, kNone, 0};
    for (int query = kTile * tile + lane_id(); query < min(kTile * (tile + 1), m.queries); query += kWarp) {
      const Interval keys = m.interval(b, query);
      t = {min(t.first_begin, keys.begin), max(t.last_begin, keys.begin), min(t.first_end, keys.end),
           max(t.last_end, keys.end)};
    }
    t.first_begin = warp_min(t.first_begin);
    t.last_begin = -warp_min(-t.last_begin);
    t.first_end = warp_min(t.first_end);
    t.last_end = -warp_min(-t.last_end);
    if (lane_id() == 0) query_tiles[b * of_queries + tile] = t;
  }
}

}  // namespace fastdiff::cuda::qgfd
