// T_j of Algorithm 1 in bulk: every tied member against the selected one, a warp for each pair.
//
// The walk is that of stages.h. Below the first convolution it goes depth first: the warp compares two patches element
// by element, or the channels of two pixels, a lane each; what is settled goes into a table that all warps share. Two
// warps may settle the same pair: they come to the same answer.

#include <torch/csrc/stable/library.h>

#include <array>
#include <bit>
#include <cstring>

#include "memo.cuh"
#include "resolve.h"

namespace adcert {
namespace {

constexpr int kDepth = 40;                          // convolutions above a pooling
constexpr unsigned kYes = 1, kNo = 2, kDiffer = 3;  // answers of the table: kZero, kOpen, kRow
constexpr int64_t kSelected = 7;                    // answer for the selected member itself

struct Job {
  const Stage* stages;
  int count;
  Map offsets;
  Patches pool;
  Flat flat;
  int64_t channels;
  const int64_t *windows, *cells;  // of every member of every tie
  int64_t pairs;
  int64_t *chosen, *other, *answer;
  DeviceMemo memo;
  int second_bits, first_bits;
};

// Two places p < q of the output of convolution `stage` in group g of sample n.
struct Places {
  int stage;
  int64_t n, g, p, q;
};

// A comparison under way: of tap `tap`, from channel `channel` of the group on.
struct Frame {
  Places places;
  int64_t tap, channel;
};

__device__ Word key_of(const Job& job, int stage, bool pixel, int64_t first, int64_t second) {
  return ((static_cast<Word>(2 * stage + pixel) << job.first_bits | static_cast<Word>(first)) << job.second_bits) |
         static_cast<Word>(second);
}

__device__ Word key_of(const Job& job, const Places& at) {
  const Stage& s = job.stages[at.stage];
  return key_of(job, at.stage, false, (at.n * s.patches.groups + at.g) * s.patches.window.outputs() + at.p, at.q);
}

__device__ Places places(const Job& job, int stage, int64_t n, int64_t c, int64_t p, int64_t q) {
  return {stage, n, job.stages[stage].group(c), p < q ? p : q, p < q ? q : p};
}

// Do the values of two patches compare equal? Every lane of the warp takes part.
template <class U>
__device__ bool equal_values_as(const Stage& s, const Places& at) {
  const int64_t channels = s.patches.channels, taps = s.patches.taps(), plane = s.plane(at.n, at.g);
  const bool by_channel = s.values.c == 1;  // neighbouring lanes read neighbouring elements
  for (int64_t base = 0; base < channels * taps; base += kWarp) {
    const int64_t e = base + threadIdx.x % kWarp;
    bool unequal = false;
    if (e < channels * taps) {
      const int64_t c = by_channel ? e % channels : e / taps, k = by_channel ? e / channels : e % taps;
      unequal = differ(s.element<U>(plane, at.p, c, k), s.element<U>(plane, at.q, c, k));
    }
    if (__any_sync(kWhole, unequal)) return false;
  }
  return true;
}

__device__ bool equal_values(const Stage& s, const Places& at) {
  switch (s.values.bytes) {
    case 2:
      return equal_values_as<uint16_t>(s, at);
    case 4:
      return equal_values_as<uint32_t>(s, at);
    default:
      return equal_values_as<uint64_t>(s, at);
  }
}

// What values and the next stage alone say of two places: kDiffer, kYes, kNo, or 0 for "ask the elements".
__device__ unsigned first_look(const Job& job, const Places& at) {
  const Stage& s = job.stages[at.stage];
  if (s.values && !equal_values(s, at)) return kDiffer;
  const Kind next = at.stage + 1 < job.count ? job.stages[at.stage + 1].kind : Kind::kUnknown;
  return next == Kind::kConstant ? kYes : next == Kind::kUnknown ? kNo : 0;
}

// Goes on with a comparison of elements: kYes, kNo, or 0 where `deeper` has to be settled first.
__device__ unsigned compare_elements(const Job& job, Frame& frame, Places& deeper) {
  const Places& at = frame.places;
  const Patches& patches = job.stages[at.stage].patches;
  const int64_t cells = patches.window.cells();
  for (; frame.tap < patches.taps(); ++frame.tap, frame.channel = 0) {
    int64_t a = patches.input(at.p, frame.tap), b = patches.input(at.q, frame.tap);
    if (a == b) continue;
    if (a > b) {
      const int64_t swapped = a;
      a = b, b = swapped;  // a may be kOff
    }
    const Word pixel = key_of(job, at.stage, true, (at.n * patches.groups + at.g) * (cells + 1) + a + 1, b);
    const unsigned known = job.memo.find(pixel);
    // Another warp may have put it there since: all lanes go by what the first one saw.
    const unsigned seen = __shfl_sync(kWhole, known, 0);
    if (seen == kNo) return kNo;
    if (seen == kYes) continue;
    for (; frame.channel < patches.channels; frame.channel += kWarp) {
      const int64_t c = frame.channel + threadIdx.x % kWarp;
      Answer answer = kZero;
      Places below{};
      unsigned settled = kYes;
      if (c < patches.channels) {
        int i = at.stage + 1;
        int64_t p = a, q = b;
        const int64_t channel = at.g * patches.channels + c;
        answer = climb(job.stages, job.count, i, at.n, channel, p, q);
        if (answer == kOpen) {
          below = places(job, i, at.n, channel, p, q);
          settled = job.memo.find(key_of(job, below));
        } else {
          settled = answer == kZero ? kYes : kNo;
        }
      }
      if (__any_sync(kWhole, settled == kNo || settled == kDiffer)) {
        job.memo.put(pixel, kNo);
        return kNo;
      }
      const unsigned open = __ballot_sync(kWhole, settled == 0);
      if (open) {
        const int lane = __ffs(static_cast<int>(open)) - 1;
        deeper.stage = __shfl_sync(kWhole, below.stage, lane);
        deeper.n = at.n;
        deeper.g = __shfl_sync(kWhole, below.g, lane);
        deeper.p = __shfl_sync(kWhole, below.p, lane);
        deeper.q = __shfl_sync(kWhole, below.q, lane);
        return 0;
      }
    }
    job.memo.put(pixel, kYes);
  }
  return kYes;
}

// Settles two places; every lane of the warp comes to the same answer. kNo too where the table is full: the caller then
// asks all again. stack: of the warp, in shared memory, for the comparisons that wait for a deeper one.
__device__ unsigned settle(const Job& job, const Places& asked, Frame* stack) {
  int depth = 0;
  Frame frame{asked, -1, 0};
  while (true) {
    unsigned answer = 0;
    Places deeper{};
    if (frame.tap < 0) {
      answer = __shfl_sync(kWhole, job.memo.find(key_of(job, frame.places)), 0);
      if (answer == 0) answer = first_look(job, frame.places);
      frame.tap = 0;
    }
    if (answer == 0) answer = compare_elements(job, frame, deeper);
    if (answer == 0) {  // depth stays below kDepth: each convolution is deeper than the one before, and the host counts
      if (threadIdx.x % kWarp == 0) stack[depth] = frame;
      __syncwarp();
      ++depth;
      frame = {deeper, -1, 0};
      continue;
    }
    if (!job.memo.put(key_of(job, frame.places), answer)) return kNo;
    if (depth == 0) return answer;
    frame = stack[--depth];
    __syncwarp();  // all lanes have read it before it is written again
  }
}

__global__ __launch_bounds__(kThreads, 2) void resolve(const __grid_constant__ Job job) {
  // As local memory the device would have to set it aside for every thread it can hold.
  __shared__ Frame stacks[kThreads / kWarp][kDepth];
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t outputs = job.pool.window.outputs();
  for (int64_t k = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarp; k < job.pairs; k += warps) {
    const int64_t window = job.windows[k], plane = window / outputs, o = window % outputs;
    const int64_t n = plane / job.channels, c = plane % job.channels;
    const auto selected = static_cast<int64_t>(job.offsets.load(job.offsets.index(n, c, o)));
    int64_t answer = kSelected, p = job.pool.input(o, selected), q = job.pool.input(o, job.cells[k]);
    if (job.cells[k] != selected) {
      int i = 0;
      answer = reach_top(job.stages, job.count, i, n, c, p, q);
      if (answer == kOpen) {
        const unsigned settled = settle(job, places(job, i, n, c, p, q), stacks[threadIdx.x / kWarp]);
        answer = settled == kYes ? kZero : settled == kDiffer ? kRow : kOpen;
      }
    }
    if (threadIdx.x % kWarp) continue;
    job.answer[k] = answer;
    job.chosen[k] = job.flat(n, c, p);
    job.other[k] = job.flat(n, c, q);
  }
}

int bits(int64_t below) { return static_cast<int>(std::bit_width(static_cast<uint64_t>(below))); }

// Widths of the two halves of a key.
void choose_bits(const std::vector<Stage>& stages, int64_t batch, Job& job) {
  job.first_bits = job.second_bits = 1;
  int convolutions = 0;
  for (const Stage& s : stages) {
    if (s.kind != Kind::kConv) continue;
    ++convolutions;
    const Window& w = s.patches.window;
    const int64_t places = std::max(w.outputs(), w.cells() + 1);
    job.first_bits = std::max(job.first_bits, bits(batch * s.patches.groups * places));
    job.second_bits = std::max(job.second_bits, bits(places));
  }
  const int stage_bits = bits(2 * static_cast<int64_t>(stages.size()) + 1);
  STD_TORCH_CHECK(job.first_bits + job.second_bits + stage_bits <= kKeyBits && convolutions < kDepth,
                  "resolve_ties: images too large or network too deep for this device: keys of ",
                  job.first_bits + job.second_bits + stage_bits, " bits, ", convolutions, " convolutions");
}

// The answers of all members of all ties: int64 [3, K] chosen, other, answer, on the CPU.
Tensor ask(const Question& asked, const Tensor& offsets, const std::vector<int64_t>& windows,
           const std::vector<int64_t>& cells) {
  const Place place(offsets);
  const auto pairs = static_cast<int64_t>(windows.size());
  static_assert(std::is_trivially_copyable_v<Stage> && sizeof(Stage) % sizeof(int64_t) == 0);
  std::vector<int64_t> stages(asked.stages.size() * sizeof(Stage) / sizeof(int64_t));
  if (!stages.empty()) std::memcpy(stages.data(), asked.stages.data(), stages.size() * sizeof(int64_t));
  const Tensor where = sent(long_list(windows), offsets.device());
  const Tensor which = sent(long_list(cells), offsets.device());
  const Tensor walk = sent(long_list(stages), offsets.device());
  const Tensor result = torch::stable::new_empty(offsets, {3, pairs}, ScalarType::Long);
  auto* to = static_cast<int64_t*>(result.mutable_data_ptr());
  Job job{reinterpret_cast<const Stage*>(walk.const_data_ptr()),
          static_cast<int>(asked.stages.size()),
          Map(offsets),
          Patches{asked.pool, offsets.size(1), 1},
          asked.flat,
          offsets.size(1),
          static_cast<const int64_t*>(where.const_data_ptr()),
          static_cast<const int64_t*>(which.const_data_ptr()),
          pairs,
          to,
          to + pairs,
          to + 2 * pairs,
          {},
          0,
          0};
  choose_bits(asked.stages, offsets.size(0), job);
  constexpr int64_t kLeast = int64_t{1} << 14, kMost = int64_t{1} << 27;
  for (auto slots = std::max(kLeast, static_cast<int64_t>(std::bit_ceil(4 * static_cast<uint64_t>(pairs))));
       slots <= kMost; slots *= 8) {
    const Tensor table = torch::stable::new_empty(offsets, {slots + 1}, ScalarType::Long);  // and the flag
    auto* words = static_cast<Word*>(table.mutable_data_ptr());
    place.zero(words, (slots + 1) * static_cast<int64_t>(sizeof(Word)));
    job.memo = {words, static_cast<Word>(slots - 1), reinterpret_cast<unsigned*>(words + slots)};
    place.launch(&resolve, pairs * kWarp, job);
    const Tensor full = on_cpu(torch::stable::narrow(const_cast<Tensor&>(table), 0, slots, 1));
    if (*static_cast<const int64_t*>(full.const_data_ptr()) == 0) return on_cpu(result);
  }
  STD_TORCH_CHECK(false, "resolve_ties: ", pairs, " pairs ask for more comparisons than ", kMost, " remembered ones");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> resolve_ties(const Tensor& windows, const Tensor& members,
                                                                const Tensor& offsets, std::vector<int64_t> pool,
                                                                std::vector<int64_t> stages,
                                                                std::vector<Tensor> tensors) {
  const Tensor ties = on_cpu(windows), sets = on_cpu(members);
  const Question asked = read_question(ties, sets, offsets, pool, stages, tensors);
  std::vector<int64_t> window, cell, found[4];
  for (int64_t t = 0, words = asked.pool.words(); t < asked.count; ++t)
    for (int64_t word = 0; word < words; ++word)
      for (auto left = static_cast<uint64_t>(asked.members[t * words + word]); left; left &= left - 1) {
        cell.push_back(64 * word + std::countr_zero(left));
        window.push_back(asked.windows[t]);
        STD_TORCH_CHECK(cell.back() < asked.pool.taps(), "resolve_ties: a member outside the window");
      }
  std::array<int64_t, kAnswers> counts{};
  const auto pairs = static_cast<int64_t>(window.size());
  if (pairs) {
    const Tensor answers = ask(asked, offsets, window, cell);
    const auto* chosen = static_cast<const int64_t*>(answers.const_data_ptr());
    const int64_t *other = chosen + pairs, *answer = other + pairs;
    for (int64_t k = 0; k < pairs; ++k) {
      if (answer[k] == kSelected) continue;
      ++counts[static_cast<size_t>(answer[k])];
      if (answer[k] == kZero || answer[k] == kFlat) continue;
      const int64_t entry[4] = {window[static_cast<size_t>(k)], chosen[k], other[k], answer[k]};
      for (size_t i = 0; i < 4; ++i) found[i].push_back(entry[i]);
    }
  }
  const auto give = [&](const std::vector<int64_t>& values) {
    return torch::stable::to(long_list(values), windows.device());
  };
  return {give(found[0]), give(found[1]), give(found[2]), give(found[3]),
          give(std::vector<int64_t>(counts.begin(), counts.end()))};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(ADCERT_LIBRARY, ADCERT_CUDA, m) { m.impl("resolve_ties", TORCH_BOX(&adcert::resolve_ties)); }
