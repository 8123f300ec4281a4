// Fingerprints of tensors in one pass over each.

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstring>

#include "collect.h"
#include "fingerprint.h"

namespace adcert {
namespace {

// The sum over words [begin, end), multiples of kLanes, of `bytes` bytes; what is behind them is zero.
ADCERT_CLONES uint64_t sum_of(const char* data, int64_t bytes, int64_t begin, int64_t end) {
  uint64_t sums[kLanes] = {};
  for (int64_t k = begin; k < end; k += kLanes) {
    uint64_t words[kLanes];
    const int64_t at = k / kLanes * kSpan, left = bytes - at;
    if (left >= kSpan) {
      std::memcpy(words, data + at, kSpan);
    } else {
      std::memset(words, 0, kSpan);
      std::memcpy(words, data + at, static_cast<size_t>(left));
    }
    for (int64_t l = 0; l < kLanes; ++l) sums[l] += scatter(words[l], static_cast<uint64_t>(k + l));
  }
  uint64_t sum = 0;
  for (const uint64_t each : sums) sum += each;
  return sum;
}

Tensor fingerprints(const std::vector<Tensor>& tensors) {
  const Tensor out = torch::stable::new_empty(tensors[0], {static_cast<int64_t>(tensors.size())}, ScalarType::Long);
  auto* number = static_cast<int64_t*>(out.mutable_data_ptr());
  for (const Tensor& t : dense_ones(tensors)) {
    const auto* data = static_cast<const char*>(t.const_data_ptr());
    const int64_t bytes = bytes_of(t);
    std::atomic<uint64_t> sum{0};
    torch::stable::parallel_for(0, words_of(bytes) / kLanes, grain(kLanes), [&](int64_t begin, int64_t end) {
      sum += sum_of(data, bytes, begin * kLanes, end * kLanes);
    });
    *number++ = static_cast<int64_t>(sum.load());
  }
  return out;
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) { m.impl("fingerprints", TORCH_BOX(&adcert::fingerprints)); }
