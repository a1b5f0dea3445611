#include "kernels/common/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastdiff::cpu {
namespace {

std::string& error() {
  static std::string text;
  return text;
}

int index_of(const char* name) {
  for (int i = 0; i < kIsaCount; i++)
    if (std::strcmp(name, kIsaNames[i]) == 0) return i;
  return -1;
}

Isa from_environment() {
  const char* name = std::getenv("FASTDIFF_CPU_ISA");
  if (name == nullptr || *name == '\0') return best_isa();
  const int i = index_of(name);
  if (i >= 0 && i <= static_cast<int>(best_isa())) return static_cast<Isa>(i);
  error() = std::string("FASTDIFF_CPU_ISA is '") + name + "'; expected one of";
  for (int k = 0; k <= static_cast<int>(best_isa()); k++) error() += std::string(k ? ", " : " ") + kIsaNames[k];
  error() += " (what this CPU and build can run)";
  return best_isa();
}

std::atomic<int>& current() {
  static std::atomic<int> isa{static_cast<int>(from_environment())};
  return isa;
}

// Whether the CPU has AMX's tiles and bf16 products, and the system lends them: Linux does to a process that asks.
[[maybe_unused]] bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool has = [] {
    unsigned a, b, c, d;
    constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kBf16) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return Isa::kBaseline;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
    return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  return has_amx() ? Isa::kAmxBf16 : Isa::kAvx512Bf16;
#else
  return Isa::kBaseline;
#endif
}

Isa chosen_isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

bool choose_isa(const char* name) {
  const int i = index_of(name);
  if (i < 0 || i > static_cast<int>(best_isa())) return false;
  current().store(i, std::memory_order_relaxed);
  return true;
}

const char* isa_error() {
  current();
  return error().empty() ? nullptr : error().c_str();
}

}  // namespace fastdiff::cpu
