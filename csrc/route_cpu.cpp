// The backward of pooling and its adjoint: one value to, or from, the cell each route names.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "checks.h"
#include "collect.h"
#include "lanes.h"
#include "tensors.h"

namespace adcert {
namespace {

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

// In the order of the windows, which fixes the rounding of overlapping sums: torch's order.
template <class T, class R>
ADCERT_INLINE void any_plane(const Routing<T, R>& job, const T* from, const R* routes, T* to) {
  std::fill_n(to, job.window.cells(), T{});
  int64_t o = 0;
  for (int64_t oh = 0; oh < job.window.height.count; ++oh)
    for (int64_t ow = 0; ow < job.window.width.count; ++ow, ++o) {
      const int64_t i = job.target(oh, ow, routes[o]);
      if (i >= 0) to[i] = Value<T>::add(to[i], from[o]);
    }
}

// One image [H, W, C], every channel in the order of the windows.
template <class T, class R>
ADCERT_INLINE void any_image(const Routing<T, R>& job, const T* from, const R* routes, T* to) {
  constexpr int64_t kMaskedTaps = 9;  // up to here a masked sum over all taps beats a scattered one
  const Axis &h = job.window.height, &w = job.window.width;
  const int64_t channels = job.channels, taps = job.window.taps();
  std::fill_n(to, job.window.cells() * channels, T{});
  for (int64_t oh = 0; oh < h.count; ++oh)
    for (int64_t ow = 0; ow < w.count; ++ow, from += channels, routes += channels) {
      if (taps > kMaskedTaps) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t i = job.target(oh, ow, routes[c]);
          if (i >= 0) to[i * channels + c] = Value<T>::add(to[i * channels + c], from[c]);
        }
        continue;
      }
      for (int64_t kh = h.first(oh), kh_last = h.last(oh); kh < kh_last; ++kh)
        for (int64_t kw = w.first(ow), kw_last = w.last(ow); kw < kw_last; ++kw) {
          const auto tap = static_cast<R>(kh * w.kernel + kw);
          T* __restrict cell = to + (h.cell(oh, kh) * w.size + w.cell(ow, kw)) * channels;
          for (int64_t c = 0; c < channels; ++c) cell[c] = routes[c] == tap ? Value<T>::add(cell[c], from[c]) : cell[c];
        }
    }
}

// Planes, or images if NHWC, begin <= u < end; routes repeat after `period` of them.
template <class T, class R>
ADCERT_INLINE void scatter_chunk_as(const Routing<T, R>& job, bool channels_last, int64_t period, int64_t begin,
                                    int64_t end) {
  const bool square = job.window.is_square();
  const int64_t outputs = job.window.outputs() * job.channels, cells = job.window.cells() * job.channels;
  for (int64_t u = begin; u < end; ++u) {
    const T* from = job.from + u * outputs;
    const R* routes = job.routes + u % period * outputs;
    T* to = job.to + u * cells;
    if (channels_last)
      any_image(job, from, routes, to);
    else if (square)
      square_plane(job, from, routes, to);
    else
      any_plane(job, from, routes, to);
  }
}

#define ADCERT_SCATTER(T, R)                                                                                \
  ADCERT_CLONES void scatter_chunk(const Routing<T, R>& job, bool channels_last, int64_t period, int64_t b, \
                                   int64_t e) {                                                             \
    scatter_chunk_as(job, channels_last, period, b, e);                                                     \
  }
ADCERT_SCATTER(float, uint8_t)
ADCERT_SCATTER(double, uint8_t)
ADCERT_SCATTER(BFloat16, uint8_t)
ADCERT_SCATTER(Float16, uint8_t)
ADCERT_SCATTER(float, int32_t)
ADCERT_SCATTER(double, int32_t)
ADCERT_SCATTER(BFloat16, int32_t)
ADCERT_SCATTER(Float16, int32_t)
#undef ADCERT_SCATTER

template <class T, class R>
void gather_chunk(const Routing<T, R>& job, int64_t period, int64_t begin, int64_t end) {
  const int64_t outputs = job.window.outputs() * job.channels, cells = job.window.cells() * job.channels;
  for (int64_t u = begin; u < end; ++u) {
    const R* r = job.routes + u % period * outputs;
    T* to = job.to + u * outputs;
    for (int64_t oh = 0; oh < job.window.height.count; ++oh)
      for (int64_t ow = 0; ow < job.window.width.count; ++ow)
        for (int64_t c = 0; c < job.channels; ++c) {
          const int64_t i = job.target(oh, ow, *r++);
          *to++ = i < 0 ? T{} : job.from[u * cells + i * job.channels + c];
        }
  }
}

