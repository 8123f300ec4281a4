// What passes over single values share on CUDA: packs of 16 bytes, one a thread, and the touches found on the way.
#pragma once

#include "activation.h"
#include "lists.cuh"

namespace adcert {

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

inline Layout layout_of(const Tensor& x, const char* op) {
  Layout layout;
  if (x.is_contiguous() || x.numel() == 0) return layout;
  int64_t step = 1;
  for (int64_t k = x.dim() - 1; k >= 0; step *= x.size(k--)) {
    if (x.size(k) <= 1) continue;
    STD_TORCH_CHECK(layout.axes < Layout::kAxes, op, ": more than ", Layout::kAxes, " axes that are not contiguous");
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

// Kinks as values are compared with them; one of them is there twice.
template <class T>
struct WideKinks {
  typename Element<T>::Wide first, second;
  unsigned two;

  explicit WideKinks(const Kinks& kinks)
      : first(widened(kinks.at[0])), second(widened(kinks.at[1])), two(kinks.count == 2) {}

 private:
  static typename Element<T>::Wide widened(double kink) {
    if constexpr (std::is_floating_point_v<T>)
      return rounded_to<T>(kink);
    else
      return Value<T>::widen(rounded_to<T>(kink));
  }
};

// The formula of an activation, known at run time only: the same for all threads. run(f) with f in W.
template <class W>
struct Formula {
  Kind kind;
  W a, b;

  template <class F>
  __device__ void with(const F& run) const {
    switch (kind) {
      case Kind::leaky_relu:
        return run(Leaky<W>{a});
      case Kind::hardsigmoid:
        return run(HardSigmoid<W, false>{});
      case Kind::hardswish:
        return run(HardSwish<W, false>{});
      case Kind::threshold:
        return run(Threshold<W>{a, a});
      case Kind::abs:
        return run(Absolute<W>{});
      default:
        return run(Clamp<W>{a, b});
    }
  }
};

template <class W>
struct Rectified {
  template <class F>
  __device__ void with(const F& run) const {
    run([](W v) { return positive_part(v); });
  }
};

struct Reading {};  // no output

// Lists the touches among the `own` values of a pack at `at`; all lanes of the warp take part.
template <class T, int V>
__device__ void list_touches(const typename Element<T>::Wide (&value)[V], int own, int64_t at,
                             const WideKinks<T>& kinks, const Layout& layout, const Lists& lists) {
  unsigned touched = 0, odd = 0;  // with two kinks, two bits a value
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const unsigned bit = static_cast<unsigned>(v) << kinks.two;
    touched |= static_cast<unsigned>(v < own && value[v] == kinks.first) << bit;
    touched |= static_cast<unsigned>(v < own && value[v] == kinks.second) << (bit + kinks.two);
    odd += v < own && !Value<typename Element<T>::Wide>::is_finite(value[v]);
  }
  if (!__any_sync(kWhole, touched | odd)) return;
  tally(lists.counts + kNonfinite, odd);
  int64_t slot = reserve(lists.counts + kTouches, static_cast<unsigned>(__popc(touched)));
  for (; touched; touched &= touched - 1, ++slot) {
    const unsigned bit = static_cast<unsigned>(__ffs(static_cast<int>(touched)) - 1);
    if (slot < lists.room) lists.touches[slot] = (layout(at + (bit >> kinks.two)) << kinks.two) + (bit & kinks.two);
  }
}

template <int V, class T>
__device__ Pack<T, V> load_some(const T* p, int own) {
  if (own == V) return load<V>(p);
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.v[v] = v < own ? p[v] : T{};
  return pack;
}

template <int V, class T>
__device__ void store_some(T* p, const Pack<T, V>& pack, int own) {
  if (own == V) return store<V>(p, pack);
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (v < own) p[v] = pack.v[v];
}

// How many of the V values at `at` there are; 0 for a thread without.
template <int V>
__device__ int own_values(const Items<int64_t>& item, int64_t at, int64_t count) {
  return item.active() ? static_cast<int>(count - at < V ? count - at : V) : 0;
}

// out: formula of x, unless the formula is Reading.
template <class T, int V, class F>
__global__ __launch_bounds__(kThreads) void scan(const T* x, T* out, int64_t count, F formula, WideKinks<T> kinks,
                                                 Layout layout, Lists lists) {
  using E = Element<T>;
  for (Items<int64_t> item((count + V - 1) / V); item.more(); item.next()) {
    const int64_t at = item.index() * V;
    const int own = own_values<V>(item, at, count);
    const Pack<T, V> pack = load_some<V>(x + at, own);
    typename E::Wide value[V];
#pragma unroll
    for (int v = 0; v < V; ++v) value[v] = E::widen(pack.v[v]);
    if constexpr (!std::is_same_v<F, Reading>) {
      Pack<T, V> result;
      formula.with([&](const auto& f) {
#pragma unroll
        for (int v = 0; v < V; ++v) result.v[v] = E::narrow(f(value[v]));
      });
      store_some<V>(out + at, result, own);
    }
    list_touches<T, V>(value, own, at, kinks, layout, lists);
  }
}

// x is dense, and so is out, with the same strides. make(T{}): the formula.
template <class F>
Record scan_all(const char* op, const Tensor& x, const Tensor* out, const Kinks& kinks, int64_t capacity,
                const F& make) {
  const Place place(x);
  const Record record(place, x, capacity, 0, true);
  by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = kPack<T>;
    const auto formula = make(zero);
    using Made = std::remove_const_t<decltype(formula)>;
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    auto* to = out ? static_cast<T*>(out->mutable_data_ptr()) : nullptr;
    const auto run = [&](auto kernel, int64_t width) {
      place.launch(kernel, (x.numel() + width - 1) / width, from, to, x.numel(), formula, WideKinks<T>(kinks),
                   layout_of(x, op), record.lists());
    };
    packs(from, 0, 1) && packs(to, 0, 1) ? run(&scan<T, V, Made>, V) : run(&scan<T, 1, Made>, 1);
  });
  return record;
}

}  // namespace adcert
