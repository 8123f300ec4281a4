// T_j of Algorithm 1 in bulk: every tied member against the selected one, up the straight part of the network.
//
// The answer for a pair is one-sided. kZero is a proof that both units have the same AD gradient with respect to all
// parameters: the same unit, both off, or equal patches whose every element is such a pair in turn (value numbering).
// kRow: the patches of the first convolution differ, an exact nonzero row. Patches are compared once for each pair of
// places; what is below, once for each pair of pixels, whatever the number of channels and ties that ask.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <bit>
#include <mutex>
#include <tuple>
#include <vector>

#include "collect.h"
#include "memo.h"
#include "stages.h"

namespace adcert {
namespace {

enum Answer : uint8_t { kZero = 0, kRow = 1, kOpen = 2, kHard = 3, kFlat = 4, kAnswers = 5, kNew = 255 };

// Walks pairs of positions (p, q) of one sample and channel up the stages; remembers what it has compared.
class Walker {
 public:
  explicit Walker(const std::vector<Stage>& stages) : stages_(stages) {
    for (size_t i = 0; i < stages.size(); ++i) {
      patches_.emplace_back(kNew);
      pixels_.emplace_back(kNew);
    }
  }

  // The pair at the input of the pooling; p and q become positions of the first convolution's output.
  Answer top(int64_t n, int64_t c, int64_t& p, int64_t& q) {
    for (size_t i = 0; i < stages_.size(); ++i) {
      const Stage& s = stages_[i];
      if (p == kOff || q == kOff) return kHard;
      switch (s.kind) {
        case Kind::kRelu:
        case Kind::kPool:
          p = source(s, n, c, p), q = source(s, n, c, q);
          if (p == q) return kFlat;
          break;
        case Kind::kNorm:
          if (!same(s, n, c, p, q)) return kHard;
          break;
        case Kind::kConv:
          return patch(i, n, c / (s.channels_out / s.patches.groups), p, q);
        default:
          return kHard;
      }
    }
    return kHard;
  }

 private:
  static bool same(const Stage& s, int64_t n, int64_t c, int64_t p, int64_t q) {
    return s.values.equal(s.values.index(n, c, p), s.values.index(n, c, q));
  }

  // Position of the input that position p of the output selects.
  static int64_t source(const Stage& s, int64_t n, int64_t c, int64_t p) {
    if (p == kOff) return kOff;
    if (s.values && !s.values.positive(s.values.index(n, c, p))) return kOff;
    if (s.kind == Kind::kRelu) return p;
    return s.patches.input(p, static_cast<int64_t>(s.offsets.load(s.offsets.index(n, c, p))));
  }

  // The same function of the parameters around w?
  bool congruent(size_t i, int64_t n, int64_t c, int64_t p, int64_t q) {
    for (; i < stages_.size(); ++i) {
      if (p == q) return true;
      const Stage& s = stages_[i];
      switch (s.kind) {
        case Kind::kRelu:
        case Kind::kPool:
          p = source(s, n, c, p), q = source(s, n, c, q);
          if (p != q && (p == kOff || q == kOff)) return false;
          break;
        case Kind::kNorm:
          if (!same(s, n, c, p, q)) return false;
          break;
        case Kind::kConv:
          return patch(i, n, c / (s.channels_out / s.patches.groups), p, q) == kZero;
        default:
          return false;
      }
    }
    return false;
  }

  // Places p and q of convolution i in group g of sample n: kZero, kRow or kOpen.
  Answer patch(size_t i, int64_t n, int64_t g, int64_t p, int64_t q) {
    if (p == q) return kZero;
    if (p > q) std::swap(p, q);
    const Stage& s = stages_[i];
    const int64_t places = s.patches.window.outputs();
    const int64_t first = (n * s.patches.groups + g) * places + p;
    const uint8_t known = patches_[i].at(first, q);
    if (known != kNew) return static_cast<Answer>(known);
    Answer answer = kZero;
    if (s.values && !equal_values(s, n, g, p, q))
      answer = kRow;
    else if (!congruent_elements(i, n, g, p, q))
      answer = kOpen;
    patches_[i].at(first, q) = answer;
    return answer;
  }

  bool congruent_elements(size_t i, int64_t n, int64_t g, int64_t p, int64_t q) {
    const Patches& patches = stages_[i].patches;
    const Kind next = i + 1 < stages_.size() ? stages_[i + 1].kind : Kind::kUnknown;
    if (next == Kind::kConstant) return true;
    if (next == Kind::kUnknown) return false;
    const int64_t cells = patches.window.cells();
    for (int64_t k = 0; k < patches.taps(); ++k) {
      int64_t a = patches.input(p, k), b = patches.input(q, k);
      if (a == b) continue;
      if (a > b) std::swap(a, b);  // a may be kOff
      const int64_t first = (n * patches.groups + g) * (cells + 1) + a + 1;
      uint8_t known = pixels_[i].at(first, b);
      if (known == kNew) {
        known = 1;
        for (int64_t c = g * patches.channels; known && c < (g + 1) * patches.channels; ++c)
          known = congruent(i + 1, n, c, a, b);
        pixels_[i].at(first, b) = known;
      }
      if (!known) return false;
    }
    return true;
  }

