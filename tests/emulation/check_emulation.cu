// Small kernels that tests/test_emulation.py runs on the emulator, with answers it knows. nvcc compiles them too, so
// that the emulator claims nothing that CUDA has not.
#ifdef ADCERT_EMULATION
#include "cuda_emulation.h"
#endif

#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>

namespace {

using Word = unsigned long long;
constexpr unsigned kFull = 0xffffffffu;

struct Data {
  const Word* in;
  Word* out;
  unsigned size;  // words of in
};

struct Entry {
  const char* name;
  void (*kernel)(Data);
};
#define ENTRY(kernel) {#kernel, kernel}

__device__ unsigned global_index() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ unsigned lane_index() { return threadIdx.x % warpSize; }

#ifdef ADCERT_EMULATION
__device__ Word* dynamic_words() { return static_cast<Word*>(emulation::dynamic_shared()); }
#else
extern __shared__ Word dynamic_memory[];
__device__ Word* dynamic_words() { return dynamic_memory; }
#endif

#include "check_atomics.cuh"
#include "check_bugs.cuh"

// ---- What a thread knows of itself, and what it can do alone

__global__ void indices(Data d) {
  Word* out = d.out + 5 * global_index();
  out[0] = threadIdx.x, out[1] = blockIdx.x, out[2] = blockDim.x, out[3] = gridDim.x;
  out[4] = threadIdx.y + threadIdx.z + blockIdx.y + blockIdx.z + 10 * (blockDim.y + blockDim.z + gridDim.y + gridDim.z);
}

__global__ void grid_stride(Data d) {
  for (unsigned i = global_index(); i < d.size; i += gridDim.x * blockDim.x) d.out[i] = d.in[i] * 100 + blockIdx.x;
}

__global__ void bits(Data d) {
  const Word x = d.in[0];
  Word* out = d.out;
  *out++ = __popc(static_cast<unsigned>(x)), *out++ = __popcll(x);
  *out++ = __clz(static_cast<int>(x)), *out++ = __clzll(static_cast<long long>(x));
  *out++ = __ffs(static_cast<int>(x)), *out++ = __ffsll(static_cast<long long>(x));
  *out++ = __brev(static_cast<unsigned>(x)), *out++ = __ldg(d.in);
  *out++ = __float_as_uint(1.0f), *out++ = __float_as_int(-0.0f) == INT32_MIN;
  *out++ = static_cast<Word>(__uint_as_float(0x40400000u)), *out++ = static_cast<Word>(__int_as_float(0x40800000));
  *out++ = static_cast<Word>(__double_as_longlong(1.0));
  *out++ = static_cast<Word>(__longlong_as_double(0x4014000000000000ll));
  *out++ = max(min(3, 5), 4), *out++ = static_cast<Word>(max(2.0f, __uint_as_float(0x7fc00000u)));
}

__global__ void vectors(Data d) {
  const uint4 a = make_uint4(1, 2, 3, 4);
  const float2 b = make_float2(5, 6);
  const ulonglong2 c = make_ulonglong2(7, 8);
  const int2 e = make_int2(9, 10);
  const int4 f = make_int4(11, 12, 13, 14);
  const uint2 g = make_uint2(15, 16);
  const float4 h = make_float4(17, 18, 19, 20);
  const Word all[] = {a.x,
                      a.y,
                      a.z,
                      a.w,
                      Word(b.x),
                      Word(b.y),
                      c.x,
                      c.y,
                      Word(e.x),
                      Word(e.y),
                      Word(f.x),
                      Word(f.w),
                      g.x,
                      g.y,
                      Word(h.x),
                      Word(h.w),
                      alignof(uint4),
                      alignof(float2),
                      alignof(ulonglong2),
                      alignof(int2),
                      alignof(int4),
                      alignof(uint2),
                      alignof(float4)};
  for (unsigned i = 0; i < sizeof all / sizeof *all; ++i) d.out[i] = all[i];
}

// ---- Warps

__global__ void votes(Data d) {
  const int mine = d.in[threadIdx.x] != 0;
  d.out[3 * threadIdx.x] = __ballot_sync(kFull, mine);
  d.out[3 * threadIdx.x + 1] = __any_sync(kFull, mine);
  d.out[3 * threadIdx.x + 2] = __all_sync(kFull, mine);
}

template <class T>
__device__ void shuffle_all(T value, int number, int width, Word* out) {
  out[0] = static_cast<Word>(__shfl_sync(kFull, value, number, width));
  out[1] = static_cast<Word>(__shfl_up_sync(kFull, value, number, width));
  out[2] = static_cast<Word>(__shfl_down_sync(kFull, value, number, width));
  out[3] = static_cast<Word>(__shfl_xor_sync(kFull, value, number, width));
}

// in: type, number, width
__global__ void shuffles(Data d) {
  const int number = static_cast<int>(d.in[1]), width = static_cast<int>(d.in[2]);
  const unsigned value = 100 + threadIdx.x;
  Word* out = d.out + 4 * threadIdx.x;
  switch (d.in[0]) {
    case 0:
      return shuffle_all(static_cast<int>(value), number, width, out);
    case 1:
      return shuffle_all(value, number, width, out);
    case 2:
      return shuffle_all(static_cast<long long>(value), number, width, out);
    case 3:
      return shuffle_all(static_cast<Word>(value) << 32, number, width, out);
    case 4:
      return shuffle_all(static_cast<float>(value), number, width, out);
    default:
      return shuffle_all(static_cast<double>(value), number, width, out);
  }
}

__global__ void reductions(Data d) {
  const auto mine = static_cast<unsigned>(d.in[threadIdx.x]);
  Word* out = d.out + 9 * threadIdx.x;
  out[0] = __reduce_add_sync(kFull, mine), out[1] = __reduce_min_sync(kFull, mine);
  out[2] = __reduce_max_sync(kFull, mine), out[3] = __reduce_or_sync(kFull, mine);
  out[4] = __reduce_and_sync(kFull, mine), out[5] = __reduce_xor_sync(kFull, mine);
  const int negative = -static_cast<int>(mine);
  out[6] = -__reduce_add_sync(kFull, negative), out[7] = -__reduce_min_sync(kFull, negative);
  out[8] = -__reduce_max_sync(kFull, negative);
}

__global__ void matches(Data d) {
  d.out[2 * threadIdx.x] = __match_any_sync(kFull, d.in[threadIdx.x]);
  d.out[2 * threadIdx.x + 1] = __match_any_sync(kFull, static_cast<float>(d.in[threadIdx.x]));
}

// Two groups of a warp at once, each with its own collectives, then all together.
__global__ void halves(Data d) {
  unsigned sum = threadIdx.x;
  if (lane_index() < 8) {
    for (int step = 4; step; step /= 2) sum += __shfl_xor_sync(0xffu, sum, step);
  } else {
    sum = __ballot_sync(kFull << 8, threadIdx.x & 1);
  }
  __syncwarp();
  d.out[threadIdx.x] = __shfl_sync(kFull, sum, threadIdx.x ^ 8);
}

// Odd lanes leave; the others go on without them.
__global__ void leavers(Data d) {
  if (threadIdx.x & 1) return;
  const unsigned below = __shfl_up_sync(0x55555555u, threadIdx.x, 2);
  d.out[threadIdx.x] = __ballot_sync(0x55555555u, threadIdx.x % 4 == 0) + (Word{below} << 32);
}

// out: how many, then the indices of the words that are not 0; a warp takes its places at once.
__global__ void append(Data d) {
  for (unsigned base = blockIdx.x * blockDim.x; base < d.size; base += gridDim.x * blockDim.x) {
    const unsigned i = base + threadIdx.x;
    const bool found = i < d.size && d.in[i] != 0;
    const unsigned all = __ballot_sync(kFull, found);
    Word place = 0;
    if (lane_index() == 0 && all) place = atomicAdd(d.out, static_cast<Word>(__popc(all)));
    place = __shfl_sync(kFull, place, 0);
    if (found) d.out[1 + place + __popc(all & ((1u << lane_index()) - 1))] = i;
  }
}

// Every thread for itself.
__global__ void arrivals(Data d) { d.out[1 + atomicAdd(d.out, Word{1})] = global_index(); }

// ---- Blocks

__global__ void block_sums(Data d) {
  __shared__ Word part[256];
  Word sum = 0;
  for (unsigned i = global_index(); i < d.size; i += gridDim.x * blockDim.x) sum += d.in[i];
  part[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) d.out[blockIdx.x] = part[0];
}

__global__ void block_votes(Data d) {
  const int mine = static_cast<int>(d.in[threadIdx.x]);
  Word* out = d.out + 3 * threadIdx.x;
  out[0] = __syncthreads_or(mine), out[1] = __syncthreads_and(mine), out[2] = __syncthreads_count(mine);
}

__global__ void reverse(Data d) {
  Word* words = dynamic_words();
  words[threadIdx.x] = d.in[global_index()];
  __syncthreads();
  d.out[global_index()] = words[blockDim.x - 1 - threadIdx.x];
}

const Entry kChecks[] = {ENTRY(indices),  ENTRY(grid_stride), ENTRY(bits),       ENTRY(vectors),     ENTRY(votes),
                         ENTRY(shuffles), ENTRY(reductions),  ENTRY(matches),    ENTRY(halves),      ENTRY(leavers),
                         ENTRY(append),   ENTRY(arrivals),    ENTRY(block_sums), ENTRY(block_votes), ENTRY(reverse),
                         ENTRY(atomics),  ENTRY(exchanges)};

void must(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

void launch(void (*kernel)(Data), unsigned blocks, unsigned threads, size_t shared, Data data) {
#ifdef ADCERT_EMULATION
  emulation::launch(blocks, threads, shared, [&] { kernel(data); });
#else
  kernel<<<blocks, threads, shared>>>(data);
#endif
  must(cudaGetLastError());
  must(cudaDeviceSynchronize());
}

class Words {  // on the device
 public:
  explicit Words(size_t size) : bytes_(size * sizeof(Word)) {
    must(cudaMalloc(reinterpret_cast<void**>(&at_), bytes_));
    must(cudaMemsetAsync(at_, 0, bytes_, nullptr));
  }
  ~Words() { cudaFree(at_); }
  Words(const Words&) = delete;
  Words& operator=(const Words&) = delete;
  void read(const Word* from) { must(cudaMemcpyAsync(at_, from, bytes_, cudaMemcpyHostToDevice, nullptr)); }
  void write(Word* to) const { must(cudaMemcpy(to, at_, bytes_, cudaMemcpyDeviceToHost)); }
  Word* at() const { return at_; }

 private:
  size_t bytes_;
  Word* at_ = nullptr;
};

const Entry& find(const char* name) {
  for (const Entry& entry : kChecks)
    if (std::strcmp(entry.name, name) == 0) return entry;
  for (const Entry& entry : kBugs)
    if (std::strcmp(entry.name, name) == 0) return entry;
  throw std::runtime_error("no such kernel");
}

void run(const char* name, unsigned blocks, unsigned threads, size_t shared, const Word* in, unsigned in_size,
         Word* out, unsigned out_size) {
  Words from(in_size), to(out_size);
  from.read(in);
  launch(find(name).kernel, blocks, threads, shared, {from.at(), to.at(), in_size});
  to.write(out);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// 0, or 1 and a message.
EXPORT int emulation_check(const char* name, unsigned blocks, unsigned threads, unsigned shared, const Word* in,
                           unsigned in_size, Word* out, unsigned out_size, char* message, unsigned room) {
  try {
    run(name, blocks, threads, shared, in, in_size, out, out_size);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, room, "%s", error.what());
    return 1;
  }
}

#ifdef ADCERT_EMULATION
// As emulation_check: a barrier where there are no threads.
EXPORT int emulation_outside(char* message, unsigned room) {
  try {
    __syncthreads();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, room, "%s", error.what());
    return 1;
  }
}

EXPORT unsigned emulation_stack() { return emulation::Fiber::kStack; }
#endif

EXPORT int emulation_processors() {
  int count = 0;
  must(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}
