// CUDA's language and library, as far as kernels here use it, for tests without a GPU.
//
// Compiled as C++ (g++ -x c++) with ADCERT_EMULATION, a kernel is a plain function that emulation::launch runs for
// every thread; machine.h says in what order and what is an error. Only names that CUDA has are provided, with CUDA's
// own overloads, so that what compiles here compiles there. Differences a kernel sees:
//   - __shared__ arrays have a fixed size; the dynamic one is emulation::dynamic_shared();
//   - there is no <<<>>>, and blocks never run at the same time: a kernel must not wait for another block, nor spin;
//   - one thread runs at a time: races between plain accesses go unseen unless the order brings them to light.
#pragma once

#include <math.h>

#include "machine.h"

// Shared memory: all threads of a block run on one host thread, and one block after the other.
#define __shared__ static thread_local
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // g++'s own headers use the word as an attribute, which may be empty
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#define EMULATION_VECTOR2(name, T, bytes) \
  struct __align__(bytes) name {          \
    T x, y;                               \
  };                                      \
  constexpr name make_##name(T x, T y) { return {x, y}; }
#define EMULATION_VECTOR4(name, T, bytes) \
  struct __align__(bytes) name {          \
    T x, y, z, w;                         \
  };                                      \
  constexpr name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATION_VECTOR2(int2, int, 8)
EMULATION_VECTOR2(uint2, unsigned, 8)
EMULATION_VECTOR2(float2, float, 8)
EMULATION_VECTOR2(double2, double, 16)
EMULATION_VECTOR2(longlong2, long long, 16)
EMULATION_VECTOR2(ulonglong2, unsigned long long, 16)
EMULATION_VECTOR4(int4, int, 16)
EMULATION_VECTOR4(uint4, unsigned, 16)
EMULATION_VECTOR4(float4, float, 16)
#undef EMULATION_VECTOR2
#undef EMULATION_VECTOR4

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

constexpr int warpSize = emulation::kWarp;

namespace emulation {

inline uint3 thread_index() { return {Machine::inside("threadIdx").thread(), 0, 0}; }
inline uint3 block_index() { return {Machine::inside("blockIdx").block(), 0, 0}; }
inline dim3 block_size() { return Machine::inside("blockDim").threads(); }
inline dim3 grid_size() { return Machine::inside("gridDim").blocks(); }

}  // namespace emulation

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())

#include "cuda_atomics.h"
#include "cuda_bits.h"
#include "cuda_collectives.h"
#include "cuda_host.h"
