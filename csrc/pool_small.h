// The usual windows, 2 x 2 and 3 x 3, on finite values: the state of a lane stays in the registers until it has seen
// every tap, and no comparison is spent on NaN.
#pragma once

#include <algorithm>
#include <utility>

#include "pool_tile.h"

namespace adcert {

// A lane with its first value. RELU: the maximum is then at least 0, so that later values need not be rectified: where
// it stays 0, the first tap is selected.
template <bool RELU, class T, class L>
struct First : Best<T, L> {
  using Key = typename Value<T>::Key;
  using Best<T, L>::maximum, Best<T, L>::value, Best<T, L>::offset, Best<T, L>::last;
  static constexpr bool kRaw = RELU && Tile<T, L>::kBits;  // positive half values compare as their bits do

  ADCERT_INLINE First(T v, L tap) : Best<T, L>{0, RELU ? rectify(v) : v, tap, tap} { maximum = Value<T>::key(value); }

  static ADCERT_INLINE Key key(T v) {
    if constexpr (kRaw)
      return static_cast<Key>(bits(v));
    else
      return Value<T>::key(v);
  }

  ADCERT_INLINE void see(T v, L tap) {
    const Key k = key(v);
    const bool take = k > maximum, attains = k >= maximum;
    last = attains ? tap : last;
    maximum = take ? k : maximum;
    offset = take ? tap : offset;
    if constexpr (!kRaw) value = take ? v : value;
  }

  ADCERT_INLINE void save(Tile<T, L>& t, int64_t i) {
    if constexpr (kRaw) value = maximum > 0 ? static_cast<T>(maximum) : value;
    adcert::save(*this, t, i);
  }
};

// Lanes begin .. begin + n - 1 see the values p[k][i] in turn and become t's from `at` + begin on.
template <bool RELU, class T, class L, size_t... K>
ADCERT_INLINE void see_taps(const T* const* p, const L* tap, int64_t begin, int64_t n, int64_t at, Tile<T, L>& t,
                            std::index_sequence<K...>) {
  ADCERT_NO_ALIAS
  for (int64_t i = begin; i < begin + n; ++i) {
    First<RELU, T, L> lane(p[0][i], tap[0]);
    (lane.see(p[K + 1][i], tap[K + 1]), ...);
    lane.save(t, at + i);
  }
}

// Cells inside the image first, in row-major order, then -inf for those outside: the latter are never selected, and
// where they seem to tie with a maximum of -inf, push_window finds out.
template <int K, class T, class L>
struct Taps {
  const T* p[K * K];
  L tap[K * K];

