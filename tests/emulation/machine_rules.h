// What a collective asks of the threads: the part of machine.h that lets them meet or reports that they cannot.
#pragma once

#include "machine.h"

namespace emulation {

inline std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

inline std::string describe(const Call& call) {
  const std::string path = call.where.file_name();
  const std::string at = path.substr(path.rfind('/') + 1) + ":" + std::to_string(call.where.line());
  return std::string(call.name) + (call.mask ? " with mask " + hex(call.mask) : "") + " (" + at + ")";
}

inline std::string lanes_in(unsigned mask) {
  std::string text = std::popcount(mask) == 1 ? "lane " : "lanes ";
  for (const char* comma = ""; mask; mask &= mask - 1, comma = ", ")
    text += comma + std::to_string(std::countr_zero(mask));
  return text;
}

// The same collective: name, mask and line of the source.
inline bool meet(const Call& a, const Call& b) {
  const auto same = [](const char* s, const char* t) { return s == t || std::strcmp(s, t) == 0; };
  return a.mask == b.mask && a.where.line() == b.where.line() && same(a.name, b.name) &&
         same(a.where.file_name(), b.where.file_name());
}

inline void Machine::check_stack(const Call& call) {
  if (!current_->fiber->holds()) fail(describe(call) + ": stack overflow");
}

inline void Machine::check_warp_call(const Call& call) {
  Warp& warp = warp_of(*current_);
  const Threads lanes = lanes_of(*current_);
  if (!(call.mask & bit_of(*current_))) fail(describe(call) + ": the mask does not name the caller");
  if (lanes.size() < kWarp && call.mask >> lanes.size())
    fail(describe(call) + ": the warp has only " + std::to_string(lanes.size()) + " lanes");
  if (call.mask & warp.exited) fail(describe(call) + ": " + lanes_in(call.mask & warp.exited) + " exited before");
  // To meet one of those who met is to meet all of them.
  if (warp.met && !meet(call, lanes[std::countr_zero(warp.met)].call)) warp.met = 0;
  for (unsigned rest = call.mask & (warp.waiting | warp.barred) & ~warp.met; rest; rest &= rest - 1)
    check_partner(call, static_cast<unsigned>(std::countr_zero(rest)));
}

// A lane of the mask that waits already must wait for this call, or at least not for the caller.
inline void Machine::check_partner(const Call& call, unsigned lane) {
  const Call& other = lanes_of(*current_)[lane].call;
  const bool for_caller = other.mask == 0 || other.mask & bit_of(*current_);
  if (for_caller && !meet(call, other))
    fail(describe(call) + ": lane " + std::to_string(lane) + " waits in " + describe(other));
}

inline std::uint64_t Machine::warp_collective(const Call& call, Answer answer) {
  check_stack(call);
  check_warp_call(call);
  Warp& warp = warp_of(*current_);
  Threads lanes = lanes_of(*current_);
  Thread& self = *current_;
  self.call = call;
  warp.waiting |= bit_of(self);
  warp.met |= bit_of(self);
  bool complete = (warp.waiting & call.mask) == call.mask;
  for (unsigned rest = call.mask & ~warp.met; complete && rest; rest &= rest - 1)
    complete = meet(call, lanes[std::countr_zero(rest)].call);
  if (complete) {
    if (answer) answer(lanes, call);
    warp.waiting &= ~call.mask;
    warp.met = 0;
    warp.ready |= call.mask;
  }
  leave();
  return self.result;
}

// No thread may have left: CUDA lets exited threads count as arrived, its manual forbids to rely on it.
inline std::uint64_t Machine::block_collective(const Call& call, Answer answer) {
  check_stack(call);
  Thread& self = *current_;
  if (alive_ < threads()) fail(describe(call) + ": " + std::to_string(threads() - alive_) + " threads exited before");
  const Warp& warp = warp_of(self);
  for (unsigned rest = warp.waiting; rest; rest &= rest - 1)
    check_partner(call, static_cast<unsigned>(std::countr_zero(rest)));
  for (Thread& t : threads_) {
    const bool barred = warp_of(t).barred & bit_of(t);
    if (barred && !meet(call, t.call)) fail(describe(call) + ": " + name_of(t) + " waits in " + describe(t.call));
    if (barred) break;  // the others met this one
  }
  self.call = call;
  warp_of(self).barred |= bit_of(self);
  if (++barred_ == threads()) {
    if (answer) answer(threads_, call);
    barred_ = 0;
    for (Warp& w : warps_) w.ready |= std::exchange(w.barred, 0);
  }
  leave();
  return self.result;
}

inline void Machine::exit_thread() {
  Warp& warp = warp_of(*current_);
  for (unsigned rest = warp.waiting; rest; rest &= rest - 1) {
    const Thread& t = lanes_of(*current_)[std::countr_zero(rest)];
    if (t.call.mask & bit_of(*current_)) fail("exits, while " + name_of(t) + " waits for it in " + describe(t.call));
  }
  for (unsigned i = 0; barred_ && i < threads(); ++i) {
    const Thread& t = threads_[i];
    if (warp_of(t).barred & bit_of(t)) fail("exits, while " + name_of(t) + " waits for it in " + describe(t.call));
  }
  warp.exited |= bit_of(*current_);
  --alive_;
}

// Said of the first thread that waits. Nobody can go on, so that those it waits for wait in turn.
inline std::string Machine::deadlock() const {
  for (const Thread& t : threads_) {
    const Warp& warp = warps_[index_of(t) / kWarp];
    if (!((warp.waiting | warp.barred) & bit_of(t))) continue;
    std::string whom = "the other threads of the block";
    if (t.call.mask) {
      unsigned missing = 0;
      const std::size_t first = index_of(t) / kWarp * kWarp;
      for (unsigned lane = 0; lane < kWarp && first + lane < threads_.size(); ++lane)
        if (t.call.mask >> lane & 1 && !meet(t.call, threads_[first + lane].call)) missing |= 1u << lane;
      whom = lanes_in(missing);
    }
    return "deadlock: " + name_of(t) + " waits in " + describe(t.call) + " for " + whom;
  }
  return "deadlock";
}

}  // namespace emulation
