// ReLU and its touches in one pass over x; the read-only pass for any kink.

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>

#include <limits>
#include <tuple>

#include "checks.h"
#include "collect.h"
#include "lanes.h"
#include "tensors.h"

namespace adcert {
namespace {

template <class T>
ADCERT_COLD void push_touches(const T* x, int64_t begin, int64_t end, typename Value<T>::Key kink, Found& found) {
  for (int64_t i = begin; i < end; ++i)
    if (Value<T>::key(x[i]) == kink) found.touches.push_back(i);
}

template <bool OUT, class T>
ADCERT_INLINE void scan_chunk(const T* x, T* out, int64_t begin, int64_t end, typename Value<T>::Key kink,
                              Found& found) {
  constexpr int64_t kBlock = 1024;  // what is looked at again is still in the first-level cache
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t stop = std::min(end, i + kBlock);
    if ((OUT || kink == 0) && !any_odd<OUT>(x + i, OUT ? out + i : out, stop - i)) continue;
    int64_t touches = 0;
    count(x + i, stop - i, kink, touches, found.nonfinite);
    if (touches) push_touches(x, i, stop, kink, found);
  }
}

#define ADCERT_SCAN(T)                                                                                          \
  ADCERT_CLONES void relu_chunk(const T* x, T* out, int64_t begin, int64_t end, Value<T>::Key kink, Found& f) { \
    scan_chunk<true>(x, out, begin, end, kink, f);                                                              \
  }                                                                                                             \
  ADCERT_CLONES void touch_chunk(const T* x, int64_t begin, int64_t end, Value<T>::Key kink, Found& f) {        \
    scan_chunk<false>(x, static_cast<T*>(nullptr), begin, end, kink, f);                                        \
  }
ADCERT_SCAN(float)
ADCERT_SCAN(double)
ADCERT_SCAN(BFloat16)
ADCERT_SCAN(Float16)
#undef ADCERT_SCAN

// Positions in dense memory to logical indices, ascending.
void to_logical(std::vector<int64_t>& touches, const Tensor& x) {
  if (x.is_contiguous() || touches.empty()) return;
  const int64_t d = x.dim();
  if (looks_channels_last(x)) {
    std::vector<int64_t> none;
    return sort_channels_last(touches, none, 0, x.size(1), x.size(2) * x.size(3));
  }
  std::vector<int64_t> logical(static_cast<size_t>(d)), order;  // logical strides; axes by falling stride
  int64_t step = 1;
  for (int64_t k = d - 1; k >= 0; step *= x.size(k--)) logical[k] = step;
  for (int64_t k = 0; k < d; ++k)
    if (x.size(k) > 1) order.push_back(k);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  for (int64_t& i : touches) {
    int64_t rest = i, flat = 0;
    for (const int64_t k : order) {
      flat += rest / x.stride(k) * logical[k];
      rest %= x.stride(k);
    }
    i = flat;
  }
  std::sort(touches.begin(), touches.end());
}

// The key of the kink as torch compares it: rounded to the dtype first.
template <class T>
typename Value<T>::Key kink_key(double kink) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return Value<T>::key(T{torch::headeronly::BFloat16(static_cast<float>(kink)).x});
  else if constexpr (std::is_same_v<T, Float16>)
    return Value<T>::key(T{torch::headeronly::Half(static_cast<float>(kink)).x});
  else
    return static_cast<T>(kink);
}

template <class T>
Found scan_all(const Tensor& x, const Tensor* out, double kink) {
  const auto* from = static_cast<const T*>(x.const_data_ptr());
  auto* to = out ? static_cast<T*>(out->mutable_data_ptr()) : nullptr;
  const auto key = kink_key<T>(kink);
  Chunks chunks;
  torch::stable::parallel_for(0, x.numel(), grain(1), [&](int64_t begin, int64_t end) {
    Found found;
    if (to)
      relu_chunk(from, to, begin, end, key, found);
    else
      touch_chunk(from, begin, end, key, found);
    chunks.add(begin, std::move(found));
  });
  Found all = chunks.merged();
  to_logical(all.touches, x);
  return all;
}

Found scan_any(const Tensor& x, const Tensor* out, double kink) {
  return by_dtype(x.scalar_type(), [&](auto zero) { return scan_all<decltype(zero)>(x, out, kink); });
}

Tensor counts_of(const Found& found, const Tensor& like) {
  return to_tensor({0, static_cast<int64_t>(found.touches.size()), found.nonfinite}, like);
}

std::tuple<Tensor, Tensor, Tensor> relu(const Tensor& x, int64_t capacity) {
  check_floating(x, "relu");
  const Tensor from = dense(x);
  const Tensor out = fresh(torch::stable::empty_like(from));
  const Found found = scan_any(from, &out, 0.0);
  return {out, to_list(found.touches, 1, capacity, false, x), counts_of(found, x)};
}

std::tuple<Tensor, Tensor> touches(const Tensor& x, double kink, int64_t capacity) {
  check_floating(x, "touches");
  STD_TORCH_CHECK(kink == kink, "touches: the kink must not be NaN");
  const Found found = scan_any(dense(x), nullptr, kink);
  return {to_list(found.touches, 1, capacity, false, x), counts_of(found, x)};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) {
  m.impl("relu", TORCH_BOX(&adcert::relu));
  m.impl("touches", TORCH_BOX(&adcert::touches));
}
