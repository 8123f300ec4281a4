"""E2 and E3: units the loss does not depend on near w, whatever their gradient.

An output of a recorded operation is irrelevant if every consumer is a recorded operation that ignores it: a window
in which it loses strictly or whose own output is irrelevant in turn, or a ReLU at which it is strictly negative.
The closure is recursive; any other consumer (a skip connection, the loss) makes the unit relevant. A zero
backward gradient or a zero weight is not irrelevance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import Graph
from .records import OpRecord
from .transfer import take


def relevant_outputs(graph: Graph, record: OpRecord, units: Tensor) -> Tensor:
    """bool [K]: may the loss depend, near w, on these outputs (int64 [K], flat) of ``record``?"""
    consumers = graph.consumers[record.node]
    records = [graph.record_of.get(node) for node, _, _ in consumers]
    if record.node in graph.roots or not records:
        return torch.ones(len(units), dtype=torch.bool)
    found = torch.zeros(len(units), dtype=torch.bool)
    for item in records:
        if item is None:
            return torch.ones(len(units), dtype=torch.bool)
        found |= relevant_inputs(graph, item, units)
    return found


def relevant_inputs(graph: Graph, record: OpRecord, units: Tensor) -> Tensor:
    """bool [K]: may the loss depend, through ``record`` and near w, on these units of its input y?"""
    if len(units) == 0:
        return torch.zeros(0, dtype=torch.bool)
    if record.ties is None:
        alive = _positive(record, units) | _touched(record, units)
        return alive & relevant_outputs(graph, record, units)
    owner, windows, cells = windows_of(record, units)
    attains = _attains(record, windows, cells)
    if record.relu:  # where the maximum is 0, negative units are flat and touching ones decide
        attains = torch.where(_positive(record, windows), attains, _touched(record, units[owner]))
    owner, windows = owner[attains], windows[attains]
    kept = owner[relevant_outputs(graph, record, windows)]
    found = torch.zeros(len(units), dtype=torch.bool)
    found[kept] = True
    return found


def rectified(graph: Graph, record: OpRecord) -> bool:
    """True for a max pooling whose output only ReLUs read, directly or through more such poolings.

    ``relu(max_i y_i) = max_i relu(y_i)``, with the same AD gradient: where the maximum is 0 or less the ties need
    no rows, and where it is 0 each member of the argmax set is a touch of its own.
    """
    if record.ties is None or record.relu or record.node in graph.roots:
        return False
    consumers = [graph.record_of.get(node) for node, _, _ in graph.consumers[record.node]]
    return bool(consumers) and all(item is not None and (item.relu or rectified(graph, item)) for item in consumers)


def windows_of(record: OpRecord, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every (position in ``units``, flat output index of a window, in-window cell) that holds a unit of y."""
    assert record.ties is not None
    window = record.ties.window
    *_, height, width = record.input_shape
    out_h, out_w = record.output.shape[-2:]
    cells = torch.arange(window.kernel[0] * window.kernel[1])
    plane, rest = units // (height * width), units % (height * width)
    row = (rest // width + window.padding[0])[:, None] - cells // window.kernel[1] * window.dilation[0]
    column = (rest % width + window.padding[1])[:, None] - cells % window.kernel[1] * window.dilation[1]
    aligned = (row % window.stride[0] == 0) & (column % window.stride[1] == 0)
    row, column = row // window.stride[0], column // window.stride[1]
    inside = aligned & (row >= 0) & (row < out_h) & (column >= 0) & (column < out_w)
    owner, cell = torch.nonzero(inside, as_tuple=True)
    return owner, ((plane[:, None] * out_h + row) * out_w + column)[inside], cell


def _attains(record: OpRecord, windows: Tensor, cells: Tensor) -> Tensor:
    """Does the cell attain its window's maximum (selected, or member of a recorded tie)?"""
    assert record.ties is not None
    ties = record.ties
    found = take(ties.offsets, windows).to(torch.int64) == cells
    if len(ties.windows):
        place = torch.searchsorted(ties.windows, windows).clamp(max=len(ties.windows) - 1)
        word = ties.members[place, cells // 64]
        found |= (ties.windows[place] == windows) & ((word >> (cells % 64)) & 1).bool()
    return found


def _positive(record: OpRecord, units: Tensor) -> Tensor:
    return take(record.output, units) > 0


def _touched(record: OpRecord, units: Tensor) -> Tensor:
    if len(record.touches) == 0:
        return torch.zeros(len(units), dtype=torch.bool)
    place = torch.searchsorted(record.touches, units).clamp(max=len(record.touches) - 1)
    return record.touches[place] == units
