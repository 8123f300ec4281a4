// Values as the kernels compare them, and the choice a window makes: shared by every device.
//
// Half types are compared on the CPU through an order-preserving map of their bits to int16 (both zeros to 0, every NaN
// to 32767): exact, and twice as many to a vector as after conversion to float.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define ADCERT_HD __host__ __device__ inline
#define ADCERT_INLINE __host__ __device__ __forceinline__
#else
#define ADCERT_HD inline
#define ADCERT_INLINE inline __attribute__((always_inline))
#endif

namespace adcert {

// Spreads the bits of a key.
ADCERT_HD uint64_t mix(uint64_t h) {
  h = (h ^ (h >> 32)) * 0x9e3779b97f4a7c15ull;
  h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9ull;
  return h ^ (h >> 32);
}

// Enumerations, not structs: only scalar loads and stores are turned into vector ones.
enum class BFloat16 : uint16_t {};
enum class Float16 : uint16_t {};

template <class T>
ADCERT_INLINE uint16_t bits(T v) {
  return static_cast<uint16_t>(v);
}

// Key: what is compared. Lane: integer as wide as a key. Bits: the same, unsigned. infinity: the bits of +inf, the
// mask of the exponent.
template <class T>
struct Value;

template <class F, class U, class I>
struct FloatValue {
  using Key = F;
  using Lane = I;
  using Bits = U;
  static constexpr U infinity = std::bit_cast<U>(std::numeric_limits<F>::infinity());
  static constexpr Key lowest = -std::numeric_limits<F>::infinity();
  static constexpr F lowest_value = lowest;
  static ADCERT_INLINE Key key(F v) { return v; }
  static ADCERT_INLINE bool is_nan(Key k) { return k != k; }
  static ADCERT_INLINE bool is_finite(F v) { return (std::bit_cast<U>(v) & infinity) != infinity; }
  static ADCERT_INLINE F add(F a, F b) { return a + b; }
};
template <>
struct Value<float> : FloatValue<float, uint32_t, int32_t> {};
template <>
struct Value<double> : FloatValue<double, uint64_t, int64_t> {};

template <class T, uint16_t kInfinity>
struct HalfValue {
  using Key = int16_t;
  using Lane = int16_t;
  using Bits = uint16_t;
  static constexpr uint16_t infinity = kInfinity;
  static constexpr Key nan = 0x7fff;
  static constexpr Key lowest = -static_cast<int>(infinity);
  static constexpr T lowest_value = static_cast<T>(infinity | 0x8000);
  static ADCERT_INLINE Key key(T v) {
    const auto magnitude = static_cast<int16_t>(bits(v) & 0x7fff);
    const auto sign = static_cast<int16_t>(static_cast<int16_t>(bits(v)) >> 15);  // 0 or -1
    const auto ordered = static_cast<int16_t>((magnitude ^ sign) - sign);
    return magnitude > static_cast<int16_t>(infinity) ? nan : ordered;
  }
  static ADCERT_INLINE bool is_nan(Key k) { return k == nan; }
  static ADCERT_INLINE bool is_finite(T v) { return (bits(v) & infinity) != infinity; }
};

template <>
struct Value<BFloat16> : HalfValue<BFloat16, 0x7f80> {
  static ADCERT_INLINE float widen(BFloat16 v) { return std::bit_cast<float>(static_cast<uint32_t>(bits(v)) << 16); }
  static ADCERT_INLINE BFloat16 narrow(float f) {  // to nearest, ties to even; every NaN to 0x7fc0, as c10 does
    const auto u = std::bit_cast<uint32_t>(f);
    const auto rounded = static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    return static_cast<BFloat16>(f != f ? 0x7fc0 : rounded);
  }
  static ADCERT_INLINE BFloat16 add(BFloat16 a, BFloat16 b) { return narrow(widen(a) + widen(b)); }
};

template <>
struct Value<Float16> : HalfValue<Float16, 0x7c00> {
  // Without a branch, which c10's conversions have, and so in vectors.
  static ADCERT_INLINE float widen(Float16 v) {
    const uint32_t magnitude = bits(v) & 0x7fff, sign = static_cast<uint32_t>(bits(v) & 0x8000) << 16;
    const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude | 0x3f000000) - 0.5f);  // times 2^-24
    const uint32_t rebased = (magnitude << 13) + 0x38000000, infinite = (magnitude << 13) | 0x7f800000;
    const uint32_t is_small = -static_cast<uint32_t>(magnitude < 0x400);
    const uint32_t is_infinite = -static_cast<uint32_t>(magnitude >= infinity);
    return std::bit_cast<float>(sign | (small & is_small) | (infinite & is_infinite) |
                                (rebased & ~(is_small | is_infinite)));
  }
  static ADCERT_INLINE Float16 narrow(float f) {  // to nearest, ties to even; every NaN to 0x7e00, as c10 does
    const auto u = std::bit_cast<uint32_t>(f);
    const uint32_t magnitude = u & 0x7fffffff, sign = u >> 16 & 0x8000;
    const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t is_small = -static_cast<uint32_t>(magnitude < 0x38800000);
    const uint32_t is_large = -static_cast<uint32_t>(magnitude >= 0x47800000);
    const uint32_t large = 0x7c00 | (0x200 & -static_cast<uint32_t>(magnitude > 0x7f800000));
    const uint32_t result = (small & is_small) | (large & is_large) | (normal & ~(is_small | is_large));
    return static_cast<Float16>(sign | result);
  }
  static ADCERT_INLINE Float16 add(Float16 a, Float16 b) { return narrow(widen(a) + widen(b)); }
};

// max(v, 0) as torch.relu: -0.0 and NaN pass. A mask, not a choice: compilers turn only the former into vectors.
template <class T>
ADCERT_INLINE T rectify(T v) {
  if constexpr (std::is_floating_point_v<T>) {
    using Lane = typename Value<T>::Lane;
    const Lane below = v < 0 ? Lane{-1} : Lane{0};
    return std::bit_cast<T>(std::bit_cast<Lane>(v) & ~below);
  } else {
    const bool below = static_cast<uint16_t>(bits(v) - 0x8001) < Value<T>::infinity;
    return static_cast<T>(bits(v) & static_cast<uint16_t>(below - 1));
  }
}

// One lane of a window. It begins with its first value or, with -inf, before it.
//
// A lane sees the taps of its window in row-major order, so the first maximum stays selected, and a NaN, which beats
// everything, is replaced only by a later NaN: torch's rule. It also remembers the last tap that attains the maximum:
// where that is another one the window is tied. L: signed integer that holds a tap.
template <class T, class L>
struct Best {
  typename Value<T>::Key maximum;
  T value;
  L offset, last;

  ADCERT_INLINE void see(T v, L tap) {
    const auto k = Value<T>::key(v);
    const bool nan = Value<T>::is_nan(k), take = (k > maximum) | nan, attains = take | (k == maximum);
    last = attains ? tap : last;
    maximum = take ? k : maximum;
    offset = take ? tap : offset;
    value = take ? v : value;
  }
};

// Whether v is zero or not finite: exactly for these twice the bits, less one, is as large as for infinity.
template <class T>
ADCERT_INLINE bool is_odd(T v) {
  using Bits = typename Value<T>::Bits;
  const auto twice = static_cast<Bits>(2 * static_cast<Bits>(std::bit_cast<Bits>(v)) - 1);
  return twice >= static_cast<Bits>(2 * Value<T>::infinity - 1);
}

}  // namespace adcert
