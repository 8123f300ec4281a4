"""Decisions -> constraint rows: the exact own-layer part of a difference of two units' gradients.

A row of Algorithm 1 (and of E4) is a difference ``ga_plus - ga_minus`` of AD gradients of two units of one tensor;
a touch is a difference with the zero function (index -1). :func:`expand` carries such differences through tau_l:
at a convolution or linear layer they become differences of input patches, which are exact when both terms are
kept; what is left of them lands on the outputs of recorded operations (the boundary), where
:mod:`adcert.equality` goes on. Nothing here rounds: where the structure does not allow exact rows, the difference
is reported as ``hard`` and goes to :mod:`adcert.backward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .layers import Graph, kind_of, shape_of
from .records import Node, OpRecord, take

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
CHUNK = 1 << 21  # elements of gathered patches held at once


@dataclass(frozen=True, eq=False)
class Differences:
    """K differences of units of one tensor: int64 [K] flat indices, -1 for the zero function."""

    plus: Tensor
    minus: Tensor

    def __len__(self) -> int:
        return int(self.plus.numel())

    def swapped(self) -> Differences:
        return Differences(self.minus, self.plus)

    def select(self, index: Tensor) -> Differences:
        return Differences(self.plus[index], self.minus[index])


@dataclass(frozen=True, eq=False)
class Part:
    """Own-layer entries of some rows: row ``owner[k]`` has ``plus[k] - minus[k]`` in group ``group[k]`` of a leaf.

    A leaf with two or more dimensions is cut into groups along its first one (a filter, a row of a linear layer);
    a vector or a scalar into single entries. ``scaled``: the true entries are a positive multiple, the same for all
    of the row's entries in this part.
    """

    leaf: str
    owner: Tensor
    group: Tensor
    plus: Tensor
    minus: Tensor
    scaled: bool = False
    radius: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Boundary:
    """Differences of outputs of ``record``; difference k of the expansion needs those with ``owner == inverse[k]``."""

    record: OpRecord
    differences: Differences
    owner: Tensor
    inverse: Tensor


@dataclass(eq=False)
class Expansion:
    """What K differences at an edge come to inside one layer."""

    count: int
    parts: list[Part] = field(default_factory=list)
    boundary: list[Boundary] = field(default_factory=list)
    hard: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def own_nonzero(self) -> Tensor:
        """bool [K]: some exact own-layer entry is not zero."""
        found = torch.zeros(self.count, dtype=torch.bool)
        for part in self.parts:
            found[part.owner] = True
        return found


def groups_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(number of groups, entries per group) of a leaf of this shape."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return shape[0], math.prod(shape[1:])


def unit_parts(leaf: str, shape: tuple[int, ...], differences: Differences, owner: Tensor) -> list[Part]:
    """Differences of a leaf's own entries: +1 at ``plus``, -1 at ``minus``."""
    width = groups_of(shape)[1]
    parts = []
    for index, positive in ((differences.plus, True), (differences.minus, False)):
        rows = torch.nonzero(index >= 0).flatten()
        hot = torch.zeros(len(rows), width, dtype=torch.float64)
        hot[torch.arange(len(rows)), index[rows] % width] = 1.0
        zero = torch.zeros_like(hot)
        plus, minus = (hot, zero) if positive else (zero, hot)
        if len(rows):
            parts.append(Part(leaf, owner[rows], index[rows] // width, plus, minus))
    return parts


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
    walk = _Walk(graph, Expansion(len(differences), hard=torch.zeros(len(differences), dtype=torch.bool)))
    walk.push(edge, differences, torch.arange(len(differences)), False)
    while walk.stack:
        (node, number), differences, owner, scaled = walk.stack.pop()
        walk.step(node, number, differences, owner, scaled)
    return walk.result


class _Walk:
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

    def emit(self, part: Part) -> None:
        if len(part.owner):
            self.result.parts.append(part)

    def bias_entries(self, leaf: str, plus: Tensor, minus: Tensor, owner: Tensor, scaled: bool) -> None:
        """A bias added once per group: +1 in the plus unit's group, -1 in the minus unit's; equal groups cancel."""
        shape = tuple(self.graph.leaves.tensor(leaf).shape)
        assert len(shape) <= 1
        differ = plus != minus
        self.leaf_entries(leaf, Differences(plus[differ], minus[differ]), owner[differ], scaled)


def unique_pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct pairs [U, 2] of int64 numbers >= -1 and the number of every pair, as ``torch.unique`` of rows."""
    if len(first) == 0:
        return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    size = int(second.max()) + 2
    keys, inverse = torch.unique((first + 1) * size + second + 1, return_inverse=True)
    return torch.stack([keys // size - 1, keys % size - 1], 1), inverse


def _same(walk: _Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    walk.push(node.next_functions[0], d, owner, scaled)
    return True


def _neg(walk: _Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    walk.push(node.next_functions[0], d.swapped(), owner, scaled)
    return True


def _add(walk: _Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
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


def _expand_view(walk: _Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    out, edge = shape_of(node, number), node.next_functions[0]
    shape = shape_of(*edge)
    walk.push(
        edge, Differences(broadcast_index(d.plus, out, shape), broadcast_index(d.minus, out, shape)), owner, scaled
    )
    return True


def broadcast_index(index: Tensor, out: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    if out == shape:
        return index
    table = torch.arange(math.prod(shape)).reshape(shape).expand(out)
    moved = table[torch.unravel_index(index.clamp(min=0), out)] if out else table.expand(len(index))
    return torch.where(index >= 0, moved, -1)


def _move(walk: _Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """Data movement: every output is at most one input. The node itself, fed with output numbers, tells which."""
    shape = shape_of(node, number)
    marks = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)
    inputs = node(marks)
    for edge, marked in zip(
        node.next_functions, inputs if isinstance(inputs, (tuple, list)) else (inputs,), strict=False
    ):
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


def _batch_norm(walk: _Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """Equal inputs in one channel: the mean and variance terms cancel, gamma / sigma times the difference is left."""
    x = node._saved_input
    shape = shape_of(node, number)
    inner = math.prod(shape[2:])
    channel = [index.clamp(min=0) // inner % shape[1] for index in (d.plus, d.minus)]
    values = [take(x, index.clamp(min=0)) for index in (d.plus, d.minus)]
    easy = (d.plus >= 0) & (d.minus >= 0) & (channel[0] == channel[1]) & (values[0] == values[1])
    walk.result.hard[owner[~easy]] = True
    d, owner, channel0 = d.select(easy), owner[easy], channel[0][easy]
    weight = node._saved_weight
    gamma = torch.ones(len(d)) if weight is None else weight.detach()[channel0]
    walk.push(node.next_functions[0], d.select(gamma > 0), owner[gamma > 0], True)
    walk.push(node.next_functions[0], d.swapped().select(gamma < 0), owner[gamma < 0], True)
    return bool(torch.isfinite(gamma).all())


def _convolution(walk: _Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """Patch differences for the weight, +-1 for the bias, patch elements for the input."""
    weight_edge, bias_edge = node.next_functions[1], node.next_functions[2]
    weight, bias = walk.graph.leaf(weight_edge[0]), walk.graph.leaf(bias_edge[0])
    if node._saved_transposed or (weight_edge[0] is not None and weight is None):
        return False
    if bias_edge[0] is not None and bias is None:
        return False
    geometry = _ConvGeometry(node, number)
    plus, minus = geometry.split(d.plus), geometry.split(d.minus)
    if bias is not None:
        walk.bias_entries(bias, plus.channel, minus.channel, owner, scaled)
    places, inverse = unique_pairs(plus.place, minus.place)
    step = max(1, CHUNK // max(1, geometry.patch_size))
    for start in range(0, len(places), step):
        rows = torch.nonzero((inverse >= start) & (inverse < start + step)).flatten()
        chunk = places[start : start + step]
        patches = geometry.patch(chunk[:, 0]), geometry.patch(chunk[:, 1])
        if weight is not None:
            sides = plus.select(rows), minus.select(rows)
            _weight_parts(walk, weight, geometry, patches, inverse[rows] - start, sides, owner[rows], scaled)
        if node.next_functions[0][0] is not None:
            _patch_boundary(walk, node.next_functions[0], patches, inverse[rows] - start, owner[rows], scaled)
    return True


def _weight_parts(
    walk: _Walk,
    leaf: str,
    geometry: _ConvGeometry,
    patches: tuple[Tensor, Tensor],
    inverse: Tensor,
    sides: tuple[_Units, _Units],
    owner: Tensor,
    scaled: bool,
) -> None:
    first, second = geometry.values(patches[0]), geometry.values(patches[1])
    plus, minus = sides
    joint = (plus.channel == minus.channel) | (plus.channel < 0) | (minus.channel < 0)
    differ = (first != second).any(1)[inverse] & joint
    rows = torch.nonzero(differ).flatten()
    group = torch.where(plus.channel >= 0, plus.channel, minus.channel)[rows]
    walk.emit(Part(leaf, owner[rows], group, first[inverse[rows]], second[inverse[rows]], scaled))
    for side, values, sign in ((plus, first, 1), (minus, second, -1)):
        rows = torch.nonzero(~joint & (values != 0).any(1)[inverse]).flatten()
        taken = values[inverse[rows]]
        pair = (taken, torch.zeros_like(taken)) if sign > 0 else (torch.zeros_like(taken), taken)
        walk.emit(Part(leaf, owner[rows], side.channel[rows], *pair, scaled))


def _patch_boundary(
    walk: _Walk, edge: tuple[Node, int], patches: tuple[Tensor, Tensor], inverse: Tensor, owner: Tensor, scaled: bool
) -> None:
    """Differences of all patch elements, once per pair of places; only a recorded output can take them exactly."""
    first, second = patches
    place = torch.arange(len(first)).repeat_interleave(first.shape[1])
    differ = (first != second).flatten()
    if not bool(differ.any()):
        return
    differences = Differences(first.flatten()[differ], second.flatten()[differ])
    full = torch.full((walk.result.count,), -1)
    full[owner] = inverse
    walk_to_records(walk, edge, differences, place[differ], full)


def walk_to_records(
    walk: _Walk, edge: tuple[Node, int], differences: Differences, place: Tensor, inverse: Tensor
) -> None:
    """Follow weighted differences through exact rules; they may meet records, but no parameter of the layer."""
    inner = expand(walk.graph, edge, differences)
    blocked = inner.hard | inner.own_nonzero()
    places = torch.zeros(int(place.max()) + 1, dtype=torch.bool)
    places[place[blocked]] = True
    known = inverse >= 0
    hit = torch.zeros_like(known)
    hit[known] = places[inverse[known].clamp(max=len(places) - 1)] & (inverse[known] < len(places))
    walk.result.hard |= hit
    for item in inner.boundary:
        # item.inverse: inner difference -> its representative; go the other way, representative -> place
        inner_index = torch.nonzero(item.inverse >= 0).flatten()
        representative = item.inverse[inner_index]
        counts = torch.bincount(item.owner, minlength=int(representative.max()) + 1 if len(representative) else 0)
        if len(item.owner) == len(counts) and bool((counts == 1).all()):
            of_owner = torch.empty(len(counts), dtype=torch.int64)
            of_owner[item.owner] = torch.arange(len(item.owner))
            picked = item.differences.select(of_owner[representative])
            walk.result.boundary.append(Boundary(item.record, picked, place[inner_index], inverse))
        else:
            walk.result.hard |= known


@dataclass(frozen=True, eq=False)
class _Units:
    """Conv output units: a place number (sample, group, position) and the channel; -1 for the zero function."""

    place: Tensor
    channel: Tensor

    def select(self, rows: Tensor) -> _Units:
        return _Units(self.place[rows], self.channel[rows])


class _ConvGeometry:
    """Index arithmetic of one convolution node, any number of spatial dimensions."""

    def __init__(self, node: Node, number: int) -> None:
        self.out = shape_of(node, number)
        self.groups = int(node._saved_groups)
        source = node.next_functions[0]
        weight = node.next_functions[1]
        self.x = node._saved_input if weight[0] is not None else None
        self.source_shape = tuple(self.x.shape) if self.x is not None else shape_of(*source)
        spatial = len(self.out) - 2
        self.stride = [int(v) for v in node._saved_stride]
        self.padding = [int(v) for v in node._saved_padding]
        self.dilation = [int(v) for v in node._saved_dilation]
        kernel = shape_of(*weight)[2:] if weight[0] is not None else tuple(node._saved_weight.shape)[2:]
        self.kernel = tuple(int(k) for k in kernel)
        assert len(self.kernel) == spatial
        self.per_group = self.source_shape[1] // self.groups
        self.patch_size = self.per_group * math.prod(self.kernel)

    def split(self, index: Tensor) -> _Units:
        """Units by flat output index."""
        known = index >= 0
        sample, channel, *position = torch.unravel_index(index.clamp(min=0), self.out)
        place = sample * self.groups + channel // (self.out[1] // self.groups)
        for size, coordinate in zip(self.out[2:], position, strict=True):
            place = place * size + coordinate
        return _Units(torch.where(known, place, -1), torch.where(known, channel, -1))

    def patch(self, place: Tensor) -> Tensor:
        """Flat input indices [K, patch_size] of the patches at these places, -1 in the padding."""
        known = place >= 0
        rest = place.clamp(min=0)
        position = []
        for size in reversed(self.out[2:]):
            position.append(rest % size)
            rest = rest // size
        sample, group = rest // self.groups, rest % self.groups
        channels = torch.arange(self.per_group)
        index = (sample * self.source_shape[1] + group * self.per_group)[:, None] + channels[None, :]
        inside = known[:, None].expand(index.shape)
        for axis, coordinate in enumerate(reversed(position)):
            taps = torch.arange(self.kernel[axis]) * self.dilation[axis] - self.padding[axis]
            where = coordinate[:, None] * self.stride[axis] + taps[None, :]
            size = self.source_shape[2 + axis]
            ok = (where >= 0) & (where < size)
            index = index.unsqueeze(-1) * size + where.reshape(len(place), *[1] * (axis + 1), -1)
            inside = inside.unsqueeze(-1) & ok.reshape(len(place), *[1] * (axis + 1), -1)
        return torch.where(inside, index, -1).flatten(1)

    def values(self, patch: Tensor) -> Tensor:
        """The input's values at flat indices, 0 in the padding; any memory format, no copy of the input."""
        assert self.x is not None
        taken = take(self.x.detach(), patch.clamp(min=0))
        return torch.where(patch >= 0, taken, torch.zeros((), dtype=taken.dtype))


def _linear(walk: _Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """``y = x W^T (+ b)`` as AddmmBackward or MmBackward: patches are rows of x."""
    biased = kind_of(node) == "AddmmBackward"
    if biased and (node._saved_alpha != 1 or node._saved_beta != 1):
        return False
    bias_edge = node.next_functions[0] if biased else (None, 0)
    x_edge, w_edge = node.next_functions[1 if biased else 0], node.next_functions[2 if biased else 1]
    transpose = w_edge[0]
    leaf = None
    if transpose is not None:
        leaf = walk.graph.leaf(transpose.next_functions[0][0]) if kind_of(transpose) == "TBackward" else None
        if leaf is None:
            return False
    samples, outputs = shape_of(node, number)
    place = [torch.where(index >= 0, index // outputs, -1) for index in (d.plus, d.minus)]
    channel = [torch.where(index >= 0, index % outputs, -1) for index in (d.plus, d.minus)]
    if bias_edge[0] is not None:
        bias = walk.graph.leaf(bias_edge[0])
        if bias is None or tuple(walk.graph.leaves.tensor(bias).shape) != (outputs,):
            return False
        walk.bias_entries(bias, channel[0], channel[1], owner, scaled)
    geometry = _LinearGeometry(node, biased, leaf is not None, samples)
    places, inverse = unique_pairs(place[0], place[1])
    patches = geometry.patch(places[:, 0]), geometry.patch(places[:, 1])
    if leaf is not None:
        sides = _Units(place[0], channel[0]), _Units(place[1], channel[1])
        _weight_parts(walk, leaf, geometry, patches, inverse, sides, owner, scaled)  # type: ignore[arg-type]
    if x_edge[0] is not None:
        _patch_boundary(walk, x_edge, patches, inverse, owner, scaled)
    return True


class _LinearGeometry:
    def __init__(self, node: Node, biased: bool, trainable: bool, samples: int) -> None:
        self.x: Tensor | None = None
        if trainable:
            self.x = node._saved_mat1 if biased else node._saved_self
        features = node._saved_mat1_sym_sizes[1] if biased else node._saved_self_sym_sizes[1]
        self.source_shape = (samples, int(features))

    def patch(self, place: Tensor) -> Tensor:
        features = self.source_shape[1]
        index = place[:, None] * features + torch.arange(features)[None, :]
        return torch.where(place[:, None] >= 0, index, -1)

    values = _ConvGeometry.values


_Rule = Callable[[_Walk, Node, int, Differences, Tensor, bool], bool]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(SAME_UNITS, _same),
    **dict.fromkeys(["AddBackward", "SubBackward", "RsubBackward"], _add),
    **dict.fromkeys(
        [
            "PermuteBackward",
            "TransposeBackward",
            "TBackward",
            "SliceBackward",
            "SelectBackward",
            "CatBackward",
            "StackBackward",
            "ConstantPadNdBackward",
            "FlipBackward",
            "RollBackward",
        ],
        _move,
    ),
    "NegBackward": _neg,
    "ExpandBackward": _expand_view,
    "NativeBatchNormBackward": _batch_norm,
    "ConvolutionBackward": _convolution,
    "AddmmBackward": _linear,
    "MmBackward": _linear,
}
