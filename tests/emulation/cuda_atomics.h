// CUDA's atomics and fences. A thread is never interrupted within one; in a hostile order others may come before it.
#pragma once

#include <cstdint>

#include "machine.h"

namespace emulation {

template <class T, class F>
T atomic(T* at, F change) {
  if (Machine* machine = Machine::running()) {
    if (reinterpret_cast<std::uintptr_t>(at) % sizeof(T) != 0) machine->fail("an atomic on a misaligned address");
    machine->interleave();
  }
  const T old = *at;
  *at = change(old);
  return old;
}

inline void fence() {
  if (Machine* machine = Machine::running()) machine->interleave();
}

}  // namespace emulation

#define EMULATION_ATOMIC(name, T, change)                                 \
  inline T name(T* at, T value) {                                         \
    return emulation::atomic(at, [value](T old) -> T { return change; }); \
  }
EMULATION_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
EMULATION_ATOMIC(atomicAdd, unsigned, old + value)
EMULATION_ATOMIC(atomicAdd, unsigned long long, old + value)
EMULATION_ATOMIC(atomicAdd, float, old + value)
EMULATION_ATOMIC(atomicAdd, double, old + value)
EMULATION_ATOMIC(atomicSub, int, static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(value)))
EMULATION_ATOMIC(atomicSub, unsigned, old - value)
EMULATION_ATOMIC(atomicExch, float, (static_cast<void>(old), value))
#define EMULATION_ATOMICS(T)                                \
  EMULATION_ATOMIC(atomicMin, T, old < value ? old : value) \
  EMULATION_ATOMIC(atomicMax, T, old < value ? value : old) \
  EMULATION_ATOMIC(atomicAnd, T, old& value)                \
  EMULATION_ATOMIC(atomicOr, T, old | value)                \
  EMULATION_ATOMIC(atomicXor, T, old ^ value)
EMULATION_ATOMICS(int)
EMULATION_ATOMICS(unsigned)
EMULATION_ATOMICS(long long)
EMULATION_ATOMICS(unsigned long long)
#undef EMULATION_ATOMICS
#undef EMULATION_ATOMIC

#define EMULATION_SWAP(T)                                                               \
  inline T atomicExch(T* at, T value) {                                                 \
    return emulation::atomic(at, [value](T) { return value; });                         \
  }                                                                                     \
  inline T atomicCAS(T* at, T expected, T value) {                                      \
    return emulation::atomic(at, [=](T old) { return old == expected ? value : old; }); \
  }
EMULATION_SWAP(int)
EMULATION_SWAP(unsigned)
EMULATION_SWAP(unsigned long long)
#undef EMULATION_SWAP

inline void __threadfence() { emulation::fence(); }
inline void __threadfence_block() { emulation::fence(); }
