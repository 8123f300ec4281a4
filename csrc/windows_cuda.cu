// Ties of a max pooling over any windows, from its output: a thread for each output.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "lists.cuh"
#include "windows.h"

namespace adcert {
namespace {

// counts: tied windows, pairs, inputs that are not finite, outputs that no cell attains.
struct Pairs {
  int64_t *owner, *member;
  int64_t room;
  Counter* counts;
};
constexpr int kPairs = 1, kLost = 3;

// `count` outputs, from the first of a plane on: few enough for divisions of 32 bits.
template <class T>
__global__ __launch_bounds__(kThreads) void look(const T* x, const T* output, int64_t plane, int count, Windows windows,
                                                 Pairs pairs) {
  using E = Element<T>;
  const int64_t first = plane * windows.outputs();
  for (Items<int> item(count); item.more(); item.next()) {
    const int64_t o = first + item.index();
    unsigned attained = 0, lost = 0;
    typename E::Wide maximum{};
    const Cells cells = cells_of(windows, plane, item.active() ? static_cast<uint32_t>(item.index()) : 0u);
    if (item.active()) {
      maximum = E::widen(output[o]);
      if (maximum == maximum) {
        for_cells(windows, cells, [&](int64_t i) { attained += E::widen(x[i]) == maximum; });
        lost = attained == 0;
      }
    }
    const unsigned mine = attained > 1 ? attained : 0;
    if (!__any_sync(kWhole, mine | lost)) continue;
    tally(pairs.counts + kWindows, mine ? 1u : 0u);
    tally(pairs.counts + kLost, lost);
    int64_t slot = reserve(pairs.counts + kPairs, static_cast<unsigned long long>(mine));
    if (mine == 0) continue;
    for_cells(windows, cells, [&](int64_t i) {
      if (E::widen(x[i]) != maximum) return;
      if (slot < pairs.room) {
        pairs.owner[slot] = o;
        pairs.member[slot] = i;
      }
      ++slot;
    });
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void tally_nonfinite(const T* x, int64_t count, Counter* counts) {
  for (Items<int64_t> item(count); item.more(); item.next()) {
    const unsigned odd = item.active() && !Value<T>::is_finite(x[item.index()]);
    if (__any_sync(kWhole, odd)) tally(counts + kNonfinite, odd);
  }
}

std::tuple<Tensor, Tensor, Tensor> window_ties(const Tensor& x, const Tensor& output, const std::vector<Tensor>& tables,
                                               int64_t capacity) {
  check_floating(x, "window_ties");
  check_capacity("window_ties", capacity);
  const Tensor from = torch::stable::contiguous(x), maxima = torch::stable::contiguous(output);
  std::vector<Tensor> all;
  for (const Tensor& table : tables) all.push_back(torch::stable::contiguous(table));
  const auto longs = [&](int64_t n) { return torch::stable::new_empty(x, {n}, ScalarType::Long); };
  const auto data = [](const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); };
  const Tensor one = longs(1), owner = longs(capacity), member = longs(capacity), counts = longs(4);
  const Place place(x);
  place.zero(data(one), sizeof(int64_t));
  place.zero(data(counts), 4 * static_cast<int64_t>(sizeof(Counter)));
  const Windows windows = checked_windows(from, maxima, all, one);
  const Pairs pairs{data(owner), data(member), capacity, reinterpret_cast<Counter*>(data(counts))};
  STD_TORCH_CHECK(fits_int(windows.outputs()), "window_ties: more than 2^30 outputs of one plane");
  const int64_t planes = windows.outputs() > 0 ? (int64_t{1} << 30) / windows.outputs() : 0;  // in one launch
  by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto* values = static_cast<const T*>(from.const_data_ptr());
    for (int64_t plane = 0; maxima.numel() > 0 && plane < windows.planes; plane += planes) {
      const int64_t count = std::min(planes, windows.planes - plane) * windows.outputs();
      place.launch(&look<T>, count, values, static_cast<const T*>(maxima.const_data_ptr()), plane, count, windows,
                   pairs);
    }
    place.launch(&tally_nonfinite<T>, from.numel(), values, from.numel(), pairs.counts);
  });
  return {owner, member, counts};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(ADCERT_LIBRARY, ADCERT_CUDA, m) { m.impl("window_ties", TORCH_BOX(&adcert::window_ties)); }
