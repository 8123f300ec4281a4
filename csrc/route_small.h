// The usual ways back, each cell written once with the sum of all gradients that arrive: nothing is filled with zeros
// first. Sums run in the order of the windows, which fixes their rounding: torch's order. A gradient that goes
// elsewhere counts as +0.0, which changes no sum: it began with +0.0, so it is never -0.0.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "lanes.h"
#include "window.h"

namespace adcert {

template <class T, class R>
struct Routing {
  const T* from;
  const R* routes;
  T* to;
  Window window;
  int64_t channels;           // NHWC only; 1 for planes
  std::vector<int64_t> cell;  // [KH * KW] flat distance of a tap from the start of its window, in cells

  // Flat cell of the route r of window (oh, ow), or -1: ReLU stops it, or it would leave the image.
  ADCERT_INLINE int64_t target(int64_t oh, int64_t ow, R r) const {
    if (static_cast<size_t>(r) >= cell.size()) return -1;
    const int64_t i = window.height.start(oh) * window.width.size + window.width.start(ow) + cell[r];
    return i >= 0 && i < window.cells() ? i : -1;
  }
};

// A gradient arrives in a cell that holds +0.0: -0.0 becomes +0.0, as in torch.
template <class T>
ADCERT_INLINE T arrive(T g) {
  if constexpr (std::is_floating_point_v<T>)
    return g + T{};
  else
    return static_cast<T>(bits(g) & (bits(g) == 0x8000 ? 0 : 0xffff));
}

// The gradient if the route is this tap, else 0; by masks, which compilers turn into vectors.
template <class T, class L>
ADCERT_INLINE T pick(L route, L tap, T g) {
  const auto hit = static_cast<L>(-static_cast<L>(route == tap));
  if constexpr (std::is_floating_point_v<T>)
    return std::bit_cast<T>(std::bit_cast<L>(g) & hit);
  else
    return static_cast<T>(bits(g) & hit);
}

template <class T, class L>
ADCERT_INLINE void square_tile(const T* __restrict from, const L* __restrict route, int64_t n, T* __restrict top,
                               T* __restrict bottom) {
  for (int64_t i = 0; i < n; ++i) {
    const T g = arrive(from[i]);
    top[2 * i] = pick(route[i], L{0}, g);
    top[2 * i + 1] = pick(route[i], L{1}, g);
    bottom[2 * i] = pick(route[i], L{2}, g);
    bottom[2 * i + 1] = pick(route[i], L{3}, g);
  }
}

// 2 x 2 windows side by side cover every cell at most once: written, not accumulated.
template <class T, class R>
ADCERT_INLINE void square_plane(const Routing<T, R>& job, const T* from, const R* routes, T* to) {
  using L = typename Value<T>::Lane;
  constexpr int64_t kTile = 256;
  const int64_t width = job.window.width.size, height = job.window.height.size;
  const int64_t rows = job.window.height.count, columns = job.window.width.count;
  L route[kTile];
  for (int64_t oh = 0; oh < rows; ++oh) {
    T *top = to + 2 * oh * width, *bottom = top + width;
    for (int64_t t0 = 0; t0 < columns; t0 += kTile) {
      const int64_t n = std::min(kTile, columns - t0), at = oh * columns + t0;
      for (int64_t i = 0; i < n; ++i) route[i] = static_cast<L>(routes[at + i]);
      square_tile(from + at, route, n, top + 2 * t0, bottom + 2 * t0);
    }
    std::fill(top + 2 * columns, top + width, T{});
    std::fill(bottom + 2 * columns, bottom + width, T{});
  }
  std::fill(to + 2 * rows * width, to + height * width, T{});
}

// Cells begin .. begin + n - 1: the sum of those gradients g[k] whose routes r[k] name tap[k].
template <class T, class L, size_t... K>
ADCERT_INLINE void sum_taps(const T* const* g, const L* const* r, const L* tap, int64_t begin, int64_t n, T* to,
                            std::index_sequence<K...>) {
  ADCERT_NO_ALIAS
  for (int64_t i = begin; i < begin + n; ++i) {
    T sum = arrive(pick(r[0][i], tap[0], g[0][i]));
    ((sum = Value<T>::add(sum, pick(r[K + 1][i], tap[K + 1], g[K + 1][i]))), ...);
    to[i] = sum;
  }
}

template <size_t N, class T, class L>
ADCERT_INLINE void sum_channels(const T* const* g, const L* const* r, const L* tap, int64_t n, T* to) {
  constexpr int64_t kVector = 64 / sizeof(T);
  constexpr auto rest = std::make_index_sequence<N - 1>{};
  if (N == 1 || n < kVector)  // so short a loop of known length would be unrolled instead
    sum_taps(g, r, tap, 0, n, to, rest);
  else
    for (int64_t i = 0; i < n; i += kVector) sum_taps(g, r, tap, std::min(i, n - kVector), kVector, to, rest);
}

// Routes as wide as the gradients, which compilers need to make vectors: the last rows of windows of one image.
template <class L>
class WideRoutes {
 public:
  ADCERT_INLINE WideRoutes(const Axis& h, int64_t row_size)
      : rows_(((h.kernel - 1) * h.dilation + h.stride) / h.stride), row_size_(row_size), wide_(rows_ * row_size) {}

