// Max pooling, fused with ReLU or not, with its ties and touches in one pass over x.
//
// A lane (values.h) is one output: a column of an output row (NCHW) or a channel of an output pixel (NHWC). The few
// tied windows are looked at again, one by one.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "pool.h"
#include "pool_small.h"
#include "pool_tile.h"

namespace adcert {
namespace {

template <bool RELU, class T, class L>
ADCERT_INLINE void see_row(const T* __restrict x, int64_t n, L tap, int64_t at, Tile<T, L>& __restrict t) {
  for (int64_t i = at; i < at + n; ++i) {
    const T v = x[i - at];
    Best<T, L> best{t.maximum[i], {}, t.offset[i], t.last[i]};
    if constexpr (Tile<T, L>::kBits) best.value = t.value[i];
    best.see(RELU ? rectify(v) : v, tap);
    save(best, t, i);
  }
}

template <class T, class L>
ADCERT_INLINE void reset(Tile<T, L>& t, int64_t at, int64_t n, L first) {
  for (int64_t i = at; i < at + n; ++i) save(Best<T, L>{Value<T>::lowest, Value<T>::lowest_value, first, first}, t, i);
}

// line[j * stride + p] -> split[p * count + j]. Stride 2 apart from the rest: only then are whole vectors loaded.
template <class T>
ADCERT_INLINE void split_line(const T* __restrict line, int64_t stride, int64_t count, T* __restrict split) {
  if (stride == 2)
    for (int64_t j = 0; j < count; ++j) {
      split[j] = line[2 * j];
      split[count + j] = line[2 * j + 1];
    }
  else
    for (int64_t p = 0; p < stride; ++p)
      for (int64_t j = 0; j < count; ++j) split[p * count + j] = line[j * stride + p];
}

// Any window: each input row is first copied, rectified, surrounded by -inf and split by the stride, so that every lane
// sees every tap and neighbouring lanes look at neighbouring values. The -inf of the padding is never selected; where
// it seems to tie with a maximum of -inf, push_window finds out.
template <bool RELU, class T, class L>
ADCERT_INLINE void fill_any(const Job<T>& job, const T* image, int64_t oh, int64_t t0, int64_t n, int64_t at,
                            std::vector<T>& scratch, Tile<T, L>& t) {
  const Axis &h = job.window.height, &w = job.window.width;
  const int64_t start = w.start(t0), length = (n - 1) * w.stride + (w.kernel - 1) * w.dilation + 1;
  const int64_t lo = std::clamp<int64_t>(-start, 0, length), hi = std::clamp<int64_t>(w.size - start, lo, length);
  const int64_t count = (length / w.stride + 16) / 16 * 16;  // whole vectors
  reset(t, at, n, static_cast<L>(h.first(oh) * w.kernel));
  for (int64_t ow = t0; ow < t0 + n && w.start(ow) < 0; ++ow)
    t.last[at + ow - t0] = t.offset[at + ow - t0] += static_cast<L>(w.first(ow));
  scratch.assign(static_cast<size_t>(2 * count * w.stride), Value<T>::lowest_value);
  T* __restrict line = scratch.data(), * __restrict split = line + (w.stride == 1 ? 0 : count * w.stride);
  for (int64_t kh = h.first(oh), last = h.last(oh); kh < last; ++kh) {
    const T* __restrict row = image + h.cell(oh, kh) * w.size;
    for (int64_t i = lo; i < hi; ++i) line[i] = RELU ? rectify(row[start + i]) : row[start + i];
    if (w.stride > 1) split_line(line, w.stride, count, split);
    for (int64_t kw = 0; kw < w.kernel; ++kw) {
      const int64_t cell = kw * w.dilation;
      see_row<false>(split + cell % w.stride * count + cell / w.stride, n, static_cast<L>(kh * w.kernel + kw), at, t);
    }
  }
}

// The first row of x, over all images (or planes), that belongs to output row u.
template <class T>
ADCERT_INLINE int64_t owned(const Job<T>& job, int64_t u) {
  const Axis& h = job.window.height;
  return u / h.count * h.size + h.owned(u % h.count);
}

// Whether the windows of output rows u0 .. u1 - 1 look at finite values only.
template <bool RELU, class T>
ADCERT_INLINE bool finite(const Job<T>& job, Scan<RELU, T>& scan, int64_t u0, int64_t u1, Found& found) {
  const Axis& h = job.window.height;
  const int64_t oh = (u1 - 1) % h.count, image = (u1 - 1) / h.count * h.size;
  return scan.finite(owned(job, u0), std::max(owned(job, u1), image + h.cell(oh, h.last(oh) - 1) + 1), found);
}

// x [planes, H, W]; rows begin <= u < end of [planes, OH]. Short rows share a tile.
template <bool RELU, class T, class L>
ADCERT_INLINE void nchw_rows(const Job<T>& job, int64_t begin, int64_t end, Found& found) {
  const Axis &h = job.window.height, &w = job.window.width;
  constexpr bool small = std::is_same_v<L, typename Value<T>::Lane>;  // else the windows are huge
  const bool square = small && job.window.is_square(), three = small && job.window.is_three();
  const int64_t group = std::max<int64_t>(1, kTile / w.count);
  Scan<RELU, T> scan(job.x, w.size, owned(job, begin), owned(job, end));
  Tile<T, L> t;
  Lines<T> lines;
  std::vector<T> scratch;
  for (int64_t u0 = begin; u0 < end; u0 += group) {
    const int64_t u1 = std::min(end, u0 + group);
    const bool usual = finite(job, scan, u0, u1, found) && (square || three);
    for (int64_t t0 = 0; t0 < w.count; t0 += kTile) {
      const int64_t n = std::min(kTile, w.count - t0), index = u0 * w.count + t0;
      for (int64_t u = u0; u < u1; ++u) {
        const int64_t oh = u % h.count, at = (u - u0) * n;
        const T* image = job.x + u / h.count * job.window.cells();
        if constexpr (small) {
          if (usual && square) fill_square<RELU>(job, image, oh, t0, n, at, t);
          if (usual && three) fill_three<RELU>(job, image, oh, t0, n, at, lines, t);
        }
        if (!usual) fill_any<RELU>(job, image, oh, t0, n, at, scratch, t);
      }
      store<RELU>(job, t, (u1 - u0) * n, index);
      each_tied(t, (u1 - u0) * n, [&](int64_t i) {
        const int64_t u = (index + i) / w.count, ow = (index + i) % w.count;
        push_window<RELU>(job, job.x + u / h.count * job.window.cells(), w.size, 1, u % h.count, ow, index + i, found);
      });
    }
  }
}

// NHWC, any window: n channels of one pixel, one tap after the other.
template <bool RELU, class T, class L>
ADCERT_INLINE void fill_taps(const Job<T>& job, const T* image, int64_t oh, int64_t ow, int64_t n, int64_t at,
                             Tile<T, L>& t) {
  const Axis &h = job.window.height, &w = job.window.width;
  reset(t, at, n, static_cast<L>(job.window.first(oh, ow)));
  for (int64_t kh = h.first(oh), kh_last = h.last(oh); kh < kh_last; ++kh)
    for (int64_t kw = w.first(ow), kw_last = w.last(ow); kw < kw_last; ++kw)
      see_row<RELU>(image + (h.cell(oh, kh) * w.size + w.cell(ow, kw)) * job.channels, n,
                    static_cast<L>(kh * w.kernel + kw), at, t);
}

// x [N, H, W, C]; rows begin <= u < end of [N, OH]. Pixels with few channels share a tile.
template <bool RELU, class T, class L>
ADCERT_INLINE void nhwc_rows(const Job<T>& job, int64_t begin, int64_t end, Found& found) {
  const Axis &h = job.window.height, &w = job.window.width;
  const int64_t channels = job.channels, row = w.size * channels;
  constexpr bool small = std::is_same_v<L, typename Value<T>::Lane>;  // else the windows are huge
  const bool two = small && h.kernel == 2 && w.kernel == 2, three = small && h.kernel == 3 && w.kernel == 3;
  const int64_t group = std::max<int64_t>(1, kTile / channels);
  Scan<RELU, T> scan(job.x, row, owned(job, begin), owned(job, end));
  Tile<T, L> t;
  T none[kTile];
  std::fill_n(none, kTile, Value<T>::lowest_value);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t oh = u % h.count;
    const T* image = job.x + u / h.count * h.size * row;
    const bool usual = finite(job, scan, u, u + 1, found) && (two || three);
    for (int64_t o0 = 0; o0 < w.count; o0 += group)
      for (int64_t c = 0; c < channels; c += kTile) {
        const int64_t n = std::min(kTile, channels - c), pixels = std::min(group, w.count - o0);
        const int64_t index = (u * w.count + o0) * channels + c;
        for (int64_t k = 0; k < pixels; ++k) {
          if constexpr (small) {
            if (usual && two) fill_pixel<RELU, 2>(job, image + c, oh, o0 + k, n, k * n, none, t);
            if (usual && three) fill_pixel<RELU, 3>(job, image + c, oh, o0 + k, n, k * n, none, t);
          }
          if (!usual) fill_taps<RELU>(job, image + c, oh, o0 + k, n, k * n, t);
        }
        store<RELU>(job, t, pixels * n, index);
        each_tied(t, pixels * n, [&](int64_t i) {
          push_window<RELU>(job, image + c + i % n, row, channels, oh, o0 + i / n, index + i, found);
        });
      }
  }
}

template <bool RELU, class T>
ADCERT_INLINE void pool_rows_as(const Job<T>& job, bool channels_last, int64_t begin, int64_t end, Found& found) {
  using L = typename Value<T>::Lane;
  using Wide = std::conditional_t<(sizeof(L) < 4), int32_t, L>;
  if (job.window.taps() > 0x7ffe)
    channels_last ? nhwc_rows<RELU, T, Wide>(job, begin, end, found) : nchw_rows<RELU, T, Wide>(job, begin, end, found);
  else
    channels_last ? nhwc_rows<RELU, T, L>(job, begin, end, found) : nchw_rows<RELU, T, L>(job, begin, end, found);
}

#define ADCERT_POOL(T)                                                                                             \
  ADCERT_CLONES void pool_rows(const Job<T>& job, bool channels_last, int64_t begin, int64_t end, Found& found) {  \
    pool_rows_as<false>(job, channels_last, begin, end, found);                                                    \
  }                                                                                                                \
  ADCERT_CLONES void relu_pool_rows(const Job<T>& job, bool channels_last, int64_t begin, int64_t end, Found& f) { \
    pool_rows_as<true>(job, channels_last, begin, end, f);                                                         \
  }
ADCERT_POOL(float)
ADCERT_POOL(double)
ADCERT_POOL(BFloat16)
ADCERT_POOL(Float16)
#undef ADCERT_POOL

template <class T>
Found pool_all(const Pooling& p, bool relu) {
  const Window& window = p.window;
  const int64_t batch = p.batch, channels = p.channels;
  const bool channels_last = p.channels_last;
  Job<T> job{static_cast<const T*>(p.x.const_data_ptr()),
             static_cast<T*>(p.out.mutable_data_ptr()),
             Offsets(p.offsets),
             Offsets(p.routes),
             window,
             channels};
  const int64_t units = batch * (channels_last ? 1 : channels) * window.height.count;
  const int64_t lanes = window.width.count * (channels_last ? channels : 1);
  Chunks chunks;
  torch::stable::parallel_for(0, units, grain(lanes * window.taps()), [&](int64_t begin, int64_t end) {
    Found found;
    relu ? relu_pool_rows(job, channels_last, begin, end, found) : pool_rows(job, channels_last, begin, end, found);
    chunks.add(begin, std::move(found));
  });
  Found all = chunks.merged();
  if (channels_last) {
    std::vector<int64_t> none;
    sort_channels_last(all.windows, all.members, window.words(), channels, window.outputs());
    sort_channels_last(all.touches, none, 0, channels, window.cells());
  }
  return all;
}

using Pairs = const std::vector<int64_t>&;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> max_pool2d(
    const Tensor& x, std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, bool ceil_mode, bool relu, int64_t capacity) {
  const Pooling p = make_pooling(x, kernel, stride, padding, dilation, ceil_mode, relu);
  const Found found = by_dtype(x.scalar_type(), [&](auto zero) { return pool_all<decltype(zero)>(p, relu); });
  return {
      p.out,
      p.offsets,
      to_list(found.windows, 1, capacity, false, x),
      to_list(found.members, p.window.words(), capacity, true, x),
      to_list(found.touches, 1, relu ? capacity : std::min<int64_t>(capacity, 0), false, x),
      to_tensor(
          {static_cast<int64_t>(found.windows.size()), static_cast<int64_t>(found.touches.size()), found.nonfinite}, x),
      p.routes};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) { m.impl("max_pool2d", TORCH_BOX(&adcert::max_pool2d)); }
