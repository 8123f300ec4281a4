// Kinked activations and their touches in one pass over x; PReLU. Half types are compared and computed in float.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "scan.cuh"

namespace adcert {
namespace {

// Limits of a clamp are compared with unrounded, a threshold in x's dtype: as torch does on CUDA.
template <class T>
Formula<typename Element<T>::Wide> formula_of(const Activation& a) {
  using W = typename Element<T>::Wide;
  check_parameters<W, T, W>(a);
  if constexpr (!std::is_floating_point_v<T>)
    if (a.kind == Kind::threshold) return {a.kind, Value<T>::widen(rounded_to<T>(a.a)), W{0}};
  return {a.kind, static_cast<W>(a.a), static_cast<W>(a.b)};
}

std::tuple<Tensor, Tensor, Tensor> activation(const Tensor& x, int64_t kind, const std::vector<double>& parameters,
                                              int64_t capacity) {
  check_floating(x, "activation");
  check_capacity("activation", capacity);
  const Activation a(kind, parameters);
  const Tensor from = dense(x);
  const Tensor out = torch::stable::empty_like(from);
  const Record record =
      scan_all("activation", from, &out, a.kinks, capacity, [&](auto zero) { return formula_of<decltype(zero)>(a); });
  return {out, record.touches, record.counts};
}

// Lines of `run` values in memory have one slope each, those of all channels in turn.
struct Lines {
  int64_t channels, run;

  __device__ int64_t channel(int64_t position) const {
    return channels == 1 ? 0
           : position < INT32_MAX && run < INT32_MAX
               ? static_cast<int64_t>(static_cast<uint32_t>(position) / static_cast<uint32_t>(run) %
                                      static_cast<uint32_t>(channels))
               : position / run % channels;
  }
};

template <class T, int V>
__global__ __launch_bounds__(kThreads) void slope(const T* x, T* out, const T* weight, int64_t count, Lines lines,
                                                  WideKinks<T> kinks, Layout layout, Lists lists) {
  using E = Element<T>;
  using W = typename E::Wide;
  for (Items<int64_t> item((count + V - 1) / V); item.more(); item.next()) {
    const int64_t at = item.index() * V;
    const int own = own_values<V>(item, at, count);
    const Pack<T, V> pack = load_some<V>(x + at, own);
    const bool one = lines.channels == 1 || lines.run % V == 0;  // slope for the whole pack
    W value[V], left = E::widen(weight[lines.channel(at < count ? at : 0)]);
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (!one && v < own) left = E::widen(weight[lines.channel(at + v)]);
      value[v] = E::widen(pack.v[v]);
      result.v[v] = E::narrow(Leaky<W>{left}(value[v]));
    }
    store_some<V>(out + at, result, own);
    list_touches<T, V>(value, own, at, kinks, layout, lists);
  }
}

std::tuple<Tensor, Tensor, Tensor> prelu(const Tensor& x, const Tensor& weight, int64_t capacity) {
  check_floating(x, "prelu");
  check_slopes(x, weight);
  check_capacity("prelu", capacity);
  const Tensor from = dense(x), slopes = torch::stable::contiguous(weight);
  const Tensor out = torch::stable::empty_like(from);
  const Place place(x);
  const Record record(place, x, capacity, 0, true);
  const int64_t count = x.numel(), channels = slopes.numel();
  const Lines lines{channels, channels == 1 || count == 0 ? 1 : from.stride(1)};
  by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = kPack<T>;
    const auto* in = static_cast<const T*>(from.const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    const auto run = [&](auto kernel, int64_t width) {
      place.launch(kernel, (count + width - 1) / width, in, to, static_cast<const T*>(slopes.const_data_ptr()), count,
                   lines, WideKinks<T>(Kinks{}), layout_of(from, "prelu"), record.lists());
    };
    packs(in, 0, 1) && packs(to, 0, 1) ? run(&slope<T, V>, V) : run(&slope<T, 1>, 1);
  });
  return {out, record.touches, record.counts};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(ADCERT_LIBRARY, ADCERT_CUDA, m) {
  m.impl("activation", TORCH_BOX(&adcert::activation));
  m.impl("prelu", TORCH_BOX(&adcert::prelu));
}
