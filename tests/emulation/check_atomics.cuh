// Every atomic, on every type it takes; included by check_emulation.cu.
#pragma once

struct Cells {
  int sum, least, most, down;
  unsigned usum, uleast, umost, set, common, parity;
  Word wsum, wleast, wmost, wset;
  long long lleast, lmost;
  float fsum;
  double dsum;
  unsigned tickets, swaps;
};

__global__ void atomics(Data d) {
  __shared__ Cells c;
  const unsigned t = threadIdx.x;
  if (t == 0) c = Cells{0, 0, 0, 0, 0, 99, 0, 0, kFull, 0, 0, 99, 0, 0, 0, -99, 0, 0, 0, 0};
  __syncthreads();
  const int negative = -static_cast<int>(t);
  const Word wide = Word{t} << 33;
  atomicAdd(&c.sum, negative), atomicMin(&c.least, negative), atomicMax(&c.most, static_cast<int>(t));
  atomicSub(&c.down, 2), atomicAdd(&c.usum, t), atomicMin(&c.uleast, t + 7), atomicMax(&c.umost, t);
  atomicOr(&c.set, 1u << t), atomicAnd(&c.common, ~(2u << t)), atomicXor(&c.parity, t + 1);
  atomicAdd(&c.wsum, wide), atomicMin(&c.wleast, Word{t} + 5), atomicMax(&c.wmost, wide), atomicOr(&c.wset, wide);
  atomicMin(&c.lleast, static_cast<long long>(negative)), atomicMax(&c.lmost, static_cast<long long>(negative) - 1);
  atomicAdd(&c.fsum, 0.5f), atomicAdd(&c.dsum, 0.25);
  for (unsigned seen = c.tickets, old = ~seen; old != seen;) old = seen, seen = atomicCAS(&c.tickets, old, old + 3);
  atomicExch(&c.swaps, 5u);
  __threadfence_block();
  __syncthreads();
  if (t != 0) return;
  const Word all[] = {Word(-c.sum),    Word(-c.least), Word(c.most), Word(-c.down), c.usum,    c.uleast, c.umost,
                      c.set,           c.common,       c.parity,     c.wsum,        c.wleast,  c.wmost,  c.wset,
                      Word(-c.lleast), Word(-c.lmost), Word(c.fsum), Word(c.dsum),  c.tickets, c.swaps};
  for (unsigned i = 0; i < sizeof all / sizeof *all; ++i) d.out[i] = all[i];
}

__global__ void exchanges(Data d) {
  __shared__ Word word;
  __shared__ int small;
  __shared__ unsigned bits;
  __shared__ float real;
  word = 3, small = 4, bits = 5, real = 6;
  d.out[0] = atomicExch(&word, Word{7}), d.out[1] = atomicExch(&small, 8), d.out[2] = atomicExch(&bits, 9u);
  d.out[3] = static_cast<Word>(atomicExch(&real, 10.0f));
  d.out[4] = atomicCAS(&word, Word{7}, Word{11}), d.out[5] = atomicCAS(&word, Word{7}, Word{12});
  d.out[6] = atomicCAS(&small, 9, 13), d.out[7] = word, d.out[8] = small, d.out[9] = bits;
  d.out[10] = static_cast<Word>(real);
}
