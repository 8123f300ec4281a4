// Every operator of adcert: the table of contents. Kernels are in <family>_cpu.cpp, meanings in adcert/ops.py.
//
//   relu                 max(x, 0); touches: flat indices with x == 0; counts: [3] of tied windows, touches, NaN and
//   inf activation           another kinked function (csrc/activation.h); touches: with K kinks, K * index + k where x
//   equals
//                        the k-th of them
//   prelu                x where it is positive, else weight * x; touches as of relu
//   touches              the same without an output, for one or two kinks
//   max_pool2d           pooling of x, or of relu(x); offsets: in-window offset of the selected member; windows:
//                        flat output indices with two or more maximisers; members: their bit sets; routes
//                        (relu only, else empty): offsets where the gradient flows, KH * KW where ReLU stops it
//   max_pool2d_backward  sends grad to the cells that routes (or offsets) name; batch of grad a multiple of theirs
//   max_pool2d_gather    its adjoint: reads those cells
//   window_ties          of a max pooling over any windows: outputs, and the inputs that attain them, where there are
//                        several; counts: [4] of tied windows, pairs, NaN and inf, outputs that no input attains
//   resolve_ties         tied members against the selected one: counts by answer, and the pairs not proved equal
//   conv_patches         patches of a convolution's input, one row for each output unit
//   distinct_rows        ascending indices of the first of equal rows
//   opposite_rows        a row that seems the opposite of an earlier one of its group
//   fingerprints         of each tensor, a sum over the scattered words of its memory
//
// capacity of a recording operator: -1, its lists are as long as what was found, ascending (on the CPU); else they have
// room for so many entries, counts tells how many were found, and what is beyond is unspecified. On CUDA the entries
// are in no order, and nothing waits for the device.
#include <torch/csrc/stable/library.h>

#include "namespace.h"

STABLE_TORCH_LIBRARY(ADCERT_LIBRARY, m) {
  m.def("relu(Tensor x, int capacity=-1) -> (Tensor output, Tensor touches, Tensor counts)");
  m.def("touches(Tensor x, float[] kinks, int capacity=-1) -> (Tensor touches, Tensor counts)");
  m.def(
      "activation(Tensor x, int kind, float[] parameters, int capacity=-1) -> (Tensor output, Tensor touches, "
      "Tensor counts)");
  m.def("prelu(Tensor x, Tensor weight, int capacity=-1) -> (Tensor output, Tensor touches, Tensor counts)");
  m.def(
      "max_pool2d(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode, "
      "bool relu, int capacity=-1) -> (Tensor output, Tensor offsets, Tensor windows, Tensor members, Tensor touches, "
      "Tensor counts, Tensor routes)");
  m.def(
      "max_pool2d_backward(Tensor grad, Tensor routes, SymInt height, SymInt width, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation, bool channels_last) -> Tensor");
  m.def(
      "max_pool2d_gather(Tensor x, Tensor routes, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation) -> Tensor");
  m.def(
      "window_ties(Tensor x, Tensor output, Tensor[] axes, int capacity=-1) -> (Tensor owner, Tensor member, "
      "Tensor counts)");
  m.def(
      "resolve_ties(Tensor windows, Tensor members, Tensor offsets, int[] pool, int[] stages, Tensor[] tensors) -> "
      "(Tensor window, Tensor chosen, Tensor other, Tensor answer, Tensor counts)");
  m.def("conv_patches(Tensor x, Tensor units, int[] stage) -> Tensor");
  m.def("distinct_rows(Tensor rows) -> Tensor");
  m.def("opposite_rows(Tensor plus, Tensor minus, Tensor group) -> Tensor");
  m.def("fingerprints(Tensor[] tensors) -> Tensor");
}
