"""The bias structure of a layer: which parameter is added, with coefficient one, to every unit of y."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .differences import broadcast_index
from .layers import Graph, kind_of, shape_of
from .movement import PERMUTATIONS, permutation
from .nodes import Node
from .normalization import BATCH_NORM
from .records import OpRecord
from .rows import SAME_UNITS, alpha_of


@dataclass(frozen=True, eq=False)
class Bias:
    """``y_i = (terms without b) + b[group(i)]``, exactly; ``kind`` is "distinct" or "shared".

    ``run``: the group is the same for every aligned run of that many consecutive units.
    """

    leaf: str
    group: Callable[[Tensor], Tensor]
    kind: str
    run: int = 1


def bias_of(graph: Graph, record: OpRecord, own: frozenset[str]) -> Bias | None:
    """The additive bias of a record's y among its ``own`` leaves w_l, or None.

    It must enter y once and nowhere else in the layer's smooth part: a convolution bias in front of a batch
    normalisation is none (train mode removes it), the normalisation's beta is one. A frozen bias is a constant.
    """
    found = _search(graph, record.edge, lambda units: units, own)
    if found is None:
        return None
    leaf, group, run = found
    if _paths(graph, record, leaf) != 1:
        return None
    units = math.prod(record.input_shape[1:])
    distinct = graph.leaves.tensor(leaf).numel() == units == len(torch.unique(group(torch.arange(units))))
    return Bias(leaf, group, "distinct" if distinct else "shared", run)


def partly_biased(graph: Graph, record: OpRecord, own: frozenset[str]) -> bool:
    """Do some units of a record's y add a bias, where not all add the same one (branches that are concatenated)?"""
    edge = record.edge
    while edge[0] is not None and edge[0] not in graph.record_of and kind_of(edge[0]) in SAME_UNITS:
        edge = graph.edges[edge[0]][0]
    if edge[0] is None or edge[0] in graph.record_of or kind_of(edge[0]) != "CatBackward":
        return False
    return any(_search(graph, part, lambda units: units, own) is not None for part in graph.edges[edge[0]])


def _paths(graph: Graph, record: OpRecord, leaf: str) -> int:
    """Number of paths from y to a leaf inside the layer; on a single one the coefficient is the path's alone.

    Counted from the leaf: few nodes read a bias before the next recorded operation does.
    """
    end, start = record.edge[0], graph.accumulator(leaf)
    found, stack = {start}, [start]
    while stack:
        node = stack.pop()
        for user, _, _ in graph.consumers.get(node, ()) if node is not end else ():
            if user not in found and user not in graph.record_of:
                found.add(user)
                stack.append(user)
    counts: dict[Node, int] = {end: 1}
    for node in sorted(found - {end}, key=graph.position.__getitem__):
        counts[node] = sum(counts.get(user, 0) for user, _, _ in graph.consumers.get(node, ()))
    return counts[start]


_Map = Callable[[Tensor], Tensor]
_Found = tuple[str, _Map, int]  # leaf, group and run of a Bias


def _search(graph: Graph, edge: tuple[Node, int], units: _Map, own: frozenset[str]) -> _Found | None:
    node = edge[0]
    if node is None or node in graph.record_of:
        return None
    leaf = graph.leaf(node)
    if leaf is not None:
        return (leaf, units, 1) if leaf in own else None
    kind = kind_of(node)
    if kind in SAME_UNITS:
        return _search(graph, graph.edges[node][0], units, own)
    if kind == "AddBackward" and alpha_of(node) == 1:
        return _search_sum(graph, edge, units, own)
    if kind in PERMUTATIONS:
        moved = partial(_permuted, units, shape_of(*edge), permutation(node))
        found = _search(graph, graph.edges[node][0], moved, own)
        return None if found is None else (*found[:2], 1)
    slot = _SLOTS.get(kind)
    if slot is None or (kind == "AddmmBackward" and (node._saved_alpha != 1 or node._saved_beta != 1)):
        return None
    return _added(graph, edge, graph.edges[node][slot], units, own)


#: Where a node has the bias it adds, once for every channel or place.
_SLOTS = {
    "ConvolutionBackward": 2,
    "AddmmBackward": 0,
    "NativeGroupNormBackward": 2,
    "NativeLayerNormBackward": 2,
    **dict.fromkeys(BATCH_NORM, 2),
}


def _added(
    graph: Graph, edge: tuple[Node, int], bias: tuple[Node, int], units: _Map, own: frozenset[str]
) -> _Found | None:
    shape, source = shape_of(*edge), bias[0]
    if source is not None and kind_of(source) == "RepeatBackward":  # instance normalisation: once for every sample
        source = graph.edges[source][0][0]
    leaf = graph.leaf(source)
    if leaf is None or leaf not in own:
        return None
    held = tuple(graph.leaves.tensor(leaf).shape)
    entries = math.prod(held)
    if kind_of(edge[0]) == "NativeLayerNormBackward":
        return leaf, lambda u: units(u) % entries, 1
    if len(held) != 1 or (source is bias[0] and held != shape[1:2]) or shape[1] % max(1, entries):
        return None
    inner = math.prod(shape[2:])
    return leaf, lambda u: units(u) // inner % entries, inner


def _permuted(units: _Map, out: tuple[int, ...], order: list[int], index: Tensor) -> Tensor:
    shape = [0] * len(out)
    places: list[Tensor] = [index] * len(out)
    for dim, place in zip(order, torch.unravel_index(units(index), out), strict=True):
        shape[dim], places[dim] = out[order.index(dim)], place
    flat = torch.zeros_like(index)
    for size, place in zip(shape, places, strict=True):
        flat = flat * size + place
    return flat


def _search_sum(graph: Graph, edge: tuple[Node, int], units: _Map, own: frozenset[str]) -> _Found | None:
    out = shape_of(*edge)
    for operand in graph.edges[edge[0]]:
        if operand[0] is not None:
            shape = shape_of(*operand)
            inner = partial(_broadcast, units, out, shape)
            found = _search(graph, operand, inner, own)
            if found is not None:
                return (*found[:2], found[2] if shape == out else 1)
    return None


def _broadcast(units: _Map, out: tuple[int, ...], shape: tuple[int, ...], index: Tensor) -> Tensor:
    return broadcast_index(units(index), out, shape)
