"""T_j: which members of a tie, and which touches, have AD gradients that are equal for a structural reason.

Congruence is value numbering in the order it is needed: two units are congruent when they are the same function of
the parameters around every recorded value, that is, equal own-layer rows and, below, pairs of units that are the
same, that are both switched off, or that are congruent in turn. Padding and inputs are constants. The answer is
one-sided: True is a proof of ``ga_plus == ga_minus`` with respect to all parameters, False says nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .differences import Differences, Expansion
from .layers import Graph
from .records import OpRecord, Ties
from .rows import expand
from .transfer import take


def selected_inputs(record: OpRecord, units: Tensor) -> Tensor:
    """Flat indices of y that AD selects for these outputs of ``record``, whatever the slope there."""
    if record.ties is None:
        return units
    return cell_inputs(record, units, take(record.ties.offsets, units).to(torch.int64))


def cell_inputs(record: OpRecord, windows: Tensor, cells: Tensor) -> Tensor:
    """Flat indices of y of the in-window cells ``kh * KW + kw`` of output units ``windows``."""
    assert record.ties is not None
    window = record.ties.window
    *_, height, width = record.input_shape
    out_h, out_w = record.output.shape[-2:]
    line = windows // out_w  # divisions of int64 are what this function costs
    plane = line // out_h
    row = (line - plane * out_h) * window.stride[0] - window.padding[0]
    column = (windows - line * out_w) * window.stride[1] - window.padding[1]
    cell = torch.arange(window.kernel[0] * window.kernel[1])
    inside = cell // window.kernel[1] * (window.dilation[0] * width) + cell % window.kernel[1] * window.dilation[1]
    return (plane * height + row) * width + column + inside[cells]


def follow(record: OpRecord, differences: Differences) -> Differences:
    """Differences of outputs of ``record`` as differences of its inputs; units of slope 0 become the zero function."""

    def source(units: Tensor) -> Tensor:
        known = units >= 0
        safe = units.clamp(min=0)
        inputs = selected_inputs(record, safe)
        if record.relu:
            known = known & (take(record.output, safe) > 0)
        return torch.where(known, inputs, -1)

    return Differences(source(differences.plus), source(differences.minus))


def base_of(graph: Graph, record: OpRecord, strict: bool) -> OpRecord:
    """The last of the recorded operations that feed ``record`` directly: its parameters are the deepest ones.

    In strict mode only from a pooling to the ReLU under it (one layer phi o rho of the paper).
    """
    steps = 0
    while True:
        source = graph.record_of.get(record.edge[0])
        if source is None:
            return record
        joined = record.ties is not None and not record.relu and source.ties is None and steps == 0
        if strict and not joined:
            return record
        record, steps = source, steps + 1


def follow_to(graph: Graph, record: OpRecord, base: OpRecord, differences: Differences) -> Differences:
    """Differences of y of ``record`` as differences of y of its ``base``."""
    while record is not base:
        record = graph.record_of[record.edge[0]]
        differences = follow(record, differences)
    return differences


def prove_zero(graph: Graph, record: OpRecord, differences: Differences) -> Tensor:
    """bool [K]: the gradients of y_plus and y_minus of ``record`` (all parameters) are proved equal.

    Example: two windows over patches of identical pixels in the first layer; or two units whose patches are all
    switched off.
    """
    proved = differences.plus == differences.minus
    todo = torch.nonzero(~proved).flatten()
    if len(todo) == 0:
        return proved
    size = math.prod(record.input_shape) + 1
    keys = (differences.plus[todo] + 1) * size + differences.minus[todo] + 1
    unique, inverse = torch.unique(keys, return_inverse=True)
    distinct = Differences(unique // size - 1, unique % size - 1)
    good = prove_expansion_zero(graph, expand(graph, record.edge, distinct))
    proved[todo] = good[inverse]
    return proved


def prove_expansion_zero(graph: Graph, expansion: Expansion) -> Tensor:
    """:func:`prove_zero` for differences that are expanded already."""
    good = ~(expansion.own_nonzero() | expansion.hard)
    for item in expansion.boundary:
        needed = torch.unique(item.inverse[good & (item.inverse >= 0)])
        if len(needed) == 0:
            continue
        owners = torch.zeros(int(max(item.owner.max(), needed.max())) + 1, dtype=torch.bool)
        owners[needed] = True
        picked = torch.nonzero(owners[item.owner]).flatten()
        below = prove_zero(graph, item.record, follow(item.record, item.differences.select(picked)))
        bad = torch.zeros_like(owners)
        bad[item.owner[picked[~below]]] = True
        known = item.inverse >= 0
        good[known] &= ~bad[item.inverse[known].clamp(max=len(bad) - 1)] | (item.inverse[known] >= len(bad))
    return good


def tied_members(ties: Ties) -> tuple[Tensor, Tensor]:
    """(window, cell) of every member of every tie, int64 [M] each, windows ascending."""
    kernel = ties.window.kernel[0] * ties.window.kernel[1]
    bits = torch.arange(min(kernel, 64))
    held = ((ties.members[:, :, None] >> bits) & 1).flatten(1)[:, :kernel]
    which, cells = torch.nonzero(held, as_tuple=True)
    return ties.windows[which], cells


def tied_pairs(record: OpRecord, ties: Ties) -> tuple[Tensor, Differences]:
    """(window, selected member minus other member) of every pair of these ties of a record."""
    owner, cells = tied_members(ties)
    members, chosen = cell_inputs(record, owner, cells), selected_inputs(record, owner)
    other = members != chosen
    return owner[other], Differences(chosen[other], members[other])


def maximisers(record: OpRecord, windows: Tensor) -> Tensor:
    """Distinct flat input indices of all members of the argmax sets of these windows (int64, flat output indices)."""
    assert record.ties is not None
    owner, cells = tied_members(record.ties)
    mine = torch.isin(owner, windows)
    members = torch.cat([selected_inputs(record, windows), cell_inputs(record, owner[mine], cells[mine])])
    distinct: Tensor = torch.unique(members)
    return distinct
