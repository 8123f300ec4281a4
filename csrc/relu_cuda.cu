// ReLU and its touches in one pass over x; the pass that only reads, for one or two kinks.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "scan.cuh"

namespace adcert {
namespace {

std::tuple<Tensor, Tensor, Tensor> relu(const Tensor& x, int64_t capacity) {
  check_floating(x, "relu");
  check_capacity("relu", capacity);
  const Tensor from = dense(x);
  const Tensor out = torch::stable::empty_like(from);
  const Record record = scan_all("relu", from, &out, Kinks{}, capacity,
                                 [](auto zero) { return Rectified<typename Element<decltype(zero)>::Wide>{}; });
  return {out, record.touches, record.counts};
}

std::tuple<Tensor, Tensor> touches(const Tensor& x, const std::vector<double>& at, int64_t capacity) {
  check_floating(x, "touches");
  check_capacity("touches", capacity);
  const Kinks kinks = checked_kinks("touches", at);
  const Record record = scan_all("touches", dense(x), nullptr, kinks, capacity, [](auto) { return Reading{}; });
  return {record.touches, record.counts};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(ADCERT_LIBRARY, ADCERT_CUDA, m) {
  m.impl("relu", TORCH_BOX(&adcert::relu));
  m.impl("touches", TORCH_BOX(&adcert::touches));
}
