// Fibers: one stack each, all on one system thread, switched by hand.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <new>

#include "sanitizers.h"

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly; on other machines its tests are skipped"
#endif

namespace cuda_on_cpu {

// Saves the callee-saved registers on the stack, leaves its address in *from, and goes on where `to` was left.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.weak cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

inline void* map_stacks(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

class Fiber {
 public:
  static constexpr size_t kStackBytes = 128 << 10;

  // `entry` never returns. Stacks that start at staggered addresses do not fight for the same cache sets.
  EMULATOR_INTERNAL void start(char* stack, unsigned number, void (*entry)()) {
    stack_ = stack;
    unpoison(stack, kStackBytes);  // frames that never returned are AddressSanitizer's poison still
    const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + kStackBytes - number * 7 % 64 * 192) & ~uintptr_t{63};
    void** slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;  // the return address of `entry`, and what aligns its stack
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--slot = nullptr;  // the registers that the switch restores
    pointer_ = slot;
#ifdef EMULATOR_TSAN
    tsan_ = __tsan_create_fiber(0);
    char name[32];
    std::snprintf(name, sizeof name, "CUDA thread %u", number);
    __tsan_set_fiber_name(tsan_, name);
#endif
  }

  void destroy() {
#ifdef EMULATOR_TSAN
    __tsan_destroy_fiber(tsan_);
#endif
  }

  // From the system thread into the fiber, until it gives control back.
  EMULATOR_INTERNAL void enter(Fiber& thread) {
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&thread.fake_stack_, stack_, kStackBytes);
#endif
#ifdef EMULATOR_TSAN
    thread.tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, 1);
#endif
    cuda_on_cpu_switch(&thread.pointer_, pointer_);
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(thread.fake_stack_, nullptr, nullptr);
#endif
  }

  // From the fiber back to the system thread; `last`: it will not be entered again.
  EMULATOR_INTERNAL void leave(Fiber& thread, [[maybe_unused]] bool last) {
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, thread.bottom_, thread.size_);
#endif
#ifdef EMULATOR_TSAN
    __tsan_switch_to_fiber(thread.tsan_, 1);
#endif
    cuda_on_cpu_switch(&pointer_, thread.pointer_);
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, &thread.bottom_, &thread.size_);
#endif
  }

  // The first thing a fiber does: AddressSanitizer tells it where the system thread's stack is.
  EMULATOR_INTERNAL void arrived([[maybe_unused]] Fiber& thread) {
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &thread.bottom_, &thread.size_);
#endif
  }

 private:
  void* pointer_ = nullptr;
  char* stack_ = nullptr;
#ifdef EMULATOR_ASAN
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;  // of the system thread's stack
  size_t size_ = 0;
#endif
#ifdef EMULATOR_TSAN
  void* tsan_ = nullptr;
#endif
};

}  // namespace cuda_on_cpu
