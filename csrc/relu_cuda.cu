// ReLU and its touches in one pass over x; the read-only pass for any kink. Packs of 16 bytes, one a thread.

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <tuple>

#include "lists.cuh"

namespace adcert {
namespace {

// From a position in dense memory to the logical index: axes by falling stride.
struct Layout {
  static constexpr int kAxes = 16;
  int axes = 0;  // 0: positions are logical indices
  int64_t stride[kAxes], logical[kAxes];

  __device__ int64_t operator()(int64_t position) const {
    if (axes == 0) return position;
    int64_t index = 0;
    for (int k = 0; k < axes; ++k) {
      index += position / stride[k] * logical[k];
      position %= stride[k];
    }
    return index;
  }
};

Layout layout_of(const Tensor& x) {
  Layout layout;
  if (x.is_contiguous() || x.numel() == 0) return layout;
  int64_t step = 1;
  for (int64_t k = x.dim() - 1; k >= 0; step *= x.size(k--)) {
    if (x.size(k) <= 1) continue;
    STD_TORCH_CHECK(layout.axes < Layout::kAxes, "relu: more than ", Layout::kAxes, " axes that are not contiguous");
    int at = layout.axes++;
    for (; at > 0 && layout.stride[at - 1] < x.stride(k); --at) {
      layout.stride[at] = layout.stride[at - 1];
      layout.logical[at] = layout.logical[at - 1];
    }
    layout.stride[at] = x.stride(k);
    layout.logical[at] = step;
  }
  return layout;
}

// OUT: writes max(x, 0). kink: as torch compares it, rounded to T first.
template <class T, int V, bool OUT>
__global__ __launch_bounds__(kThreads) void scan(const T* x, T* out, int64_t count, typename Element<T>::Wide kink,
                                                 Layout layout, Lists lists) {
  using E = Element<T>;
  using W = typename E::Wide;
  for (Items<int64_t> item((count + V - 1) / V); item.more(); item.next()) {
    const int64_t at = item.index() * V;
    const int own = item.active() ? static_cast<int>(count - at < V ? count - at : V) : 0;
    Pack<T, V> pack, result;
    if (own == V) {
      pack = load<V>(x + at);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) pack.v[v] = v < own ? x[at + v] : T{};
    }
    unsigned touched = 0, odd = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const W value = E::widen(pack.v[v]);
      touched |= static_cast<unsigned>(v < own && value == kink) << v;
      odd += v < own && !Value<W>::is_finite(value);
      if constexpr (OUT) result.v[v] = E::exact(positive_part(value));
    }
    if constexpr (OUT) {
      if (own == V) {
        store<V>(out + at, result);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (v < own) out[at + v] = result.v[v];
      }
    }
    if (!__any_sync(kWhole, touched | odd)) continue;
    tally(lists.counts + kNonfinite, odd);
    int64_t slot = reserve(lists.counts + kTouches, static_cast<unsigned>(__popc(touched)));
    for (; touched; touched &= touched - 1, ++slot)
      if (slot < lists.room) lists.touches[slot] = layout(at + __ffs(static_cast<int>(touched)) - 1);
  }
}

template <class T>
typename Element<T>::Wide rounded(double kink) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return torch::headeronly::BFloat16(static_cast<float>(kink));
  else if constexpr (std::is_same_v<T, Float16>)
    return torch::headeronly::Half(static_cast<float>(kink));
  else
    return static_cast<T>(kink);
}

// x is dense, and so is out, with the same strides.
Record scan_all(const Tensor& x, const Tensor* out, double kink, int64_t capacity) {
  const Place place(x);
  const Record record(place, x, capacity, 0, true);
  by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = kPack<T>;
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    auto* to = out ? static_cast<T*>(out->mutable_data_ptr()) : nullptr;
    const auto run = [&](auto kernel, int64_t width) {
      place.launch(kernel, (x.numel() + width - 1) / width, from, to, x.numel(), rounded<T>(kink), layout_of(x),
                   record.lists());
    };
    const bool wide = packs(from, 0, 1) && packs(to, 0, 1);
    if (out)
      wide ? run(&scan<T, V, true>, V) : run(&scan<T, 1, true>, 1);
    else
      wide ? run(&scan<T, V, false>, V) : run(&scan<T, 1, false>, 1);
  });
  return record;
}

std::tuple<Tensor, Tensor, Tensor> relu(const Tensor& x, int64_t capacity) {
  check_floating(x, "relu");
  check_capacity("relu", capacity);
  const Tensor from = dense(x);
  const Tensor out = torch::stable::empty_like(from);
  const Record record = scan_all(from, &out, 0.0, capacity);
  return {out, record.touches, record.counts};
}

std::tuple<Tensor, Tensor> touches(const Tensor& x, double kink, int64_t capacity) {
  check_floating(x, "touches");
  check_capacity("touches", capacity);
  STD_TORCH_CHECK(kink == kink, "touches: the kink must not be NaN");
  const Record record = scan_all(dense(x), nullptr, kink, capacity);
  return {record.touches, record.counts};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(ADCERT_LIBRARY, ADCERT_CUDA, m) {
  m.impl("relu", TORCH_BOX(&adcert::relu));
  m.impl("touches", TORCH_BOX(&adcert::touches));
}
