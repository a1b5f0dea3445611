// Which instruction set the CPU kernels run with: found at load, overridable by FASTDIFF_CPU_ISA.
#pragma once

namespace fastdiff::cpu {

// Ordered: each runs wherever a later one does. "baseline" is SSE2 on x86-64 and NEON on aarch64.
enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmxBf16 = 4 };
constexpr int kIsaCount = 5;
inline constexpr const char* kIsaNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

Isa best_isa();    // the best that this CPU, its operating system and this build can run
Isa chosen_isa();  // what kernels run with: FASTDIFF_CPU_ISA, else best_isa(), unless choose_isa() was called
// False (and nothing changes) for an unknown name or an instruction set that cannot run here.
bool choose_isa(const char* name);
// The reason why FASTDIFF_CPU_ISA could not be obeyed, or nullptr.
const char* isa_error();

// One entry an instruction set; nullptr where this build has none (anything but baseline on aarch64).
template <class F>
struct IsaTable {
  F* entry[kIsaCount];
  F* chosen() const { return entry[static_cast<int>(chosen_isa())]; }
};

// In namespace fastdiff::cpu, for a function that each instruction set's namespace has:
//   FASTDIFF_ISA_DECLARE(void name(const Params&, const ParallelFor&))      declares it in all of them
//   FASTDIFF_ISA_TABLE(name).chosen()                                       is the one to call
// AMX's tiles serve kernels that multiply matrices: they have a namespace more, declared by FASTDIFF_ISA_DECLARE_AMX, and
// FASTDIFF_ISA_TABLE_AMX for a table. The others run there as they do with AVX-512-BF16.
#if defined(__x86_64__) && defined(FASTDIFF_SANITIZE)  // two are compiled: each takes long with the sanitizers
#define FASTDIFF_ISA_DECLARE(...)       \
  namespace baseline { __VA_ARGS__; }    \
  namespace avx512 { __VA_ARGS__; }
#define FASTDIFF_ISA_DECLARE_AMX(...)
#define FASTDIFF_ISA_TABLE(name)      \
  (IsaTable<decltype(baseline::name)>{ \
      {&baseline::name, &baseline::name, &avx512::name, &avx512::name, &avx512::name}})
#define FASTDIFF_ISA_TABLE_AMX FASTDIFF_ISA_TABLE
#elif defined(__x86_64__)
#define FASTDIFF_ISA_DECLARE(...)       \
  namespace baseline { __VA_ARGS__; }    \
  namespace avx2 { __VA_ARGS__; }        \
  namespace avx512 { __VA_ARGS__; }      \
  namespace avx512_bf16 { __VA_ARGS__; }
#define FASTDIFF_ISA_TABLE(name)      \
  (IsaTable<decltype(baseline::name)>{ \
      {&baseline::name, &avx2::name, &avx512::name, &avx512_bf16::name, &avx512_bf16::name}})
#define FASTDIFF_ISA_DECLARE_AMX(...) \
  namespace amx_bf16 { __VA_ARGS__; }
#define FASTDIFF_ISA_TABLE_AMX(name)  \
  (IsaTable<decltype(baseline::name)>{ \
      {&baseline::name, &avx2::name, &avx512::name, &avx512_bf16::name, &amx_bf16::name}})
#else
#define FASTDIFF_ISA_DECLARE(...) \
  namespace baseline { __VA_ARGS__; }
#define FASTDIFF_ISA_DECLARE_AMX(...)
#define FASTDIFF_ISA_TABLE(name) \
  (IsaTable<decltype(baseline::name)>{{&baseline::name, nullptr, nullptr, nullptr, nullptr}})
#define FASTDIFF_ISA_TABLE_AMX FASTDIFF_ISA_TABLE
#endif

}  // namespace fastdiff::cpu
