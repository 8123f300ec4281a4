// Runs the threads of a kernel as fibers of one host thread and holds them to the rules of the collectives.
//
// Blocks run one after the other. A thread runs until it waits in a collective, which completes when every thread it
// is for has arrived; then all of them may go on. The order is the natural one, or with the environment variable
// ADCERT_EMULATION_ORDER (a seed, not 0) a hostile one: blocks, warps and lanes in pseudo-random order, warps that run
// ahead of others, and threads that stop before an atomic. What CUDA leaves undefined is an error here.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <source_location>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulation {

using Where = std::source_location;

constexpr unsigned kWarp = 32;

// A thread's part in a collective. value and argument are bits of whatever the collective takes.
struct Call {
  const char* name;
  unsigned mask;  // 0: all of the block
  Where where;
  std::uint64_t value = 0;
  std::uint64_t argument = 0;
};

struct Thread {
  Fiber* fiber = nullptr;  // once it has begun
  Call call{};             // where it waits
  std::uint64_t result = 0;
};

using Threads = std::span<Thread>;
// Sets the results of a collective: of the lanes in call.mask among those of the warp, or of the whole block.
using Answer = void (*)(Threads threads, const Call& call);

struct Warp {
  unsigned ready = 0;    // lanes that can run, begun or not
  unsigned waiting = 0;  // in a collective of the warp
  unsigned met = 0;      // those of them that wait in the same one as who came last
  unsigned barred = 0;   // in a collective of the block
  unsigned exited = 0;
};

// Numbers that look random (splitmix64).
class Dice {
 public:
  explicit Dice(std::uint64_t seed = 0) : state_(seed) {}
  std::uint64_t operator()() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  void shuffle(std::vector<unsigned>& order) {
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[(*this)() % i]);
  }

 private:
  std::uint64_t state_;
};

class Machine {
 public:
  using Body = void (*)(void*);

  // Every launch of this host thread.
  static Machine& here() {
    static thread_local Machine machine;
    return machine;
  }
  // The one that is running a kernel on this host thread, or null.
  static Machine*& running() {
    static thread_local Machine* machine = nullptr;
    return machine;
  }
  // For everything that exists inside kernels only.
  static Machine& inside(const char* name) {
    if (!running()) throw std::runtime_error(std::string("emulation: ") + name + " outside of a kernel");
    return *running();
  }

  void launch(unsigned blocks, unsigned threads, std::size_t shared, Body body, void* argument);

  std::uint64_t warp_collective(const Call& call, Answer answer);
  std::uint64_t block_collective(const Call& call, Answer answer);
  // Perhaps lets others run first.
  void interleave() {
    if (!hostile_ || dice_() % 4 != 0) return;
    warp_of(*current_).ready |= bit_of(*current_);
    leave();
  }
  // Ends the launch with an error that names the running thread.
  [[noreturn]] void fail(const std::string& what) {
    error_ = std::make_exception_ptr(std::runtime_error("emulation: " + name_of(*current_) + ": " + what));
    abandon();
  }

  unsigned thread() const { return index_of(*current_); }
  unsigned block() const { return block_; }
  unsigned threads() const { return static_cast<unsigned>(threads_.size()); }
  unsigned blocks() const { return blocks_; }
  void* shared() { return shared_.get(); }

 private:
  static constexpr std::size_t kAlignment = 16;
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
  };

  unsigned index_of(const Thread& t) const { return static_cast<unsigned>(&t - threads_.data()); }
  unsigned bit_of(const Thread& t) const { return 1u << (index_of(t) % kWarp); }
  Warp& warp_of(const Thread& t) { return warps_[index_of(t) / kWarp]; }
  Threads lanes_of(const Thread& t) {
    const std::size_t first = index_of(t) / kWarp * kWarp;
    return Threads(threads_).subspan(first, std::min<std::size_t>(kWarp, threads_.size() - first));
  }
  std::string name_of(const Thread& t) const {
    const unsigned i = index_of(t);
    return "block " + std::to_string(block_) + ", thread " + std::to_string(i) + " (warp " + std::to_string(i / kWarp) +
           ", lane " + std::to_string(i % kWarp) + ")";
  }

  // Order
  void begin_block(unsigned block);
  Thread* next();
  bool next_warp();
  void go_from(Context& context, Thread* chosen);
  void leave();
  [[noreturn]] void abandon() {
    current_->fiber->context.leave_for(host_, true);
    std::abort();  // nobody comes back
  }
  static void run_threads();
  void run_one();
  void exit_thread();
  void settle();
  std::string deadlock() const;

  // Rules
  void check_stack(const Call& call);
  void check_warp_call(const Call& call);
  void check_partner(const Call& call, unsigned lane);

  Body body_ = nullptr;
  void* argument_ = nullptr;
  unsigned blocks_ = 0;
  unsigned block_ = 0;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Thread* current_ = nullptr;
  unsigned alive_ = 0;
  unsigned barred_ = 0;  // threads in a collective of the block
  std::size_t shared_size_ = 0;
  std::unique_ptr<std::byte, Free> shared_;

  bool hostile_ = false;
  Dice dice_;
  std::vector<unsigned> warp_order_;
  std::size_t turn_ = 0;  // in warp_order_
  unsigned warp_ = 0;     // being visited
  unsigned visit_ = 0;    // its lanes still to run in this visit

  Context host_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  std::exception_ptr error_;
};

}  // namespace emulation

#include "machine_order.h"
#include "machine_rules.h"

namespace emulation {

// Runs body once for every thread of every block. Errors of the kernel are thrown here, as std::runtime_error.
template <class F>
void launch(unsigned blocks, unsigned threads, std::size_t shared, F&& body) {
  using Plain = std::remove_reference_t<F>;
  Machine::here().launch(
      blocks, threads, shared, [](void* f) { (*static_cast<Plain*>(f))(); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

// The block's dynamic shared memory, aligned to 16 bytes, filled with 0xA5 when a block begins.
inline void* dynamic_shared() { return Machine::inside("dynamic shared memory").shared(); }

}  // namespace emulation
