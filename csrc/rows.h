// What the operators on rows check, on every device.
#pragma once

#include <vector>

#include "stages.h"
#include "tensors.h"

namespace adcert {

// The convolution of conv_patches; units: int64 [K].
inline Stage read_convolution(const Tensor& x, const Tensor& units, std::vector<int64_t> stage) {
  STD_TORCH_CHECK(static_cast<int64_t>(stage.size()) == kStageInts, "conv_patches: expected ", kStageInts,
                  " integers, got ", stage.size());
  check_floating(x, "conv_patches");
  STD_TORCH_CHECK(units.dim() == 1 && units.scalar_type() == ScalarType::Long && units.is_contiguous(),
                  "conv_patches: units must be contiguous int64 [K]");
  stage[0] = static_cast<int64_t>(Kind::kConv), stage[2] = 0, stage[3] = -1;
  const std::vector<Tensor> tensors{x};
  return read_stage(stage.data(), tensors);
}

// Units on the CPU, each among the outputs of the convolution or -1.
inline void check_units(const Tensor& x, const Stage& s, const Tensor& units) {
  const int64_t limit = x.size(0) * s.channels_out * s.patches.window.outputs();
  const auto* index = static_cast<const int64_t*>(units.const_data_ptr());
  for (int64_t i = 0; i < units.size(0); ++i)
    STD_TORCH_CHECK(index[i] >= -1 && index[i] < limit, "conv_patches: unit ", index[i], " is not among ", limit);
}

inline void check_matrix(const Tensor& t, const char* op) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous(), op, ": expected a contiguous matrix, got ", t.dim(),
                  " dimensions");
}

inline void check_pair(const Tensor& plus, const Tensor& minus, const Tensor& group) {
  check_matrix(plus, "opposite_rows");
  check_matrix(minus, "opposite_rows");
  check_floating(plus, "opposite_rows");
  STD_TORCH_CHECK(plus.size(0) == minus.size(0) && plus.size(1) == minus.size(1) &&
                      plus.scalar_type() == minus.scalar_type() && group.dim() == 1 && group.is_contiguous() &&
                      group.size(0) == plus.size(0) && group.scalar_type() == ScalarType::Long &&
                      plus.get_device_index() == minus.get_device_index() &&
                      plus.get_device_index() == group.get_device_index(),
                  "opposite_rows: plus and minus must be alike [K, n], group int64 [K], on one device");
}

// As float64, exactly.
template <class T>
ADCERT_HD double to_double(T v) {
  if constexpr (std::is_floating_point_v<T>)
    return static_cast<double>(v);
  else
    return Value<T>::widen(v);
}

}  // namespace adcert
