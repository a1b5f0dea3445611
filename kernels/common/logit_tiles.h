// Logits that never lie whole in memory: a head's product made a tile at a time by whoever calls the kernel.
#pragma once
#include <cstdint>

namespace fastdiff {

constexpr int64_t kLogitBlock = 1024;  // ids that are read, and added up, at a time
constexpr int64_t kLogitCell = 128;    // a part of a block

// Some rows' logits of some ids: [rows, end - begin] of the head's dtype, contiguous.
struct HeadTile {
  int64_t first_row;
  int64_t rows;
  int64_t begin;
  int64_t end;
  void* logits;
};

// Lent by the caller, who has a fast matrix product: fills a tile. A CPU kernel calls it from several threads at once,
// each for a tile of its own.
struct HeadProduct {
  void (*run)(void* context, const HeadTile& tile);
  void* context;
};

}  // namespace fastdiff