  // p[kh * K + kw] lies at rows[kh] + kw * across; none: n values of -inf
  ADCERT_INLINE Taps(const Window& window, int64_t oh, int64_t ow, const T* image, int64_t down, int64_t across,
                     const T* none) {
    const Axis &h = window.height, &w = window.width;
    const int64_t h0 = h.first(oh), h1 = h.last(oh), w0 = w.first(ow), w1 = w.last(ow);
    int inside = 0, outside = K * K;
    for (int64_t kh = 0; kh < K; ++kh)
      for (int64_t kw = 0; kw < K; ++kw) {
        const bool in = kh >= h0 && kh < h1 && kw >= w0 && kw < w1;
        const int k = in ? inside++ : --outside;
        p[k] = in ? image + h.cell(oh, kh) * down + w.cell(ow, kw) * across : none;
        tap[k] = static_cast<L>(kh * K + kw);
      }
  }
};

// NHWC, any stride, padding and dilation: n channels of one pixel.
template <bool RELU, int K, class T, class L>
ADCERT_INLINE void fill_pixel(const Job<T>& job, const T* image, int64_t oh, int64_t ow, int64_t n, int64_t at,
                              const T* none, Tile<T, L>& t) {
  constexpr int64_t kVector = 64 / sizeof(T);
  constexpr auto rest = std::make_index_sequence<K * K - 1>{};
  const Taps<K, T, L> taps(job.window, oh, ow, image, job.window.width.size * job.channels, job.channels, none);
  if (n < kVector)
    see_taps<RELU>(taps.p, taps.tap, 0, n, at, t, rest);
  else
    for (int64_t i = 0; i < n; i += kVector)
      see_taps<RELU>(taps.p, taps.tap, std::min(i, n - kVector), kVector, at, t, rest);
}

// The four cells are compared with their maximum by arithmetic: four choices in a row become branches, not vectors.
template <bool RELU, class T, class L>
ADCERT_INLINE void see_square(const T* top, const T* bottom, int64_t begin, int64_t n, int64_t at, Tile<T, L>& t) {
  using Lane = First<RELU, T, L>;
  ADCERT_NO_ALIAS
  for (int64_t i = begin; i < begin + n; ++i) {
    const T v0 = top[2 * i], v1 = top[2 * i + 1], v2 = bottom[2 * i], v3 = bottom[2 * i + 1];
    Lane lane(v0, 0);
    const auto k0 = lane.maximum, k1 = Lane::key(v1), k2 = Lane::key(v2), k3 = Lane::key(v3);
    const auto a = k1 > k0 ? k1 : k0, b = k3 > k2 ? k3 : k2, maximum = b > a ? b : a;  // of equal zeros the first
    const L less0 = k0 < maximum, less1 = k1 < maximum, less2 = k2 < maximum, less3 = k3 < maximum;
    const L not01 = less0 & less1, not012 = not01 & less2;
    lane.maximum = maximum;
    lane.offset = static_cast<L>(less0 + not01 + not012);
    lane.last = static_cast<L>(lane.offset - (less0 + less1 + less2 + less3 <= 2));  // another one than the first
    if constexpr (Tile<T, L>::kBits && !RELU) {
      const auto keep = [](T v, L one) { return bits(v) & -one; };
      lane.value =
          static_cast<T>(keep(v0, 1 - less0) | keep(v1, less0 - not01) | keep(v2, not01 - not012) | keep(v3, not012));
    } else if constexpr (!Tile<T, L>::kBits) {
      lane.value = maximum;
    }
    lane.save(t, at + i);
  }
}

// NCHW, 2 x 2 windows side by side: lanes at .. at + n - 1 become outputs t0 .. t0 + n - 1 of row oh.
template <bool RELU, class T, class L>
ADCERT_INLINE void fill_square(const Job<T>& job, const T* image, int64_t oh, int64_t t0, int64_t n, int64_t at,
                               Tile<T, L>& t) {
  constexpr int64_t kHalf = kShortRow / 2;
  const T *top = image + 2 * oh * job.window.width.size + 2 * t0, *bottom = top + job.window.width.size;
  if (n >= kShortRow)
    for (int64_t i = 0; i < n; i += kShortRow)
      see_square<RELU>(top, bottom, std::min(i, n - kShortRow), kShortRow, at, t);
  else if (n >= kHalf)
    for (int64_t i = 0; i < n; i += kHalf) see_square<RELU>(top, bottom, std::min(i, n - kHalf), kHalf, at, t);
  else
    see_square<RELU>(top, bottom, 0, n, at, t);
}

// Rows of a plane split by the parity of the column, the last few of them: as the 3 x 3 windows of stride 2 look at
// them, neighbouring lanes at neighbouring values. Tap 0 of lane j is side[j], tap 1 middle[j], tap 2 side[j + 1].
// Rows are split two ahead: a processor stalls on reading across two stores that it has just made.
template <class T>
struct Lines {
  static constexpr int64_t kPitch = kTile + 2 * kShortRow;
  static constexpr int64_t kRows = 5;
  T side[kRows][kPitch], middle[kRows][kPitch], none[kPitch];
  const T* image = nullptr;
  int64_t t0 = 0, next = 0;  // rows before `next` are split, for lanes from t0 on

