// A tensor's memory as one number: shared by every device.
//
// The bytes are words of 64 bits, with zeros behind them up to a multiple of kLanes words. The number is a sum over the
// words modulo 2^64, and so in no order.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "tensors.h"

namespace adcert {

constexpr int64_t kLanes = 16;                        // words that the CPU takes at once
constexpr int64_t kSpan = kLanes * sizeof(uint64_t);  // their bytes

// What word `k` adds. One-to-one in the word, so that a word that changes always shows.
ADCERT_INLINE uint64_t scatter(uint64_t word, uint64_t k) {
  uint64_t h = word ^ (k * 0x9e3779b97f4a7c15u);
  h = (h ^ (h >> 32)) * 0xd6e8feb86659fd93u;
  h = (h ^ (h >> 32)) * 0xd6e8feb86659fd93u;
  return h ^ (h >> 32);
}

inline int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

// Words of so many bytes, with the zeros.
inline int64_t words_of(int64_t bytes) { return (bytes + kSpan - 1) / kSpan * kLanes; }

inline std::vector<Tensor> dense_ones(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> held;
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.device() == tensors[0].device(), "fingerprints: expected tensors of one device");
    held.push_back(dense(t));
  }
  return held;
}

}  // namespace adcert
