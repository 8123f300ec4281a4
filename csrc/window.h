// Window arithmetic of 2-D pooling, shared by every device: which cells a window looks at.
#pragma once

#include <cstdint>

#include "values.h"

namespace adcert {

// One axis of a pooling: window o looks at cells start(o) + k * dilation, k = 0 .. kernel - 1, of 0 .. size - 1;
// cells outside are padding and never attain the maximum. I: int64_t, or int32_t where all products fit.
template <class I>
struct AxisOf {
  I size, kernel, stride, padding, dilation;
  I count;  // number of windows

  ADCERT_HD I start(I o) const { return o * stride - padding; }
  ADCERT_HD I cell(I o, I k) const { return start(o) + k * dilation; }

  // Taps first(o) <= k < last(o) are those inside the image.
  ADCERT_HD I first(I o) const {
    const I s = start(o);
    return s >= 0 ? 0 : (-s + dilation - 1) / dilation;
  }
  ADCERT_HD I last(I o) const {
    const I room = size - start(o);
    if (room <= 0) return 0;
    const I k = (room + dilation - 1) / dilation;
    return k < kernel ? k : kernel;
  }

  // Cells owned(o) .. owned(o + 1) - 1 are visited with window o: a partition of 0 .. size - 1, so that every cell
  // is looked at once for touches even where windows overlap or leave gaps.
  ADCERT_HD I owned(I o) const {
    if (o == 0) return 0;
    if (o >= count) return size;
    const I s = start(o);
    return s < 0 ? 0 : (s < size ? s : size);
  }

  // Windows reach(i) <= o < beyond(i) are those that may look at cell i; with a dilation some of them step over it.
  ADCERT_HD I reach(I i) const {
    const I past = i + padding - dilation * (kernel - 1);
    return past <= 0 ? 0 : (past + stride - 1) / stride;
  }
  ADCERT_HD I beyond(I i) const {
    const I o = (i + padding) / stride + 1;
    return o < count ? o : count;
  }

  template <class J>
  AxisOf<J> as() const {
    return {static_cast<J>(size),    static_cast<J>(kernel),   static_cast<J>(stride),
            static_cast<J>(padding), static_cast<J>(dilation), static_cast<J>(count)};
  }
};
using Axis = AxisOf<int64_t>;

// Pooling of planes [height.size, width.size] by windows [height.kernel, width.kernel].
template <class I>
struct WindowOf {
  AxisOf<I> height, width;

  ADCERT_HD I taps() const { return height.kernel * width.kernel; }
  ADCERT_HD I words() const { return (taps() + 63) / 64; }  // int64 words of a member mask
  ADCERT_HD I cells() const { return height.size * width.size; }
  ADCERT_HD I outputs() const { return height.count * width.count; }
  // 2 x 2 windows side by side, all inside the image: the usual case, for which kernels have a shorter way.
  ADCERT_HD bool is_square() const { return is_half(height) && is_half(width); }
  ADCERT_HD static bool is_half(const AxisOf<I>& a) {
    return a.kernel == 2 && a.stride == 2 && a.padding == 0 && a.dilation == 1 && 2 * a.count <= a.size;
  }
  // 3 x 3 windows of stride 2, the other usual case.
  ADCERT_HD bool is_three() const { return is_overlapping(height) && is_overlapping(width); }
  ADCERT_HD static bool is_overlapping(const AxisOf<I>& a) {
    return a.kernel == 3 && a.stride == 2 && a.padding <= 1 && a.dilation == 1;
  }
  ADCERT_HD I first(I oh, I ow) const { return height.first(oh) * width.kernel + width.first(ow); }

  template <class J>
  WindowOf<J> as() const {
    return {height.template as<J>(), width.template as<J>()};
  }
};
using Window = WindowOf<int64_t>;

}  // namespace adcert
