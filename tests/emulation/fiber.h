// Fibers: stacks that wait in the middle of a function, and the switch from one to another.
//
// On x86-64 the switch is written out, since ucontext's asks the system for the signal mask each time. Elsewhere, and
// with ADCERT_EMULATION_UCONTEXT, it is ucontext's.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstring>
#include <new>

#if !defined(__x86_64__) && !defined(ADCERT_EMULATION_UCONTEXT)
#define ADCERT_EMULATION_UCONTEXT
#endif
#ifdef ADCERT_EMULATION_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

#ifndef ADCERT_EMULATION_UCONTEXT
// Saves the callee's registers and the stack pointer, then takes the other's. noipa: g++ must not look inside and
// conclude that nothing is clobbered.
[[gnu::naked, gnu::noipa]] inline void switch_stacks([[maybe_unused]] void** save, [[maybe_unused]] void* load) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

// A place to continue: the host's stack or a fiber's. The address sanitizer has to hear of every switch.
class Context {
 public:
  // Continues at entry, on this stack; entry must not return and has to call entered() first.
  void start(std::byte* stack, std::size_t size, void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, size);  // frames that were abandoned
    fake_ = nullptr;
    stack_ = stack;
    size_ = size;
#endif
#ifdef ADCERT_EMULATION_UCONTEXT
    getcontext(&state_);
    state_.uc_stack = {};
    state_.uc_stack.ss_sp = stack;
    state_.uc_stack.ss_size = size;
    state_.uc_link = nullptr;
    makecontext(&state_, entry, 0);
#else
    auto** top = reinterpret_cast<void**>(stack + size) - 8;  // six registers, where to return, no caller
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(entry);
    state_ = top;
#endif
  }

  // Waits here until somebody goes to this context; for_good: nobody ever will.
  void leave_for(Context& other, [[maybe_unused]] bool for_good = false) {
    left() = this;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_, other.stack_, other.size_);
#endif
#ifdef ADCERT_EMULATION_UCONTEXT
    swapcontext(&state_, &other.state_);
#else
    switch_stacks(&state_, other.state_);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_, &left()->stack_, &left()->size_);
#endif
  }

  static void entered() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &left()->stack_, &left()->size_);
#endif
  }

 private:
  static Context*& left() {  // whom the running one came from
    static thread_local Context* context = nullptr;
    return context;
  }

#ifdef ADCERT_EMULATION_UCONTEXT
  ucontext_t state_{};
#else
  void* state_ = nullptr;
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake_ = nullptr;
  const void* stack_ = nullptr;
  std::size_t size_ = 0;
#endif
};

// A stack with its context. Below the stack lies as much spare memory, of which the first page holds a pattern: who
// broke it used too much. Below that nothing is mapped, so that a greater excess ends the process and spoils nothing.
class Fiber {
 public:
#if defined(__SANITIZE_ADDRESS__) || !defined(__OPTIMIZE__)
  static constexpr std::size_t kStack = 256 << 10;
#else
  static constexpr std::size_t kStack = 64 << 10;
#endif

  explicit Fiber(void (*entry)()) : entry_(entry) {
    void* memory = mmap(nullptr, 3 * kStack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<std::byte*>(memory);
    if (mprotect(spare(), 2 * kStack, PROT_READ | PROT_WRITE) != 0) {
      munmap(memory_, 3 * kStack);
      throw std::bad_alloc();
    }
    restart();
  }
  ~Fiber() { munmap(memory_, 3 * kStack); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Forgets what it was doing.
  void restart() {
    context.start(stack(), kStack, entry_);
    std::memset(guard(), static_cast<int>(kPattern), kGuarded);
  }

  // The caller, on this fiber, is still within its stack.
  bool holds() { return static_cast<std::byte*>(__builtin_frame_address(0)) >= stack(); }

  // Nobody on this fiber ever left its stack.
  bool intact() { return *guard() == kPattern && std::memcmp(guard(), guard() + 1, kGuarded - 1) == 0; }

  Context context;

 private:
  static constexpr std::size_t kGuarded = 4096;
  static constexpr std::byte kPattern{0x5c};

  std::byte* spare() { return memory_ + kStack; }
  std::byte* stack() { return memory_ + 2 * kStack; }
  std::byte* guard() { return stack() - kGuarded; }

  void (*entry_)();
  std::byte* memory_ = nullptr;
};

}  // namespace emulation
