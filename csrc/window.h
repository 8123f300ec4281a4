// Window arithmetic of 2-D pooling, shared by every device: which cells a window looks at.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ADCERT_HD __host__ __device__ inline
#else
#define ADCERT_HD inline
#endif

namespace adcert {

// One axis of a pooling: window o looks at cells start(o) + k * dilation, k = 0 .. kernel - 1, of 0 .. size - 1;
// cells outside are padding and never attain the maximum.
struct Axis {
  int64_t size, kernel, stride, padding, dilation;
  int64_t count;  // number of windows

  ADCERT_HD int64_t start(int64_t o) const { return o * stride - padding; }
  ADCERT_HD int64_t cell(int64_t o, int64_t k) const { return start(o) + k * dilation; }

  // Taps first(o) <= k < last(o) are those inside the image.
  ADCERT_HD int64_t first(int64_t o) const {
    const int64_t s = start(o);
    return s >= 0 ? 0 : (-s + dilation - 1) / dilation;
  }
  ADCERT_HD int64_t last(int64_t o) const {
    const int64_t room = size - start(o);
    if (room <= 0) return 0;
    const int64_t k = (room + dilation - 1) / dilation;
    return k < kernel ? k : kernel;
  }

  // Cells owned(o) .. owned(o + 1) - 1 are visited with window o: a partition of 0 .. size - 1, so that every cell
  // is looked at once for touches even where windows overlap or leave gaps.
  ADCERT_HD int64_t owned(int64_t o) const {
    if (o == 0) return 0;
    if (o >= count) return size;
    const int64_t s = start(o);
    return s < 0 ? 0 : (s < size ? s : size);
  }
};

// Pooling of planes [height.size, width.size] by windows [height.kernel, width.kernel].
struct Window {
  Axis height, width;

  ADCERT_HD int64_t taps() const { return height.kernel * width.kernel; }
  ADCERT_HD int64_t words() const { return (taps() + 63) / 64; }  // int64 words of a member mask
  ADCERT_HD int64_t cells() const { return height.size * width.size; }
  ADCERT_HD int64_t outputs() const { return height.count * width.count; }
  // 2 x 2 windows side by side, all inside the image: the usual case, for which kernels have a shorter way.
  ADCERT_HD bool is_square() const { return is_half(height) && is_half(width); }
  ADCERT_HD static bool is_half(const Axis& a) {
    return a.kernel == 2 && a.stride == 2 && a.padding == 0 && a.dilation == 1 && 2 * a.count <= a.size;
  }
  // 3 x 3 windows of stride 2, the other usual case.
  ADCERT_HD bool is_three() const { return is_overlapping(height) && is_overlapping(width); }
  ADCERT_HD static bool is_overlapping(const Axis& a) {
    return a.kernel == 3 && a.stride == 2 && a.padding <= 1 && a.dilation == 1;
  }
  ADCERT_HD int64_t first(int64_t oh, int64_t ow) const { return height.first(oh) * width.kernel + width.first(ow); }
};

}  // namespace adcert
