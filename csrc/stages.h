// The straight part of a network above a pooling, as the resolver walks it: stages from the pooling's input upwards.
//
// Every tie compares two units of one sample and one channel, and so does every comparison below it: a stage maps a
// position of its output plane to one of its input plane, and a convolution asks for all positions of two patches. A
// position is row * width + column, or kOff for a unit that is constant near w: padding, or behind a closed ReLU.
//
// One step of such a walk is here, for every device; what a convolution's patches are compared with is not.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "checks.h"
#include "window.h"

namespace adcert {

constexpr int64_t kOff = -1;

enum class Kind : int64_t { kConstant = 0, kUnknown = 1, kRelu = 2, kPool = 3, kNorm = 4, kConv = 5 };

// A tensor [N, C, H, W] of any strides, read as raw bits.
struct Map {
  const char* data = nullptr;
  int64_t bytes = 0;                   // of an element
  int64_t n = 0, c = 0, h = 0, w = 0;  // strides in elements
  int64_t width = 1;

  Map() = default;
  explicit Map(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 4, "resolve_ties: expected a 4-D tensor, got ", t.dim(), " dimensions");
    data = static_cast<const char*>(t.const_data_ptr());
    bytes = static_cast<int64_t>(t.element_size());
    n = t.stride(0), c = t.stride(1), h = t.stride(2), w = t.stride(3);
    width = t.size(3) > 0 ? t.size(3) : 1;
  }
  ADCERT_HD explicit operator bool() const { return data != nullptr; }
  ADCERT_HD int64_t index(int64_t sample, int64_t channel, int64_t position) const {
    return sample * n + channel * c + position / width * h + position % width * w;
  }
  template <class U>
  ADCERT_HD U raw(int64_t i) const {
#if defined(__CUDA_ARCH__)
    return reinterpret_cast<const U*>(data)[i];
#else
    U bits;
    std::memcpy(&bits, data + i * static_cast<int64_t>(sizeof(U)), sizeof(U));
    return bits;
#endif
  }
  ADCERT_HD uint64_t load(int64_t i) const {
    switch (bytes) {
      case 1:
        return raw<uint8_t>(i);
      case 2:
        return raw<uint16_t>(i);
      case 4:
        return raw<uint32_t>(i);
      default:
        return raw<uint64_t>(i);
    }
  }
  ADCERT_HD uint64_t sign() const { return uint64_t{1} << (8 * bytes - 1); }
  // Floating point values compare equal: the same bits, or both zeros. (Steps with a NaN are undecided elsewhere.)
  ADCERT_HD bool equal(int64_t i, int64_t j) const {
    const uint64_t a = load(i), b = load(j);
    return a == b || ((a | b) & ~sign()) == 0;
  }
  ADCERT_HD bool positive(int64_t i) const {
    const uint64_t a = load(i);
    return a != 0 && (a & sign()) == 0;
  }
};

// Which positions of the input a convolution's output position looks at.
struct Patches {
  Window window;
  int64_t channels = 0;  // of the input, in one group
  int64_t groups = 1;

  ADCERT_HD int64_t taps() const { return window.taps(); }
  ADCERT_HD int64_t size() const { return channels * taps(); }
  // Input position of tap k of output position p; kOff in the padding.
  ADCERT_HD int64_t input(int64_t p, int64_t k) const {
    const Axis &ah = window.height, &aw = window.width;
    const int64_t row = ah.cell(p / aw.count, k / aw.kernel), column = aw.cell(p % aw.count, k % aw.kernel);
    return row >= 0 && row < ah.size && column >= 0 && column < aw.size ? row * aw.size + column : kOff;
  }
  // Element offset of the first tap of an output position inside a plane of `x`.
  ADCERT_HD int64_t corner(int64_t p, const Map& x) const {
    return window.height.start(p / window.width.count) * x.h + window.width.start(p % window.width.count) * x.w;
  }
  ADCERT_HD bool inside(int64_t p) const {
    const Axis &ah = window.height, &aw = window.width;
    const int64_t oh = p / aw.count, ow = p % aw.count;
    return ah.start(oh) >= 0 && ah.cell(oh, ah.kernel - 1) < ah.size && aw.start(ow) >= 0 &&
           aw.cell(ow, aw.kernel - 1) < aw.size;
  }
};