  ADCERT_INLINE void begin(const T* new_image, int64_t new_t0) {
    if (image == new_image && t0 == new_t0) return;
    image = new_image, t0 = new_t0, next = 0;
    std::fill_n(&side[0][0], kRows * kPitch, Value<T>::lowest_value);
    std::fill_n(&middle[0][0], kRows * kPitch, Value<T>::lowest_value);
    std::fill_n(none, kPitch, Value<T>::lowest_value);
  }

  static ADCERT_INLINE void split_pairs(const T* __restrict from, int64_t begin, int64_t n, T* __restrict even,
                                        T* __restrict odd) {
    ADCERT_NO_ALIAS
    for (int64_t j = begin; j < begin + n; ++j) {
      even[j] = from[2 * j];
      odd[j] = from[2 * j + 1];
    }
  }

  // Row r for n lanes. In the first window the padding changes places with the cell beside it, so that a lane always
  // begins with a cell of the image.
  ADCERT_INLINE void split(const Axis& w, int64_t r, int64_t n) {
    constexpr int64_t kHalf = kShortRow / 2;
    const T* from = image + r * w.size + 2 * t0;
    const int64_t room = w.size - 2 * t0, lanes = n + 1 - w.padding, pairs = std::min(lanes, room / 2);
    T *a = side[r % kRows], *b = middle[r % kRows];
    T *even = w.padding ? b : a, *odd = w.padding ? a + 1 : b;
    if (pairs >= kShortRow)
      for (int64_t j = 0; j < pairs; j += kShortRow)
        split_pairs(from, std::min(j, pairs - kShortRow), kShortRow, even, odd);
    else if (pairs >= kHalf)
      for (int64_t j = 0; j < pairs; j += kHalf) split_pairs(from, std::min(j, pairs - kHalf), kHalf, even, odd);
    else
      split_pairs(from, 0, pairs, even, odd);
    if (pairs < lanes && 2 * pairs < room) even[pairs] = from[2 * pairs];
    if (w.padding == 0) return;
    a[0] = t0 ? from[-1] : from[0];
    if (t0 == 0) b[0] = Value<T>::lowest_value;
  }
};

// NCHW, 3 x 3 windows of stride 2: lanes as in fill_square.
template <bool RELU, class T, class L>
ADCERT_INLINE void fill_three(const Job<T>& job, const T* image, int64_t oh, int64_t t0, int64_t n, int64_t at,
                              Lines<T>& lines, Tile<T, L>& t) {
  const Axis &h = job.window.height, &w = job.window.width;
  const int64_t h0 = h.first(oh), h1 = h.last(oh);
  lines.begin(image, t0);
  const int64_t end = std::min(h.cell(oh, h1) + 2, h.size);
  for (int64_t r = std::max(lines.next, h.cell(oh, h0)); r < end; ++r) lines.split(w, r, n);
  lines.next = end;
  const T* p[9];
  L tap[9];
  int inside = 0, outside = 9;
  for (int64_t kh = 0; kh < 3; ++kh) {
    const bool in = kh >= h0 && kh < h1;
    const int k = in ? inside : outside - 3;
    (in ? inside : outside) += in ? 3 : -3;
    const int64_t slot = in ? h.cell(oh, kh) % lines.kRows : 0;
    p[k] = in ? lines.side[slot] : lines.none;
    p[k + 1] = in ? lines.middle[slot] : lines.none;
    p[k + 2] = in ? lines.side[slot] + 1 : lines.none;
    for (int64_t kw = 0; kw < 3; ++kw) tap[k + kw] = static_cast<L>(3 * kh + kw);
  }
  for (int64_t i = 0; i < n; i += kShortRow) see_taps<RELU>(p, tap, i, kShortRow, at, t, std::make_index_sequence<8>{});
  if (w.start(t0) >= 0) return;
  t.offset[at] += t.offset[at] % 3 == 0 ? 1 : 0;
  t.last[at] += t.last[at] % 3 == 0 ? 1 : 0;
}

}  // namespace adcert
