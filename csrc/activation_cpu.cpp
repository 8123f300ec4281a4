// Kinked activations and their touches in one pass over x; PReLU; the pass that only reads.
//
// A unit touches a kink if it equals it after both are of x's dtype. Half types are clamped as int16 keys, which is
// exact; what multiplies or divides runs in float and is rounded once, as in torch.

#include <torch/csrc/stable/library.h>

#include "halves.h"
#include "scan.h"

namespace adcert {
namespace {

constexpr int64_t kBlock = 1024;  // what is looked at again is still in the first-level cache

template <class T>
constexpr bool kHalf = !std::is_floating_point_v<T>;

// Where a formula is computed.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What a value has to be compared with: of half types the bits, without the sign where the kink is 0.
template <class T>
struct Notable {
  typename Value<T>::Key first, second;

  explicit Notable(const KinkKeys<T>& kinks) : first(kinks.at[0]), second(kinks.at[1]) {}
  ADCERT_INLINE bool operator()(T v) const { return (v == first) | (v == second) | !Value<T>::is_finite(v); }
};
template <class T>
  requires kHalf<T>
struct Notable<T> {
  uint16_t mask[2], want[2];

  explicit Notable(const KinkKeys<T>& kinks) {
    for (int k = 0; k < 2; ++k) {
      const int16_t key = kinks.at[k];
      mask[k] = key == 0 ? 0x7fff : 0xffff;
      want[k] = static_cast<uint16_t>(key < 0 ? 0x8000 - key : key);
    }
  }
  ADCERT_INLINE bool operator()(T v) const {
    const auto first = static_cast<uint16_t>(bits(v) & mask[0]), second = static_cast<uint16_t>(bits(v) & mask[1]);
    return (first == want[0]) | (second == want[1]) | !Value<T>::is_finite(v);
  }
};

template <class T>
ADCERT_INLINE bool any_notable(const T* __restrict x, int64_t n, const Notable<T>& notable) {
  typename Value<T>::Lane any = 0;
  for (int64_t i = 0; i < n; ++i) any |= notable(x[i]);
  return any != 0;
}

// One formula for values as they are, put(i, v); whether any of them is at a kink or not finite.
template <class T, class F>
ADCERT_INLINE bool put_all(const T* __restrict x, T* __restrict out, int64_t n, const Notable<T>& notable, const F& f) {
  if constexpr (kHalf<T>) {  // twice as many lanes to a vector if they are not mixed with floats
    for (int64_t i = 0; i < n; ++i) out[i] = f(i, x[i]);
    return any_notable(x, n, notable);
  } else {
    typename Value<T>::Lane any = 0;
    for (int64_t i = 0; i < n; ++i) {
      out[i] = f(i, x[i]);
      any |= notable(x[i]);
    }
    return any != 0;
  }
}

// The same for formulas in W; half types are rounded once.
template <class T, class F>
ADCERT_INLINE bool put_wide(const T* x, T* out, int64_t n, const Notable<T>& notable, const F& f) {
  if constexpr (std::is_same_v<T, Float16>) {
    float wide[kBlock], result[kBlock];
    widen_all(x, wide, n);
    for (int64_t i = 0; i < n; ++i) result[i] = f(i, wide[i]);
    narrow_all(result, out, n);
    return any_notable(x, n, notable);
  } else {
    return put_all(x, out, n, notable, [&](int64_t i, T v) __attribute__((always_inline)) {
      if constexpr (kHalf<T>)
        return Value<T>::narrow(f(i, Value<T>::widen(v)));
      else
        return f(i, v);
    });
  }
}

// Of half types: compared by their keys. NaN has the largest key and passes.
template <class T>
struct KeyClamp {
  T low, high;
  int16_t low_key, high_key;
  ADCERT_INLINE T operator()(T v) const {
    const int16_t key = Value<T>::key(v);
    const T raised = key < low_key ? low : v, lowered = high_key < key ? high : raised;
    return key == Value<T>::nan ? v : lowered;
  }
};

template <class T>
struct KeyThreshold {
  T value;
  int16_t at;
  ADCERT_INLINE T operator()(T v) const { return Value<T>::key(v) <= at ? value : v; }
};

template <class T>
struct KeyAbsolute {
  ADCERT_INLINE T operator()(T v) const { return static_cast<T>(bits(v) & 0x7fff); }
};

template <class T>
ADCERT_INLINE auto clamp_of(const Activation& a) {
  const T low = rounded_to<T>(a.a), high = rounded_to<T>(a.b);
  if constexpr (std::is_floating_point_v<T>)
    return Clamp<T>{low, high};
  else
    return KeyClamp<T>{low, high, Value<T>::key(low), Value<T>::key(high)};
}

// torch compares half types with the threshold in float, unrounded: with the largest value that is not above it.
template <class T>
ADCERT_INLINE auto threshold_of(const Activation& a) {
  const T value = rounded_to<T>(a.a);
  if constexpr (std::is_floating_point_v<T>) {
    return Threshold<T>{value, value};
  } else {
    const bool above = Value<T>::widen(value) > static_cast<float>(a.a);
    return KeyThreshold<T>{value, static_cast<int16_t>(Value<T>::key(value) - above)};
  }
}

template <class T>
ADCERT_INLINE auto absolute_of() {
  if constexpr (std::is_floating_point_v<T>)
    return Absolute<T>{};
  else
    return KeyAbsolute<T>{};
}

template <class T>
ADCERT_INLINE bool put_block(const T* x, T* out, int64_t n, const Activation& a, const Notable<T>& notable) {
  using W = Wide<T>;
  const auto plain = [&](const auto& f) __attribute__((always_inline)) {
    return put_all(x, out, n, notable, [&](int64_t, T v) __attribute__((always_inline)) { return f(v); });
  };
  const auto wide = [&](const auto& f) __attribute__((always_inline)) {
    return put_wide(x, out, n, notable, [&](int64_t, W v) __attribute__((always_inline)) { return f(v); });
  };
  switch (a.kind) {
    case Kind::leaky_relu:
      return wide(Leaky<W>{static_cast<W>(a.a)});
    case Kind::hardsigmoid:
      return wide(HardSigmoid<W, !kHalf<T>>{});
    case Kind::hardswish:
      return wide(HardSwish<W, !kHalf<T>>{});
    case Kind::threshold:
      return plain(threshold_of<T>(a));
    case Kind::abs:
      return plain(absolute_of<T>());
    default:
      return plain(clamp_of<T>(a));
  }
}

template <class T>
ADCERT_INLINE void activate(const T* x, T* out, int64_t begin, int64_t end, const Activation& a,
                            const KinkKeys<T>& kinks, Found& found) {
  const Notable<T> notable(kinks);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t stop = std::min(end, i + kBlock);
    if (put_block(x + i, out + i, stop - i, a, notable)) note_touches(x, i, stop, kinks, found);
  }
}

template <class T>
ADCERT_INLINE void read(const T* x, int64_t begin, int64_t end, const KinkKeys<T>& kinks, Found& found) {
  const Notable<T> notable(kinks);
  const bool zero = kinks.count == 1 && kinks.at[0] == 0;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t stop = std::min(end, i + kBlock);
    if (zero ? any_odd<false>(x + i, static_cast<T*>(nullptr), stop - i) : any_notable(x + i, stop - i, notable))
      note_touches(x, i, stop, kinks, found);
  }
}