struct Stage {
  Kind kind = Kind::kUnknown;
  bool relu = false;  // of a pooling: of its input
  Map values;         // ReLU and pooling with ReLU: the output; normalisation, convolution: the input
  Map offsets;        // of a pooling
  Patches patches;    // of a pooling (its windows) or a convolution
  int64_t channels_out = 1;

  // Group of a convolution that an output channel belongs to.
  ADCERT_HD int64_t group(int64_t channel) const { return channel / (channels_out / patches.groups); }
  // Raw bits of element (c, tap k) of the patch at output position p; 0 in the padding. plane: of the group.
  template <class U>
  ADCERT_HD U element(int64_t plane, int64_t p, int64_t c, int64_t k) const {
    const int64_t at = patches.input(p, k);
    return at == kOff
               ? U{0}
               : values.raw<U>(plane + c * values.c + at / values.width * values.h + at % values.width * values.w);
  }
  ADCERT_HD int64_t plane(int64_t n, int64_t g) const { return n * values.n + g * patches.channels * values.c; }
  // Do the values at two positions compare equal?
  ADCERT_HD bool same(int64_t n, int64_t c, int64_t p, int64_t q) const {
    return values.equal(values.index(n, c, p), values.index(n, c, q));
  }
  // Of a recorded operation: position of the input that position p of the output selects; kOff if the unit is off.
  ADCERT_HD int64_t source(int64_t n, int64_t c, int64_t p) const {
    if (p == kOff) return kOff;
    if (values && !values.positive(values.index(n, c, p))) return kOff;
    if (kind == Kind::kRelu) return p;
    return patches.input(p, static_cast<int64_t>(offsets.load(offsets.index(n, c, p))));
  }
};

// Do raw bits stand for different numbers? Both zeros are one.
template <class U>
ADCERT_HD bool differ(U a, U b) {
  constexpr U magnitude = static_cast<U>(~U{0}) >> 1;
  return a != b && ((a | b) & magnitude) != 0;
}

// What a comparison of two units comes to. kZero is a proof that both have the same AD gradient with respect to all
// parameters: equal patches whose every element is such a pair in turn. kRow: the patches of the first convolution
// differ, an exact nonzero row. kOpen: they are equal, but what is below is not proved equal. kHard: the stages do not
// tell. kFlat: the same unit, or both off.
enum Answer : uint8_t { kZero = 0, kRow = 1, kOpen = 2, kHard = 3, kFlat = 4, kAnswers = 5 };

// Walks a pair of positions of the pooling's input up to the first convolution: kOpen when it stands at stages[i], else
// the answer. p and q become positions of that convolution's output.
ADCERT_HD Answer reach_top(const Stage* stages, int count, int& i, int64_t n, int64_t c, int64_t& p, int64_t& q) {
  for (i = 0; i < count; ++i) {
    const Stage& s = stages[i];
    if (p == kOff || q == kOff) return kHard;
    switch (s.kind) {
      case Kind::kRelu:
      case Kind::kPool:
        p = s.source(n, c, p), q = s.source(n, c, q);
        if (p == q) return kFlat;
        break;
      case Kind::kNorm:
        if (!s.same(n, c, p, q)) return kHard;
        break;
      case Kind::kConv:
        return kOpen;
      default:
        return kHard;
    }
  }
  return kHard;
}

// The same function of the parameters around w? kZero: yes. kHard: not proved. kOpen: as much as places p and q of the
// convolution stages[i] are.
ADCERT_HD Answer climb(const Stage* stages, int count, int& i, int64_t n, int64_t c, int64_t& p, int64_t& q) {
  for (; i < count; ++i) {
    if (p == q) return kZero;
    const Stage& s = stages[i];
    switch (s.kind) {
      case Kind::kRelu:
      case Kind::kPool:
        p = s.source(n, c, p), q = s.source(n, c, q);
        if (p != q && (p == kOff || q == kOff)) return kHard;
        break;
      case Kind::kNorm:
        if (p == kOff || q == kOff || !s.same(n, c, p, q)) return kHard;
        break;
      case Kind::kConv:
        return p == kOff || q == kOff ? kHard : kOpen;
      default:
        return kHard;
    }
  }
  return kHard;
}

