// The kinked activations: their numbers, kinks and formulas, for every device. torch's own, operation by operation.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "values.h"

namespace adcert {

// Numbered as in adcert/reference.py (ACTIVATIONS).
enum class Kind : int64_t {
  hardtanh,
  leaky_relu,
  hardsigmoid,
  hardswish,
  threshold,
  clamp,
  abs,
};

// Ascending; a unit touches a kink if it equals it, rounded to its dtype.
struct Kinks {
  int64_t count = 1;
  double at[2] = {0.0, 0.0};
};

inline Kinks checked_kinks(const char* op, const std::vector<double>& at) {
  STD_TORCH_CHECK(at.size() == 1 || at.size() == 2, op, ": expected one kink or two, got ", at.size());
  for (const double kink : at) STD_TORCH_CHECK(kink == kink, op, ": a kink must not be NaN");
  STD_TORCH_CHECK(at.front() <= at.back(), op, ": the kinks have to ascend, got ", at.front(), ", ", at.back());
  return {static_cast<int64_t>(at.size()), {at.front(), at.back()}};
}

inline std::vector<double> finite(const std::vector<double>& numbers) {
  std::vector<double> kept;
  for (const double number : numbers)
    if (std::abs(number) < std::numeric_limits<double>::infinity()) kept.push_back(number);
  return kept;
}

// a, b: the limits of a clamp (infinite where it has none), the threshold, the slope below 0.
struct Activation {
  Kind kind;
  double a = 0.0, b = 0.0;
  Kinks kinks;

  Activation(int64_t number, const std::vector<double>& parameters) : kind(static_cast<Kind>(number)) {
    constexpr size_t kParameters[] = {2, 1, 0, 0, 1, 2, 0};
    STD_TORCH_CHECK(number >= 0 && number <= static_cast<int64_t>(Kind::abs), "activation: there is no kind ", number);
    STD_TORCH_CHECK(parameters.size() == kParameters[number], "activation: kind ", number, " has ", kParameters[number],
                    " parameters, got ", parameters.size());
    for (const double p : parameters) STD_TORCH_CHECK(p == p, "activation: a parameter must not be NaN");
    if (!parameters.empty()) a = b = parameters.front();
    switch (kind) {
      case Kind::hardtanh:
        kinks = checked_kinks("activation", parameters);
        b = parameters.back();
        break;
      case Kind::clamp:
        kinks = checked_kinks("activation", finite(parameters));
        b = parameters.back();
        break;
      case Kind::hardsigmoid:
      case Kind::hardswish:
        kinks = {2, {-3.0, 3.0}};
        break;
      case Kind::threshold:
        kinks = {1, {a, a}};
        break;
      default:  // at 0
        break;
    }
  }
};

// A number as torch rounds it to an element.
template <class T>
T rounded_to(double number) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return T{torch::headeronly::BFloat16(static_cast<float>(number)).x};
  else if constexpr (std::is_same_v<T, Float16>)
    return T{torch::headeronly::Half(static_cast<float>(number)).x};
  else
    return static_cast<T>(number);
}

// torch lets no parameter overflow. Limit, Level, Slope: what it rounds those of a clamp, thresholds and slopes to.
template <class Limit, class Level, class Slope>
void check_parameters(const Activation& activation) {
  const auto fits = [&](double p) {
    switch (activation.kind) {
      case Kind::leaky_relu:
        return Value<Slope>::is_finite(rounded_to<Slope>(p));
      case Kind::threshold:
        return Value<Level>::is_finite(rounded_to<Level>(p));
      default:
        return Value<Limit>::is_finite(rounded_to<Limit>(p));
    }
  };
  for (const double p : {activation.a, activation.b})
    STD_TORCH_CHECK(std::isinf(p) || fits(p), "activation: the parameter ", p, " overflows in the input's dtype");
}

// Formulas in W, float or double. NaN passes all of them.
template <class W>
struct Clamp {
  W low, high;
  ADCERT_INLINE W operator()(W v) const {
    const W raised = v < low ? low : v;
    return high < raised ? high : raised;
  }
};

template <class W>
struct Leaky {
  W slope;
  ADCERT_INLINE W operator()(W v) const { return v > 0 ? v : v * slope; }
};

// A sixth: torch divides on the CPU, and on CUDA multiplies with the float next to 1/6, in double as well. Rounded to a
// half type both are the same for all of its values (a test tries them).
template <class W, bool DIVIDE>
struct Sixth {
  static ADCERT_INLINE W of(W v) { return DIVIDE ? v / W{6} : v * static_cast<W>(1.0f / 6.0f); }
};

template <class W, bool DIVIDE>
struct HardSigmoid {
  ADCERT_INLINE W operator()(W v) const { return Sixth<W, DIVIDE>::of(Clamp<W>{0, 6}(v + 3)); }
};

template <class W, bool DIVIDE>
struct HardSwish {
  ADCERT_INLINE W operator()(W v) const { return Sixth<W, DIVIDE>::of(v * Clamp<W>{0, 6}(v + 3)); }
};

template <class W>
struct Threshold {  // value and threshold are one
  W at, value;
  ADCERT_INLINE W operator()(W v) const { return v <= at ? value : v; }
};

template <class W>
struct Absolute {
  using Bits = typename Value<W>::Bits;
  ADCERT_INLINE W operator()(W v) const {
    return std::bit_cast<W>(static_cast<Bits>(std::bit_cast<Bits>(v) & (static_cast<Bits>(~Bits{0}) >> 1)));
  }
};

}  // namespace adcert
