// Small open-addressing tables from pairs of places to answers: one a thread, nothing shared, nothing erased.
#pragma once

#include <cstdint>
#include <vector>

#include "values.h"

namespace adcert {

// A key is two numbers >= 0; the value of a new key is `fresh`.
template <class V>
class Memo {
 public:
  explicit Memo(V fresh) : fresh_(fresh), slots_(64, Slot{-1, -1, fresh}) {}

  // The value of a key, to read or to set; valid until the next call.
  V& at(int64_t first, int64_t second) {
    if (2 * (count_ + 1) > slots_.size()) grow();
    Slot& slot = find(slots_, first, second);
    if (slot.first < 0) {
      slot = {first, second, fresh_};
      ++count_;
    }
    return slot.value;
  }

 private:
  struct Slot {
    int64_t first, second;
    V value;
  };

  static Slot& find(std::vector<Slot>& slots, int64_t first, int64_t second) {
    const uint64_t mask = slots.size() - 1;
    uint64_t i = mix(static_cast<uint64_t>(first) * 0xff51afd7ed558ccdull + static_cast<uint64_t>(second)) & mask;
    while (slots[i].first >= 0 && (slots[i].first != first || slots[i].second != second)) i = (i + 1) & mask;
    return slots[i];
  }

  void grow() {
    std::vector<Slot> wider(2 * slots_.size(), Slot{-1, -1, fresh_});
    for (const Slot& slot : slots_)
      if (slot.first >= 0) find(wider, slot.first, slot.second) = slot;
    slots_.swap(wider);
  }

  V fresh_;
  size_t count_ = 0;
  std::vector<Slot> slots_;
};

}  // namespace adcert
