// One CUDA block at a time on the CPU: its threads, barriers, warp exchanges, shared memory, and who runs next.
#pragma once
#include <vector_types.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "async_copy.h"
#include "fiber.h"

namespace cuda_on_cpu {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStaticSharedLimit = 48 << 10;  // what nvcc allows, and a launch without opt-in too

struct Config {
  int schedule = 0;                          // 0: threads and blocks in order, 1: backwards, n: shuffled with seed n
  size_t shared_limit = kStaticSharedLimit;  // bytes a block may have, static and dynamic together
  int64_t max_grid = 2147483647;             // blocks in x that a launch may have; less, to test loops over the rest
  unsigned char poison = 0xff;               // what shared memory holds at first: NaN in every float type
};
inline Config& config() {
  static Config c;
  return c;
}

struct Site {  // where a thread is in the source
  const char* what = "running";
  const char* file = "";
  int line = 0;
  bool operator==(const Site& o) const { return line == o.line && !std::strcmp(file, o.file); }
};

// What the lanes named by `mask` give one another. Two generations of slots: nobody overwrites what others still read.
struct Exchange {
  static constexpr size_t kBytes = 48;
  uint32_t mask = 0, arrived = 0;
  volatile uint32_t generation = 0;
  Site site;
  unsigned char slot[2][kWarpSize][kBytes];
  char ordering[2];
};

struct Warp {
  uint32_t alive = 0;
  std::vector<Exchange*> exchanges;  // one for every mask in use
};

struct Thread {
  uint3 index{};
  unsigned number = 0, lane = 0;
  Warp* warp = nullptr;
  bool done = true;
  const volatile uint32_t* counter = nullptr;  // waits until *counter differs from `seen`
  uint32_t seen = 0;
  Site site;
  AsyncCopies copies;
  Fiber fiber;
};

struct StaticShared {
  const void* key;
  unsigned char* data;
  size_t bytes, capacity;
};

struct Block {
  uint3 index{};
  dim3 size, grid;
  unsigned threads = 0, alive = 0;
  std::vector<Thread> thread{kMaxThreads};
  std::vector<Warp> warp{kMaxThreads / kWarpSize};
  Thread* current = nullptr;
  Fiber system;  // the thread that runs the fibers
  char* stacks = nullptr;

  volatile uint32_t barrier_generation = 0;
  unsigned barrier_arrived = 0;
  Site barrier_site;
  int barrier_votes[2];
  char barrier_ordering[2], started;

  unsigned char* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  std::vector<StaticShared> static_shared;

