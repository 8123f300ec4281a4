// Rows of a layer in bulk: patches of a convolution's input, equal rows, opposite rows. A warp for each row.
//
// Equal and opposite rows meet in a table of row numbers; rows are compared, never their hashes alone. What a slot
// holds only ever becomes an equal row with a smaller number, so the result does not depend on who comes first.

#include <torch/csrc/stable/library.h>

#include <bit>

#include "launch.cuh"
#include "rows.h"

namespace adcert {
namespace {

using Slot = unsigned long long;
constexpr Slot kFree = ~Slot{0};

// The rows of warps: for (Rows row(count); row.more(); row.next()), in step for the lanes of a warp.
class Rows {
 public:
  __device__ explicit Rows(int64_t count)
      : at_((blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarp), count_(count) {}
  __device__ bool more() const { return at_ < count_; }
  __device__ void next() { at_ += gridDim.x * static_cast<int64_t>(kThreads / kWarp); }
  __device__ int64_t index() const { return at_; }

 private:
  int64_t at_, count_;
};

__device__ unsigned lane() { return threadIdx.x % kWarp; }

// Sum over the lanes of a warp, known to all of them.
__device__ uint64_t warp_sum(uint64_t v) {
  for (unsigned d = kWarp / 2; d > 0; d /= 2) v += __shfl_xor_sync(kWhole, static_cast<Slot>(v), d);
  return v;
}

// The slot of a row's class, -1 where every slot is another's (never in a table twice as large as there are rows).
// equal(other): is row `other` of the class? Every lane takes part.
template <class F>
__device__ int64_t settle(Slot* slots, uint64_t mask, uint64_t hash, int64_t row, const F& equal) {
  uint64_t at = hash & mask;
  for (uint64_t i = 0; i <= mask; ++i, at = (at + 1) & mask) {
    Slot held = 0;
    if (lane() == 0) held = atomicCAS(slots + at, kFree, static_cast<Slot>(row));
    held = __shfl_sync(kWhole, held, 0);
    if (held == kFree) return static_cast<int64_t>(at);
    if (!equal(static_cast<int64_t>(held))) continue;
    if (lane() == 0) atomicMin(slots + at, static_cast<Slot>(row));
    return static_cast<int64_t>(at);
  }
  return -1;
}

// conv_patches -----------------------------------------------------------------------------------------------------

template <class U>
__global__ __launch_bounds__(kThreads, 2) void copy_patches(const __grid_constant__ Stage s, const int64_t* units,
                                                            int64_t count, U* out) {
  const int64_t taps = s.patches.taps(), size = s.patches.size(), places = s.patches.window.outputs();
  for (Rows row(count); row.more(); row.next()) {
    const int64_t unit = units[row.index()], plane = unit / places;
    for (int64_t e = lane(); e < size; e += kWarp) {
      U value{};
      if (unit >= 0)
        value = s.element<U>(s.plane(plane / s.channels_out, s.group(plane % s.channels_out)), unit % places, e / taps,
                             e % taps);
      out[row.index() * size + e] = value;
    }
  }
}

Tensor conv_patches(const Tensor& x, const Tensor& units, std::vector<int64_t> stage) {
  const Stage s = read_convolution(x, units, std::move(stage));
  check_units(x, s, on_cpu(units));
  const int64_t count = units.size(0);
  const Tensor out = empty(x, {count, s.patches.size()}, x.scalar_type(), false);
  const Tensor index = sent(units, x.device());
  const auto* from = static_cast<const int64_t*>(index.const_data_ptr());
  const Place place(x);
  const auto run = [&](auto zero) {
    using U = decltype(zero);
    place.launch(&copy_patches<U>, count * kWarp, s, from, count, static_cast<U*>(out.mutable_data_ptr()));
  };
  switch (x.element_size()) {
    case 2:
      run(uint16_t{});
      break;
    case 4:
      run(uint32_t{});
      break;
    default:
      run(uint64_t{});
  }
  return out;
}

// distinct_rows ----------------------------------------------------------------------------------------------------

// U: the largest word a row is a whole number of, and whose alignment the first one has.
template <class U>
__global__ __launch_bounds__(kThreads, 2) void mark_first(const U* rows, int64_t count, int64_t width, Slot* slots,
                                                          uint64_t mask) {
  for (Rows row(count); row.more(); row.next()) {
    const U* mine = rows + row.index() * width;
    uint64_t sum = 0;
    for (int64_t i = lane(); i < width; i += kWarp) sum += mix(static_cast<uint64_t>(mine[i]) ^ mix(i + 1));
    const uint64_t hash = mix(warp_sum(sum));
    settle(slots, mask, hash, row.index(), [&](int64_t other) {
      const U* theirs = rows + other * width;
      for (int64_t base = 0; base < width; base += kWarp) {
        const int64_t i = base + lane();
        if (__any_sync(kWhole, i < width && mine[i] != theirs[i])) return false;
      }
      return true;
    });
  }
}

int64_t slots_for(int64_t rows) { return static_cast<int64_t>(std::bit_ceil(2 * static_cast<uint64_t>(rows) + 2)); }

Tensor free_slots(const Place& place, const Tensor& like, int64_t count) {
  const Tensor slots = torch::stable::new_empty(like, {count}, ScalarType::Long);
  place.fill(slots.mutable_data_ptr(), 0xff, count * static_cast<int64_t>(sizeof(Slot)));
  return slots;
}

Tensor distinct_rows(const Tensor& rows) {
  check_matrix(rows, "distinct_rows");
  const int64_t count = rows.size(0), bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
  const Place place(rows);
  const int64_t size = slots_for(count);
  const Tensor slots = free_slots(place, rows, size);
  auto* table = static_cast<Slot*>(slots.mutable_data_ptr());
  const auto run = [&](auto zero) {
    using U = decltype(zero);
    const auto* data = static_cast<const U*>(rows.const_data_ptr());
    place.launch(&mark_first<U>, count * kWarp, data, count, bytes / static_cast<int64_t>(sizeof(U)), table,
                 static_cast<uint64_t>(size - 1));
  };
  const uint64_t start = reinterpret_cast<uintptr_t>(rows.const_data_ptr()),
                 aligned = start | static_cast<uint64_t>(bytes);
  if (aligned % 8 == 0)
    run(uint64_t{});
  else if (aligned % 4 == 0)
    run(uint32_t{});
  else if (aligned % 2 == 0)
    run(uint16_t{});
  else
    run(uint8_t{});
  const Tensor held = on_cpu(slots);
  std::vector<int64_t> first;
  const auto* begin = static_cast<const int64_t*>(held.const_data_ptr());
  std::copy_if(begin, begin + size, std::back_inserter(first), [](int64_t row) { return row >= 0; });
  std::sort(first.begin(), first.end());
  return torch::stable::to(long_list(first), rows.device());
}

// opposite_rows ----------------------------------------------------------------------------------------------------

template <class T>
struct Lines {
  const T *plus, *minus;
  const int64_t* group;
  int64_t count, width;

