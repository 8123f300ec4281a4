// What max pooling checks and makes before any kernel runs, on every device.
#pragma once

#include <vector>

#include "checks.h"
#include "tensors.h"

namespace adcert {

// x in one memory format, and room for what it is pooled to; routes are empty unless it is relu(x) that is pooled.
struct Pooling {
  Window window;
  Tensor x, out, offsets, routes;
  int64_t batch, channels;
  bool channels_last;
};

inline Pooling make_pooling(const Tensor& x, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, bool ceil_mode,
                            bool relu) {
  check_floating(x, "max_pool2d");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const Window window = make_window(shape, kernel, stride, padding, dilation, ceil_mode);
  check_cells(window);
  const Tensor base = relu ? dense(x) : x;  // torch's pooling would see the strides of torch.relu(x)
  const bool channels_last = looks_channels_last(base);
  const int64_t batch = shape.size() == 4 ? shape[0] : 1, channels = shape[shape.size() - 3];
  shape[shape.size() - 2] = window.height.count;
  shape[shape.size() - 1] = window.width.count;
  // KH * KW itself means "no gradient" in routes and must fit as well.
  const ScalarType byte_or_int = window.taps() <= 255 ? ScalarType::Byte : ScalarType::Int;
  return {window,
          in_format(base, channels_last),
          empty(x, shape, x.scalar_type(), channels_last),
          empty(x, shape, byte_or_int, channels_last),
          relu ? empty(x, shape, byte_or_int, channels_last) : empty(x, {0}, byte_or_int, false),
          batch,
          channels,
          channels_last};
}

}  // namespace adcert
