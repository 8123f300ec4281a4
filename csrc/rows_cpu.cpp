// Rows of a layer in bulk: patches of a convolution's input, equal rows, opposite rows.
//
// opposite_rows only proposes: float64 differences may round, and hashes are compared before rows are. Whoever asks
// checks the pair exactly.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <bit>
#include <cstring>
#include <vector>

#include "collect.h"
#include "memo.h"
#include "rows.h"

namespace adcert {
namespace {

template <class U>
void copy_patch(const Stage& s, const std::vector<int64_t>& reach, int64_t plane, int64_t place, U* out) {
  const Map& x = s.values;
  const Patches& patches = s.patches;
  if (patches.inside(place)) {
    const int64_t corner = plane + patches.corner(place, x);
    for (size_t i = 0; i < reach.size(); ++i) out[i] = x.raw<U>(corner + reach[i]);
    return;
  }
  const int64_t taps = patches.taps();
  for (int64_t k = 0; k < taps; ++k) {
    const int64_t at = patches.input(place, k);
    const int64_t from = at == kOff ? 0 : plane + at / x.width * x.h + at % x.width * x.w;
    for (int64_t c = 0; c < patches.channels; ++c) out[c * taps + k] = at == kOff ? U{0} : x.raw<U>(from + c * x.c);
  }
}

template <class U>
void copy_patches(const Stage& s, const int64_t* units, int64_t count, U* out) {
  const Patches& patches = s.patches;
  const int64_t channels_out = s.channels_out;
  const int64_t places = patches.window.outputs(), size = patches.size();
  const std::vector<int64_t> reach = reach_of(s);
  torch::stable::parallel_for(0, count, grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      U* row = out + i * size;
      if (units[i] < 0) {
        std::memset(row, 0, static_cast<size_t>(size) * sizeof(U));
        continue;
      }
      const int64_t plane = units[i] / places;
      copy_patch(s, reach, s.plane(plane / channels_out, s.group(plane % channels_out)), units[i] % places, row);
    }
  });
}

Tensor conv_patches(const Tensor& x, const Tensor& units, std::vector<int64_t> stage) {
  const Stage s = read_convolution(x, units, std::move(stage));
  check_units(x, s, units);
  const int64_t count = units.size(0);
  const auto* index = static_cast<const int64_t*>(units.const_data_ptr());
  Tensor out = empty(x, {count, s.patches.size()}, x.scalar_type(), false);
  switch (x.element_size()) {
    case 2:
      copy_patches(s, index, count, static_cast<uint16_t*>(out.mutable_data_ptr()));
      break;
    case 4:
      copy_patches(s, index, count, static_cast<uint32_t*>(out.mutable_data_ptr()));
      break;
    default:
      copy_patches(s, index, count, static_cast<uint64_t*>(out.mutable_data_ptr()));
  }
  return out;
}

uint64_t hash_bytes(const char* bytes, int64_t size) {
  uint64_t h = static_cast<uint64_t>(size);
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    h = mix(h ^ word);
  }
  for (; i < size; ++i) h = mix(h ^ static_cast<uint8_t>(bytes[i]));
  return h;
}

// Ascending indices of the first of each set of rows that are equal byte by byte.
Tensor distinct_rows(const Tensor& rows) {
  check_matrix(rows, "distinct_rows");
  const int64_t count = rows.size(0), size = rows.size(1) * static_cast<int64_t>(rows.element_size());
  const auto* data = static_cast<const char*>(rows.const_data_ptr());
  Memo<int64_t> last(-1);  // row with this hash, the latest of several
  std::vector<int64_t> first, earlier;
  for (int64_t i = 0; i < count; ++i) {
    const char* row = data + i * size;
    const uint64_t h = hash_bytes(row, size);
    int64_t& latest = last.at(static_cast<int64_t>(h >> 1), static_cast<int64_t>(h & 1));
    int64_t k = latest;
    while (k >= 0 && size > 0 && std::memcmp(row, data + first[k] * size, static_cast<size_t>(size)) != 0)
      k = earlier[k];
    if (k >= 0) continue;
    earlier.push_back(latest);
    latest = static_cast<int64_t>(first.size());
    first.push_back(i);
  }
  return to_tensor(first, rows);
}

// The first row that is the opposite of an earlier one of its group: [earlier, row], or [] if there is none.
template <class T>
std::vector<int64_t> find_opposite(const T* plus, const T* minus, const int64_t* group, int64_t count, int64_t width) {
  Memo<std::array<int64_t, 2>> seen{{-1, -1}};  // of a line: its first row, and the first of the other sense
  const auto entry = [&](int64_t i, int64_t k) {
    return to_double(plus[i * width + k]) - to_double(minus[i * width + k]) + 0.0;
  };
  for (int64_t i = 0; i < count; ++i) {
    uint64_t h = mix(static_cast<uint64_t>(group[i]) + 1);
    double sense = 0;
    for (int64_t k = 0; k < width; ++k) {
      const double v = entry(i, k);
      if (v == 0) continue;
      if (sense == 0) sense = v > 0 ? 1 : -1;
      h = mix(mix(h + static_cast<uint64_t>(k)) ^ std::bit_cast<uint64_t>(sense * v));
    }
    auto& line = seen.at(static_cast<int64_t>(h >> 1), static_cast<int64_t>(h & 1));
    const int64_t own = sense < 0, earlier = line[static_cast<size_t>(1 - own)];
    bool opposite = earlier >= 0 && sense != 0 && group[earlier] == group[i];
    for (int64_t k = 0; opposite && k < width; ++k) opposite = entry(i, k) == -entry(earlier, k);
    if (opposite) return {earlier, i};
    if (line[static_cast<size_t>(own)] < 0) line[static_cast<size_t>(own)] = i;
  }
  return {};
}

Tensor opposite_rows(const Tensor& plus, const Tensor& minus, const Tensor& group) {
  check_pair(plus, minus, group);
  const auto* groups = static_cast<const int64_t*>(group.const_data_ptr());
  const int64_t count = plus.size(0), width = plus.size(1);
  return to_tensor(by_dtype(plus.scalar_type(),
                            [&](auto zero) {
                              using T = decltype(zero);
                              return find_opposite(static_cast<const T*>(plus.const_data_ptr()),
                                                   static_cast<const T*>(minus.const_data_ptr()), groups, count, width);
                            }),
                   group);
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(adcert, CPU, m) {
  m.impl("conv_patches", TORCH_BOX(&adcert::conv_patches));
  m.impl("distinct_rows", TORCH_BOX(&adcert::distinct_rows));
  m.impl("opposite_rows", TORCH_BOX(&adcert::opposite_rows));
}