  void (*kernel)(const void*) = nullptr;
  const void* closure = nullptr;
  std::string error;
};
inline Block* g_block = nullptr;
inline char g_finished;  // every thread's end is before the launch's end

EMULATOR_INTERNAL inline std::string where(const Thread& t) {
  const Block& b = *g_block;
  const auto triple = [](const uint3& v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
  };
  std::string s = "block" + triple(b.index) + " thread" + triple(t.index) + " ";
  if (t.done) return s + "has exited";
  return s + "in " + t.site.what + " at " + t.site.file + ":" + std::to_string(t.site.line);
}

// The block ends here, with this as the launch's error.
[[noreturn]] EMULATOR_INTERNAL inline void fail(const std::string& message) {
  Block& b = *g_block;
  b.error = message + ": " + where(*b.current);
  b.current->fiber.leave(b.system, true);
  std::abort();  // a failed block's threads are never entered again
}

EMULATOR_INTERNAL inline void wait_until_changed(const volatile uint32_t* counter, uint32_t seen) {
  Thread& t = *g_block->current;
  t.counter = counter;
  t.seen = seen;
  t.fiber.leave(g_block->system, false);
}

// Returns whether any thread came with a vote.
EMULATOR_INTERNAL inline int barrier(const Site& site, bool vote = false) {
  Unwatched scope;
  Block& b = *g_block;
  b.current->site = site;
  const uint32_t generation = b.barrier_generation;
  publish(&b.barrier_ordering[generation & 1]);
  if (b.alive != b.threads) fail("a barrier that some threads of the block will never reach, having exited");
  int& votes = b.barrier_votes[generation & 1];
  if (b.barrier_arrived == 0) {
    b.barrier_site = site;
    votes = 0;
  }
  votes |= vote;
  if (!(b.barrier_site == site)) {
    fail("divergent barrier, others wait at " + std::string(b.barrier_site.file) + ":" +
         std::to_string(b.barrier_site.line));
  }
  if (++b.barrier_arrived == b.alive) {
    b.barrier_arrived = 0;
    b.barrier_generation = generation + 1;
  } else {
    wait_until_changed(&b.barrier_generation, generation);
  }
  observe(&b.barrier_ordering[generation & 1]);
  return votes;
}

EMULATOR_INTERNAL inline Exchange& exchange_of(Warp& warp, uint32_t mask) {
  Exchange* found = nullptr;
  for (Exchange* e : warp.exchanges) {
    if (e->mask == mask) found = e;
    if (e->mask != mask && e->arrived && (e->mask & mask)) fail("divergent warp exchange, masks overlap");
  }
  if (!found) {
    found = new Exchange;
    found->mask = mask;
    warp.exchanges.push_back(found);
  }
  return *found;
}

// Every lane of `mask` leaves `bytes` of data and gets the slots of all. Only __syncwarp orders memory.
EMULATOR_INTERNAL inline unsigned char (*exchange(uint32_t mask, const void* data, size_t bytes, const Site& site,
                                                  bool orders_memory))[Exchange::kBytes] {
  Unwatched scope;
  Block& b = *g_block;
  Thread& t = *b.current;
  t.site = site;
  if (!(mask >> t.lane & 1)) fail("the mask of a warp exchange does not name the calling lane");
  if (mask & ~t.warp->alive) fail("the mask of a warp exchange names a lane that has exited or never was");
  Exchange& e = exchange_of(*t.warp, mask);
  if (!e.arrived) e.site = site;
  if (!(e.site == site)) fail("divergent warp exchange, other lanes are at line " + std::to_string(e.site.line));
  const uint32_t generation = e.generation;
  auto* slots = e.slot[generation & 1];
  if (bytes) std::memcpy(slots[t.lane], data, bytes);
  if (orders_memory) publish(&e.ordering[generation & 1]);
  e.arrived |= 1u << t.lane;
  if (e.arrived == mask) {
    e.arrived = 0;
    e.generation = generation + 1;
  } else {
    wait_until_changed(&e.generation, generation);
  }
  if (orders_memory) observe(&e.ordering[generation & 1]);
  return slots;
}

// Shared memory ends where the array ends: AddressSanitizer sees the bytes up to the next 128 as poisoned.
EMULATOR_INTERNAL inline unsigned char* new_shared(size_t bytes, size_t capacity) {
  auto* p = static_cast<unsigned char*>(std::aligned_alloc(128, capacity));
  if (!p) throw std::bad_alloc();
  std::memset(p, config().poison, bytes);
  poison(p + bytes, capacity - bytes);
  return p;
}
EMULATOR_INTERNAL inline void free_shared(unsigned char* p, size_t capacity) {
  unpoison(p, capacity);
  std::free(p);
}
constexpr size_t shared_capacity(size_t bytes) { return (bytes + 127) / 128 * 128; }

EMULATOR_INTERNAL inline void* static_shared(const void* key, size_t bytes, const Site& site) {
  Unwatched scope;
  Block& b = *g_block;
  b.current->site = site;
  size_t total = b.dynamic_bytes + bytes;
  for (const StaticShared& s : b.static_shared) {
    if (s.key == key) return s.data;
    total += s.bytes;
  }
  if (total > config().shared_limit) {
    fail("shared memory: " + std::to_string(total) + " bytes a block, the limit is " +
         std::to_string(config().shared_limit));
  }
  b.static_shared.push_back({key, new_shared(bytes, shared_capacity(bytes)), bytes, shared_capacity(bytes)});
  return b.static_shared.back().data;
}

EMULATOR_INTERNAL inline void check_aligned(const void* p, size_t bytes, const Site& site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  Unwatched scope;
  g_block->current->site = site;
  fail("misaligned access of " + std::to_string(bytes) + " bytes");
}

EMULATOR_INTERNAL inline void end_thread() {
  publish(&g_finished);
  Block& b = *g_block;
  Thread& t = *b.current;
  t.site.what = "its end";
  if (b.barrier_arrived) fail("a thread exits while others wait in a barrier");
  if (!t.copies.copies.empty()) fail("a thread exits without having waited for its copies to shared memory");
  t.done = true;
  t.warp->alive &= ~(1u << t.lane);
  --b.alive;
}

inline void thread_main() {  // watched: the kernel runs in it
  {
    Unwatched scope;
    g_block->current->fiber.arrived(g_block->system);
    observe(&g_block->started);
  }
  g_block->kernel(g_block->closure);
  {
    Unwatched scope;  // ended before the last switch, as ThreadSanitizer demands
    end_thread();
  }
  g_block->current->fiber.leave(g_block->system, true);
  std::abort();
}

EMULATOR_INTERNAL inline void begin_block(Block& b) {
#ifdef EMULATOR_TSAN  // a stack that served another block would look like shared data
  b.stacks = static_cast<char*>(map_stacks(b.threads * Fiber::kStackBytes));
#endif
  for (Warp& w : b.warp) w.alive = 0;
  for (unsigned i = 0; i < b.threads; ++i) {
    Thread& t = b.thread[i];
    t.index = {i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y)};
    t.number = i;
    t.lane = i % kWarpSize;
    t.warp = &b.warp[i / kWarpSize];
    t.warp->alive |= 1u << t.lane;
    t.done = false;
    t.counter = nullptr;
    t.site = {};
    t.copies = {};
    t.fiber.start(b.stacks + i * Fiber::kStackBytes, i, &thread_main);
  }
  b.alive = b.threads;
  b.barrier_arrived = 0;
  if (b.dynamic_bytes) b.dynamic_shared = new_shared(b.dynamic_bytes, shared_capacity(b.dynamic_bytes));
  publish(&b.started);
}

