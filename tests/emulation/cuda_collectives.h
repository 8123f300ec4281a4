// CUDA's votes, shuffles, reductions and barriers. Each takes the caller's place in the source as a hidden last
// argument: lanes meet only on the same line. A value that CUDA leaves undefined is kPoison.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <string>

#include "machine.h"

namespace emulation {

constexpr std::uint64_t kPoison = 0xa5a5a5a5a5a5a5a5u;

template <class T>
std::uint64_t to_bits(T value) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// f(thread) for every thread the collective is for.
template <class F>
void each(Threads threads, const Call& call, F f) {
  for (unsigned i = 0; i < threads.size(); ++i)
    if (!call.mask || call.mask >> i & 1) f(threads[i]);
}

inline void give(Threads threads, const Call& call, std::uint64_t result) {
  each(threads, call, [&](Thread& t) { t.result = result; });
}

// The threads whose value is not 0.
inline std::uint64_t count(Threads threads, const Call& call) {
  std::uint64_t n = 0;
  each(threads, call, [&](const Thread& t) { n += t.call.value != 0; });
  return n;
}

inline std::uint64_t size(Threads threads, const Call& call) {
  return call.mask ? static_cast<std::uint64_t>(std::popcount(call.mask)) : threads.size();
}

inline std::uint64_t warp(const char* name, unsigned mask, Where where, std::uint64_t value, Answer answer) {
  Machine& machine = Machine::inside(name);
  if (mask == 0) machine.fail(std::string(name) + ": the mask is 0");
  return machine.warp_collective({name, mask, where, value}, answer);
}

inline std::uint64_t block(const char* name, Where where, std::uint64_t value, Answer answer) {
  return Machine::inside(name).block_collective({name, 0, where, value}, answer);
}

// source(lane, number, first, last): whom a lane reads; first and last are of its group of width lanes.
template <class Source>
void answer_shuffle(Threads lanes, const Call& call, Source source) {
  for (unsigned lane = 0; lane < lanes.size(); ++lane) {
    if (!(call.mask >> lane & 1)) continue;
    const auto width = static_cast<unsigned>(lanes[lane].call.argument >> 32);
    const auto number = static_cast<unsigned>(lanes[lane].call.argument);
    const unsigned first = lane & ~(width - 1);
    const unsigned from = source(lane, number, first, first + width - 1);
    lanes[lane].result = call.mask >> from & 1 ? lanes[from].call.value : kPoison;
  }
}

inline void answer_index(Threads lanes, const Call& call) {
  answer_shuffle(lanes, call, [](unsigned, unsigned number, unsigned first, unsigned last) {
    return first | (number & (last - first));
  });
}

inline void answer_up(Threads lanes, const Call& call) {
  answer_shuffle(lanes, call, [](unsigned lane, unsigned number, unsigned first, unsigned) {
    return number <= lane - first ? lane - number : lane;
  });
}

inline void answer_down(Threads lanes, const Call& call) {
  answer_shuffle(lanes, call, [](unsigned lane, unsigned number, unsigned, unsigned last) {
    return number <= last - lane ? lane + number : lane;
  });
}

// Lanes of earlier groups can be read, those of later ones not.
inline void answer_xor(Threads lanes, const Call& call) {
  answer_shuffle(lanes, call, [](unsigned lane, unsigned number, unsigned, unsigned last) {
    return (lane ^ number) <= last ? lane ^ number : lane;
  });
}

// argument of a shuffle: width in the upper half, the number that says whom to read in the lower.
template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned number, int width, Where where, Answer answer) {
  Machine& machine = Machine::inside(name);
  if (width <= 0 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width)))
    machine.fail(std::string(name) + ": the width must be a power of two up to 32, got " + std::to_string(width));
  if (number >= kWarp && answer != answer_index)
    machine.fail(std::string(name) + ": lanes differ by less than 32, got " + std::to_string(number));
  const std::uint64_t argument = static_cast<std::uint64_t>(width) << 32 | number;
  return from_bits<T>(machine.warp_collective({name, mask, where, to_bits(value), argument}, answer));
}

// value op value op ...
template <class T, class F>
void fold(Threads lanes, const Call& call, F op) {
  T total{};
  bool first = true;
  each(lanes, call, [&](const Thread& t) {
    const T value = from_bits<T>(t.call.value);
    total = first ? value : op(total, value);
    first = false;
  });
  give(lanes, call, to_bits(total));
}

// For each lane the lanes whose value has the same bits.
inline void answer_match(Threads lanes, const Call& call) {
  each(lanes, call, [&](Thread& t) {
    t.result = 0;
    each(lanes, call, [&](const Thread& other) {
      if (other.call.value == t.call.value) t.result |= 1u << (&other - lanes.data());
    });
  });
}

inline void answer_ballot(Threads lanes, const Call& call) {
  unsigned set = 0;
  each(lanes, call, [&](const Thread& t) {
    if (t.call.value) set |= 1u << (&t - lanes.data());
  });
  give(lanes, call, set);
}

