// Who runs when: the part of machine.h that starts, chooses, stops and ends threads.
#pragma once

#include "machine.h"

namespace emulation {

inline std::uint64_t order_seed() {
  const char* text = std::getenv("ADCERT_EMULATION_ORDER");
  if (!text || !*text) return 0;
  char* end = nullptr;
  const std::uint64_t seed = std::strtoull(text, &end, 10);
  if (*end) throw std::runtime_error(std::string("ADCERT_EMULATION_ORDER must be an integer, got ") + text);
  return seed;
}

inline void Machine::launch(unsigned blocks, unsigned threads, std::size_t shared, Body body, void* argument) {
  if (running()) running()->fail("a kernel cannot launch another");
  if (blocks == 0 || blocks >= 1u << 31 || threads == 0 || threads > 1024 || shared > 48 << 10)
    throw std::runtime_error("emulation: invalid launch of " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads with " + std::to_string(shared) +
                             " bytes of shared memory");
  const std::uint64_t seed = order_seed();
  hostile_ = seed != 0;
  dice_ = Dice(seed);
  body_ = body;
  argument_ = argument;
  blocks_ = blocks;
  threads_.resize(threads);
  warps_.resize((threads + kWarp - 1) / kWarp);
  warp_order_.resize(warps_.size());
  shared_size_ = shared;
  shared_.reset(static_cast<std::byte*>(::operator new(shared, std::align_val_t{kAlignment})));
  std::vector<unsigned> order(hostile_ ? blocks : 0);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  dice_.shuffle(order);

  struct Running {
    explicit Running(Machine* machine) { running() = machine; }
    ~Running() { running() = nullptr; }
  } running(this);
  for (unsigned i = 0; i < blocks; ++i) {
    begin_block(hostile_ ? order[i] : i);
    go_from(host_, next());
    settle();
  }
}

inline void Machine::begin_block(unsigned block) {
  block_ = block;
  alive_ = threads();
  barred_ = 0;
  for (Thread& t : threads_) t = Thread{};
  for (unsigned w = 0; w < warps_.size(); ++w) {
    const unsigned lanes = std::min(kWarp, threads() - w * kWarp);
    warps_[w] = Warp{.ready = ~0u >> (kWarp - lanes)};
    warp_order_[w] = w;
  }
  if (hostile_) dice_.shuffle(warp_order_);
  turn_ = 0;
  warp_ = warp_order_[0];
  visit_ = warps_[warp_].ready;
  std::memset(shared_.get(), 0xA5, shared_size_);  // what it holds at first is undefined
}

// The thread to run now, or null if none can. Round robin: one visit runs the lanes of a warp that were ready.
inline Thread* Machine::next() {
  if (visit_ == 0 && !next_warp()) return nullptr;
  const int turn = hostile_ ? static_cast<int>(dice_() % kWarp) : 0;
  const unsigned lane = (static_cast<unsigned>(std::countr_zero(std::rotr(visit_, turn))) + turn) % kWarp;
  visit_ &= ~(1u << lane);
  warps_[warp_].ready &= ~(1u << lane);
  return &threads_[warp_ * kWarp + lane];
}

inline bool Machine::next_warp() {
  if (hostile_ && warps_[warp_].ready && dice_() % 4 != 0) {  // it runs ahead of the others
    visit_ = warps_[warp_].ready;
    return true;
  }
  for (std::size_t tried = 0; tried < warps_.size(); ++tried) {
    turn_ = (turn_ + 1) % warps_.size();
    warp_ = warp_order_[turn_];
    visit_ = warps_[warp_].ready;
    if (visit_) return true;
  }
  return false;
}

// To the chosen thread, on a fiber of its own, or to the host.
inline void Machine::go_from(Context& context, Thread* chosen) {
  current_ = chosen;
  if (!chosen) return context.leave_for(host_);
  if (!chosen->fiber) {
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>(&run_threads));
      idle_.push_back(fibers_.back().get());
    }
    chosen->fiber = idle_.back();
    idle_.pop_back();
  }
  context.leave_for(chosen->fiber->context);
}

// Returns when the running thread is chosen again.
inline void Machine::leave() {
  Thread* self = current_;
  Thread* chosen = next();
  if (chosen != self) go_from(self->fiber->context, chosen);
}

// What a fiber does: one thread, then the next that has not begun. So threads that never wait share one fiber.
inline void Machine::run_threads() {
  Context::entered();
  Machine& machine = here();
  for (;;) {
    machine.run_one();
    Fiber* fiber = machine.current_->fiber;
    Thread* chosen = machine.next();
    if (chosen && !chosen->fiber) {
      chosen->fiber = fiber;
      machine.current_ = chosen;
    } else {
      machine.idle_.push_back(fiber);
      machine.go_from(fiber->context, chosen);
    }
  }
}

inline void Machine::run_one() {
  try {
    body_(argument_);
  } catch (...) {
    error_ = std::current_exception();
  }
  if (error_) abandon();  // out here: a handler that never ends would stay on the host thread's books
  if (!current_->fiber->intact()) fail("stack overflow");
  exit_thread();
}

// After the host got the word back: all threads are done, or none can go on.
inline void Machine::settle() {
  if (!error_ && alive_ > 0) error_ = std::make_exception_ptr(std::runtime_error("emulation: " + deadlock()));
  if (!error_) return;
  idle_.clear();  // frames that wait are forgotten: kernels own nothing
  for (const auto& fiber : fibers_) {
    fiber->restart();
    idle_.push_back(fiber.get());
  }
  std::rethrow_exception(std::exchange(error_, nullptr));
}

}  // namespace emulation