  __device__ double entry(int64_t i, int64_t k) const {
    return to_double(plus[i * width + k]) - to_double(minus[i * width + k]) + 0.0;
  }
};

// Of the line a row spans, in either sense: the first row of each sense. slots: any row of the line; first: [2, slots].
template <class T>
__global__ __launch_bounds__(kThreads, 2) void sort_lines(Lines<T> lines, Slot* slots, uint64_t mask, Slot* first) {
  for (Rows row(lines.count); row.more(); row.next()) {
    const int64_t i = row.index();
    int64_t leading = lines.width;  // the first entry that is not 0 gives the sense
    for (int64_t k = lane(); k < lines.width && leading == lines.width; k += kWarp)
      if (lines.entry(i, k) != 0) leading = k;
    for (unsigned d = kWarp / 2; d > 0; d /= 2) {
      const int64_t theirs = __shfl_xor_sync(kWhole, leading, d);
      leading = theirs < leading ? theirs : leading;
    }
    if (leading == lines.width) continue;
    const double sense = lines.entry(i, leading) > 0 ? 1 : -1;
    uint64_t sum = 0;
    for (int64_t k = lane(); k < lines.width; k += kWarp) {
      const double v = sense * lines.entry(i, k);
      if (v != 0) sum += mix(std::bit_cast<uint64_t>(v) ^ mix(k + 1));
    }
    const uint64_t hash = mix(warp_sum(sum) + mix(static_cast<uint64_t>(lines.group[i]) + 1));
    const int64_t at = settle(slots, mask, hash, i, [&](int64_t other) {
      if (lines.group[other] != lines.group[i]) return false;
      const double same = lines.entry(other, leading) == lines.entry(i, leading) ? 1 : -1;
      for (int64_t base = 0; base < lines.width; base += kWarp) {
        const int64_t k = base + lane();
        if (__any_sync(kWhole, k < lines.width && lines.entry(i, k) != same * lines.entry(other, k))) return false;
      }
      return true;
    });
    if (lane() == 0 && at >= 0) atomicMin(first + at + (sense < 0 ? mask + 1 : 0), static_cast<Slot>(i));
  }
}

template <class T>
std::vector<int64_t> find_opposite(const Tensor& plus, const Tensor& minus, const Tensor& group) {
  const Place place(plus);
  const int64_t count = plus.size(0), size = slots_for(count);
  const Tensor slots = free_slots(place, plus, 3 * size);
  auto* table = static_cast<Slot*>(slots.mutable_data_ptr());
  const Lines<T> lines{static_cast<const T*>(plus.const_data_ptr()), static_cast<const T*>(minus.const_data_ptr()),
                       static_cast<const int64_t*>(group.const_data_ptr()), count, plus.size(1)};
  place.launch(&sort_lines<T>, count * kWarp, lines, table, static_cast<uint64_t>(size - 1), table + size);
  const Tensor found = on_cpu(slots);
  const auto *up = static_cast<const int64_t*>(found.const_data_ptr()) + size, *down = up + size;
  std::vector<int64_t> best;
  for (int64_t k = 0; k < size; ++k) {
    if (up[k] < 0 || down[k] < 0) continue;  // free
    const int64_t later = std::max(up[k], down[k]);
    if (best.empty() || later < best[1]) best = {std::min(up[k], down[k]), later};
  }
  return best;
}

Tensor opposite_rows(const Tensor& plus, const Tensor& minus, const Tensor& group) {
  check_pair(plus, minus, group);
  const std::vector<int64_t> found =
      by_dtype(plus.scalar_type(), [&](auto zero) { return find_opposite<decltype(zero)>(plus, minus, group); });
  return torch::stable::to(long_list(found), group.device());
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(ADCERT_LIBRARY, ADCERT_CUDA, m) {
  m.impl("conv_patches", TORCH_BOX(&adcert::conv_patches));
  m.impl("distinct_rows", TORCH_BOX(&adcert::distinct_rows));
  m.impl("opposite_rows", TORCH_BOX(&adcert::opposite_rows));
}
