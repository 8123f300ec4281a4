// What the resolver of ties reads and checks, on every device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "stages.h"

namespace adcert {

// Places of the first convolution's output as flat indices; a unit that is off is -1.
struct Flat {
  int64_t channels, outputs;
  ADCERT_HD int64_t operator()(int64_t n, int64_t c, int64_t p) const {
    return p == kOff ? kOff : (n * channels + c) * outputs + p;
  }
};

inline void check_ties(const Tensor& windows, const Tensor& members, const Tensor& offsets, const Window& pool) {
  STD_TORCH_CHECK(windows.dim() == 1 && windows.scalar_type() == ScalarType::Long && windows.is_contiguous(),
                  "resolve_ties: windows must be contiguous int64 [T]");
  STD_TORCH_CHECK(members.dim() == 2 && members.scalar_type() == ScalarType::Long && members.is_contiguous() &&
                      members.size(0) == windows.size(0) && members.size(1) == pool.words(),
                  "resolve_ties: members must be contiguous int64 [T, ", pool.words(), "]");
  STD_TORCH_CHECK(offsets.dim() == 4 && offsets.size(2) == pool.height.count && offsets.size(3) == pool.width.count &&
                      (offsets.scalar_type() == ScalarType::Byte || offsets.scalar_type() == ScalarType::Int),
                  "resolve_ties: offsets must be uint8 or int32 [N, C, ", pool.height.count, ", ", pool.width.count,
                  "]");
}

// Each stage's output is what the one before reads, so that no position leaves a tensor.
inline void check_stages(const std::vector<Stage>& stages, const Window& pool, int64_t channels) {
  int64_t height = pool.height.size, width = pool.width.size;
  bool fresh = false;  // right above a convolution, whose input no parameter of its layer may reach
  for (const Stage& s : stages) {
    if (s.kind == Kind::kConstant || s.kind == Kind::kUnknown) return;
    const Window& w = s.patches.window;
    const bool record = s.kind == Kind::kRelu || s.kind == Kind::kPool;
    STD_TORCH_CHECK(w.height.count == height && w.width.count == width && s.channels_out == channels &&
                        (record || !fresh) && (s.kind == Kind::kConv || w.cells() == w.outputs() || record),
                    "resolve_ties: the stages do not fit together");
    STD_TORCH_CHECK(s.kind == Kind::kConv || s.patches.channels * s.patches.groups == channels,
                    "resolve_ties: only a convolution changes the number of channels");
    height = w.height.size, width = w.width.size, channels = s.patches.channels * s.patches.groups;
    fresh = s.kind == Kind::kConv;
  }
}

// The arguments of resolve_ties, read and checked; windows and members lie on the CPU.
struct Question {
  Window pool;
  std::vector<Stage> stages;
  Flat flat;
  const int64_t *windows, *members;
  int64_t count;
};

inline Question read_question(const Tensor& windows, const Tensor& members, const Tensor& offsets,
                              const std::vector<int64_t>& pool, const std::vector<int64_t>& stages,
                              const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(pool.size() == 12 && stages.size() % kStageInts == 0, "resolve_ties: expected 12 integers for the ",
                  "pooling and ", kStageInts, " for each stage, got ", pool.size(), " and ", stages.size());
  Question asked;
  asked.pool = Window{read_axis(pool.data()), read_axis(pool.data() + 6)};
  check_ties(windows, members, offsets, asked.pool);
  for (size_t i = 0; i < stages.size(); i += kStageInts) asked.stages.push_back(read_stage(stages.data() + i, tensors));
  check_stages(asked.stages, asked.pool, offsets.size(1));
  asked.flat = {offsets.size(1), asked.pool.cells()};
  for (const Stage& s : asked.stages) {  // poolings right above: places are those of the first other stage's output
    if (s.kind == Kind::kPool) asked.flat.outputs = s.patches.window.cells();
    if (s.kind != Kind::kPool && s.kind != Kind::kRelu) break;
  }
  for (const Tensor& t : tensors)
    STD_TORCH_CHECK(t.size(0) == offsets.size(0) && t.get_device_index() == offsets.get_device_index(),
                    "resolve_ties: tensors of different batch sizes or devices");
  asked.count = windows.size(0);
  asked.windows = static_cast<const int64_t*>(windows.const_data_ptr());
  asked.members = static_cast<const int64_t*>(members.const_data_ptr());
  const int64_t units = offsets.size(0) * offsets.size(1) * asked.pool.outputs();
  for (int64_t i = 0; i < asked.count; ++i)
    STD_TORCH_CHECK(asked.windows[i] >= 0 && asked.windows[i] < units, "resolve_ties: window ", asked.windows[i],
                    " lies outside the pooling's ", units, " outputs");
  return asked;
}

}  // namespace adcert
