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

from .choices import Choice, Ties
from .differences import Differences, Expansion
from .layers import Graph
from .records import OpRecord
from .rows import expand
from .transfer import take


def selected_inputs(record: OpRecord, units: Tensor) -> Tensor:
    """Flat indices of y that AD selects for these outputs of ``record``, whatever the slope there."""
    return units if record.ties is None else record.ties.selected(units)


def follow(record: OpRecord, differences: Differences) -> tuple[Differences, Tensor]:
    """Differences of outputs of ``record`` as differences of its inputs, up to a positive factor of each.

    Units of slope 0 become the zero function. Also the mask of differences for which that is what they are: not those
    of two units with different slopes.
    """
    known = [index >= 0 for index in (differences.plus, differences.minus)]
    safe = [index.clamp(min=0) for index in (differences.plus, differences.minus)]
    slopes = [record.slopes(units) for units in safe]
    alive = [there & ~slope.zero() for there, slope in zip(known, slopes, strict=True)]
    plus, minus = (
        torch.where(there, selected_inputs(record, units), -1) for there, units in zip(alive, safe, strict=True)
    )
    if record.rho is None or record.relu:
        return Differences(plus, minus), torch.ones(len(differences), dtype=torch.bool)
    good = torch.stack([slope.nonzero() | ~there for there, slope in zip(alive, slopes, strict=True)]).all(0)
    same = slopes[0].value == slopes[1].value
    if record.rho.derivative is not None and slopes[0].radius is not None:  # on curves equal values only
        same &= (slopes[0].radius == 0) | (record.values(safe[0]) == record.values(safe[1]))
    good &= ~(alive[0] & alive[1]) | same
    if record.own_edge[0] is not None:  # the slopes are parameters: dz / da = min(y, 0), a that of the channel
        y = [torch.where(there, record.values(units), 0) for there, units in zip(known, safe, strict=True)]
        own = [_slope_entries(record, units) for units in safe]
        good &= (y[0].clamp(max=0) == y[1].clamp(max=0)) & ((own[0] == own[1]) | (y[0] >= 0))
    turned = torch.where(alive[0], slopes[0].value, slopes[1].value) < 0
    plus, minus = torch.where(turned, minus, plus), torch.where(turned, plus, minus)
    return Differences(plus, minus), good


def _slope_entries(record: OpRecord, units: Tensor) -> Tensor:
    """Which of PReLU's slopes each of these units has."""
    assert record.left is not None
    entries = torch.arange(record.left.numel()).reshape(record.left.shape)
    return take(entries.expand(record.input_shape), units)


def base_of(graph: Graph, record: OpRecord, strict: bool) -> OpRecord:
    """The last of the recorded operations that feed ``record`` directly: its parameters are the deepest ones.

    In strict mode only from a pooling to the ReLU under it (one layer phi o rho of the paper).
    """
    steps = 0
    while True:
        source = graph.below(record)
        if source is None:
            return record
        joined = record.ties is not None and not record.relu and source.ties is None and steps == 0
        if strict and not joined:
            return record
        record, steps = source, steps + 1


def follow_to(graph: Graph, record: OpRecord, base: OpRecord, differences: Differences) -> tuple[Differences, Tensor]:
    """Differences of y of ``record`` as differences of y of its ``base``, and for which that holds (:func:`follow`)."""
    good = torch.ones(len(differences), dtype=torch.bool)
    while record is not base:
        source = graph.below(record)
        assert source is not None
        record = source
        differences, kept = follow(record, differences)
        good &= kept
    return differences, good


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
        source, kept = follow(item.record, item.differences.select(picked))
        below = prove_zero(graph, item.record, source) & kept
        bad = torch.zeros_like(owners)
        bad[item.owner[picked[~below]]] = True
        known = item.inverse >= 0
        good[known] &= ~bad[item.inverse[known].clamp(max=len(bad) - 1)] | (item.inverse[known] >= len(bad))
    return good


def tied_pairs(ties: Ties | Choice) -> tuple[Tensor, Differences]:
    """(window, unit that has to win minus unit that has to lose) of every pair of these ties."""
    owner, plus, minus = ties.pairs()
    return owner, Differences(plus, minus)
