// What the CPU's passes over single values share: touches found block by block, and their logical indices.
#pragma once

#include <tuple>

#include "activation.h"
#include "collect.h"
#include "lanes.h"
#include "tensors.h"

namespace adcert {

template <class T>
struct KinkKeys {
  int64_t count;
  typename Value<T>::Key at[2];

  explicit KinkKeys(const Kinks& kinks) : count(kinks.count) {
    for (int k = 0; k < 2; ++k) at[k] = Value<T>::key(rounded_to<T>(kinks.at[k]));
  }
};

// Entry `count * position + k` for every value that equals the k-th kink.
template <class T>
ADCERT_COLD void push_touches(const T* x, int64_t begin, int64_t end, const KinkKeys<T>& kinks, Found& found) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t k = 0; k < kinks.count; ++k)
      if (Value<T>::key(x[i]) == kinks.at[k]) found.touches.push_back(kinks.count * i + k);
}

template <class T>
ADCERT_INLINE void note_touches(const T* x, int64_t begin, int64_t end, const KinkKeys<T>& kinks, Found& found) {
  int64_t touches = 0, ignored = 0;
  count(x + begin, end - begin, kinks.at[0], touches, found.nonfinite);
  if (kinks.count > 1) count(x + begin, end - begin, kinks.at[1], touches, ignored);
  if (touches) push_touches(x, begin, end, kinks, found);
}

// Entries of positions in dense memory to entries of logical indices, ascending.
inline void to_logical(std::vector<int64_t>& touches, const Tensor& x, int64_t kinks = 1) {
  if (x.is_contiguous() || touches.empty()) return;
  std::vector<int64_t> which;  // the kink of each entry
  if (kinks > 1)
    for (int64_t& i : touches) {
      which.push_back(i % kinks);
      i /= kinks;
    }
  const int64_t d = x.dim();
  if (looks_channels_last(x)) {
    sort_channels_last(touches, which, kinks > 1 ? 1 : 0, x.size(1), x.size(2) * x.size(3));
    for (size_t k = 0; k < which.size(); ++k) touches[k] = kinks * touches[k] + which[k];
    return;
  }
  std::vector<int64_t> logical(static_cast<size_t>(d)), order;  // logical strides; axes by falling stride
  int64_t step = 1;
  for (int64_t k = d - 1; k >= 0; step *= x.size(k--)) logical[k] = step;
  for (int64_t k = 0; k < d; ++k)
    if (x.size(k) > 1) order.push_back(k);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  for (size_t at = 0; at < touches.size(); ++at) {
    int64_t rest = touches[at], flat = 0;
    for (const int64_t k : order) {
      flat += rest / x.stride(k) * logical[k];
      rest %= x.stride(k);
    }
    touches[at] = kinks > 1 ? kinks * flat + which[at] : flat;
  }
  std::sort(touches.begin(), touches.end());
}

// pass(begin, end, found) on pieces of x, by several threads.
template <class F>
Found scan(const Tensor& x, int64_t kinks, const F& pass) {
  Chunks chunks;
  torch::stable::parallel_for(0, x.numel(), grain(1), [&](int64_t begin, int64_t end) {
    Found found;
    pass(begin, end, found);
    chunks.add(begin, std::move(found));
  });
  Found all = chunks.merged();
  to_logical(all.touches, x, kinks);
  return all;
}

inline Tensor counts_of(const Found& found, const Tensor& like) {
  return to_tensor({0, static_cast<int64_t>(found.touches.size()), found.nonfinite}, like);
}

}  // namespace adcert
