// Max pooling, fused with ReLU or not, with its ties and touches in one pass over x.
//
// A thread holds V outputs in registers: V channels of one pixel (NHWC), or one output of a plane (NCHW), or, for 2 x 2
// windows side by side in planes, those of a pack of 16 bytes. The choice of a window is Best (values.h). What is rare
// (a tie, a touch, a value that is not finite) is voted on by the warp and then looked at again.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "lists.cuh"
#include "pool.h"

namespace adcert {
namespace {

// Offsets and routes: bytes, or int32 for windows of more than 255 taps.
template <class T, class I, class O>
struct Job {
  const T* x;
  T* out;
  O *offsets, *routes;
  WindowOf<I> window;
  I batch, channels;
  Lists lists;
};

// Where the V outputs of a thread lie. A cell (row, column) of lane v is image[row * down + column * across + v].
template <class T, class I>
struct Spot {
  const T* image;
  I oh, ow, down, across;
  I at;            // of the first output, in memory
  int64_t window;  // its logical index; lanes are `step` apart
  int64_t cell;    // the logical index of the image's first cell; lanes are `plane` apart
  int64_t step, plane;
};

template <bool NHWC, int V, class T, class I, class O>
__device__ Spot<T, I> spot(const Job<T, I, O>& job, I item) {
  const I rows = job.window.height.count, columns = job.window.width.count;
  const I height = job.window.height.size, width = job.window.width.size;
  const int64_t outputs = job.window.outputs(), cells = job.window.cells();
  Spot<T, I> s;
  s.at = item * V;
  s.step = outputs, s.plane = cells;
  I line;  // n * rows + oh, or plane * rows + oh
  if constexpr (NHWC) {
    const I groups = job.channels / V, pixel = item / groups, c = (item - pixel * groups) * V;
    line = pixel / columns;
    s.ow = pixel - line * columns;
    const I n = line / rows;
    s.oh = line - n * rows;
    s.image = job.x + static_cast<int64_t>(n) * height * width * job.channels + c;
    s.down = width * job.channels, s.across = job.channels;
    const int64_t plane = static_cast<int64_t>(n) * job.channels + c;
    s.window = plane * outputs + s.oh * columns + s.ow;
    s.cell = plane * cells;
  } else {
    line = item / columns;
    s.ow = item - line * columns;
    const I plane = line / rows;
    s.oh = line - plane * rows;
    s.image = job.x + static_cast<int64_t>(plane) * height * width;
    s.down = width, s.across = 1;
    s.window = item;
    s.cell = static_cast<int64_t>(plane) * cells;
  }
  return s;
}

template <bool RELU, class W>
__device__ W seen(W value) {
  return RELU ? positive_part(value) : value;
}

// f(cell inside the image's plane, pack) for every cell that is looked at with these windows: each cell once in all.
template <int V, class T, class I, class O, class F>
__device__ void each_owned(const Job<T, I, O>& job, const Spot<T, I>& s, const F& f) {
  const AxisOf<I>&h = job.window.height, &w = job.window.width;
  const I h1 = h.owned(s.oh + 1), w0 = w.owned(s.ow), w1 = w.owned(s.ow + 1);
  for (I row = h.owned(s.oh); row < h1; ++row)
    for (I column = w0; column < w1; ++column)
      f(row * w.size + column, load<V>(s.image + row * s.down + column * s.across));
}

// Whether a value has to be noted: not finite, or zero where ReLU makes that a touch.
template <bool RELU, class W>
__device__ bool is_notable(W value) {
  return RELU ? is_odd(value) : !Value<W>::is_finite(value);
}

template <bool RELU, int V, class T, class I, class O>
__device__ bool any_notable(const Job<T, I, O>& job, const Spot<T, I>& s) {
  bool found = false;
  each_owned<V>(job, s, [&](I, const Pack<T, V>& pack) {
#pragma unroll
    for (int v = 0; v < V; ++v) found |= is_notable<RELU>(Element<T>::widen(pack.v[v]));
  });
  return found;
}

// One tap of V windows; returns whether its cell is notable.
template <bool RELU, int V, class T>
__device__ bool see_tap(const Pack<T, V>& pack, int tap, Best<typename Element<T>::Wide, int>* lanes) {
  bool found = false;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const auto value = Element<T>::widen(pack.v[v]);
    found |= is_notable<RELU>(value);
    lanes[v].see(seen<RELU>(value), tap);
  }
  return found;
}

// The taps of V windows, in row-major order. Returns whether a cell that is looked at with these windows is notable:
// without a dilation these are among the taps, unless windows leave gaps. K: windows are K x K, so that all loads of
// one inside the image are under way before the first value is needed; 0: any size.
template <bool RELU, int V, int K, class T, class I, class O>
__device__ bool see_taps(const Job<T, I, O>& job, const Spot<T, I>& s, Best<typename Element<T>::Wide, int>* lanes) {
  using W = typename Element<T>::Wide;
  const AxisOf<I>&h = job.window.height, &w = job.window.width;
  const I h0 = h.first(s.oh), h1 = h.last(s.oh), w0 = w.first(s.ow), w1 = w.last(s.ow);
  const I below = h.owned(s.oh + 1), right = w.owned(s.ow + 1);
  const int first = static_cast<int>(h0 * w.kernel + w0);
  bool found = false;
#pragma unroll
  for (int v = 0; v < V; ++v) lanes[v] = {Value<W>::lowest, Value<W>::lowest_value, first, first};
  if (K > 0 && h0 == 0 && h1 == K && w0 == 0 && w1 == K) {
    constexpr int N = K > 0 ? K : 1;
    Pack<T, V> packs[N * N];
#pragma unroll
    for (int k = 0; k < N * N; ++k)
      packs[k] = load<V>(s.image + h.cell(s.oh, k / N) * s.down + w.cell(s.ow, k % N) * s.across);
#pragma unroll
    for (int k = 0; k < N * N; ++k) {
      const bool owned = h.cell(s.oh, k / N) < below && w.cell(s.ow, k % N) < right;
      found |= see_tap<RELU, V>(packs[k], k, lanes) && owned;
    }
  } else {
    for (I kh = h0; kh < h1; ++kh)
      for (I kw = w0; kw < w1; ++kw) {
        const I row = h.cell(s.oh, kh), column = w.cell(s.ow, kw);
        const Pack<T, V> pack = load<V>(s.image + row * s.down + column * s.across);
        const bool owned = row < below && column < right;
        found |= see_tap<RELU, V>(pack, static_cast<int>(kh * w.kernel + kw), lanes) && owned;
      }
  }
  const bool covered =
      h.dilation == 1 && w.dilation == 1 && below <= h.start(s.oh) + h.kernel && right <= w.start(s.ow) + w.kernel;
  return covered ? found : any_notable<RELU, V>(job, s);
}

// Lists the touches and counts the values that are not finite, of the threads with `mine`; every thread of the warp
// comes here.
template <bool RELU, bool NHWC, int V, class T, class I, class O>
__device__ void note_odd(const Job<T, I, O>& job, I item, bool mine) {
  using W = typename Element<T>::Wide;
  const Spot<T, I> s = spot<NHWC, V>(job, item);
  // A window of a huge image may own more cells than fit into 32 bits.
  std::conditional_t<sizeof(I) == 4, unsigned, Counter> touches = 0, nonfinite = 0;
  if (mine)
    each_owned<V>(job, s, [&](I, const Pack<T, V>& pack) {
      for (int v = 0; v < V; ++v) {
        const W value = Element<T>::widen(pack.v[v]);
        touches += RELU && value == 0;
        nonfinite += !Value<W>::is_finite(value);
      }
    });
  tally(job.lists.counts + kNonfinite, nonfinite);
  if constexpr (RELU) {
    int64_t slot = reserve(job.lists.counts + kTouches, touches);
    if (touches)
      each_owned<V>(job, s, [&](I cell, const Pack<T, V>& pack) {
        for (int v = 0; v < V; ++v) {
          if (Element<T>::widen(pack.v[v]) != 0) continue;
          if (slot < job.lists.room) job.lists.touches[slot] = s.cell + v * s.plane + cell;
          ++slot;
        }
      });
  }
}

// Lists the tied windows of the threads, bit v of `tied` for lane v; every thread of the warp comes here.
template <bool RELU, bool NHWC, int V, class T, class I, class O>
__device__ void note_ties(const Job<T, I, O>& job, I item, unsigned tied) {
  using E = Element<T>;
  using W = typename E::Wide;
  const Spot<T, I> s = spot<NHWC, V>(job, item);
  const AxisOf<I>&h = job.window.height, &w = job.window.width;
  int64_t slot = reserve(job.lists.counts + kWindows, static_cast<unsigned>(__popc(tied)));
  for (; tied; tied &= tied - 1, ++slot) {
    if (slot >= job.lists.room) return;
    const int v = __ffs(static_cast<int>(tied)) - 1;
    const W maximum = E::widen(job.out[s.at + v]);
    job.lists.windows[slot] = s.window + v * s.step;
    int64_t* members = job.lists.members + slot * job.lists.words;
    for (int64_t word = 0; word < job.lists.words; ++word) members[word] = 0;
    for (I kh = h.first(s.oh), h1 = h.last(s.oh); kh < h1; ++kh)
      for (I kw = w.first(s.ow), w1 = w.last(s.ow); kw < w1; ++kw) {
        const W value = E::widen(s.image[h.cell(s.oh, kh) * s.down + w.cell(s.ow, kw) * s.across + v]);
        const I tap = kh * w.kernel + kw;
        if (seen<RELU>(value) == maximum) members[tap / 64] |= static_cast<int64_t>(uint64_t{1} << (tap % 64));
      }
  }
}

// Writes the outputs of V lanes; returns the tied ones.
template <bool RELU, int V, class T, class I, class O>
__device__ unsigned write(const Job<T, I, O>& job, I at, const Best<typename Element<T>::Wide, int>* lanes) {
  const auto taps = static_cast<int>(job.window.taps());
  Pack<T, V> out;
  Pack<O, V> offsets, routes;
  unsigned tied = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const bool closed = RELU && lanes[v].maximum <= 0;  // a NaN passes ReLU's backward
    out.v[v] = Element<T>::exact(lanes[v].value);
    offsets.v[v] = static_cast<O>(lanes[v].offset);
    routes.v[v] = static_cast<O>(closed ? taps : lanes[v].offset);
    tied |= static_cast<unsigned>(lanes[v].last != lanes[v].offset && !closed) << v;
  }
  store<V>(job.out + at, out);
  store<V>(job.offsets + at, offsets);
  if constexpr (RELU) store<V>(job.routes + at, routes);
  return tied;
}

