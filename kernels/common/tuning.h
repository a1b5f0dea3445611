// Sizes at which a CPU kernel changes how it works. They never change what it computes, not in one bit.
#pragma once
#include <cstdint>

namespace fastdiff::cpu {

// Elements that a thread should have before a second one is woken: 16 384 unless it was set.
int64_t thread_grain();

// A call that moves at least so many bytes finds nothing in the caches afterwards; its outputs are then stored past them,
// which saves the read of a line that a plain store begins with. 40 MiB unless it was set (fastdiff/tuning.py sets it by
// the machine's caches).
int64_t stream_bytes();

// Sets "thread_grain" or "stream_bytes" for the whole process; 0 goes back to the default. False, and nothing changes,
// for another name or a negative value.
bool set_tuning(const char* name, int64_t value);

}  // namespace fastdiff::cpu
