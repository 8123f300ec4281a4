// A tensor's memory as a few numbers, and whether its values are finite: shared by every device.
//
// The bytes are words of 32 bits, zeros up to a multiple of kLanes of them; word k counts in lane k mod kLanes, whose
// number is a sum modulo 2^32 and so in no order.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "tensors.h"

namespace adcert {

constexpr int kLanes = 64;
constexpr int kNumbers = 1 + kLanes;  // of a tensor: whether some value is not finite, then the lanes

// What word `k` adds. One-to-one in the word, so that a word that changes always shows.
ADCERT_INLINE uint32_t scatter(uint32_t word, uint32_t k) {
  uint32_t h = (word + k * 0x9e3779b1u) * 0x85ebca6bu;
  h = (h ^ (h >> 16)) * 0xc2b2ae35u;
  return h ^ (h >> 15);
}

// Whether a word, at an even or odd place, shows a value that is not finite: the exponent's bits are all ones.
template <class T>
ADCERT_INLINE bool is_odd_word(uint32_t word, bool at_odd) {
  if constexpr (sizeof(T) == 2) {
    constexpr uint32_t low = Value<T>::infinity, high = low << 16;
    return ((word & low) == low) | ((word & high) == high);
  } else if constexpr (sizeof(T) == 8) {  // in little-endian memory the exponent comes last
    constexpr uint32_t high = Value<T>::infinity >> 32;
    return at_odd & ((word & high) == high);
  } else {
    return (word & Value<T>::infinity) == Value<T>::infinity;
  }
}

// Words of `values` values, with the zeros.
template <class T>
ADCERT_INLINE int64_t words_of(int64_t values) {
  constexpr int64_t per =
      static_cast<int64_t>(kLanes * sizeof(uint32_t) / sizeof(T));  // values in one word of each lane
  return (values + per - 1) / per * kLanes;
}

inline std::vector<Tensor> checked_fingerprints(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> held;
  for (const Tensor& t : tensors) {
    check_floating(t, "fingerprints");
    STD_TORCH_CHECK(t.device() == tensors[0].device(), "fingerprints: expected tensors of one device");
    held.push_back(dense(t));
  }
  return held;
}

}  // namespace adcert