template <bool RELU, bool NHWC, int V, int K, class T, class I, class O>
__global__ __launch_bounds__(kThreads, sizeof(I) == 4 && K * V <= 16
                                           ? 4
                                           : 2) void pool_any(const __grid_constant__ Job<T, I, O> job) {
  const I total = job.batch * job.channels * job.window.outputs() / V;
  for (Items<I> item(total); item.more(); item.next()) {
    unsigned tied = 0;
    bool odd = false;
    if (item.active()) {
      const Spot<T, I> s = spot<NHWC, V>(job, item.index());
      Best<typename Element<T>::Wide, int> lanes[V];
      odd = see_taps<RELU, V, K>(job, s, lanes);
      tied = write<RELU, V>(job, s.at, lanes);
    }
    if (__any_sync(kWhole, tied)) note_ties<RELU, NHWC, V>(job, item.index(), tied);
    if (__any_sync(kWhole, odd)) note_odd<RELU, NHWC, V>(job, item.index(), odd);
  }
}

// Planes whose lines are whole packs, 2 x 2 windows that cover them: V columns of two lines give V / 2 outputs.
template <bool RELU, int V, class T, class I>
__global__ __launch_bounds__(kThreads,
                             sizeof(I) == 4 ? 4 : 2) void pool_square(const __grid_constant__ Job<T, I, uint8_t> job) {
  using E = Element<T>;
  using W = typename E::Wide;
  constexpr int H = V / 2;
  const I width = job.window.width.size;
  for (Items<I> item(job.batch * job.channels * job.window.outputs() / H); item.more(); item.next()) {
    unsigned tied = 0, odd = 0;
    if (item.active()) {
      const Spot<T, I> s = spot<false, 1>(job, item.index() * H);
      const T* corner = s.image + 2 * s.oh * width + 2 * s.ow;
      const Pack<T, V> top = load<V>(corner), bottom = load<V>(corner + width);
      Best<W, int> lanes[H];
#pragma unroll
      for (int v = 0; v < H; ++v) {
        const W values[4] = {E::widen(top.v[2 * v]), E::widen(top.v[2 * v + 1]), E::widen(bottom.v[2 * v]),
                             E::widen(bottom.v[2 * v + 1])};
        lanes[v] = {Value<W>::lowest, Value<W>::lowest_value, 0, 0};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          lanes[v].see(seen<RELU>(values[k]), k);
          odd |= static_cast<unsigned>(is_notable<RELU>(values[k])) << v;
        }
      }
      tied = write<RELU, H>(job, s.at, lanes);
    }
    for (int v = 0; v < H; ++v) {
      if (__any_sync(kWhole, tied >> v & 1)) note_ties<RELU, false, 1>(job, item.index() * H + v, tied >> v & 1);
      if (__any_sync(kWhole, odd >> v & 1)) note_odd<RELU, false, 1>(job, item.index() * H + v, odd >> v & 1);
    }
  }
}

