// Fingerprints of many tensors in few launches: a block takes a piece of one tensor at a time.

#include <torch/csrc/stable/library.h>

#include "fingerprint.h"
#include "launch.cuh"

namespace adcert {
namespace {

constexpr int kBatch = 96;            // tensors of a launch: its arguments have to fit into 4 KiB
constexpr int64_t kPiece = 8 * 1024;  // words of a tensor that a block takes at once
using Number = unsigned long long;    // as atomics take it
static_assert(sizeof(Number) == sizeof(int64_t));

// Tensors whose memory is read in units of one size. row: of the result; first: number of the first piece of each
// tensor, and of all in the end.
struct Many {
  int count = 0;
  const void* data[kBatch];
  int64_t bytes[kBatch];
  int row[kBatch];
  int64_t first[kBatch + 1];
};
static_assert(sizeof(Many) <= 4000);

template <class U>
__device__ uint64_t word_at(const U* data, int64_t units, int64_t k) {
  constexpr int per = static_cast<int>(sizeof(uint64_t) / sizeof(U));
  uint64_t word = 0;
#pragma unroll
  for (int u = 0; u < per; ++u)
    if (per * k + u < units) word |= static_cast<uint64_t>(data[per * k + u]) << 8 * sizeof(U) * u;
  return word;
}

template <class U>
__global__ __launch_bounds__(kThreads) void add_pieces(Many many, Number* numbers) {
  int which = 0;
  for (int64_t piece = blockIdx.x; piece < many.first[many.count]; piece += gridDim.x) {
    while (many.first[which + 1] <= piece) ++which;
    const auto* data = static_cast<const U*>(many.data[which]);
    const int64_t bytes = many.bytes[which], words = (bytes + kSpan - 1) / kSpan * kLanes;
    const int64_t begin = (piece - many.first[which]) * kPiece;
    const int64_t end = begin + kPiece < words ? begin + kPiece : words;
    Number sum = 0;
    for (int64_t k = begin + threadIdx.x; k < end; k += kThreads)
      sum += scatter(word_at(data, bytes / static_cast<int64_t>(sizeof(U)), k), static_cast<uint64_t>(k));
    for (unsigned d = kWarp / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kWhole, sum, d);
    if (threadIdx.x % kWarp == 0) atomicAdd(numbers + many.row[which], sum);
  }
}

// The widest unit that the tensor's address and size are multiples of.
int64_t unit_of(const Tensor& t) {
  const auto both = reinterpret_cast<uintptr_t>(t.const_data_ptr()) | static_cast<uintptr_t>(bytes_of(t));
  return both % 8 == 0 ? 8 : both % 4 == 0 ? 4 : both % 2 == 0 ? 2 : 1;
}

template <class U>
void add_all(const Place& place, const std::vector<Tensor>& tensors, Number* numbers) {
  Many many;
  many.first[0] = 0;
  const auto launch = [&] {
    if (many.count) place.launch(&add_pieces<U>, many.first[many.count] * kThreads, many, numbers);
    many.count = 0;
  };
  for (size_t k = 0; k < tensors.size(); ++k) {
    if (unit_of(tensors[k]) != sizeof(U)) continue;
    if (many.count == kBatch) launch();
    const int64_t bytes = bytes_of(tensors[k]), pieces = (words_of(bytes) + kPiece - 1) / kPiece;
    many.data[many.count] = tensors[k].const_data_ptr();
    many.bytes[many.count] = bytes;
    many.row[many.count] = static_cast<int>(k);
    many.first[many.count + 1] = many.first[many.count] + pieces;
    ++many.count;
  }
  launch();
}

Tensor fingerprints(const std::vector<Tensor>& tensors) {
  const std::vector<Tensor> held = dense_ones(tensors);
  const auto count = static_cast<int64_t>(held.size());
  const Tensor out = torch::stable::new_empty(held[0], {count}, ScalarType::Long);
  const Place place(out);
  auto* numbers = static_cast<Number*>(out.mutable_data_ptr());
  place.zero(numbers, count * static_cast<int64_t>(sizeof(Number)));
  add_all<uint8_t>(place, held, numbers);
  add_all<uint16_t>(place, held, numbers);
  add_all<uint32_t>(place, held, numbers);
  add_all<uint64_t>(place, held, numbers);
  return out;
}

}  // namespace
}  // namespace adcert

STABLE_TORCH_LIBRARY_IMPL(ADCERT_LIBRARY, ADCERT_CUDA, m) { m.impl("fingerprints", TORCH_BOX(&adcert::fingerprints)); }
