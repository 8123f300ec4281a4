// What the CPU kernels ask of a compiler to turn their loops into vectors, and loops over whole lines of values.
#pragma once

#include "values.h"

// One copy of the function per instruction set, chosen when the library is loaded; the bodies are always inlined
// into it. A build for one fixed machine would not run elsewhere.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(ADCERT_SANITIZE)
#define ADCERT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ADCERT_CLONES
#endif
#define ADCERT_COLD __attribute__((noinline, cold))
#if defined(__GNUC__) && !defined(__clang__)
#define ADCERT_NO_ALIAS _Pragma("GCC ivdep")
#else
#define ADCERT_NO_ALIAS
#endif

namespace adcert {

constexpr int64_t kShortRow = 16;  // lanes taken at once in short rows, few enough for images of 32 columns

// How many of n values equal the kink, and how many are not finite.
template <class T>
ADCERT_INLINE void count(const T* __restrict x, int64_t n, typename Value<T>::Key kink, int64_t& touches,
                         int64_t& nonfinite) {
  using Lane = typename Value<T>::Lane;
  constexpr int64_t kBlock = 4096;  // a 16-bit lane must not overflow
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    Lane equal = 0, odd = 0;
    for (int64_t i = begin; i < end; ++i) {
      equal = static_cast<Lane>(equal + (Value<T>::key(x[i]) == kink));
      odd = static_cast<Lane>(odd + !Value<T>::is_finite(x[i]));
    }
    touches += equal;
    nonfinite += odd;
  }
}

// Whether any of n values is zero or not finite: exactly for these twice the bits, less one, is as large as for
// infinity, so that one maximum tells. OUT: also writes their ReLU.
template <bool OUT, class T>
ADCERT_INLINE bool any_odd(const T* __restrict x, T* __restrict out, int64_t n) {
  using Bits = typename Value<T>::Bits;
  Bits most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T v = x[i];
    const auto twice = static_cast<Bits>(2 * static_cast<Bits>(std::bit_cast<Bits>(v)) - 1);
    most = twice > most ? twice : most;
    if constexpr (OUT) out[i] = rectify(v);
  }
  return most >= static_cast<Bits>(2 * Value<T>::infinity - 1);
}

}  // namespace adcert
