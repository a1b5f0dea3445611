// How a CPU kernel gets its threads: the caller lends a loop (torch's pool, a plain loop, another runtime's).
// Plain function pointers, no std types: this header is included by files compiled for one instruction set each.
#pragma once
#include <cstdint>

namespace fastdiff::cpu {

struct ParallelFor {
  using Body = void (*)(const void* closure, int64_t begin, int64_t end);
  // Calls body(closure, b, e) on ranges that cover [begin, end), each at least `grain` long where possible.
  void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, const void* closure);

  template <class F>
  void operator()(int64_t begin, int64_t end, int64_t grain, const F& f) const {
    if (begin >= end) return;
    run(begin, end, grain < 1 ? 1 : grain,
        [](const void* closure, int64_t b, int64_t e) { (*static_cast<const F*>(closure))(b, e); }, &f);
  }
};

}  // namespace fastdiff::cpu
