// What the emulator must tell AddressSanitizer and ThreadSanitizer about fibers; nothing in builds without them.
#pragma once
#include <cstddef>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define EMULATOR_TSAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) && !defined(EMULATOR_ASAN)
#define EMULATOR_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__) && !defined(EMULATOR_TSAN)
#define EMULATOR_TSAN 1
#endif

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
// The emulator's own state is shared by all fibers of its one system thread, which is no race.
#define EMULATOR_INTERNAL __attribute__((no_sanitize("thread"), noinline))
#else
#define EMULATOR_INTERNAL __attribute__((noinline))
#endif

namespace cuda_on_cpu {

// No access is looked at while one of these lives: the emulator's own.
struct Unwatched {
#ifdef EMULATOR_TSAN
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Unwatched() {}
#endif
};

// What happened before publish(x) in one fiber is visible after observe(x) in another. Fiber switches themselves order
// nothing (their flag below is 1), or no race would ever be seen.
inline void publish([[maybe_unused]] void* x) {
#ifdef EMULATOR_TSAN
  __tsan_release(x);
#endif
}
inline void observe([[maybe_unused]] void* x) {
#ifdef EMULATOR_TSAN
  __tsan_acquire(x);
#endif
}

inline void poison([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ASAN
  __asan_poison_memory_region(p, bytes);
#endif
}
inline void unpoison([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(p, bytes);
#endif
}

}  // namespace cuda_on_cpu