  void begin() { next_ = 0; }

  // Rows up to oh; those rows_ before it may be gone.
  template <class R>
  ADCERT_INLINE const L* row(const R* routes, int64_t oh) {
    for (; next_ <= oh; ++next_) {
      const R* __restrict from = routes + next_ * row_size_;
      L* __restrict to = wide_.data() + next_ % rows_ * row_size_;
      for (int64_t i = 0; i < row_size_; ++i) to[i] = static_cast<L>(from[i]);
    }
    return wide_.data() + oh % rows_ * row_size_;
  }

 private:
  int64_t rows_, row_size_, next_ = 0;
  std::vector<L> wide_;
};

// One image [H, W, C]; windows of at most 9 cells.
template <class T, class R, class L>
ADCERT_INLINE void small_image(const Routing<T, R>& job, WideRoutes<L>& wide, const T* from, const R* routes, T* to) {
  const Axis &h = job.window.height, &w = job.window.width;
  const int64_t channels = job.channels;
  wide.begin();
  for (int64_t ih = 0; ih < h.size; ++ih)
    for (int64_t iw = 0; iw < w.size; ++iw, to += channels) {
      const T* g[9];
      const L* r[9];
      L tap[9];
      int n = 0;
      for (int64_t oh = h.reach(ih), oh1 = h.beyond(ih); oh < oh1; ++oh) {
        const L* row = wide.row(routes, oh);
        for (int64_t ow = w.reach(iw), ow1 = w.beyond(iw); ow < ow1; ++ow) {
          const int64_t down = ih - h.start(oh), across = iw - w.start(ow);
          if (down % h.dilation || across % w.dilation) continue;
          g[n] = from + (oh * w.count + ow) * channels;
          r[n] = row + ow * channels;
          tap[n++] = static_cast<L>(down / h.dilation * w.kernel + across / w.dilation);
        }
      }
      if (n == 0) std::fill_n(to, channels, T{});
      if (n == 1) sum_channels<1>(g, r, tap, channels, to);
      if (n == 2) sum_channels<2>(g, r, tap, channels, to);
      if (n == 4) sum_channels<4>(g, r, tap, channels, to);
      if (n == 3 || n > 4) sum_channels<3>(g, r, tap, channels, to);
      for (int k = 3; n > 4 && k < n; ++k)
        for (int64_t c = 0; c < channels; ++c) to[c] = Value<T>::add(to[c], pick(r[k][c], tap[k], g[k][c]));
    }
}

// Gradients and routes of a row of 3 x 3 windows with stride 2, between routes that name nothing.
template <class T>
struct RouteLine {
  using L = typename Value<T>::Lane;
  std::vector<T> gradient;
  std::vector<L> route;

  explicit RouteLine(int64_t width) : gradient(width / 2 + 4 * kShortRow), route(width / 2 + 4 * kShortRow, L{-1}) {}

  template <class R>
  ADCERT_INLINE void set(const T* from, const R* routes, int64_t n) {
    if (n >= kShortRow)
      for (int64_t i = 0; i < n; i += kShortRow) copy(from, routes, std::min(i, n - kShortRow), kShortRow);
    else
      copy(from, routes, 0, n);
  }

