#include "kernels/common/tuning.h"

#include <atomic>
#include <cstring>

namespace fastdiff::cpu {
namespace {

constexpr int64_t kGrain = 16384, kStream = int64_t(40) << 20;
std::atomic<int64_t> grain{kGrain}, stream{kStream};

}  // namespace

int64_t thread_grain() { return grain.load(std::memory_order_relaxed); }

int64_t stream_bytes() { return stream.load(std::memory_order_relaxed); }

bool set_tuning(const char* name, int64_t value) {
  if (value < 0) return false;
  if (std::strcmp(name, "thread_grain") == 0)
    grain.store(value ? value : kGrain, std::memory_order_relaxed);
  else if (std::strcmp(name, "stream_bytes") == 0)
    stream.store(value ? value : kStream, std::memory_order_relaxed);
  else
    return false;
  return true;
}

}  // namespace fastdiff::cpu
