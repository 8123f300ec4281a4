// The backward of pooling and its adjoint: one value to, or from, the cell each route names.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "checks.h"
#include "collect.h"
#include "lanes.h"
#include "route_small.h"
#include "tensors.h"

namespace adcert {
namespace {

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
  const Axis &h = job.window.height, &w = job.window.width;
  const int64_t channels = job.channels;
  std::fill_n(to, job.window.cells() * channels, T{});
  for (int64_t oh = 0; oh < h.count; ++oh)
    for (int64_t ow = 0; ow < w.count; ++ow, from += channels, routes += channels)
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t i = job.target(oh, ow, routes[c]);
        if (i >= 0) to[i * channels + c] = Value<T>::add(to[i * channels + c], from[c]);
      }
}

// Planes, or images if NHWC, begin <= u < end; routes repeat after `period` of them.
template <class T, class R>
ADCERT_INLINE void scatter_chunk_as(const Routing<T, R>& job, bool channels_last, int64_t period, int64_t begin,
                                    int64_t end) {
  const Axis& w = job.window.width;
  const bool small = channels_last && job.window.taps() <= 9;
  const bool square = job.window.is_square(), three = !channels_last && job.window.is_three();
  const int64_t outputs = job.window.outputs() * job.channels, cells = job.window.cells() * job.channels;
  WideRoutes<typename Value<T>::Lane> wide(job.window.height, small ? w.count * job.channels : 0);
  std::vector<RouteLine<T>> lines(three ? 5 : 0, RouteLine<T>(w.size));
  for (int64_t u = begin; u < end; ++u) {
    const T* from = job.from + u * outputs;
    const R* routes = job.routes + u % period * outputs;
    T* to = job.to + u * cells;
    if (channels_last)
      small ? small_image(job, wide, from, routes, to) : any_image(job, from, routes, to);
    else if (square)
      square_plane(job, from, routes, to);
    else if (three)
      w.padding ? three_plane<1>(job, lines.data(), from, routes, to)
                : three_plane<0>(job, lines.data(), from, routes, to);
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
