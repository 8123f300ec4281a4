// Windows of any shape over the last one to three dimensions, given by tables; shared by every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "checks.h"
#include "values.h"

namespace adcert {

// An axis: `outputs` windows of `cells` places each, for all planes or, `step` entries apart, for each of its own. A
// place outside of 0 .. size - 1 is none.
struct TableAxis {
  const int64_t* places;
  int64_t size, outputs, step;
  int cells;
};

// The last axis is the fastest; axes that are not there come first and have one output and one cell, place 0.
struct Windows {
  TableAxis axis[3];
  int64_t planes;

  ADCERT_HD int64_t outputs() const { return axis[0].outputs * axis[1].outputs * axis[2].outputs; }
  ADCERT_HD int64_t cells() const { return int64_t{1} * axis[0].cells * axis[1].cells * axis[2].cells; }
  ADCERT_HD int64_t size() const { return axis[0].size * axis[1].size * axis[2].size; }
};

// One window: where its rows of the tables begin, and the first input of its plane.
struct Cells {
  const int64_t* row[3];
  int64_t first;
};

// The window of an output, counted from the first of a plane. I: holds that number.
template <class I>
ADCERT_HD Cells cells_of(const Windows& w, int64_t plane, I output) {
  int64_t at[3];
  for (int k = 2; k >= 0; --k) {
    const I outputs = static_cast<I>(w.axis[k].outputs), next = output / outputs;
    at[k] = static_cast<int64_t>(output - next * outputs);
    output = next;
  }
  plane += static_cast<int64_t>(output);
  Cells cells;
  for (int k = 0; k < 3; ++k) cells.row[k] = w.axis[k].places + plane * w.axis[k].step + at[k] * w.axis[k].cells;
  cells.first = plane * w.size();
  return cells;
}

// f(flat input) for every cell of a window, in row-major order.
template <class F>
ADCERT_HD void for_cells(const Windows& w, const Cells& cells, const F& f) {
  for (int i = 0; i < w.axis[0].cells; ++i) {
    const int64_t a = cells.row[0][i];
    if (a < 0 || a >= w.axis[0].size) continue;
    for (int j = 0; j < w.axis[1].cells; ++j) {
      const int64_t b = cells.row[1][j];
      if (b < 0 || b >= w.axis[1].size) continue;
      for (int k = 0; k < w.axis[2].cells; ++k) {
        const int64_t c = cells.row[2][k];
        if (c >= 0 && c < w.axis[2].size) f(cells.first + (a * w.axis[1].size + b) * w.axis[2].size + c);
      }
    }
  }
}

// x, output and tables are contiguous; one: a table that holds a 0, on x's device.
inline Windows checked_windows(const Tensor& x, const Tensor& output, const std::vector<Tensor>& tables,
                               const Tensor& one) {
  const auto axes = static_cast<int64_t>(tables.size());
  STD_TORCH_CHECK(axes >= 1 && axes <= 3, "window_ties: expected tables of one to three axes, got ", axes);
  STD_TORCH_CHECK(x.dim() >= axes && output.dim() == x.dim() && output.scalar_type() == x.scalar_type(),
                  "window_ties: expected an input and an output of the same dtype, with at least ", axes,
                  " dimensions");
  Windows w;
  w.planes = 1;
  const int64_t lead = x.dim() - axes;
  for (int64_t k = 0; k < lead; ++k) {
    STD_TORCH_CHECK(output.size(k) == x.size(k), "window_ties: input and output have different planes");
    w.planes *= x.size(k);
  }
  const auto places = [](const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); };
  for (int64_t k = 0; k < 3 - axes; ++k) w.axis[k] = {places(one), 1, 1, 0, 1};
  for (int64_t k = 0; k < axes; ++k) {
    const Tensor& table = tables[static_cast<size_t>(k)];
    const int64_t d = table.dim(), outputs = output.size(lead + k);
    STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && (d == 2 || d == 3) && table.size(d - 2) == outputs &&
                        (d == 2 || table.size(0) == w.planes) && table.device() == x.device(),
                    "window_ties: expected for each axis an int64 table [outputs, cells] or [planes, outputs, cells] ",
                    "on the input's device; that of axis ", k, " does not fit");
    const int64_t cells = table.size(d - 1);
    STD_TORCH_CHECK(cells < (int64_t{1} << 31), "window_ties: more than 2^31 cells along an axis");
    w.axis[3 - axes + k] = {places(table), x.size(lead + k), outputs, d == 3 ? outputs * cells : 0,
                            static_cast<int>(cells)};
  }
  return w;
}

}  // namespace adcert
