// Max pooling, fused with ReLU or not, with its ties and touches in one pass over x.
//
// A lane is one output: a column of an output row (NCHW) or a channel of an output pixel (NHWC). A tile of lanes runs
// through the taps of the window in row-major order, so the first maximum stays selected, and a NaN, which beats
// everything, is replaced only by a later NaN: torch's rule. The same loop counts the cells that attain the maximum;
// the few tied windows are looked at again, one by one.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>
#include <type_traits>

#include "checks.h"
#include "collect.h"
#include "lanes.h"
#include "tensors.h"

namespace adcert {
namespace {

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
  Key maximum[kTile];
  T value[kBits ? kTile : 1];
  L offset[kTile], count[kTile];
  uint8_t tied[kTile];
};

template <bool RELU, class T, class L>
ADCERT_INLINE void see(T v, L tap, typename Value<T>::Key& maximum, T& value, L& offset, L& count) {
  if constexpr (RELU) v = rectify(v);
  const auto k = Value<T>::key(v);
  const bool take = (k > maximum) | Value<T>::is_nan(k);
  count = take ? L{1} : static_cast<L>(count + (k == maximum));
  maximum = take ? k : maximum;
  offset = take ? tap : offset;
  value = take ? v : value;
}

template <bool RELU, class T, class L>
ADCERT_INLINE void see_row(const T* __restrict x, int64_t n, L tap, int64_t at, Tile<T, L>& __restrict t) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (Tile<T, L>::kBits) {
      see<RELU>(x[i], tap, t.maximum[at + i], t.value[at + i], t.offset[at + i], t.count[at + i]);
    } else {
      T unused{};
      see<RELU>(x[i], tap, t.maximum[at + i], unused, t.offset[at + i], t.count[at + i]);
    }
  }
}

template <class T, class L>
ADCERT_INLINE void reset(Tile<T, L>& t, int64_t at, int64_t n, L first) {
  for (int64_t i = at; i < at + n; ++i) {
    t.maximum[i] = Value<T>::lowest;
    if constexpr (Tile<T, L>::kBits) t.value[i] = Value<T>::lowest_value;
    t.offset[i] = first;
    t.count[i] = 0;
  }
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
      t.tied[i] = static_cast<uint8_t>((t.count[i] >= 2 ? L{1} : L{0}) & ~closed);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) t.tied[i] = static_cast<uint8_t>(t.count[i] >= 2 ? L{1} : L{0});
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

// Touches and nonfinite values of n cells from flat memory index `begin` on.
template <bool RELU, class T>
ADCERT_INLINE void scan_cells(const T* x, int64_t begin, int64_t n, Found& found) {
  if (!any_odd<false>(x + begin, static_cast<T*>(nullptr), n)) return;
  int64_t touches = 0;
  count(x + begin, n, 0, touches, found.nonfinite);
  if constexpr (RELU) {
    if (touches)
      for (int64_t i = begin; i < begin + n; ++i)
        if (Value<T>::key(x[i]) == 0) found.touches.push_back(i);
  }
}