  template <class R>
  ADCERT_INLINE void copy(const T* from, const R* routes, int64_t begin, int64_t n) {
    T* g = gradient.data() + 1;
    L* r = route.data() + 1;
    ADCERT_NO_ALIAS
    for (int64_t i = begin; i < begin + n; ++i) {
      g[i] = from[i];
      r[i] = static_cast<L>(routes[i]);
    }
  }
};

// Pairs of neighbouring cells begin .. begin + n - 1 of a row, to `to`. The row lies between the window rows `above`,
// if TWO, in their row 2, and `below` in their row 0; else in row 1 of `below`. PAD: the padding, 0 or 1.
template <bool TWO, int PAD, class T>
ADCERT_INLINE void three_pairs(const RouteLine<T>& above, const RouteLine<T>& below, int64_t begin, int64_t n, T* to) {
  using L = typename Value<T>::Lane;
  const T *ag = above.gradient.data() + PAD, *bg = below.gradient.data() + PAD;
  const L *ar = above.route.data() + PAD, *br = below.route.data() + PAD;
  constexpr L kRow0 = TWO ? 0 : 3;
  ADCERT_NO_ALIAS
  for (int64_t i = begin; i < begin + n; ++i) {
    // `both` is a cell between two windows, left and right; `one` in the middle of a window
    const int64_t middle = i + 1 - PAD;
    T both, one;
    if constexpr (TWO) {
      both = Value<T>::add(arrive(pick(ar[i], L{8}, ag[i])), pick(ar[i + 1], L{6}, ag[i + 1]));
      both = Value<T>::add(both, pick(br[i], L{2}, bg[i]));
      one = Value<T>::add(arrive(pick(ar[middle], L{7}, ag[middle])), pick(br[middle], L{1}, bg[middle]));
    } else {
      both = arrive(pick(br[i], L{5}, bg[i]));
      one = arrive(pick(br[middle], L{4}, bg[middle]));
    }
    both = Value<T>::add(both, pick(br[i + 1], kRow0, bg[i + 1]));
    to[2 * (i - begin)] = PAD ? one : both;
    to[2 * (i - begin) + 1] = PAD ? both : one;
  }
}

template <bool TWO, int PAD, class T>
ADCERT_INLINE void three_row(const RouteLine<T>& above, const RouteLine<T>& below, int64_t width, T* to) {
  constexpr int64_t kHalf = kShortRow / 2;
  const int64_t n = width / 2;
  if (n >= kShortRow)
    for (int64_t i = 0; i < n; i += kShortRow)
      three_pairs<TWO, PAD>(above, below, std::min(i, n - kShortRow), kShortRow, to + 2 * std::min(i, n - kShortRow));
  else if (n >= kHalf)
    for (int64_t i = 0; i < n; i += kHalf)
      three_pairs<TWO, PAD>(above, below, std::min(i, n - kHalf), kHalf, to + 2 * std::min(i, n - kHalf));
  else
    three_pairs<TWO, PAD>(above, below, 0, n, to);
  if (width % 2 == 0) return;
  T last[2];
  three_pairs<TWO, PAD>(above, below, n, 1, last);
  to[width - 1] = last[0];
}

// 3 x 3 windows of stride 2; PAD: padding of the width.
template <int PAD, class T, class R>
ADCERT_INLINE void three_plane(const Routing<T, R>& job, RouteLine<T>* lines, const T* from, const R* routes, T* to) {
  const Axis &h = job.window.height, &w = job.window.width;
  const RouteLine<T>& none = lines[4];
  int64_t set = 0;  // window rows that are in lines; one more than needed, since reading what was just written stalls
  for (int64_t ih = 0; ih < h.size; ++ih, to += w.size) {
    const int64_t at = ih + h.padding, below = at / 2;
    for (; set < h.count && set <= below + 1; ++set)
      lines[set % 4].set(from + set * w.count, routes + set * w.count, w.count);
    const RouteLine<T>& b = below < h.count ? lines[below % 4] : none;
    const RouteLine<T>& a = below > 0 && below <= h.count ? lines[(below - 1) % 4] : none;
    if (at % 2)
      three_row<false, PAD>(a, b, w.size, to);
    else
      three_row<true, PAD>(a, b, w.size, to);
  }
}

}  // namespace adcert
