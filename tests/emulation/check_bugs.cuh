// Kernels that break a rule: the emulator has to say so. On a GPU most of them would hang or return anything.
#pragma once

__global__ void mask_without_caller(Data d) { d.out[threadIdx.x] = __ballot_sync(0x7fffffffu, 1); }

__global__ void mask_of_nobody(Data d) { d.out[threadIdx.x] = __ballot_sync(static_cast<unsigned>(d.in[0]), 1); }

// Lane in[0] leaves.
__global__ void mask_names_exited(Data d) {
  if (threadIdx.x == d.in[0]) return;
  d.out[threadIdx.x] = __any_sync(kFull, 1);
}

// For blocks that do not fill their last warp.
__global__ void mask_names_missing(Data d) { d.out[threadIdx.x] = __any_sync(kFull, 1); }

// Lane 31 is in one of the masks only.
__global__ void different_masks(Data d) {
  const unsigned mask = threadIdx.x < 16 || threadIdx.x == 31 ? kFull : kFull >> 1;
  d.out[threadIdx.x] = __ballot_sync(mask, 1);
}

__global__ void different_collectives(Data d) {
  d.out[threadIdx.x] = threadIdx.x < 16 ? __any_sync(kFull, 1) : __all_sync(kFull, 1);
}

__global__ void different_lines(Data d) {
  if (threadIdx.x < 16)
    d.out[threadIdx.x] = __any_sync(kFull, 1);
  else
    d.out[threadIdx.x] = __any_sync(kFull, 0);
}

// A loop that lanes leave at different times, with a collective in it.
__global__ void uneven_loop(Data d) {
  for (unsigned i = 0; i <= threadIdx.x; ++i) d.out[threadIdx.x] += __any_sync(kFull, 1);
}

// Lane in[0] waits for the block, the others for their warp.
__global__ void vote_against_barrier(Data d) {
  if (threadIdx.x == d.in[0])
    __syncthreads();
  else
    d.out[threadIdx.x] = __any_sync(kFull, 1);
}

// Warp in[0] does not come.
__global__ void barrier_missed(Data d) {
  if (threadIdx.x / 32 != d.in[0]) __syncthreads();
  d.out[threadIdx.x] = 1;
}

__global__ void different_barriers(Data d) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    d.out[threadIdx.x] = __syncthreads_or(1);
}

__global__ void barriers_on_different_lines(Data d) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    d.out[threadIdx.x] = 1;
    __syncthreads();
  }
}

// Wrong in block in[0] only.
__global__ void late_bug(Data d) { d.out[threadIdx.x] = __any_sync(blockIdx.x == d.in[0] ? 1u : kFull, 1); }

// Lanes 0, 1, 2 wait for each other in a ring.
__global__ void ring(Data d) {
  const unsigned mask = threadIdx.x == 0 ? 3u : threadIdx.x == 1 ? 6u : 5u;
  if (threadIdx.x < 3) d.out[threadIdx.x] = __any_sync(mask, 1);
}

// Every lane of the first warp waits for all of the block, those of the second for each other in a ring.
__global__ void ring_and_barrier(Data d) {
  const unsigned lane = lane_index();
  if (threadIdx.x >= 32 && lane < 3) d.out[lane] = __any_sync(lane == 0 ? 3u : lane == 1 ? 6u : 5u, 1);
  __syncthreads();
}

__global__ void active_mask(Data d) { d.out[threadIdx.x] = __activemask(); }

__global__ void wide_shuffle(Data d) { d.out[threadIdx.x] = __shfl_sync(kFull, 1, 0, static_cast<int>(d.in[0])); }

__global__ void far_shuffle(Data d) { d.out[threadIdx.x] = __shfl_down_sync(kFull, 1, static_cast<unsigned>(d.in[0])); }

// Even lanes read odd ones, which their mask leaves out: the value is undefined.
__global__ void outsider(Data d) {
  if (threadIdx.x % 2 == 0) d.out[threadIdx.x] = __shfl_xor_sync(0x55555555u, threadIdx.x, 1);
}

__global__ void misaligned(Data d) { atomicAdd(reinterpret_cast<unsigned*>(reinterpret_cast<char*>(d.out) + 2), 1u); }

// What dynamic shared memory holds at first is undefined.
__global__ void unwritten(Data d) {
  d.out[global_index()] = dynamic_words()[threadIdx.x];
  dynamic_words()[threadIdx.x] = 1;
}

// in[0] frames of a kilobyte; in[1]: the deepest one votes.
__device__ unsigned deep(Word frames, bool vote) {
  volatile unsigned char frame[1024];
  for (unsigned i = 0; i < sizeof frame; i += 8) frame[i] = static_cast<unsigned char>(frames);
  if (frames <= 1) return vote ? __any_sync(kFull, frame[0]) : frame[0];
  return deep(frames - 1, vote) + frame[8];
}
__global__ void stack_overflow(Data d) { d.out[threadIdx.x] = deep(d.in[0], d.in[1] != 0); }

// Right in the natural order, and wrong if another lane comes before lane 0; if a lane stops before its atomic; if a
// warp runs ahead of the other.
__global__ void no_barrier(Data d) {
  __shared__ Word word;
  if (threadIdx.x == 0) word = d.in[0];
  d.out[threadIdx.x] = word;
}

__global__ void lost_update(Data d) {
  const Word seen = d.out[0];
  atomicAdd(d.out + 1, Word{1});
  d.out[0] = seen + 1;
}

__global__ void warps_only(Data d) {
  __shared__ Word words[64];
  words[threadIdx.x] = d.in[0];
  __syncwarp();
  d.out[threadIdx.x] = words[threadIdx.x ^ 32];
}

#ifdef ADCERT_EMULATION
__global__ void nested_launch(Data) {
  emulation::launch(1, 1, 0, [] {});
}
__global__ void own_exception(Data d) {
  __syncthreads();
  if (threadIdx.x == d.in[0]) throw std::logic_error("the kernel's own");
}
#endif

const Entry kBugs[] = {
    ENTRY(mask_without_caller),
    ENTRY(mask_of_nobody),
    ENTRY(mask_names_exited),
    ENTRY(mask_names_missing),
    ENTRY(different_masks),
    ENTRY(different_collectives),
    ENTRY(different_lines),
    ENTRY(uneven_loop),
    ENTRY(vote_against_barrier),
    ENTRY(barrier_missed),
    ENTRY(different_barriers),
    ENTRY(barriers_on_different_lines),
    ENTRY(late_bug),
    ENTRY(ring),
    ENTRY(ring_and_barrier),
    ENTRY(active_mask),
    ENTRY(wide_shuffle),
    ENTRY(far_shuffle),
    ENTRY(outsider),
    ENTRY(misaligned),
    ENTRY(unwritten),
    ENTRY(stack_overflow),
    ENTRY(no_barrier),
    ENTRY(lost_update),
    ENTRY(warps_only),
#ifdef ADCERT_EMULATION
    ENTRY(nested_launch),
    ENTRY(own_exception),
#endif
};
