// T_j of Algorithm 1 in bulk: every tied member against the selected one, up the straight part of the network.
//
// The answer for a pair (stages.h) is one-sided, by value numbering: patches are compared once for each pair of places;
// what is below, once for each pair of pixels, whatever the number of channels and ties that ask.

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
#include "resolve.h"

namespace adcert {
namespace {

constexpr uint8_t kNew = 255;

// Walks pairs of positions (p, q) of one sample and channel up the stages; remembers what it has compared.
class Walker {
 public:
  explicit Walker(const std::vector<Stage>& stages) : stages_(stages), count_(static_cast<int>(stages.size())) {
    for (const Stage& s : stages) {
      reach_.push_back(reach_of(s));
      patches_.emplace_back(kNew);
      pixels_.emplace_back(kNew);
    }
  }

  // The pair at the input of the pooling; p and q become positions of the first convolution's output.
  Answer top(int64_t n, int64_t c, int64_t& p, int64_t& q) {
    int i = 0;
    const Answer answer = reach_top(stages_.data(), count_, i, n, c, p, q);
    return answer == kOpen ? patch(static_cast<size_t>(i), n, stages_[static_cast<size_t>(i)].group(c), p, q) : answer;
  }

 private:
  // The same function of the parameters around w?
  bool congruent(size_t stage, int64_t n, int64_t c, int64_t p, int64_t q) {
    int i = static_cast<int>(stage);
    const Answer answer = climb(stages_.data(), count_, i, n, c, p, q);
    if (answer != kOpen) return answer == kZero;
    return patch(static_cast<size_t>(i), n, stages_[static_cast<size_t>(i)].group(c), p, q) == kZero;
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
    if (s.values && !equal_values(i, n, g, p, q))
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

  bool equal_values(size_t i, int64_t n, int64_t g, int64_t p, int64_t q) const {
    switch (stages_[i].values.bytes) {
      case 2:
        return equal_values_as<uint16_t>(i, n, g, p, q);
      case 4:
        return equal_values_as<uint32_t>(i, n, g, p, q);
      default:
        return equal_values_as<uint64_t>(i, n, g, p, q);
    }
  }

  template <class U>
  bool equal_values_as(size_t i, int64_t n, int64_t g, int64_t p, int64_t q) const {
    const Stage& s = stages_[i];
    const Map& x = s.values;
    const int64_t plane = s.plane(n, g);
    if (s.patches.inside(p) && s.patches.inside(q)) {
      const int64_t a = plane + s.patches.corner(p, x), b = plane + s.patches.corner(q, x);
      for (const int64_t reach : reach_[i])
        if (differ(x.raw<U>(a + reach), x.raw<U>(b + reach))) return false;
      return true;
    }
    for (int64_t k = 0; k < s.patches.taps(); ++k)
      for (int64_t c = 0; c < s.patches.channels; ++c)
        if (differ(s.element<U>(plane, p, c, k), s.element<U>(plane, q, c, k))) return false;
    return true;
  }

  const std::vector<Stage>& stages_;
  const int count_;
  std::vector<std::vector<int64_t>> reach_;
  std::vector<Memo<uint8_t>> patches_;  // of a convolution's output places
  std::vector<Memo<uint8_t>> pixels_;   // of its input pixels: kNew, congruent in all channels of the group, or not
};

struct Resolved {
  std::vector<int64_t> window, chosen, other, answer;
  std::array<int64_t, kAnswers> counts{};
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> resolve_ties(const Tensor& windows, const Tensor& members,
                                                                const Tensor& offsets, std::vector<int64_t> pool,
                                                                std::vector<int64_t> stages,
                                                                std::vector<Tensor> tensors) {
  const Question asked = read_question(windows, members, offsets, pool, stages, tensors);
  const Ties ties{asked.windows,
                  asked.members,
                  asked.count,
                  asked.pool.words(),
                  offsets.size(1),
                  Map(offsets),
                  Patches{asked.pool, offsets.size(1), 1}};
  const Resolved found = resolve_all(ties, asked.stages, asked.flat);
  return {to_tensor(found.window, windows), to_tensor(found.chosen, windows), to_tensor(found.other, windows),
          to_tensor(found.answer, windows),
          to_tensor(std::vector<int64_t>(found.counts.begin(), found.counts.end()), windows)};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) { m.impl("resolve_ties", TORCH_BOX(&adcert::resolve_ties)); }
