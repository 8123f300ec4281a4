// Fingerprints of many tensors in few launches: a block takes a piece of one tensor at a time.

#include <torch/csrc/stable/library.h>

#include "fingerprint.h"
#include "launch.cuh"

namespace adcert {
namespace {

constexpr int kBatch = 96;             // tensors of a launch: its arguments have to fit into 4 KiB
constexpr int64_t kPiece = 16 * 1024;  // words of a tensor that a block takes at once
static_assert(kThreads % kLanes == 0 && kPiece % kThreads == 0);

// Tensors of one dtype. row: of the result; first: number of the first piece of each tensor, and of all in the end.
struct Many {
  int count = 0;
  const void* data[kBatch];
  int64_t values[kBatch];
  int row[kBatch];
  int64_t first[kBatch + 1];
};
static_assert(sizeof(Many) <= 4000);

template <class T>
__device__ uint32_t word_at(const T* data, int64_t values, int64_t k) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t low = 2 * k < values ? bits(data[2 * k]) : 0u;
    const uint32_t high = 2 * k + 1 < values ? bits(data[2 * k + 1]) : 0u;
    return low | high << 16;
  } else if constexpr (sizeof(T) == 8) {
    const auto whole = k / 2 < values ? std::bit_cast<uint64_t>(data[k / 2]) : uint64_t{0};
    return static_cast<uint32_t>(k % 2 ? whole >> 32 : whole);
  } else {
    return k < values ? std::bit_cast<uint32_t>(data[k]) : 0u;
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void add_pieces(Many many, uint32_t* numbers) {
  int which = 0;
  for (int64_t piece = blockIdx.x; piece < many.first[many.count]; piece += gridDim.x) {
    while (many.first[which + 1] <= piece) ++which;
    const auto* data = static_cast<const T*>(many.data[which]);
    const int64_t values = many.values[which], words = words_of<T>(values);
    const int64_t begin = (piece - many.first[which]) * kPiece;
    const int64_t end = begin + kPiece < words ? begin + kPiece : words;
    uint32_t sum = 0, odd = 0;
    for (int64_t k = begin + threadIdx.x; k < end; k += kThreads) {
      const uint32_t word = word_at(data, values, k);
      sum += scatter(word, static_cast<uint32_t>(k));
      odd |= is_odd_word<T>(word, k % 2 != 0);
    }
    uint32_t* own = numbers + static_cast<int64_t>(many.row[which]) * kNumbers;
    atomicAdd(own + 1 + threadIdx.x % kLanes, sum);
    if (odd) atomicOr(own, 1u);
  }
}

template <class T>
void add_all(const Place& place, const std::vector<Tensor>& tensors, ScalarType dtype, uint32_t* numbers) {
  Many many;
  many.first[0] = 0;
  const auto launch = [&] {
    if (many.count) place.launch(&add_pieces<T>, many.first[many.count] * kThreads, many, numbers);
    many.count = 0;
  };
  for (size_t k = 0; k < tensors.size(); ++k) {
    if (tensors[k].scalar_type() != dtype) continue;
    if (many.count == kBatch) launch();
    const int64_t values = tensors[k].numel(), pieces = (words_of<T>(values) + kPiece - 1) / kPiece;
    many.data[many.count] = tensors[k].const_data_ptr();
    many.values[many.count] = values;
    many.row[many.count] = static_cast<int>(k);
    many.first[many.count + 1] = many.first[many.count] + pieces;
    ++many.count;
  }
  launch();
}

Tensor fingerprints(const std::vector<Tensor>& tensors) {
  const std::vector<Tensor> held = checked_fingerprints(tensors);
  const auto count = static_cast<int64_t>(held.size());
  const Tensor out = torch::stable::new_empty(held[0], {count, kNumbers}, ScalarType::Int);
  const Place place(out);
  auto* numbers = static_cast<uint32_t*>(out.mutable_data_ptr());
  place.zero(numbers, count * kNumbers * static_cast<int64_t>(sizeof(uint32_t)));
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half})
    by_dtype(dtype, [&](auto zero) { add_all<decltype(zero)>(place, held, dtype, numbers); });
  return out;
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(ADCERT_LIBRARY, ADCERT_CUDA, m) { m.impl("fingerprints", TORCH_BOX(&adcert::fingerprints)); }
