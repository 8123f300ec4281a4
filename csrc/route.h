// What both directions of routing check, on every device: the backward of pooling and its adjoint.
#pragma once

#include <vector>

#include "checks.h"
#include "tensors.h"

namespace adcert {

// gather: x [.., H, W] -> [.., OH, OW]; else grad [.., OH, OW] -> [.., H, W].
struct Route {
  Window window;
  Tensor source, routes, to;
  int64_t batch, channels;
  int64_t period;  // samples after which routes repeat
  bool channels_last, narrow;
};

// The number of windows is that of the routes, whatever ceil_mode it came from.
inline Window window_of(const Tensor& routes, int64_t height, int64_t width, const std::vector<int64_t>& kernel,
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
  check_cells(window);
  return window;
}

inline Route make_route(const Tensor& from, const Tensor& routes, const Window& window, bool channels_last,
                        bool gather) {
  const int64_t d = from.dim();
  STD_TORCH_CHECK(from.get_device_index() == routes.get_device_index(),
                  "max_pool2d: the routes are on another device than the tensor");
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
  return {window,
          in_format(from, channels_last),
          in_format(routes, channels_last),
          empty(from, shape, from.scalar_type(), channels_last),
          batch,
          shape[d - 3],
          period,
          channels_last,
          narrow};
}

// The two operators, each as a `run` that makes the tensor `to` of a route.
template <class F>
Tensor route_back(const Tensor& grad, const Tensor& routes, int64_t height, int64_t width,
                  const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, bool channels_last,
                  const F& run) {
  check_floating(grad, "max_pool2d_backward");
  const Window window = window_of(routes, height, width, kernel, stride, padding, dilation);
  STD_TORCH_CHECK(grad.dim() == routes.dim(), "max_pool2d routes do not fit the tensor: dimensions ", routes.dim(),
                  " and ", grad.dim());
  return run(make_route(grad, routes, window, channels_last && grad.dim() == 4, false));
}

template <class F>
Tensor route_forth(const Tensor& x, const Tensor& routes, const std::vector<int64_t>& kernel,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, const F& run) {
  check_floating(x, "max_pool2d_gather");
  const int64_t d = x.dim();
  STD_TORCH_CHECK(d == 3 || d == 4, "max_pool2d_gather: expected a 3-D or 4-D input, got ", d, " dimensions");
  STD_TORCH_CHECK(d == routes.dim(), "max_pool2d routes do not fit the tensor: dimensions ", routes.dim(), " and ", d);
  const Window window = window_of(routes, x.size(d - 2), x.size(d - 1), kernel, stride, padding, dilation);
  return run(make_route(x, routes, window, looks_channels_last(x), true));
}

}  // namespace adcert