// Slopes of PReLU: lines of `run` values in memory have one each, those of all channels in turn.
template <class W>
struct Slopes {
  const W* weight;
  int64_t channels, run;

  // Of the values at i and after.
  ADCERT_INLINE void get(int64_t i, int64_t n, W* out) const {
    int64_t channel = i / run % channels, left = run - i % run;
    for (int64_t at = 0; at < n;) {
      const int64_t some = run == 1 ? std::min(n - at, channels - channel) : std::min(n - at, left);
      if (run == 1)
        std::copy_n(weight + channel, some, out + at);
      else
        std::fill_n(out + at, some, weight[channel]);
      at += some;
      left = run;
      channel = run == 1 || channel + 1 == channels ? 0 : channel + 1;
    }
  }
};

template <class T>
ADCERT_INLINE void slope(const T* x, T* out, int64_t begin, int64_t end, const Slopes<Wide<T>>& slopes,
                         const KinkKeys<T>& kinks, Found& found) {
  using W = Wide<T>;
  const Notable<T> notable(kinks);
  W own[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t stop = std::min(end, i + kBlock);
    slopes.get(i, stop - i, own);
    const auto f = [&](int64_t j, W v) __attribute__((always_inline)) { return Leaky<W>{own[j]}(v); };
    if (put_wide(x + i, out + i, stop - i, notable, f)) note_touches(x, i, stop, kinks, found);
  }
}