  static bool equal_values(const Stage& s, int64_t n, int64_t g, int64_t p, int64_t q) {
    switch (s.values.bytes) {
      case 2:
        return equal_values_as<uint16_t>(s, n, g, p, q);
      case 4:
        return equal_values_as<uint32_t>(s, n, g, p, q);
      default:
        return equal_values_as<uint64_t>(s, n, g, p, q);
    }
  }

  template <class U>
  static bool equal_values_as(const Stage& s, int64_t n, int64_t g, int64_t p, int64_t q) {
    constexpr U sign = static_cast<U>(U{1} << (8 * sizeof(U) - 1));
    const Map& x = s.values;
    const int64_t plane = n * x.n + g * s.patches.channels * x.c;
    const auto differ = [](U a, U b) { return a != b && ((a | b) & static_cast<U>(~sign)) != 0; };
    if (s.patches.inside(p) && s.patches.inside(q)) {
      const int64_t a = plane + s.patches.corner(p, x), b = plane + s.patches.corner(q, x);
      for (const int64_t reach : s.reach)
        if (differ(x.raw<U>(a + reach), x.raw<U>(b + reach))) return false;
      return true;
    }
    for (int64_t k = 0; k < s.patches.taps(); ++k) {
      const int64_t a = s.patches.input(p, k), b = s.patches.input(q, k);
      for (int64_t c = 0; c < s.patches.channels; ++c) {
        const U left = a == kOff ? U{0} : x.raw<U>(plane + c * x.c + a / x.width * x.h + a % x.width * x.w);
        const U right = b == kOff ? U{0} : x.raw<U>(plane + c * x.c + b / x.width * x.h + b % x.width * x.w);
        if (differ(left, right)) return false;
      }
    }
    return true;
  }

