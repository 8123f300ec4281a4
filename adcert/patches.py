"""Rules of :mod:`adcert.rows` for convolutions and linear layers: rows are differences of input patches.

Both terms of a difference are kept, so nothing rounds. Which patch elements differ decides what is left for the layers
below. Units of one channel share their filter: equal patches elements cancel. Units of different channels do not, so
each of them is followed by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .differences import Boundary, Differences, Part, unique_pairs
from .layers import kind_of, shape_of, spacing
from .nodes import Node
from .transfer import take

if TYPE_CHECKING:
    from .rows import Walk

CHUNK = 1 << 21  # elements of gathered patches held at once


def convolution(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """Patch differences for the weight, +-1 for the bias, patch elements for the input."""
    weight_edge, bias_edge = node.next_functions[1], node.next_functions[2]
    weight, bias = walk.graph.leaf(weight_edge[0]), walk.graph.leaf(bias_edge[0])
    computed = weight_edge[0] is not None and weight is None
    if node._saved_transposed or (bias_edge[0] is not None and bias is None):
        return False
    out = shape_of(node, number)
    if bias is not None:
        inner = math.prod(out[2:])
        channels = [torch.where(index >= 0, index // inner % out[1], -1) for index in (d.plus, d.minus)]
        walk.bias_entries(bias, channels[0], channels[1], owner, scaled)
    if weight is not None or computed or node.next_functions[0][0] is not None:
        geometry = _ConvGeometry(node, number)
        sides = geometry.sides(d)
        if computed:
            _computed_weight(walk, geometry, sides, owner)
        _through(walk, geometry, weight, node.next_functions[0], sides, owner, scaled)
    return True


def linear(walk: Walk, node: Node, number: int, d: Differences, owner: Tensor, scaled: bool) -> bool:
    """``y = x W^T (+ b)`` as AddmmBackward or MmBackward: patches are rows of x."""
    biased = kind_of(node) == "AddmmBackward"
    if biased and (node._saved_alpha != 1 or node._saved_beta != 1):
        return False
    bias_edge = node.next_functions[0] if biased else (None, 0)
    x_edge, w_edge = node.next_functions[1 if biased else 0], node.next_functions[2 if biased else 1]
    transpose = w_edge[0]
    leaf = None
    if transpose is not None and kind_of(transpose) == "TBackward":
        leaf = walk.graph.leaf(transpose.next_functions[0][0])
    geometry = _LinearGeometry(node, biased, transpose is not None, shape_of(node, number))
    sides = geometry.sides(d)
    if bias_edge[0] is not None:
        bias = walk.graph.leaf(bias_edge[0])
        if bias is None or tuple(walk.graph.leaves.tensor(bias).shape) != (geometry.outputs,):
            return False
        walk.bias_entries(bias, sides[0].channel, sides[1].channel, owner, scaled)
    if transpose is not None and leaf is None:
        _computed_weight(walk, geometry, sides, owner)
    _through(walk, geometry, leaf, x_edge, sides, owner, scaled)
    return True


@dataclass(frozen=True, eq=False)
class _Units:
    """Conv output units: a place number (sample, group, position) and the channel; -1 for the zero function."""

    place: Tensor
    channel: Tensor

    def select(self, rows: Tensor) -> _Units:
        return _Units(self.place[rows], self.channel[rows])


_Sides = tuple[_Units, _Units]


def _through(
    walk: Walk,
    geometry: _ConvGeometry | _LinearGeometry,
    leaf: str | None,
    edge: tuple[Node, int],
    sides: _Sides,
    owner: Tensor,
    scaled: bool,
) -> None:
    """Weight parts and input boundary of differences of units, in chunks of distinct pairs of places."""
    plus, minus = sides
    joint = (plus.channel == minus.channel) | (plus.channel < 0) | (minus.channel < 0)
    places, inverse = unique_pairs(plus.place, minus.place)
    step = max(1, CHUNK // max(1, geometry.patch_size))
    for start in range(0, len(places), step):
        inside = (inverse >= start) & (inverse < start + step)
        chunk = places[start : start + step]
        patches = geometry.patch(chunk[:, 0]), geometry.patch(chunk[:, 1])
        if leaf is not None:
            rows = torch.nonzero(inside).flatten()
            chosen = plus.select(rows), minus.select(rows)
            _weight_parts(walk, leaf, geometry, patches, inverse[rows] - start, chosen, owner[rows], scaled)
        if edge[0] is not None:
            rows = torch.nonzero(inside & joint).flatten()
            _patch_boundary(walk, edge, patches, inverse[rows] - start, owner[rows])
    apart = torch.nonzero(~joint).flatten()
    if edge[0] is not None and len(apart):
        nothing = _Units(torch.full_like(apart, -1), torch.full_like(apart, -1))
        for side in sides:
            _through(walk, geometry, None, edge, (side.select(apart), nothing), owner[apart], scaled)


def _computed_weight(walk: Walk, geometry: _ConvGeometry | _LinearGeometry, sides: _Sides, owner: Tensor) -> None:
    """Of a weight that is a function of parameters little is said: equal patches under one filter cancel, and a patch
    of zeros is the zero function under any."""
    plus, minus = sides
    places, inverse = unique_pairs(plus.place, minus.place)
    differ = torch.zeros(len(places), dtype=torch.bool)
    filled = torch.zeros(len(places), dtype=torch.bool)
    step = max(1, CHUNK // max(1, geometry.patch_size))
    for start in range(0, len(places), step):
        chunk = places[start : start + step]
        first, second = (geometry.values(geometry.patch(chunk[:, side])) for side in (0, 1))
        differ[start : start + step] = (first != second).any(1)
        filled[start : start + step] = ((first != 0) | (second != 0)).any(1)
    apart = (plus.channel != minus.channel) & (plus.channel >= 0) & (minus.channel >= 0)
    walk.result.hard[owner[torch.where(apart, filled[inverse], differ[inverse])]] = True


def _weight_parts(
    walk: Walk,
    leaf: str,
    geometry: _ConvGeometry | _LinearGeometry,
    patches: tuple[Tensor, Tensor],
    inverse: Tensor,
    sides: _Sides,
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
    walk: Walk, edge: tuple[Node, int], patches: tuple[Tensor, Tensor], inverse: Tensor, owner: Tensor
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
    _to_records(walk, edge, differences, place[differ], full)


def _to_records(walk: Walk, edge: tuple[Node, int], differences: Differences, place: Tensor, inverse: Tensor) -> None:
    """Follow weighted differences through exact rules; they may meet records, but no parameter of the layer."""
    inner = walk.inner(edge, differences)
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
        self.stride, self.padding, self.dilation = spacing(node)
        kernel = shape_of(*weight)[2:] if weight[0] is not None else tuple(node._saved_weight.shape)[2:]
        self.kernel = tuple(int(k) for k in kernel)
        assert len(self.kernel) == spatial
        self.per_group = self.source_shape[1] // self.groups
        self.patch_size = self.per_group * math.prod(self.kernel)

    def sides(self, d: Differences) -> _Sides:
        return self._split(d.plus), self._split(d.minus)

    def _split(self, index: Tensor) -> _Units:
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


class _LinearGeometry:
    """``x`` [N, features]: a place is a sample, its patch the sample's row."""

    def __init__(self, node: Node, biased: bool, trainable: bool, out: tuple[int, ...]) -> None:
        self.outputs = out[1]
        self.x: Tensor | None = None
        if trainable:
            self.x = node._saved_mat1 if biased else node._saved_self
        features = node._saved_mat1_sym_sizes[1] if biased else node._saved_self_sym_sizes[1]
        self.source_shape = (out[0], int(features))
        self.patch_size = int(features)

    def sides(self, d: Differences) -> _Sides:
        plus, minus = (
            _Units(torch.where(i >= 0, i // self.outputs, -1), torch.where(i >= 0, i % self.outputs, -1))
            for i in (d.plus, d.minus)
        )
        return plus, minus

    def patch(self, place: Tensor) -> Tensor:
        features = self.source_shape[1]
        index = place[:, None] * features + torch.arange(features)[None, :]
        return torch.where(place[:, None] >= 0, index, -1)

    def values(self, patch: Tensor) -> Tensor:
        """The input's values at flat indices."""
        assert self.x is not None
        return take(self.x.detach(), patch.clamp(min=0)).masked_fill(patch < 0, 0)
