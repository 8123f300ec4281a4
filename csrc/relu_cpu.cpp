// ReLU and its touches in one pass over x.

#include <torch/csrc/stable/library.h>

#include "scan.h"

namespace adcert {
namespace {

template <class T>
ADCERT_INLINE void scan_chunk(const T* x, T* out, int64_t begin, int64_t end, const KinkKeys<T>& kinks, Found& found) {
  constexpr int64_t kBlock = 1024;  // what is looked at again is still in the first-level cache
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t stop = std::min(end, i + kBlock);
    if (any_odd<true>(x + i, out + i, stop - i)) note_touches(x, i, stop, kinks, found);
  }
}

#define ADCERT_SCAN(T)                                                                                            \
  ADCERT_CLONES void relu_chunk(const T* x, T* out, int64_t begin, int64_t end, const KinkKeys<T>& k, Found& f) { \
    scan_chunk(x, out, begin, end, k, f);                                                                         \
  }
ADCERT_SCAN(float)
ADCERT_SCAN(double)
ADCERT_SCAN(BFloat16)
ADCERT_SCAN(Float16)
#undef ADCERT_SCAN

std::tuple<Tensor, Tensor, Tensor> relu(const Tensor& x, int64_t capacity) {
  check_floating(x, "relu");
  const Tensor from = dense(x);
  const Tensor out = fresh(torch::stable::empty_like(from));
  const Found found = by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto* in = static_cast<const T*>(from.const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    const KinkKeys<T> kinks{Kinks{}};
    return scan(from, 1, [&](int64_t begin, int64_t end, Found& f) { relu_chunk(in, to, begin, end, kinks, f); });
  });
  return {out, to_list(found.touches, 1, capacity, false, x), counts_of(found, x)};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) { m.impl("relu", TORCH_BOX(&adcert::relu)); }
