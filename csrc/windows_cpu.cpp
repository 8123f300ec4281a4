// Ties of a max pooling over any windows (of one to three dimensions, adaptive, fractional), from its output.
//
// A pair is an output whose value two or more cells of its window attain, and one of these cells. -0.0 equals 0.0; NaN
// equals nothing.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "collect.h"
#include "tensors.h"
#include "windows.h"

namespace adcert {
namespace {

// found.windows: the outputs of the pairs; found.members: their inputs. lost: outputs that no cell attains.
struct Seen {
  Found found;
  int64_t tied = 0, lost = 0;
};

template <class T>
void look(const T* x, const T* output, const Windows& w, int64_t begin, int64_t end, Seen& seen) {
  for (int64_t o = begin; o < end; ++o) {
    const auto maximum = Value<T>::key(output[o]);
    if (Value<T>::is_nan(maximum)) continue;
    const Cells cells = cells_of(w, 0, o);
    int64_t attained = 0;
    for_cells(w, cells, [&](int64_t i) { attained += Value<T>::key(x[i]) == maximum; });
    seen.lost += attained == 0;
    if (attained < 2) continue;
    ++seen.tied;
    const size_t first = seen.found.members.size();
    for_cells(w, cells, [&](int64_t i) {
      if (Value<T>::key(x[i]) == maximum) seen.found.members.push_back(i);
    });
    auto& members = seen.found.members;
    std::sort(members.begin() + static_cast<int64_t>(first), members.end());
    seen.found.windows.resize(members.size(), o);
  }
}

template <class T>
Seen look_at_all(const Tensor& x, const Tensor& output, const Windows& w) {
  const auto* values = static_cast<const T*>(x.const_data_ptr());
  const auto* maxima = static_cast<const T*>(output.const_data_ptr());
  Chunks chunks;
  std::mutex mutex;
  Seen all;
  torch::stable::parallel_for(0, output.numel(), grain(4 * w.cells()), [&](int64_t begin, int64_t end) {
    Seen seen;
    look(values, maxima, w, begin, end, seen);
    chunks.add(begin, std::move(seen.found));
    const std::lock_guard<std::mutex> lock(mutex);
    all.tied += seen.tied;
    all.lost += seen.lost;
  });
  all.found = chunks.merged();
  int64_t ignored = 0;
  count(values, x.numel(), typename Value<T>::Key{0}, ignored, all.found.nonfinite);
  return all;
}

std::tuple<Tensor, Tensor, Tensor> window_ties(const Tensor& x, const Tensor& output, const std::vector<Tensor>& tables,
                                               int64_t capacity) {
  check_floating(x, "window_ties");
  const Tensor from = torch::stable::contiguous(x), maxima = torch::stable::contiguous(output);
  std::vector<Tensor> all;
  for (const Tensor& table : tables) all.push_back(torch::stable::contiguous(table));
  const Tensor zero = to_tensor({0}, x);
  const Windows w = checked_windows(from, maxima, all, zero);
  const Seen seen = by_dtype(x.scalar_type(), [&](auto of) { return look_at_all<decltype(of)>(from, maxima, w); });
  const auto pairs = static_cast<int64_t>(seen.found.windows.size());
  return {to_list(seen.found.windows, 1, capacity, false, x), to_list(seen.found.members, 1, capacity, false, x),
          to_tensor({seen.tied, pairs, seen.found.nonfinite, seen.lost}, x)};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) { m.impl("window_ties", TORCH_BOX(&adcert::window_ties)); }