// Lanes at .. at + n - 1 become outputs t0 .. t0 + n - 1 of row oh. 2 x 2 windows side by side, the usual case: their
// state never leaves the registers.
template <bool RELU, class T, class L>
ADCERT_INLINE void fill_square(const Job<T>& job, const T* image, int64_t oh, int64_t t0, int64_t n, int64_t at,
                               Tile<T, L>& __restrict t) {
  const T* __restrict top = image + 2 * oh * job.window.width.size + 2 * t0;
  const T* __restrict bottom = top + job.window.width.size;
  for (int64_t i = 0; i < n; ++i) {
    auto maximum = Value<T>::lowest;
    T value = Value<T>::lowest_value;
    L offset = 0, count = 0;
    see<RELU>(top[2 * i], L{0}, maximum, value, offset, count);
    see<RELU>(top[2 * i + 1], L{1}, maximum, value, offset, count);
    see<RELU>(bottom[2 * i], L{2}, maximum, value, offset, count);
    see<RELU>(bottom[2 * i + 1], L{3}, maximum, value, offset, count);
    t.maximum[at + i] = maximum;
    if constexpr (Tile<T, L>::kBits) t.value[at + i] = value;
    t.offset[at + i] = offset;
    t.count[at + i] = count;
  }
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
  for (int64_t ow = t0; ow < t0 + n && w.start(ow) < 0; ++ow) t.offset[at + ow - t0] += static_cast<L>(w.first(ow));
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

// x [planes, H, W]; rows begin <= u < end of [planes, OH]. Short rows share a tile.
template <bool RELU, class T, class L>
ADCERT_INLINE void nchw_rows(const Job<T>& job, int64_t begin, int64_t end, Found& found) {
  const Axis &h = job.window.height, &w = job.window.width;
  const bool square = job.window.is_square();
  const int64_t group = std::max<int64_t>(1, kTile / w.count);
  Tile<T, L> t;
  std::vector<T> scratch;
  for (int64_t u0 = begin; u0 < end; u0 += group) {
    const int64_t u1 = std::min(end, u0 + group);
    for (int64_t t0 = 0; t0 < w.count; t0 += kTile) {
      const int64_t n = std::min(kTile, w.count - t0), index = u0 * w.count + t0;
      for (int64_t u = u0; u < u1; ++u) {
        const int64_t plane = u / h.count, oh = u % h.count, from = h.owned(oh);
        const T* image = job.x + plane * job.window.cells();
        if (t0 == 0)
          scan_cells<RELU>(job.x, (plane * h.size + from) * w.size, (h.owned(oh + 1) - from) * w.size, found);
        if (square)
          fill_square<RELU>(job, image, oh, t0, n, (u - u0) * n, t);
        else
          fill_any<RELU>(job, image, oh, t0, n, (u - u0) * n, scratch, t);
      }
      store<RELU>(job, t, (u1 - u0) * n, index);
      each_tied(t, (u1 - u0) * n, [&](int64_t i) {
        const int64_t u = (index + i) / w.count, ow = (index + i) % w.count;
        push_window<RELU>(job, job.x + u / h.count * job.window.cells(), w.size, 1, u % h.count, ow, index + i, found);
      });
    }
  }
}

// x [N, H, W, C]; rows begin <= u < end of [N, OH].
template <bool RELU, class T, class L>
ADCERT_INLINE void nhwc_rows(const Job<T>& job, int64_t begin, int64_t end, Found& found) {
  const Axis &h = job.window.height, &w = job.window.width;
  const int64_t channels = job.channels;
  Tile<T, L> t;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t image_index = u / h.count, oh = u % h.count, from = h.owned(oh);
    const int64_t row = w.size * channels;
    scan_cells<RELU>(job.x, (image_index * h.size + from) * row, (h.owned(oh + 1) - from) * row, found);
    const T* image = job.x + image_index * h.size * row;
    for (int64_t ow = 0; ow < w.count; ++ow)
      for (int64_t c = 0; c < channels; c += kTile) {
        const int64_t n = std::min(kTile, channels - c), index = (u * w.count + ow) * channels + c;
        reset(t, 0, n, static_cast<L>(job.window.first(oh, ow)));
        for (int64_t kh = h.first(oh), kh_last = h.last(oh); kh < kh_last; ++kh)
          for (int64_t kw = w.first(ow), kw_last = w.last(ow); kw < kw_last; ++kw)
            see_row<RELU>(image + h.cell(oh, kh) * row + w.cell(ow, kw) * channels + c, n,
                          static_cast<L>(kh * w.kernel + kw), 0, t);
        store<RELU>(job, t, n, index);
        each_tied(t, n,
                  [&](int64_t i) { push_window<RELU>(job, image + c + i, row, channels, oh, ow, index + i, found); });
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
Found pool_all(const Tensor& x, const Tensor& out, const Tensor& offsets, const Tensor& routes, const Window& window,
               int64_t batch, int64_t channels, bool channels_last, bool relu) {
  Job<T> job{static_cast<const T*>(x.const_data_ptr()),
             static_cast<T*>(out.mutable_data_ptr()),
             Offsets(offsets),
             Offsets(routes),
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
    std::vector<int64_t> dilation, bool ceil_mode, bool relu) {
  check_floating(x, "max_pool2d");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const Window window = make_window(shape, kernel, stride, padding, dilation, ceil_mode);
  const Tensor base = relu ? dense(x) : x;  // torch's pooling would see the strides of torch.relu(x)
  const bool channels_last = looks_channels_last(base);
  const Tensor from = in_format(base, channels_last);
  const int64_t batch = shape.size() == 4 ? shape[0] : 1, channels = shape[shape.size() - 3];
  shape[shape.size() - 2] = window.height.count;
  shape[shape.size() - 1] = window.width.count;

  // KH * KW itself means "no gradient" in routes and must fit as well.
  const ScalarType byte_or_int = window.taps() <= 255 ? ScalarType::Byte : ScalarType::Int;
  const Tensor out = empty(x, shape, x.scalar_type(), channels_last);
  const Tensor offsets = empty(x, shape, byte_or_int, channels_last);
  const Tensor routes = relu ? empty(x, shape, byte_or_int, channels_last) : empty(x, {0}, byte_or_int, false);
  const Found found = by_dtype(x.scalar_type(), [&](auto zero) {
    return pool_all<decltype(zero)>(from, out, offsets, routes, window, batch, channels, channels_last, relu);
  });
  return {out,
          offsets,
          to_tensor(found.windows, x),
          to_tensor(found.members, {static_cast<int64_t>(found.windows.size()), window.words()}, x),
          to_tensor(found.touches, x),
          to_tensor({found.nonfinite}, x),
          routes};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) { m.impl("max_pool2d", TORCH_BOX(&adcert::max_pool2d)); }
