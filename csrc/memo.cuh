// An open-addressing table in device memory from pairs of places to answers: many warps, nothing erased.
//
// A slot is one word, key and answer together, so that one exchange publishes both. A key is exact, never a hash: the
// caller packs it into kKeyBits bits. Where the table is full that is noted, and the caller tries again with a larger.
#pragma once

#include "launch.cuh"

namespace adcert {

using Word = unsigned long long;

constexpr int kKeyBits = 61, kAnswerBits = 3;
constexpr int kProbes = 512;

struct DeviceMemo {
  Word* slots;  // 0: free
  Word mask;    // their number, less one: a power of two
  unsigned* full;

  // The answer of a key, or 0.
  __device__ unsigned find(Word key) const {
    Word at = mix(key) & mask;
    for (int i = 0; i < kProbes; ++i, at = (at + 1) & mask) {
      const Word word = *static_cast<volatile const Word*>(slots + at);
      if (word == 0) return 0;
      if (word >> kAnswerBits == key) return static_cast<unsigned>(word & 7);
    }
    return 0;
  }

  // answer: 1 to 7. False if there is no room. Every lane of the warp takes part, with the same arguments.
  __device__ bool put(Word key, unsigned answer) const {
    bool kept = true;
    if (threadIdx.x % kWarp == 0) {
      const Word mine = key << kAnswerBits | answer;
      Word at = mix(key) & mask;
      kept = false;
      for (int i = 0; i < kProbes && !kept; ++i, at = (at + 1) & mask) {
        const Word before = atomicCAS(slots + at, Word{0}, mine);
        kept = before == 0 || before >> kAnswerBits == key;
      }
      if (!kept) atomicExch(full, 1u);
    }
    return __shfl_sync(kWhole, kept ? 1 : 0, 0) != 0;
  }
};

}  // namespace adcert
