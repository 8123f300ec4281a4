"""Decisions -> constraint rows: the exact own-layer part of a difference of two units' gradients.

A row of Algorithm 1 (and of E4) is a difference ``ga_plus - ga_minus`` of AD gradients of two units of one tensor;
a touch is a difference with the zero function (index -1). :func:`expand` carries such differences through tau_l:
at a convolution or linear layer they become differences of input patches (:mod:`adcert.patches`); what is left of
them lands on the outputs of recorded operations (the boundary), where :mod:`adcert.equality` goes on. Nothing here
rounds: where the structure does not allow exact rows, the difference is reported as ``hard`` and goes to
:mod:`adcert.backward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import patches
from .differences import Boundary, Differences, Expansion, Part, broadcast_index, unit_parts
from .layers import Graph, kind_of, shape_of
from .normalization import BATCH_NORM
from .records import Node
from .transfer import take, through

# Data movement: every output is at most one input.
MOVES = frozenset(
    f"{name}Backward" for name in "Permute Transpose T Slice Select Cat Stack ConstantPadNd Flip Roll".split()
)
# Views, copies and casts: the logical order of the units stays.
SAME_UNITS = frozenset(
    [
        "ViewBackward",
        "UnsafeViewBackward",
        "ReshapeAliasBackward",
        "SqueezeBackward",
        "UnsqueezeBackward",
        "CloneBackward",
        "ToCopyBackward",
        "AliasBackward",
    ]
)


def expand(graph: Graph, edge: tuple[Node, int], differences: Differences) -> Expansion:
    """Carry differences of units of the tensor at ``edge`` through the smooth operations above it.

    Args:
        graph: the step's graph.
        edge: (node, output number) of the tensor.
        differences: the differences; indices are flat, in logical row-major order.

    Returns:
        Exact own-layer parts (only rows whose entries are not all zero appear), boundary differences, and the
        mask of differences that met an operation without an exact rule.
    """
    walk = Walk(graph, Expansion(len(differences), hard=torch.zeros(len(differences), dtype=torch.bool)))
    walk.push(edge, differences, torch.arange(len(differences)), False)
    while walk.stack:
        (node, number), differences, owner, scaled = walk.stack.pop()
        walk.step(node, number, differences, owner, scaled)
    return walk.result


class Walk:
    def __init__(self, graph: Graph, result: Expansion) -> None:
        self.graph = graph
        self.result = result
        self.stack: list[tuple[tuple[Node, int], Differences, Tensor, bool]] = []

    def push(self, edge: tuple[Node, int], differences: Differences, owner: Tensor, scaled: bool) -> None:
        if edge[0] is None:
            return  # a constant: its gradient is zero
        keep = differences.plus != differences.minus
        if not bool(keep.all()):
            differences, owner = differences.select(keep), owner[keep]
        if len(differences):
            self.stack.append((edge, differences, owner, scaled))

    def step(self, node: Node, number: int, differences: Differences, owner: Tensor, scaled: bool) -> None:
        record = self.graph.record_of.get(node)
        if record is not None:
            inverse = torch.full((self.result.count,), -1)
            inverse[owner] = torch.arange(len(differences))
            self.result.boundary.append(Boundary(record, differences, torch.arange(len(differences)), inverse))
            return
        leaf = self.graph.leaf(node)
        if leaf is not None:
            self.leaf_entries(leaf, differences, owner, scaled)
            return
        rule = _RULES.get(kind_of(node))
        if rule is None or not rule(self, node, number, differences, owner, scaled):
            self.result.hard[owner] = True

    def leaf_entries(self, leaf: str, differences: Differences, owner: Tensor, scaled: bool) -> None:
        """The tensor is a parameter itself."""
        shape = tuple(self.graph.leaves.tensor(leaf).shape)
        for part in unit_parts(leaf, shape, differences, owner):
            self.emit(replace(part, scaled=scaled))

    def inner(self, edge: tuple[Node, int], differences: Differences) -> Expansion:
        """Differences above a weight: they may meet records, but no parameter of the layer."""
        return expand(self.graph, edge, differences)

    def emit(self, part: Part) -> None:
        if len(part.owner):
            self.result.parts.append(part)

    def bias_entries(self, leaf: str, plus: Tensor, minus: Tensor, owner: Tensor, scaled: bool) -> None:
        """A bias added once per group: +1 in the plus unit's group, -1 in the minus unit's; equal groups cancel."""
        shape = tuple(self.graph.leaves.tensor(leaf).shape)
        assert len(shape) <= 1
        differ = plus != minus
        self.leaf_entries(leaf, Differences(plus[differ], minus[differ]), owner[differ], scaled)


def _same(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    walk.push(node.next_functions[0], d, owner, scaled)
    return True


def _neg(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    walk.push(node.next_functions[0], d.swapped(), owner, scaled)
    return True


def _add(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """Sums with weights +1 and -1, with broadcasting."""
    if node._saved_alpha != 1:
        return False
    kind = kind_of(node)
    signs = {"AddBackward": (1, 1), "SubBackward": (1, -1), "RsubBackward": (-1, 1)}[kind]
    out = shape_of(node, number)
    for edge, sign in zip(node.next_functions, signs, strict=False):
        if edge[0] is not None:
            shape = shape_of(*edge)
            moved = Differences(broadcast_index(d.plus, out, shape), broadcast_index(d.minus, out, shape))
            walk.push(edge, moved if sign > 0 else moved.swapped(), owner, scaled)
    return True


def _expand_view(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    out, edge = shape_of(node, number), node.next_functions[0]
    shape = shape_of(*edge)
    walk.push(
        edge, Differences(broadcast_index(d.plus, out, shape), broadcast_index(d.minus, out, shape)), owner, scaled
    )
    return True


def _move(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """Data movement: every output is at most one input. The node itself, fed with output numbers, tells which."""
    shape = shape_of(node, number)
    marks = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)
    for edge, marked in zip(node.next_functions, through(node, number, marks), strict=False):
        if edge[0] is None or marked is None:
            continue
        flat = marked.reshape(-1)
        source = torch.full((math.prod(shape) + 1,), -1)
        hit = torch.nonzero(flat).flatten()
        source[flat[hit].to(torch.int64)] = hit
        plus = torch.where(d.plus >= 0, source[d.plus + 1], -1)
        minus = torch.where(d.minus >= 0, source[d.minus + 1], -1)
        walk.push(edge, Differences(plus, minus), owner, scaled)
    return True


def _batch_norm(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """Equal inputs in one channel: the mean and variance terms cancel, gamma / sigma times the difference is left."""
    x = node._saved_input.detach()
    shape = shape_of(node, number)
    inner = math.prod(shape[2:])
    channel = [index.clamp(min=0) // inner % shape[1] for index in (d.plus, d.minus)]
    values = [take(x, index.clamp(min=0)) for index in (d.plus, d.minus)]
    easy = (d.plus >= 0) & (d.minus >= 0) & (channel[0] == channel[1]) & (values[0] == values[1])
    walk.result.hard[owner[~easy]] = True
    d, owner, channel0 = d.select(easy), owner[easy], channel[0][easy]
    weight = node._saved_weight
    gamma = torch.ones(len(d)) if weight is None else take(weight.detach(), channel0)
    walk.push(node.next_functions[0], d.select(gamma > 0), owner[gamma > 0], True)
    walk.push(node.next_functions[0], d.swapped().select(gamma < 0), owner[gamma < 0], True)
    return bool(torch.isfinite(gamma).all())


_Rule = Callable[[Walk, Node, int, Differences, Tensor, bool], bool]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(SAME_UNITS, _same),
    **dict.fromkeys(["AddBackward", "SubBackward", "RsubBackward"], _add),
    **dict.fromkeys(MOVES, _move),
    "NegBackward": _neg,
    "ExpandBackward": _expand_view,
    **dict.fromkeys(BATCH_NORM, _batch_norm),
    "ConvolutionBackward": patches.convolution,
    "AddmmBackward": patches.linear,
    "MmBackward": patches.linear,
}
