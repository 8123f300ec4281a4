// The backward of pooling and its adjoint, without atomics: every cell gathers from the windows that look at it.
//
// Sums run in the order of the windows, in float for the half types, and are rounded once: torch's order and type.

#include <torch/csrc/stable/library.h>

#include "launch.cuh"
#include "route.h"

namespace adcert {
namespace {

template <class T, class R, class I>
struct Job {
  const T* from;
  const R* routes;
  T* to;
  WindowOf<I> window;
  I images;    // planes, or samples if NHWC
  I channels;  // NHWC only; 1 for planes
  I period;    // images after which routes repeat
};

// V neighbouring channels (NHWC) or one cell of a plane.
template <int V, class T, class R, class I>
__global__ __launch_bounds__(kThreads, sizeof(I) == 4 ? 4 : 2) void scatter(const __grid_constant__ Job<T, R, I> job) {
  using E = Element<T>;
  const AxisOf<I>&h = job.window.height, &w = job.window.width;
  const I groups = job.channels / V, outputs = job.window.outputs();
  for (Items<I> item(job.images * job.window.cells() * groups); item.more(); item.next()) {
    if (!item.active()) continue;
    const I cell = item.index() / groups, c = (item.index() - cell * groups) * V;
    const I line = cell / w.size, column = cell - line * w.size;
    const I image = line / h.size, row = line - image * h.size;
    const T* from = job.from + static_cast<int64_t>(image) * outputs * job.channels + c;
    const R* routes = job.routes + static_cast<int64_t>(image % job.period) * outputs * job.channels + c;
    typename E::Wide sum[V] = {};
    for (I oh = h.reach(row), oh1 = h.beyond(row); oh < oh1; ++oh) {
      const I down = row - h.start(oh);
      if (down % h.dilation) continue;
      for (I ow = w.reach(column), ow1 = w.beyond(column); ow < ow1; ++ow) {
        const I right = column - w.start(ow);
        if (right % w.dilation) continue;
        const I tap = down / h.dilation * w.kernel + right / w.dilation;  // may not fit into R
        const I at = (oh * w.count + ow) * job.channels;
        const Pack<R, V> route = load<V>(routes + at);
        const Pack<T, V> grad = load<V>(from + at);
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (static_cast<I>(route.v[v]) == tap) sum[v] += E::widen(grad.v[v]);
      }
    }
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) result.v[v] = E::narrow(sum[v]);
    store<V>(job.to + static_cast<int64_t>(cell) * job.channels + c, result);
  }
}

// Planes whose lines are whole packs, 2 x 2 windows that cover them: V / 2 windows give V columns of two lines.
template <int V, class T, class I>
__global__ __launch_bounds__(kThreads, sizeof(I) == 4
                                           ? 4
                                           : 2) void scatter_square(const __grid_constant__ Job<T, uint8_t, I> job) {
  using E = Element<T>;
  constexpr int H = V / 2;
  const I columns = job.window.width.count, outputs = job.window.outputs(), width = 2 * columns;
  for (Items<I> item(job.images * outputs / H); item.more(); item.next()) {
    if (!item.active()) continue;
    const I at = item.index() * H, image = at / outputs, line = at / columns;  // line: image * rows + oh
    const Pack<T, H> grad = load<H>(job.from + at);
    const Pack<uint8_t, H> route = load<H>(job.routes + (at + (image % job.period - image) * outputs));
    Pack<T, V> top, bottom;
#pragma unroll
    for (int v = 0; v < H; ++v) {
      const T g = E::narrow(E::widen(grad.v[v]) + 0);  // -0.0 arrives as +0.0
      top.v[2 * v] = route.v[v] == 0 ? g : T{};
      top.v[2 * v + 1] = route.v[v] == 1 ? g : T{};
      bottom.v[2 * v] = route.v[v] == 2 ? g : T{};
      bottom.v[2 * v + 1] = route.v[v] == 3 ? g : T{};
    }
    T* corner = job.to + 2 * line * width + 2 * (at - line * columns);
    store<V>(corner, top);
    store<V>(corner + width, bottom);
  }
}

template <class T, class R, class I>
__global__ __launch_bounds__(kThreads, sizeof(I) == 4 ? 4 : 2) void gather(const __grid_constant__ Job<T, R, I> job) {
  const AxisOf<I>&h = job.window.height, &w = job.window.width;
  const I taps = job.window.taps(), outputs = job.window.outputs(), cells = job.window.cells();
  for (Items<I> item(job.images * outputs * job.channels); item.more(); item.next()) {
    if (!item.active()) continue;
    const I output = item.index() / job.channels, c = item.index() - output * job.channels;
    const I image = output / outputs, o = output - image * outputs, oh = o / w.count, ow = o - oh * w.count;
    const auto route =
        static_cast<I>(job.routes[(static_cast<int64_t>(image % job.period) * outputs + o) * job.channels + c]);
    T value{};
    if (route >= 0 && route < taps) {
      const I row = h.cell(oh, route / w.kernel), column = w.cell(ow, route % w.kernel);
      if (row >= 0 && row < h.size && column >= 0 && column < w.size)
        value = job.from[(static_cast<int64_t>(image) * cells + row * w.size + column) * job.channels + c];
    }
    job.to[item.index()] = value;
  }
}

template <class T, class R, class I>
void run_as(const Route& route, bool gathers) {
  constexpr int V = kPack<T>;
  const bool last = route.channels_last;
  const int64_t images = route.batch * (last ? 1 : route.channels), channels = last ? route.channels : 1;
  const Window& window = route.window;
  const Job<T, R, I> job{static_cast<const T*>(route.source.const_data_ptr()),
                         static_cast<const R*>(route.routes.const_data_ptr()),
                         static_cast<T*>(route.to.mutable_data_ptr()),
                         window.as<I>(),
                         static_cast<I>(images),
                         static_cast<I>(channels),
                         static_cast<I>(route.period * (last ? 1 : route.channels))};
  const Place place(route.source);
  const int64_t cells = images * channels * window.cells(), outputs = images * channels * window.outputs();
  if (gathers) return place.launch(&gather<T, R, I>, outputs, job);
  if constexpr (std::is_same_v<R, uint8_t> && std::is_same_v<I, int32_t>) {
    const bool fit = packs(job.from, 0, 1) && packs(job.to, 0, 1) && packs(job.routes, 0, 1);
    if (last && fit && channels % V == 0) return place.launch(&scatter<V, T, R, I>, cells / V, job);
    if (!last && fit && window.is_square() && window.height.size == 2 * window.height.count &&
        window.width.size == 2 * window.width.count && window.width.size % V == 0)
      return place.launch(&scatter_square<V, T, I>, 2 * outputs / V, job);
  }
  place.launch(&scatter<1, T, R, I>, cells, job);
}

Tensor run(const Route& route, bool gathers) {
  if (route.to.numel() == 0) return route.to;
  by_dtype(route.source.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (!route.narrow)
      run_as<T, int32_t, int64_t>(route, gathers);
    else if (fits_int(route.to.numel()) && fits_int(route.source.numel()) && fits_int(route.window))
      run_as<T, uint8_t, int32_t>(route, gathers);
    else
      run_as<T, uint8_t, int64_t>(route, gathers);
  });
  return route.to;
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

STABLE_TORCH_LIBRARY_IMPL(ADCERT_LIBRARY, ADCERT_CUDA, m) {
  m.impl("max_pool2d_backward", TORCH_BOX(&adcert::max_pool2d_backward));
  m.impl("max_pool2d_gather", TORCH_BOX(&adcert::max_pool2d_gather));
}