inline void answer_any(Threads threads, const Call& call) { give(threads, call, count(threads, call) > 0); }
inline void answer_count(Threads threads, const Call& call) { give(threads, call, count(threads, call)); }
inline void answer_all(Threads threads, const Call& call) {
  give(threads, call, count(threads, call) == size(threads, call));
}

}  // namespace emulation

inline void __syncwarp(unsigned mask = 0xffffffffu, emulation::Where where = emulation::Where::current()) {
  emulation::warp("__syncwarp", mask, where, 0, nullptr);
}

inline void __syncthreads(emulation::Where where = emulation::Where::current()) {
  emulation::block("__syncthreads", where, 0, nullptr);
}

#define EMULATION_BLOCK_VOTE(name, answer)                                                      \
  inline int name(int predicate, emulation::Where where = emulation::Where::current()) {        \
    return static_cast<int>(emulation::block(#name, where, predicate != 0, emulation::answer)); \
  }
EMULATION_BLOCK_VOTE(__syncthreads_or, answer_any)
EMULATION_BLOCK_VOTE(__syncthreads_and, answer_all)
EMULATION_BLOCK_VOTE(__syncthreads_count, answer_count)
#undef EMULATION_BLOCK_VOTE

#define EMULATION_VOTE(R, name, answer)                                                               \
  inline R name(unsigned mask, int predicate, emulation::Where where = emulation::Where::current()) { \
    return static_cast<R>(emulation::warp(#name, mask, where, predicate != 0, emulation::answer));    \
  }
EMULATION_VOTE(unsigned, __ballot_sync, answer_ballot)
EMULATION_VOTE(int, __any_sync, answer_any)
EMULATION_VOTE(int, __all_sync, answer_all)
#undef EMULATION_VOTE

#define EMULATION_SHUFFLE(T, name, N, answer)                                                                      \
  inline T name(unsigned mask, T value, N number, int width = 32,                                                  \
                emulation::Where where = emulation::Where::current()) {                                            \
    return emulation::shuffle(#name, mask, value, static_cast<unsigned>(number), width, where, emulation::answer); \
  }
#define EMULATION_TYPE(T)                                                                                          \
  EMULATION_SHUFFLE(T, __shfl_sync, int, answer_index)                                                             \
  EMULATION_SHUFFLE(T, __shfl_up_sync, unsigned, answer_up)                                                        \
  EMULATION_SHUFFLE(T, __shfl_down_sync, unsigned, answer_down)                                                    \
  EMULATION_SHUFFLE(T, __shfl_xor_sync, int, answer_xor)                                                           \
  inline unsigned __match_any_sync(unsigned mask, T value, emulation::Where where = emulation::Where::current()) { \
    return static_cast<unsigned>(                                                                                  \
        emulation::warp("__match_any_sync", mask, where, emulation::to_bits(value), emulation::answer_match));     \
  }
EMULATION_TYPE(int)
EMULATION_TYPE(unsigned)
EMULATION_TYPE(long)
EMULATION_TYPE(unsigned long)
EMULATION_TYPE(long long)
EMULATION_TYPE(unsigned long long)
EMULATION_TYPE(float)
EMULATION_TYPE(double)
#undef EMULATION_TYPE
#undef EMULATION_SHUFFLE

#define EMULATION_REDUCE(T, name, result)                                                                          \
  inline T name(unsigned mask, T value, emulation::Where where = emulation::Where::current()) {                    \
    return emulation::from_bits<T>(emulation::warp(                                                                \
        #name, mask, where, emulation::to_bits(value), [](emulation::Threads lanes, const emulation::Call& call) { \
          emulation::fold<T>(lanes, call, [](T a, T b) { return static_cast<T>(result); });                        \
        }));                                                                                                       \
  }
EMULATION_REDUCE(int, __reduce_add_sync, static_cast<unsigned>(a) + static_cast<unsigned>(b))
EMULATION_REDUCE(unsigned, __reduce_add_sync, a + b)
EMULATION_REDUCE(int, __reduce_min_sync, a < b ? a : b)
EMULATION_REDUCE(unsigned, __reduce_min_sync, a < b ? a : b)
EMULATION_REDUCE(int, __reduce_max_sync, a < b ? b : a)
EMULATION_REDUCE(unsigned, __reduce_max_sync, a < b ? b : a)
EMULATION_REDUCE(unsigned, __reduce_and_sync, a& b)
EMULATION_REDUCE(unsigned, __reduce_or_sync, a | b)
EMULATION_REDUCE(unsigned, __reduce_xor_sync, a ^ b)
#undef EMULATION_REDUCE

// Which lanes run together is an accident, on a GPU too: a mask has to be computed and handed down.
inline unsigned __activemask() {
  emulation::Machine::inside("__activemask").fail("__activemask says nothing reliable and is forbidden");
}
