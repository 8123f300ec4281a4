// The backward of pooling and its adjoint: one value to, or from, the cell each route names.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "collect.h"
#include "lanes.h"
#include "route.h"
#include "route_small.h"

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

Tensor run(const Route& route, bool gather) {
  const Window& window = route.window;
  std::vector<int64_t> cell;
  for (int64_t k = 0; k < window.taps(); ++k)
    cell.push_back(k / window.width.kernel * window.height.dilation * window.width.size +
                   k % window.width.kernel * window.width.dilation);
  const int64_t repeat = route.channels_last ? 1 : route.channels, period = route.period * repeat;
  const auto run_as = [&](auto zero, auto r) {
    using T = decltype(zero);
    using R = decltype(r);
    const Routing<T, R> job{static_cast<const T*>(route.source.const_data_ptr()),
                            static_cast<const R*>(route.routes.const_data_ptr()),
                            static_cast<T*>(route.to.mutable_data_ptr()),
                            window,
                            route.channels_last ? route.channels : 1,
                            std::move(cell)};
    const int64_t work = window.cells() * job.channels;
    torch::stable::parallel_for(0, route.batch * repeat, grain(work), [&](int64_t b, int64_t e) {
      gather ? gather_chunk(job, period, b, e) : scatter_chunk(job, route.channels_last, period, b, e);
    });
    return route.to;
  };
  return by_dtype(route.source.scalar_type(),
                  [&](auto zero) { return route.narrow ? run_as(zero, uint8_t{}) : run_as(zero, int32_t{}); });
}

Tensor max_pool2d_backward(const Tensor& grad, const Tensor& routes, int64_t height, int64_t width,
                           std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
                           std::vector<int64_t> dilation, bool channels_last) {
  return route_back(grad, routes, height, width, kernel, stride, padding, dilation, channels_last,
                    [](const Route& route) { return run(route, false); });
}

Tensor max_pool2d_gather(const Tensor& x, const Tensor& routes, std::vector<int64_t> kernel,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  return route_forth(x, routes, kernel, stride, padding, dilation, [](const Route& route) { return run(route, true); });
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) {
  m.impl("max_pool2d_backward", TORCH_BOX(&adcert::max_pool2d_backward));
  m.impl("max_pool2d_gather", TORCH_BOX(&adcert::max_pool2d_gather));
}