// Everything both directions share. gather: x [.., H, W] -> [.., OH, OW]; else grad [.., OH, OW] -> [.., H, W].
Tensor route(const Tensor& from, const Tensor& routes, const Window& window, bool channels_last, bool gather) {
  const int64_t d = from.dim();
  std::vector<int64_t> shape(from.sizes().begin(), from.sizes().end());
  const int64_t batch = d == 4 ? shape[0] : 1, period = d == 4 ? routes.size(0) : 1;
  const int64_t rows = gather ? window.height.size : window.height.count;
  const int64_t columns = gather ? window.width.size : window.width.count;
  STD_TORCH_CHECK(routes.dim() == d && shape[d - 2] == rows && shape[d - 1] == columns &&
                      routes.size(d - 2) == window.height.count && routes.size(d - 1) == window.width.count &&
                      routes.size(d - 3) == shape[d - 3] && (period == 0 ? batch == 0 : batch % period == 0),
                  "max_pool2d routes do not fit the tensor: dimensions ", routes.dim(), " and ", d, ", rows ",
                  routes.size(d - 2), " and ", shape[d - 2], ", columns ", routes.size(d - 1), " and ", shape[d - 1]);
  const bool narrow = routes.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(narrow || routes.scalar_type() == ScalarType::Int, "max_pool2d: routes must be uint8 or int32");
  shape[d - 2] = gather ? window.height.count : window.height.size;
  shape[d - 1] = gather ? window.width.count : window.width.size;
  const Tensor source = in_format(from, channels_last), named = in_format(routes, channels_last);
  const Tensor to = empty(from, shape, from.scalar_type(), channels_last);
  std::vector<int64_t> cell;
  for (int64_t k = 0; k < window.taps(); ++k)
    cell.push_back(k / window.width.kernel * window.height.dilation * window.width.size +
                   k % window.width.kernel * window.width.dilation);

  const int64_t channels = shape[d - 3], repeat = channels_last ? 1 : channels;
  const auto run = [&](auto zero, auto r) {
    using T = decltype(zero);
    using R = decltype(r);
    const Routing<T, R> job{static_cast<const T*>(source.const_data_ptr()),
                            static_cast<const R*>(named.const_data_ptr()),
                            static_cast<T*>(to.mutable_data_ptr()),
                            window,
                            channels_last ? channels : 1,
                            std::move(cell)};
    torch::stable::parallel_for(0, batch * repeat, grain(window.cells() * job.channels), [&](int64_t b, int64_t e) {
      gather ? gather_chunk(job, period * repeat, b, e) : scatter_chunk(job, channels_last, period * repeat, b, e);
    });
    return to;
  };
  return by_dtype(from.scalar_type(), [&](auto zero) { return narrow ? run(zero, uint8_t{}) : run(zero, int32_t{}); });
}

// The number of windows is that of the routes, whatever ceil_mode it came from.
Window window_of(const Tensor& routes, int64_t height, int64_t width, const std::vector<int64_t>& kernel,
                 const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& dilation) {
  const int64_t d = routes.dim();
  STD_TORCH_CHECK(d == 3 || d == 4, "max_pool2d: expected 3-D or 4-D routes, got ", d, " dimensions");
  const std::vector<int64_t> shape{1, height, width};
  Window window = make_window(shape, kernel, stride, padding, dilation, true);
  STD_TORCH_CHECK(routes.size(d - 2) <= window.height.count && routes.size(d - 1) <= window.width.count,
                  "max_pool2d: more windows in the routes than fit into [", height, ", ", width, "]");
  window.height.count = routes.size(d - 2);
  window.width.count = routes.size(d - 1);
  return window;
}

Tensor max_pool2d_backward(const Tensor& grad, const Tensor& routes, int64_t height, int64_t width,
                           std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
                           std::vector<int64_t> dilation, bool channels_last) {
  check_floating(grad, "max_pool2d_backward");
  const Window window = window_of(routes, height, width, kernel, stride, padding, dilation);
  return route(grad, routes, window, channels_last && grad.dim() == 4, false);
}

Tensor max_pool2d_gather(const Tensor& x, const Tensor& routes, std::vector<int64_t> kernel,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  check_floating(x, "max_pool2d_gather");
  const int64_t d = x.dim();
  STD_TORCH_CHECK(d == 3 || d == 4, "max_pool2d_gather: expected a 3-D or 4-D input, got ", d, " dimensions");
  const Window window = window_of(routes, x.size(d - 2), x.size(d - 1), kernel, stride, padding, dilation);
  return route(x, routes, window, looks_channels_last(x), true);
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) {
  m.impl("max_pool2d_backward", TORCH_BOX(&adcert::max_pool2d_backward));
  m.impl("max_pool2d_gather", TORCH_BOX(&adcert::max_pool2d_gather));
}
