// What every way of pooling shares: the state of a tile of lanes, and what becomes of it.
#pragma once

#include <cstring>
#include <type_traits>

#include "checks.h"
#include "collect.h"
#include "lanes.h"

namespace adcert {

constexpr int64_t kTile = 256;  // lanes whose state stays in the first-level cache

// Offsets are bytes where they fit, else int32.
struct Offsets {
  uint8_t* narrow = nullptr;
  int32_t* wide = nullptr;
  explicit Offsets(const Tensor& t) {
    if (t.scalar_type() == ScalarType::Byte)
      narrow = static_cast<uint8_t*>(t.mutable_data_ptr());
    else
      wide = static_cast<int32_t*>(t.mutable_data_ptr());
  }
};

template <class T>
struct Job {
  const T* x;
  T* out;
  Offsets offsets, routes;
  Window window;
  int64_t channels;
};

// State of the lanes of a tile. L: signed integer that holds an offset.
template <class T, class L>
struct Tile {
  using Key = typename Value<T>::Key;
  static constexpr bool kBits = !std::is_same_v<T, Key>;  // keys of half types forget the sign of zero
  static constexpr int64_t kLanes = kTile + kShortRow;    // the last lanes taken at once may be more than are left
  Key maximum[kLanes];
  T value[kBits ? kLanes : 1];
  L offset[kLanes], last[kLanes];  // the first and the last tap that attains the maximum: a tie if they differ
  uint8_t tied[kTile];
};

template <class T, class L>
ADCERT_INLINE void save(const Best<T, L>& best, Tile<T, L>& t, int64_t i) {
  t.maximum[i] = best.maximum;
  if constexpr (Tile<T, L>::kBits) t.value[i] = best.value;
  t.offset[i] = best.offset;
  t.last[i] = best.last;
}

// One tied window: which cells attain its maximum. image: its plane; cells of a row are `across` apart, rows `down`.
template <bool RELU, class T>
ADCERT_COLD void push_window(const Job<T>& job, const T* image, int64_t down, int64_t across, int64_t oh, int64_t ow,
                             int64_t index, Found& found) {
  const auto maximum = Value<T>::key(job.out[index]);
  const Axis &h = job.window.height, &w = job.window.width;
  found.windows.push_back(index);
  const size_t at = found.members.size();
  found.members.resize(at + static_cast<size_t>(job.window.words()));
  int64_t count = 0;
  for (int64_t kh = h.first(oh), kh_last = h.last(oh); kh < kh_last; ++kh)
    for (int64_t kw = w.first(ow), kw_last = w.last(ow); kw < kw_last; ++kw) {
      const T v = image[h.cell(oh, kh) * down + w.cell(ow, kw) * across];
      const int64_t tap = kh * w.kernel + kw;
      if (Value<T>::key(RELU ? rectify(v) : v) != maximum) continue;
      found.members[at + static_cast<size_t>(tap / 64)] |= static_cast<int64_t>(uint64_t{1} << (tap % 64));
      ++count;
    }
  if (count >= 2) return;
  found.windows.pop_back();  // only padding tied with it
  found.members.resize(at);
}

// O: type of stored offsets. Writes n lanes; fills t.tied.
template <bool RELU, class T, class L, class O>
ADCERT_INLINE void store_as(Tile<T, L>& t, int64_t n, L taps, T* __restrict out, O* __restrict offsets,
                            O* __restrict routes) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (Tile<T, L>::kBits)
      out[i] = t.value[i];
    else
      out[i] = t.maximum[i];
  }
  for (int64_t i = 0; i < n; ++i) offsets[i] = static_cast<O>(t.offset[i]);
  if constexpr (RELU) {
    for (int64_t i = 0; i < n; ++i) {
      const L closed = t.maximum[i] <= 0 ? L{-1} : L{0};  // a NaN passes ReLU's backward
      routes[i] = static_cast<O>((taps & closed) | (t.offset[i] & ~closed));
      t.tied[i] = static_cast<uint8_t>((t.last[i] != t.offset[i] ? L{1} : L{0}) & ~closed);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) t.tied[i] = static_cast<uint8_t>(t.last[i] != t.offset[i]);
  }
}

template <bool RELU, class T, class L>
ADCERT_INLINE void store(const Job<T>& job, Tile<T, L>& t, int64_t n, int64_t index) {
  const auto taps = static_cast<L>(job.window.taps());
  if (job.offsets.wide)
    store_as<RELU>(t, n, taps, job.out + index, job.offsets.wide + index, job.routes.wide + index);
  else
    store_as<RELU>(t, n, taps, job.out + index, job.offsets.narrow + index, job.routes.narrow + index);
}

// f(i) for every tied lane i < n, ascending.
template <class T, class L, class F>
ADCERT_INLINE void each_tied(const Tile<T, L>& t, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, t.tied + i, 8);
    if (eight)
      for (int64_t k = i; k < i + 8; ++k)
        if (t.tied[k]) f(k);
  }
  for (; i < n; ++i)
    if (t.tied[i]) f(i);
}

// Looks through the rows of x for touches and values that are not finite, each row once; rows from `end` on belong to
// another thread.
template <bool RELU, class T>
class Scan {
 public:
  ADCERT_INLINE Scan(const T* x, int64_t row_size, int64_t begin, int64_t end)
      : x_(x), row_size_(row_size), next_(begin), end_(end) {}

  // Whether rows from .. to - 1 are finite; `from` never falls.
  ADCERT_INLINE bool finite(int64_t from, int64_t to, Found& found) {
    Found others;
    if (next_ < std::min(to, end_)) look(std::min(to, end_), found);
    if (next_ < to) look(to, others);
    return from >= bad_;
  }

 private:
  // The rows after these; processors stop their own prefetching at the end of a page, which is as far as a tile
  // reaches.
  static ADCERT_INLINE void prefetch(const T* begin, const T* end) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (; begin < end; begin += kLine) __builtin_prefetch(begin, 0, 2);
  }

  ADCERT_INLINE void look(int64_t to, Found& found) {
    const int64_t begin = next_ * row_size_, end = to * row_size_;
    next_ = to;
    prefetch(x_ + end, x_ + std::min(2 * end - begin, end_ * row_size_));
    if (!any_odd<false>(x_ + begin, static_cast<T*>(nullptr), end - begin)) return;
    int64_t touches = 0, nonfinite = 0;
    count(x_ + begin, end - begin, 0, touches, nonfinite);
    found.nonfinite += nonfinite;
    if (nonfinite) bad_ = to;
    if constexpr (RELU) {
      if (touches)
        for (int64_t i = begin; i < end; ++i)
          if (Value<T>::key(x_[i]) == 0) found.touches.push_back(i);
    }
  }

  const T* x_;
  int64_t row_size_, next_, end_, bad_ = 0;  // rows before bad_ may hold values that are not finite
};

}  // namespace adcert
