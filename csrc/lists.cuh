// The lists a recording kernel writes: a warp at a time, into a buffer with a fixed room, in no order.
//
// Nothing is lost without a trace: the counters go on where a list is full, and whoever reads it compares.
#pragma once

#include "launch.cuh"

namespace adcert {

using Counter = unsigned long long;

// counts: [3] tied windows, touches, values that are not finite.
struct Lists {
  int64_t *windows, *members, *touches;
  int64_t room, words;  // entries of each list; int64 of a set of members
  Counter* counts;
};

constexpr int kWindows = 0, kTouches = 1, kNonfinite = 2;

// The first of `mine` places that a lane may fill; every lane of the warp takes part. C holds the sum of a warp.
template <class C>
__device__ int64_t reserve(Counter* counter, C mine) {
  const unsigned lane = threadIdx.x % kWarp;
  C sum = mine;  // of this lane and those before it
  for (unsigned d = 1; d < kWarp; d *= 2) {
    const C before = __shfl_up_sync(kWhole, sum, d);
    if (lane >= d) sum += before;
  }
  Counter base = 0;
  if (lane == kWarp - 1) base = atomicAdd(counter, static_cast<Counter>(sum));
  base = __shfl_sync(kWhole, base, kWarp - 1);
  return static_cast<int64_t>(base + sum - mine);
}

// Adds up `mine` of every lane of the warp.
template <class C>
__device__ void tally(Counter* counter, C mine) {
  for (unsigned d = kWarp / 2; d > 0; d /= 2) mine += __shfl_xor_sync(kWhole, mine, d);
  if (threadIdx.x % kWarp == 0 && mine) atomicAdd(counter, static_cast<Counter>(mine));
}

// Room for the lists of a recording operator on x's device.
struct Record {
  Tensor windows, members, touches, counts;

  Record(const Place& place, const Tensor& x, int64_t capacity, int64_t words, bool touching)
      : windows(longs(x, {words ? capacity : 0})),
        members(longs(x, {words ? capacity : 0, words ? words : 1})),
        touches(longs(x, {touching ? capacity : 0})),
        counts(longs(x, {3})),
        room_(capacity),
        words_(words) {
    place.zero(counts.mutable_data_ptr(), 3 * static_cast<int64_t>(sizeof(Counter)));
  }

  Lists lists() const {
    return {data(windows), data(members), data(touches), room_, words_, reinterpret_cast<Counter*>(data(counts))};
  }

 private:
  static Tensor longs(const Tensor& x, const std::vector<int64_t>& shape) {
    return torch::stable::new_empty(x, shape, ScalarType::Long);
  }
  static int64_t* data(const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); }

  int64_t room_, words_;
};

inline void check_capacity(const char* op, int64_t capacity) {
  STD_TORCH_CHECK(capacity >= 0, op, ": on this device the lists need a capacity, 0 or more (adcert.ops.", op,
                  " chooses one)");
}

}  // namespace adcert
