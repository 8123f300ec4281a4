// What the threads of one pass found, put together in an order that does not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

namespace adcert {

// Flat indices in the order of memory; `words` int64 of `members` for each of `windows`.
struct Found {
  std::vector<int64_t> touches, windows, members;
  int64_t nonfinite = 0;
};

class Chunks {
 public:
  void add(int64_t begin, Found&& found) {
    const std::lock_guard<std::mutex> lock(mutex_);
    chunks_.emplace_back(begin, std::move(found));
  }

  Found merged() {
    std::sort(chunks_.begin(), chunks_.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    if (chunks_.size() == 1) return std::move(chunks_.front().second);
    Found all;
    for (const auto& [begin, part] : chunks_) {
      all.touches.insert(all.touches.end(), part.touches.begin(), part.touches.end());
      all.windows.insert(all.windows.end(), part.windows.begin(), part.windows.end());
      all.members.insert(all.members.end(), part.members.begin(), part.members.end());
      all.nonfinite += part.nonfinite;
    }
    return all;
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<int64_t, Found>> chunks_;
};

// From ascending indices into [N, P, C] memory to ascending logical indices in [N, C, P]; the `words` int64 of
// `payload` that belong to each index move with it.
inline void sort_channels_last(std::vector<int64_t>& indices, std::vector<int64_t>& payload, int64_t words,
                               int64_t channels, int64_t plane) {
  const auto count = static_cast<int64_t>(indices.size());
  if (count == 0) return;
  for (int64_t& i : indices) {
    const int64_t pixel = i / channels;  // n * plane + p
    i = (pixel / plane * channels + i % channels) * plane + pixel % plane;
  }
  std::vector<int64_t> order(indices.size());
  const int64_t lowest = *std::min_element(indices.begin(), indices.end()) / plane;
  const int64_t buckets = *std::max_element(indices.begin(), indices.end()) / plane - lowest + 1;
  if (buckets <= 4 * count + 1024) {  // stable counting sort by n * C + c; within one, memory order is already logical
    std::vector<int64_t> next(static_cast<size_t>(buckets) + 1);
    for (const int64_t i : indices) ++next[i / plane - lowest + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (int64_t k = 0; k < count; ++k) order[next[indices[k] / plane - lowest]++] = k;
  } else {
    std::iota(order.begin(), order.end(), int64_t{0});
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return indices[a] < indices[b]; });
  }
  std::vector<int64_t> sorted(indices.size()), moved(payload.size());
  for (int64_t k = 0; k < count; ++k) {
    sorted[k] = indices[order[k]];
    std::copy_n(payload.begin() + order[k] * words, words, moved.begin() + k * words);
  }
  indices.swap(sorted);
  payload.swap(moved);
}

inline torch::stable::Tensor to_tensor(const std::vector<int64_t>& values, const std::vector<int64_t>& shape,
                                       const torch::stable::Tensor& like) {
  auto t = torch::stable::new_empty(like, shape, torch::headeronly::ScalarType::Long);
  if (!values.empty()) std::copy(values.begin(), values.end(), static_cast<int64_t*>(t.mutable_data_ptr()));
  return t;
}

inline torch::stable::Tensor to_tensor(const std::vector<int64_t>& values, const torch::stable::Tensor& like) {
  return to_tensor(values, {static_cast<int64_t>(values.size())}, like);
}

// A list of `words` int64 for each entry: all of it, or with a capacity of 0 or more exactly so many entries.
inline torch::stable::Tensor to_list(const std::vector<int64_t>& values, int64_t words, int64_t capacity, bool matrix,
                                     const torch::stable::Tensor& like) {
  const int64_t found = words > 0 ? static_cast<int64_t>(values.size()) / words : 0;
  std::vector<int64_t> kept(values);
  if (capacity >= 0) kept.resize(static_cast<size_t>(capacity * words), -1);
  const int64_t entries = capacity >= 0 ? capacity : found;
  return matrix ? to_tensor(kept, {entries, words}, like) : to_tensor(kept, {entries}, like);
}

// Iterations for each thread to be worth waking it.
inline int64_t grain(int64_t work_per_iteration) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work_per_iteration));
}

}  // namespace adcert
