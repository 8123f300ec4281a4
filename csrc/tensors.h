// Tensors as the kernels want them: dense, one memory format at a time.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "checks.h"
#include "lanes.h"

namespace adcert {

// x itself if its elements fill a piece of memory without gaps or repetition, else such a copy.
inline Tensor dense(const Tensor& x) {
  if (x.is_contiguous()) return x;
  Tensor copy = torch::stable::empty_like(x);  // keeps the strides of a dense x
  bool same = true;
  for (int64_t k = 0; k < x.dim(); ++k) same = same && (x.size(k) <= 1 || x.stride(k) == copy.stride(k));
  return same ? x : torch::stable::copy_(copy, x);
}

inline MemoryFormat format(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline Tensor in_format(const Tensor& x, bool channels_last) {
  return torch::stable::contiguous(x, format(channels_last));
}

// From 32 MiB on glibc maps every allocation anew, and a page fault for each 4 KiB costs more than the kernel that
// fills them. Ask for 2 MiB pages where the system leaves that to the program. Advice only; all of t must get written.
inline Tensor fresh(const Tensor& t) {
#if defined(MADV_HUGEPAGE)
  constexpr uint64_t kMapped = uint64_t{32} << 20, kPage = uint64_t{2} << 20;
  const auto bytes = static_cast<uint64_t>(t.numel()) * t.element_size();
  if (bytes >= kMapped && t.is_cpu()) {
    const auto at = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uint64_t begin = (at + kPage - 1) / kPage * kPage, end = (at + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return t;
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype, bool channels_last) {
  return fresh(torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt, format(channels_last)));
}

// f(T{}) for the element type T of the kernels.
template <class F>
auto by_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      return f(Float16{});
  }
}

}  // namespace adcert