  const std::vector<Stage>& stages_;
  std::vector<Memo<uint8_t>> patches_;  // of a convolution's output places
  std::vector<Memo<uint8_t>> pixels_;   // of its input pixels: kNew, congruent in all channels of the group, or not
};

struct Resolved {
  std::vector<int64_t> window, chosen, other, answer;
  std::array<int64_t, kAnswers> counts{};
};

// Places of the first convolution's output as flat indices; a unit that is off is -1.
struct Flat {
  int64_t channels, outputs;
  int64_t operator()(int64_t n, int64_t c, int64_t p) const {
    return p == kOff ? kOff : (n * channels + c) * outputs + p;
  }
};

struct Ties {
  const int64_t *windows, *members;
  int64_t count, words, channels;
  Map offsets;
  Patches patches;  // of the pooling
};

void resolve_chunk(const Ties& ties, const std::vector<Stage>& stages, Flat flat, int64_t begin, int64_t end,
                   Resolved& out) {
  Walker walker(stages);
  const int64_t outputs = ties.patches.window.outputs();
  for (int64_t t = begin; t < end; ++t) {
    const int64_t window = ties.windows[t], plane = window / outputs, o = window % outputs;
    const int64_t n = plane / ties.channels, c = plane % ties.channels;
    const auto selected = static_cast<int64_t>(ties.offsets.load(ties.offsets.index(n, c, o)));
    const int64_t chosen = ties.patches.input(o, selected);
    for (int64_t word = 0; word < ties.words; ++word) {
      auto left = static_cast<uint64_t>(ties.members[t * ties.words + word]);
      for (; left; left &= left - 1) {
        const int64_t cell = 64 * word + std::countr_zero(left);
        if (cell == selected) continue;
        int64_t p = chosen, q = ties.patches.input(o, cell);
        const Answer answer = walker.top(n, c, p, q);
        ++out.counts[answer];
        if (answer == kZero || answer == kFlat) continue;
        out.window.push_back(window);
        out.chosen.push_back(flat(n, c, p));
        out.other.push_back(flat(n, c, q));
        out.answer.push_back(answer);
      }
    }
  }
}

void append(std::vector<int64_t>& to, const std::vector<int64_t>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

Resolved resolve_all(const Ties& ties, const std::vector<Stage>& stages, Flat flat) {
  std::mutex mutex;
  std::vector<std::pair<int64_t, Resolved>> parts;
  torch::stable::parallel_for(0, ties.count, 512, [&](int64_t begin, int64_t end) {
    Resolved part;
    resolve_chunk(ties, stages, flat, begin, end, part);
    const std::lock_guard<std::mutex> lock(mutex);
    parts.emplace_back(begin, std::move(part));
  });
  std::sort(parts.begin(), parts.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  Resolved all;
  for (const auto& [begin, part] : parts) {
    append(all.window, part.window);
    append(all.chosen, part.chosen);
    append(all.other, part.other);
    append(all.answer, part.answer);
    for (size_t i = 0; i < kAnswers; ++i) all.counts[i] += part.counts[i];
  }
  return all;
}

void check_ties(const Tensor& windows, const Tensor& members, const Tensor& offsets, const Window& pool) {
  STD_TORCH_CHECK(windows.dim() == 1 && windows.scalar_type() == ScalarType::Long && windows.is_contiguous(),
                  "resolve_ties: windows must be contiguous int64 [T]");
  STD_TORCH_CHECK(members.dim() == 2 && members.scalar_type() == ScalarType::Long && members.is_contiguous() &&
                      members.size(0) == windows.size(0) && members.size(1) == pool.words(),
                  "resolve_ties: members must be contiguous int64 [T, ", pool.words(), "]");
  STD_TORCH_CHECK(offsets.dim() == 4 && offsets.size(2) == pool.height.count && offsets.size(3) == pool.width.count &&
                      (offsets.scalar_type() == ScalarType::Byte || offsets.scalar_type() == ScalarType::Int),
                  "resolve_ties: offsets must be uint8 or int32 [N, C, ", pool.height.count, ", ", pool.width.count,
                  "]");
}

// Each stage's output is what the one before reads, so that no position leaves a tensor.
void check_stages(const std::vector<Stage>& stages, const Window& pool, int64_t channels) {
  int64_t height = pool.height.size, width = pool.width.size;
  bool fresh = false;  // right above a convolution, whose input no parameter of its layer may reach
  for (const Stage& s : stages) {
    if (s.kind == Kind::kConstant || s.kind == Kind::kUnknown) return;
    const Window& w = s.patches.window;
    const bool record = s.kind == Kind::kRelu || s.kind == Kind::kPool;
    STD_TORCH_CHECK(w.height.count == height && w.width.count == width && s.channels_out == channels &&
                        (record || !fresh) && (s.kind == Kind::kConv || w.cells() == w.outputs() || record),
                    "resolve_ties: the stages do not fit together");
    STD_TORCH_CHECK(s.kind == Kind::kConv || s.patches.channels * s.patches.groups == channels,
                    "resolve_ties: only a convolution changes the number of channels");
    height = w.height.size, width = w.width.size, channels = s.patches.channels * s.patches.groups;
    fresh = s.kind == Kind::kConv;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> resolve_ties(const Tensor& windows, const Tensor& members,
                                                                const Tensor& offsets, std::vector<int64_t> pool,
                                                                std::vector<int64_t> stages,
                                                                std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(pool.size() == 12 && stages.size() % kStageInts == 0, "resolve_ties: expected 12 integers for the ",
                  "pooling and ", kStageInts, " for each stage, got ", pool.size(), " and ", stages.size());
  const Window window{read_axis(pool.data()), read_axis(pool.data() + 6)};
  check_ties(windows, members, offsets, window);
  std::vector<Stage> walk;
  for (size_t i = 0; i < stages.size(); i += kStageInts) walk.push_back(read_stage(stages.data() + i, tensors));
  check_stages(walk, window, offsets.size(1));
  Flat flat{offsets.size(1), window.cells()};
  for (const Stage& s : walk) {  // poolings right above: places are those of the first other stage's output
    if (s.kind == Kind::kPool) flat.outputs = s.patches.window.cells();
    if (s.kind != Kind::kPool && s.kind != Kind::kRelu) break;
  }
  for (const Tensor& t : tensors)
    STD_TORCH_CHECK(t.size(0) == offsets.size(0), "resolve_ties: tensors of different batch sizes");
  const int64_t count = windows.size(0), units = offsets.size(0) * offsets.size(1) * window.outputs();
  const auto* first = static_cast<const int64_t*>(windows.const_data_ptr());
  STD_TORCH_CHECK(
      count == 0 || (*std::min_element(first, first + count) >= 0 && *std::max_element(first, first + count) < units),
      "resolve_ties: a window lies outside the pooling's output");
  const Ties ties{first,
                  static_cast<const int64_t*>(members.const_data_ptr()),
                  count,
                  window.words(),
                  offsets.size(1),
                  Map(offsets),
                  Patches{window, offsets.size(1), 1}};
  const Resolved found = resolve_all(ties, walk, flat);
  return {to_tensor(found.window, windows), to_tensor(found.chosen, windows), to_tensor(found.other, windows),
          to_tensor(found.answer, windows),
          to_tensor(std::vector<int64_t>(found.counts.begin(), found.counts.end()), windows)};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) { m.impl("resolve_ties", TORCH_BOX(&adcert::resolve_ties)); }
