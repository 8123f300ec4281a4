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
from .layers import Graph, complex_at, kind_of, shape_of
from .movement import MOVES, PARTS, SOURCES, readers, sources
from .nodes import Node
from .normalization import BATCH_NORM
from .recomputed import DroppedError
from .transfer import take

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
        (edge,) = self.graph.linked((edge,))
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
        try:
            seen = self.graph.legible(node)
            if rule is not None and not complex_at(node) and rule(self, seen, number, differences, owner, scaled):
                return
        except DroppedError:
            pass
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
    if alpha_of(node) != 1:
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


def _move(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """Every output is at most one input, and every input at most one output."""
    size = math.prod(shape_of(node, number))
    try:
        tables = readers(node, number)
    except ValueError:
        return False
    for edge, table in zip(node.next_functions, tables, strict=False):
        if edge[0] is None or table is None:
            continue
        source = torch.full((size + 1,), -1)
        moved = torch.nonzero(table >= 0).flatten()
        source[table[moved]] = moved
        if not torch.equal(source[table[moved]], moved):
            return False  # a sum
        walk.push(edge, Differences(source[d.plus], source[d.minus]), owner, scaled)
    return True


def _copy(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """Every output is one input, or a constant."""
    try:
        table = torch.cat([sources(node), torch.tensor([-1])])
    except ValueError:
        return False
    walk.push(node.next_functions[0], Differences(table[d.plus], table[d.minus]), owner, scaled)
    return True


def _chosen(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """``where`` and ``masked_fill``: every output is one entry of one operand."""
    fill = kind_of(node) == "MaskedFillBackward"
    mask, out = node._saved_mask if fill else node._saved_condition, shape_of(node, number)
    mask = mask.detach().expand(out)
    first = [(index >= 0) & (take(mask, index.clamp(min=0)) != fill) for index in (d.plus, d.minus)]
    for edge, own in zip(node.next_functions, (first, [~held for held in first]), strict=False):
        if edge[0] is not None:
            shape = shape_of(*edge)
            plus, minus = (
                broadcast_index(torch.where(held, index, -1), out, shape)
                for held, index in zip(own, (d.plus, d.minus), strict=True)
            )
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


def _group_norm(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """Equal inputs of one group, under the same scale and shift: all terms but the difference itself cancel."""
    x, shape = node._saved_input.detach(), shape_of(node, number)
    layer = kind_of(node) == "NativeLayerNormBackward"
    inner = math.prod(shape[2:])
    if layer:
        group, place = math.prod(node._saved_normalized_shape), 1
    else:
        group, place = shape[1] * inner // int(node._saved_group), inner
    plus, minus = d.plus.clamp(min=0), d.minus.clamp(min=0)
    easy = (d.plus >= 0) & (d.minus >= 0) & (plus // group == minus // group) & (take(x, plus) == take(x, minus))
    weight = node._saved_weight
    affine = any(edge[0] is not None for edge in node.next_functions[1:])
    if weight is not None or affine:
        easy &= plus // place == minus // place  # one channel, or one entry
    walk.result.hard[owner[~easy]] = True
    d, owner, plus = d.select(easy), owner[easy], plus[easy]
    gamma = torch.ones(len(d))
    if weight is not None:
        gamma = take(weight.detach(), plus % group if layer else plus // inner % shape[1])
    walk.push(node.next_functions[0], d.select(gamma > 0), owner[gamma > 0], True)
    walk.push(node.next_functions[0], d.swapped().select(gamma < 0), owner[gamma < 0], True)
    return bool(torch.isfinite(gamma).all())


def _constant_factor(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """A product or quotient with a constant: differences of units with one factor, and units alone, are scaled.

    Of a divisor the sign and where it is equal matter alone; the audit has seen that it is nowhere 0.
    """
    quotient = kind_of(node) == "DivBackward"
    slots = [slot for slot, edge in enumerate(node.next_functions) if edge[0] is not None]
    if len(slots) != 1 or (quotient and (slots != [0] or getattr(node, "_saved_rounding_mode", None) is not None)):
        return False
    factor, out = getattr(node, "_saved_self" if slots[0] else "_saved_other", None), shape_of(node, number)
    if isinstance(factor, (int, float)):
        factor = torch.full((), float(factor), dtype=torch.float64)
    if factor is None or factor.is_complex():
        return False
    factor = factor.detach().expand(out)
    values = [
        torch.where(index >= 0, take(factor, index.clamp(min=0)).to(torch.float64), 0.0) for index in (d.plus, d.minus)
    ]
    plus, minus = (torch.where(value != 0, index, -1) for value, index in zip(values, (d.plus, d.minus), strict=True))
    easy = (plus < 0) | (minus < 0) | (values[0] == values[1])
    walk.result.hard[owner[~easy]] = True
    sign = torch.where(plus >= 0, values[0], values[1])
    edge = node.next_functions[slots[0]]
    shape = shape_of(*edge)
    moved = Differences(broadcast_index(plus, out, shape), broadcast_index(minus, out, shape))
    for held, turned in ((easy & (sign > 0), moved), (easy & (sign < 0), moved.swapped())):
        walk.push(edge, turned.select(held), owner[held], True)
    return bool(torch.isfinite(sign).all())


def alpha_of(node: Node) -> float:
    """The factor of a sum's second term; sums with a number have none."""
    return float(getattr(node, "_saved_alpha", 1.0))


_Rule = Callable[[Walk, Node, int, Differences, Tensor, bool], bool]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(SAME_UNITS, _same),
    **dict.fromkeys(["AddBackward", "SubBackward", "RsubBackward"], _add),
    **dict.fromkeys(MOVES, _move),
    "NegBackward": _neg,
    **dict.fromkeys(PARTS, _move),
    **dict.fromkeys(SOURCES, _copy),
    **dict.fromkeys(["WhereBackward", "MaskedFillBackward"], _chosen),
    **dict.fromkeys(["NativeGroupNormBackward", "NativeLayerNormBackward"], _group_norm),
    "MulBackward": _constant_factor,
    "DivBackward": _constant_factor,
    **dict.fromkeys(BATCH_NORM, _batch_norm),
    "ConvolutionBackward": patches.convolution,
    "AddmmBackward": patches.linear,
    "MmBackward": patches.linear,
}