// Of a convolution: where the elements of a patch inside the image are, from its first.
inline std::vector<int64_t> reach_of(const Stage& s) {
  std::vector<int64_t> reach;
  const Axis &h = s.patches.window.height, &w = s.patches.window.width;
  if (s.kind != Kind::kConv || !s.values) return reach;
  for (int64_t c = 0; c < s.patches.channels; ++c)
    for (int64_t kh = 0; kh < h.kernel; ++kh)
      for (int64_t kw = 0; kw < w.kernel; ++kw)
        reach.push_back(c * s.values.c + kh * h.dilation * s.values.h + kw * w.dilation * s.values.w);
  return reach;
}

// One stage is kStageInts integers: kind, relu, indices of values and offsets in `tensors` (-1: none), channels of
// the input, groups, channels of the output, then (size, kernel, stride, padding, dilation, count) of height, width.
constexpr int64_t kStageInts = 19;

inline Axis read_axis(const int64_t* v) {
  STD_TORCH_CHECK(v[0] > 0 && v[1] > 0 && v[2] > 0 && v[3] >= 0 && v[4] > 0 && v[5] > 0,
                  "resolve_ties: impossible sizes of a stage");
  return Axis{v[0], v[1], v[2], v[3], v[4], v[5]};
}

inline Map read_map(const std::vector<Tensor>& tensors, int64_t i) {
  STD_TORCH_CHECK(i < static_cast<int64_t>(tensors.size()), "resolve_ties: a stage names tensor ", i, " of ",
                  tensors.size());
  return i < 0 ? Map() : Map(tensors[static_cast<size_t>(i)]);
}

inline void check_size(const std::vector<Tensor>& tensors, int64_t i, int64_t channels, int64_t height, int64_t width) {
  if (i < 0) return;
  const Tensor& t = tensors[static_cast<size_t>(i)];
  STD_TORCH_CHECK(t.size(1) == channels && t.size(2) == height && t.size(3) == width,
                  "resolve_ties: a stage's tensor has another shape than the stage");
}

inline Stage read_stage(const int64_t* v, const std::vector<Tensor>& tensors) {
  Stage s;
  s.kind = static_cast<Kind>(v[0]);
  STD_TORCH_CHECK(v[0] >= 0 && v[0] <= static_cast<int64_t>(Kind::kConv), "resolve_ties: unknown stage ", v[0]);
  if (s.kind == Kind::kConstant || s.kind == Kind::kUnknown) return s;
  s.relu = v[1] != 0;
  s.values = read_map(tensors, v[2]);
  s.offsets = read_map(tensors, v[3]);
  STD_TORCH_CHECK(v[4] > 0 && v[5] > 0 && v[6] > 0 && v[4] % v[5] == 0 && v[6] % v[5] == 0,
                  "resolve_ties: impossible channels of a stage");
  s.patches = {Window{read_axis(v + 7), read_axis(v + 13)}, v[4] / v[5], v[5]};
  s.channels_out = v[6];
  const Window& w = s.patches.window;
  if (s.kind == Kind::kNorm || s.kind == Kind::kConv) check_size(tensors, v[2], v[4], w.height.size, w.width.size);
  if (s.kind == Kind::kRelu || s.kind == Kind::kPool) {
    check_size(tensors, v[2], v[6], w.height.count, w.width.count);
    check_size(tensors, v[3], v[6], w.height.count, w.width.count);
    STD_TORCH_CHECK(s.kind == Kind::kRelu ? bool(s.values) : bool(s.offsets) && (!s.relu || s.values),
                    "resolve_ties: a stage lacks a tensor");
    STD_TORCH_CHECK(!s.offsets || s.offsets.bytes <= 4, "resolve_ties: offsets must be uint8 or int32");
  }
  if (s.kind == Kind::kNorm) STD_TORCH_CHECK(bool(s.values), "resolve_ties: a normalisation lacks its input");
  return s;
}

}  // namespace adcert
