// Blocks of half types to float and back, on the CPU: by the processor's own instructions where it has them.
#pragma once

#include "lanes.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(ADCERT_SANITIZE)
#include <immintrin.h>
#define ADCERT_F16C __attribute__((target("avx,f16c")))
#endif

namespace adcert {

template <class T>
ADCERT_INLINE void widen_all(const T* __restrict x, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = Value<T>::widen(x[i]);
}

template <class T>
ADCERT_INLINE void narrow_all(const float* __restrict x, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = Value<T>::narrow(x[i]);
}

// Compilers do not turn conversions of float16 into vectors by themselves. What is left of a line goes the usual way.
#if defined(ADCERT_F16C)
inline const bool kHasF16C = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");

ADCERT_F16C inline void widen_eights(const Float16* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
}
ADCERT_F16C inline void narrow_eights(const float* x, Float16* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
}

template <>
ADCERT_INLINE void widen_all(const Float16* __restrict x, float* __restrict out, int64_t n) {
  const int64_t eights = kHasF16C ? n / 8 * 8 : 0;
  widen_eights(x, out, eights);
  for (int64_t i = eights; i < n; ++i) out[i] = Value<Float16>::widen(x[i]);
}
template <>
ADCERT_INLINE void narrow_all(const float* __restrict x, Float16* __restrict out, int64_t n) {
  const int64_t eights = kHasF16C ? n / 8 * 8 : 0;
  narrow_eights(x, out, eights);
  for (int64_t i = eights; i < n; ++i) out[i] = Value<Float16>::narrow(x[i]);
}
#endif

}  // namespace adcert
