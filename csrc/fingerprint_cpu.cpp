// Fingerprints of tensors in one pass over each.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <mutex>

#include "collect.h"
#include "fingerprint.h"

namespace adcert {
namespace {

struct Sums {
  uint32_t odd = 0, lanes[kLanes] = {};
};

// Words [begin, end), multiples of kLanes, of `bytes` bytes; what is behind them is zero.
template <class T>
ADCERT_INLINE void add_words(const char* data, int64_t bytes, int64_t begin, int64_t end, Sums& sums) {
  constexpr int64_t kSpan = kLanes * sizeof(uint32_t);
  uint32_t odd[kLanes] = {}, lanes[kLanes] = {};
  for (int64_t k = begin; k < end; k += kLanes) {
    uint32_t words[kLanes];
    const int64_t at = k * static_cast<int64_t>(sizeof(uint32_t)), left = bytes - at;
    if (left >= kSpan) {
      std::memcpy(words, data + at, kSpan);
    } else {
      std::memset(words, 0, kSpan);
      std::memcpy(words, data + at, static_cast<size_t>(left));
    }
    for (int l = 0; l < kLanes; ++l) {
      lanes[l] += scatter(words[l], static_cast<uint32_t>(k) + static_cast<uint32_t>(l));
      odd[l] |= is_odd_word<T>(words[l], l & 1);
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    sums.lanes[l] += lanes[l];
    sums.odd |= odd[l];
  }
}

#define ADCERT_WORDS(T)                                                                                   \
  ADCERT_CLONES void add_chunk(T, const char* data, int64_t bytes, int64_t begin, int64_t end, Sums& s) { \
    add_words<T>(data, bytes, begin, end, s);                                                             \
  }
ADCERT_WORDS(float)
ADCERT_WORDS(double)
ADCERT_WORDS(BFloat16)
ADCERT_WORDS(Float16)
#undef ADCERT_WORDS

template <class T>
Sums fingerprint(const Tensor& t) {
  const auto* data = static_cast<const char*>(t.const_data_ptr());
  const int64_t bytes = t.numel() * static_cast<int64_t>(sizeof(T)), steps = words_of<T>(t.numel()) / kLanes;
  std::mutex mutex;
  Sums all;
  torch::stable::parallel_for(0, steps, grain(kLanes), [&](int64_t begin, int64_t end) {
    Sums sums;
    add_chunk(T{}, data, bytes, begin * kLanes, end * kLanes, sums);
    const std::lock_guard<std::mutex> lock(mutex);
    all.odd |= sums.odd;
    for (int l = 0; l < kLanes; ++l) all.lanes[l] += sums.lanes[l];
  });
  return all;
}

Tensor fingerprints(const std::vector<Tensor>& tensors) {
  const std::vector<Tensor> held = checked_fingerprints(tensors);
  const auto count = static_cast<int64_t>(held.size());
  const Tensor out = torch::stable::new_empty(held[0], {count, kNumbers}, ScalarType::Int);
  auto* numbers = static_cast<int32_t*>(out.mutable_data_ptr());
  for (const Tensor& t : held) {
    const Sums sums = by_dtype(t.scalar_type(), [&](auto zero) { return fingerprint<decltype(zero)>(t); });
    *numbers++ = static_cast<int32_t>(sums.odd);
    for (const uint32_t lane : sums.lanes) *numbers++ = static_cast<int32_t>(lane);
  }
  return out;
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) { m.impl("fingerprints", TORCH_BOX(&adcert::fingerprints)); }