#define ADCERT_ACTIVATION(T)                                                                               \
  ADCERT_CLONES void activate_chunk(const T* x, T* out, int64_t begin, int64_t end, const Activation& a,   \
                                    const KinkKeys<T>& k, Found& f) {                                      \
    activate(x, out, begin, end, a, k, f);                                                                 \
  }                                                                                                        \
  ADCERT_CLONES void read_chunk(const T* x, int64_t begin, int64_t end, const KinkKeys<T>& k, Found& f) {  \
    read(x, begin, end, k, f);                                                                             \
  }                                                                                                        \
  ADCERT_CLONES void slope_chunk(const T* x, T* out, int64_t begin, int64_t end, const Slopes<Wide<T>>& s, \
                                 const KinkKeys<T>& k, Found& f) {                                         \
    slope(x, out, begin, end, s, k, f);                                                                    \
  }
ADCERT_ACTIVATION(float)
ADCERT_ACTIVATION(double)
ADCERT_ACTIVATION(BFloat16)
ADCERT_ACTIVATION(Float16)
#undef ADCERT_ACTIVATION

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> activation(const Tensor& x, int64_t kind, const std::vector<double>& parameters,
                                              int64_t capacity) {
  check_floating(x, "activation");
  const Activation a(kind, parameters);
  const Tensor from = dense(x);
  const Tensor out = fresh(torch::stable::empty_like(from));
  const Found found = by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    const KinkKeys<T> kinks(a.kinks);
    check_parameters<T, T, Wide<T>>(a);
    return scan(from, kinks.count, [&](int64_t begin, int64_t end, Found& f) {
      activate_chunk(data<T>(from), to, begin, end, a, kinks, f);
    });
  });
  return {out, to_list(found.touches, 1, capacity, false, x), counts_of(found, x)};
}

std::tuple<Tensor, Tensor> touches(const Tensor& x, const std::vector<double>& at, int64_t capacity) {
  check_floating(x, "touches");
  const Kinks all = checked_kinks("touches", at);
  const Tensor from = dense(x);
  const Found found = by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const KinkKeys<T> kinks(all);
    return scan(from, kinks.count,
                [&](int64_t begin, int64_t end, Found& f) { read_chunk(data<T>(from), begin, end, kinks, f); });
  });
  return {to_list(found.touches, 1, capacity, false, x), counts_of(found, x)};
}

std::tuple<Tensor, Tensor, Tensor> prelu(const Tensor& x, const Tensor& weight, int64_t capacity) {
  check_floating(x, "prelu");
  check_slopes(x, weight);
  const Tensor from = dense(x), own = torch::stable::contiguous(weight);
  const Tensor out = fresh(torch::stable::empty_like(from));
  const int64_t channels = own.numel(), run = channels == 1 ? std::max<int64_t>(1, x.numel()) : from.stride(1);
  const Found found = by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<Wide<T>> weights(static_cast<size_t>(channels));
    if constexpr (kHalf<T>)
      widen_all(data<T>(own), weights.data(), channels);
    else
      std::copy_n(data<T>(own), channels, weights.data());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    const Slopes<Wide<T>> slopes{weights.data(), channels, run};
    const KinkKeys<T> kinks{Kinks{}};
    return scan(from, 1, [&](int64_t begin, int64_t end, Found& f) {
      slope_chunk(data<T>(from), to, begin, end, slopes, kinks, f);
    });
  });
  return {out, to_list(found.touches, 1, capacity, false, x), counts_of(found, x)};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) {
  m.impl("activation", TORCH_BOX(&adcert::activation));
  m.impl("touches", TORCH_BOX(&adcert::touches));
  m.impl("prelu", TORCH_BOX(&adcert::prelu));
}