template <class T, class I, class O>
Job<T, I, O> job_of(const Pooling& p, const Lists& lists) {
  return {static_cast<const T*>(p.x.const_data_ptr()),
          static_cast<T*>(p.out.mutable_data_ptr()),
          static_cast<O*>(p.offsets.mutable_data_ptr()),
          static_cast<O*>(p.routes.mutable_data_ptr()),
          p.window.as<I>(),
          static_cast<I>(p.batch),
          static_cast<I>(p.channels),
          lists};
}

template <bool RELU, class T>
void pool_all(const Place& place, const Pooling& p, const Lists& lists) {
  constexpr int V = kPack<T>;
  const Window& window = p.window;
  const Tensor &x = p.x, &offsets = p.offsets;
  const int64_t channels = p.channels, outputs = p.batch * channels * window.outputs();
  const bool channels_last = p.channels_last;
  const auto run = [&](auto kernel, auto index, auto offset, int64_t width) {
    using I = decltype(index);
    using O = decltype(offset);
    place.launch(kernel, outputs / width, job_of<T, I, O>(p, lists));
  };
  const int32_t narrow = 0;
  const int64_t wide = 0;
  const uint8_t byte = 0;
  const void* data = x.const_data_ptr();
  const int64_t side = window.height.kernel == window.width.kernel ? window.width.kernel : 0;
  const bool square = window.is_square() && window.height.size == 2 * window.height.count &&
                      window.width.size == 2 * window.width.count && packs(data, window.width.size, sizeof(T));
  if (offsets.scalar_type() != ScalarType::Byte)
    channels_last ? run(&pool_any<RELU, true, 1, 0, T, int64_t, int32_t>, wide, narrow, 1)
                  : run(&pool_any<RELU, false, 1, 0, T, int64_t, int32_t>, wide, narrow, 1);
  else if (!fits_int(x.numel()) || !fits_int(outputs) || !fits_int(window))
    channels_last ? run(&pool_any<RELU, true, 1, 0, T, int64_t, uint8_t>, wide, byte, 1)
                  : run(&pool_any<RELU, false, 1, 0, T, int64_t, uint8_t>, wide, byte, 1);
  else if (channels_last && !packs(data, channels, sizeof(T)))
    run(&pool_any<RELU, true, 1, 0, T, int32_t, uint8_t>, narrow, byte, 1);
  else if (channels_last)
    run(side == 2   ? &pool_any<RELU, true, V, 2, T, int32_t, uint8_t>
        : side == 3 ? &pool_any<RELU, true, V, 3, T, int32_t, uint8_t>
                    : &pool_any<RELU, true, V, 0, T, int32_t, uint8_t>,
        narrow, byte, V);
  else if (square)
    run(&pool_square<RELU, V, T, int32_t>, narrow, byte, V / 2);
  else
    run(side == 2   ? &pool_any<RELU, false, 1, 2, T, int32_t, uint8_t>
        : side == 3 ? &pool_any<RELU, false, 1, 3, T, int32_t, uint8_t>
                    : &pool_any<RELU, false, 1, 0, T, int32_t, uint8_t>,
        narrow, byte, 1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> max_pool2d(
    const Tensor& x, std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, bool ceil_mode, bool relu, int64_t capacity) {
  check_capacity("max_pool2d", capacity);
  const Pooling p = make_pooling(x, kernel, stride, padding, dilation, ceil_mode, relu);
  const Place place(x);
  const Record record(place, x, capacity, p.window.words(), relu);
  by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (relu)
      pool_all<true, T>(place, p, record.lists());
    else
      pool_all<false, T>(place, p, record.lists());
  });
  return {p.out, p.offsets, record.windows, record.members, record.touches, record.counts, p.routes};
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(ADCERT_LIBRARY, ADCERT_CUDA, m) { m.impl("max_pool2d", TORCH_BOX(&adcert::max_pool2d)); }