EMULATOR_INTERNAL inline void end_block(Block& b) {
  for (unsigned i = 0; i < b.threads; ++i) b.thread[i].fiber.destroy();
#ifdef EMULATOR_TSAN
  munmap(b.stacks, b.threads * Fiber::kStackBytes);
#endif
  for (Warp& w : b.warp) {
    for (Exchange* e : w.exchanges) delete e;
    w.exchanges.clear();
  }
  for (const StaticShared& s : b.static_shared) free_shared(s.data, s.capacity);
  b.static_shared.clear();
  if (b.dynamic_shared) free_shared(b.dynamic_shared, shared_capacity(b.dynamic_bytes));
  b.dynamic_shared = nullptr;
}

// Lets the runnable threads of one warp go on until each waits or is done. Returns whether any ran.
EMULATOR_INTERNAL inline bool run_warp(Block& b, unsigned warp, std::vector<unsigned>& lanes, std::mt19937& random) {
  bool any = false;
  for (bool progress = true; progress && b.error.empty();) {
    progress = false;
    if (config().schedule >= 2) std::shuffle(lanes.begin(), lanes.end(), random);
    for (const unsigned lane : lanes) {
      const unsigned i = warp * kWarpSize + lane;
      if (i >= b.threads) continue;
      Thread& t = b.thread[i];
      if (t.done || (t.counter && *t.counter == t.seen)) continue;
      t.counter = nullptr;
      t.site = {};
      b.current = &t;
      t.fiber.enter(b.system);
      progress = any = true;
      if (!b.error.empty()) break;
    }
  }
  return any;
}

EMULATOR_INTERNAL inline std::vector<unsigned> in_schedule(unsigned n) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (config().schedule == 1) std::reverse(order.begin(), order.end());
  return order;
}

EMULATOR_INTERNAL inline void report_deadlock(Block& b) {
  b.error = "deadlock:";
  int named = 0;
  for (unsigned i = 0; i < b.threads && named < 3; ++i) {
    if (b.thread[i].done) continue;
    b.error += (named++ ? "; " : " ") + where(b.thread[i]);
  }
}

EMULATOR_INTERNAL inline void run_block(Block& b) {
  Unwatched scope;
  begin_block(b);
  std::mt19937 random(static_cast<unsigned>(config().schedule) * 7919u + b.index.x * 31u + b.index.y * 17u);
  std::vector<unsigned> warps = in_schedule((b.threads + kWarpSize - 1) / kWarpSize);
  std::vector<unsigned> lanes = in_schedule(kWarpSize);
  while (b.alive && b.error.empty()) {
    if (config().schedule >= 2) std::shuffle(warps.begin(), warps.end(), random);
    bool any = false;
    for (const unsigned w : warps) any = run_warp(b, w, lanes, random) || any;
    if (!any && b.error.empty()) report_deadlock(b);
  }
  end_block(b);
}

EMULATOR_INTERNAL inline void check_launch(dim3 grid, dim3 block, size_t dynamic_bytes) {
  const auto refuse = [](const std::string& why) { throw std::invalid_argument("launch refused: " + why); };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) refuse(std::to_string(threads) + " threads a block");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
    refuse("grid (" + std::to_string(grid.x) + "," + std::to_string(grid.y) + "," + std::to_string(grid.z) + ")");
  }
  if (dynamic_bytes > config().shared_limit) {
    refuse("shared memory: " + std::to_string(dynamic_bytes) + " bytes a block, the limit is " +
           std::to_string(config().shared_limit));
  }
}

EMULATOR_INTERNAL inline void launch(dim3 grid, dim3 size, size_t dynamic_bytes, void (*kernel)(const void*),
                                     const void* closure) {
  Unwatched scope;
  check_launch(grid, size, dynamic_bytes);
  static Block b;
  g_block = &b;
  b.size = size;
  b.grid = grid;
  b.threads = size.x * size.y * size.z;
  b.dynamic_bytes = dynamic_bytes;
  b.kernel = kernel;
  b.closure = closure;
  b.error.clear();
#ifndef EMULATOR_TSAN
  if (!b.stacks) b.stacks = static_cast<char*>(map_stacks(kMaxThreads * Fiber::kStackBytes));
#endif
  std::vector<unsigned> order = in_schedule(grid.x * grid.y * grid.z);
  if (config().schedule >= 2) std::shuffle(order.begin(), order.end(), std::mt19937(config().schedule));
  for (const unsigned i : order) {
    b.index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    run_block(b);
    if (b.error.empty()) continue;
    throw std::runtime_error(b.error);
  }
  observe(&g_finished);
}

}  // namespace cuda_on_cpu
