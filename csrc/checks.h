// Argument checks: every message says what was expected and what was found.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "window.h"

namespace adcert {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_floating(const Tensor& x, const char* op) {
  const ScalarType t = x.scalar_type();
  STD_TORCH_CHECK(
      t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 || t == ScalarType::Half, op,
      ": expected float32, float64, bfloat16 or float16, got scalar type ", static_cast<int>(t));
}

// One slope, or one for every channel of a tensor with channels.
inline void check_slopes(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "prelu: expected a weight of the input's dtype");
  STD_TORCH_CHECK(weight.device() == x.device(), "prelu: expected a weight on the input's device");
  const int64_t count = weight.numel();
  STD_TORCH_CHECK(weight.dim() <= 1 && (count == 1 || (x.dim() >= 2 && x.size(1) == count)),
                  "prelu: expected a weight with one entry, or one for each channel of the input, got ", count);
}

// channels_last iff the strides look like it; torch's own rule (c10 is_channels_last_strides_2d), ambiguous is not.
inline bool looks_channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.numel() == 0) return false;
  int64_t least = 0;
  for (const int64_t d : {1, 3, 2, 0}) {
    const int64_t stride = x.stride(d);
    if (stride < least || (d == 0 && least == x.stride(1))) return false;
    least = stride * (x.size(d) > 1 ? x.size(d) : 1);
  }
  return true;
}

inline Axis make_axis(const char* name, int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                      bool ceil_mode) {
  STD_TORCH_CHECK(kernel > 0 && stride > 0 && dilation > 0, "max_pool2d: kernel_size, stride and dilation must be ",
                  "positive, got ", kernel, ", ", stride, ", ", dilation, " for the ", name);
  constexpr int64_t kLimit = int64_t{1} << 31;  // keeps every product below inside int64
  STD_TORCH_CHECK(kernel < kLimit && stride < kLimit && dilation < kLimit && padding < kLimit && size < kLimit,
                  "max_pool2d: sizes must be below 2^31 for the ", name);
  const int64_t span = dilation * (kernel - 1) + 1;
  STD_TORCH_CHECK(padding >= 0 && padding <= span / 2, "max_pool2d: padding must lie between 0 and half of the ",
                  "window's span ", span, ", got ", padding, " for the ", name);
  const int64_t room = size + 2 * padding - span;
  STD_TORCH_CHECK(room >= 0 || (ceil_mode && room > -stride), "max_pool2d: a window of span ", span,
                  " does not fit into ", name, " ", size, " with padding ", padding);
  int64_t count = (room < 0 ? 0 : (ceil_mode ? (room + stride - 1) / stride : room / stride)) + 1;
  // With ceil_mode a window must start inside the image or in its left padding.
  if (ceil_mode && (count - 1) * stride >= size + padding) --count;
  return {size, kernel, stride, padding, dilation, count};
}

// Every window holds a cell of the image.
inline void check_cells(const char* name, const Axis& axis) {
  for (int64_t o = 0; o < axis.count && axis.start(o) < 0; ++o)
    STD_TORCH_CHECK(axis.first(o) < axis.last(o), "max_pool2d: window ", o, " along the ", name,
                    " holds no cell of the image (size ", axis.size, "): its dilation ", axis.dilation,
                    " steps over it");
}
inline void check_cells(const Window& window) {
  check_cells("height", window.height);
  check_cells("width", window.width);
}

inline void check_pairs(const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "max_pool2d: kernel_size, stride, padding and dilation must be pairs");
}

// shape: [N, C, H, W] or [C, H, W]; only N may be 0.
inline Window make_window(const std::vector<int64_t>& shape, const std::vector<int64_t>& kernel,
                          const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                          const std::vector<int64_t>& dilation, bool ceil_mode) {
  check_pairs(kernel, stride, padding, dilation);
  const size_t d = shape.size();
  STD_TORCH_CHECK(d == 3 || d == 4, "max_pool2d: expected a 3-D or 4-D input, got ", d, " dimensions");
  STD_TORCH_CHECK(shape[d - 3] > 0 && shape[d - 2] > 0 && shape[d - 1] > 0,
                  "max_pool2d: only the batch may be empty, got [", shape[d - 3], ", ", shape[d - 2], ", ",
                  shape[d - 1], "] as the last three sizes");
  Window window{make_axis("height", shape[d - 2], kernel[0], stride[0], padding[0], dilation[0], ceil_mode),
                make_axis("width", shape[d - 1], kernel[1], stride[1], padding[1], dilation[1], ceil_mode)};
  STD_TORCH_CHECK(window.taps() < (int64_t{1} << 31), "max_pool2d: more than 2^31 cells in a window");
  return window;
}

}  // namespace adcert
