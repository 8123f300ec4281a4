"""E2, E3 and E6: units the loss does not depend on, to first order near w, whatever their gradient.

An output of a recorded operation is irrelevant if every consumer is a recorded operation that ignores it: a window
in which it loses strictly or whose own output is irrelevant in turn, or an activation in a flat piece of which it lies.
The closure is recursive; any other consumer (a skip connection, the loss) makes the unit relevant, unless
:mod:`adcert.idle` has shown for the graph that none of them feels it. A zero backward gradient is not irrelevance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .choices import Choice, Ties
from .layers import Graph
from .records import OpRecord


def relevant_outputs(graph: Graph, record: OpRecord, units: Tensor) -> Tensor:
    """bool [K]: may the loss depend, near w, on these outputs (int64 [K], flat) of ``record``?"""
    if graph.felt is not None:
        known = graph.felt.get(record)
        return torch.zeros(len(units), dtype=torch.bool) if known is None else known[units]
    records = graph.readers(record)
    if not records:
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
        alive = ~record.slopes(units).zero() | _touched(record, units)
        if record.own_edge[0] is not None:
            alive = torch.ones_like(alive)
        return alive & relevant_outputs(graph, record, units)
    if isinstance(record.ties, Choice):
        return record.ties.attained(units)
    owner, windows, attains = _holding(record, units)
    owner, windows = owner[attains], windows[attains]
    kept = owner[relevant_outputs(graph, record, windows)]
    found = torch.zeros(len(units), dtype=torch.bool)
    found[kept] = True
    return found


def felt_inputs(record: OpRecord, outputs: Tensor) -> Tensor:
    """bool [units of y]: may some of these outputs (a mask) depend, near w, on the unit?"""
    found = torch.zeros(math.prod(record.input_shape), dtype=torch.bool)
    if record.ties is None:
        units = torch.nonzero(outputs).flatten()
        alive = ~record.slopes(units).zero() | _touched(record, units)
        found[units] = alive if record.own_edge[0] is None else True
    elif isinstance(record.ties, Choice):
        found |= outputs.any() & record.ties.attained(torch.arange(len(found)))
    else:
        owner, windows, attains = _holding(record, torch.arange(len(found)))
        found[owner[attains & outputs[windows]]] = True
    return found


def _holding(record: OpRecord, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every (position in ``units``, window that holds that unit), and may the unit be the window's value near w?"""
    assert isinstance(record.ties, Ties)
    owner, windows, attains = record.ties.places(units)
    if record.relu:  # where the maximum is 0, negative units are flat and touching ones decide
        attains = torch.where(_positive(record, windows), attains, _touched(record, units[owner]))
    return owner, windows, attains


def rectified(graph: Graph, record: OpRecord) -> bool:
    """True for a max pooling whose output only ReLUs read, directly or through more such poolings.

    ``relu(max_i y_i) = max_i relu(y_i)``, with the same AD gradient: where the maximum is 0 or less the ties need
    no rows, and where it is 0 each member of the argmax set is a touch of its own.
    """
    if not isinstance(record.ties, Ties) or record.rho is not None:
        return False
    consumers = graph.readers(record)
    return bool(consumers) and all(item is not None and (item.relu or rectified(graph, item)) for item in consumers)


def _positive(record: OpRecord, units: Tensor) -> Tensor:
    return record.positive(units)


def _touched(record: OpRecord, units: Tensor) -> Tensor:
    touched = record.touched()[0]
    if len(touched) == 0:
        return torch.zeros(len(units), dtype=torch.bool)
    place = torch.searchsorted(touched, units).clamp(max=len(touched) - 1)
    return touched[place] == units
