"""Random ties and stages above them, for the native resolver: nothing a network has to be, all that it may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kernel_cases import Dice, dtype
from torch import Tensor

from adcert.ops import STAGE_INTS

CONSTANT, UNKNOWN, RELU, POOL, NORM, CONV = range(6)  # kinds of stages
IMAGES = ("zero", "constant", "tiles", "sparse", "random")

Axis = tuple[int, int, int, int, int, int]  # size, kernel, stride, padding, dilation, count


class Ties(NamedTuple):
    """The arguments of ``resolve_ties``."""

    windows: Tensor
    members: Tensor
    offsets: Tensor
    pool: list[int]
    stages: list[int]
    tensors: list[Tensor]


def ties(dice: Dice) -> Ties:
    channels = dice.one_of([1, 2, 4, 40])
    height, width = (_pooled(dice, dice.number(3, 14)) for _ in range(2))
    chain = Chain(dice, dtype(dice), dice.number(1, 3), dice.one_of(IMAGES), channels, height[0], width[0])
    offsets = chain.offsets(height, width)
    for _ in range(dice.one_of([1, 1, 2, 3, 4, 6])):
        chain.between()
        chain.convolution()
    chain.numbers += [dice.one_of([CONSTANT, CONSTANT, UNKNOWN]), *[0] * (STAGE_INTS - 1)]
    windows, members = _members(dice, offsets.numel(), height, width)
    return Ties(windows, members, offsets, [*height, *width], chain.numbers, chain.tensors)


def full_table(differs: bool) -> Ties:
    """Two windows over 200 x 200 pixels each, whose 40,000 pairs of pixels have to be compared one by one.

    That is more than the first table of a GPU has room for. ``differs``: one of the pairs is not equal.
    """
    side = 200
    ones = torch.ones(1, 1, side, side + 1)
    top = ones.clone()
    if differs:
        top[0, 0, 150, 77] = 2
    window, plane = (side, side, 1, 0, 1, 1, side + 1, side, 1, 0, 1, 2), (*_point(side), *_point(side + 1))
    conv, relu = [CONV, 0, 0, -1, 1, 1, 1, *window], [RELU, 1, 1, -1, 1, 1, 1, *plane]
    above = [CONV, 0, 2, -1, 1, 1, 1, *plane]
    pair = torch.tensor([0]), torch.tensor([[0b11]]), torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    pool = [1, 1, 1, 0, 1, 1, 2, 2, 2, 0, 1, 1]
    return Ties(*pair, pool, conv + relu + above + [CONSTANT] * STAGE_INTS, [ones, ones, top])


@dataclass
class Chain:
    """Stages from the pooling with the ties upwards; channels, height and width are those the next has to put out."""

    dice: Dice
    dtype: torch.dtype
    batch: int
    images: str
    channels: int
    height: int
    width: int
    fresh: bool = False  # right above a convolution, where no normalisation may be
    numbers: list[int] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def between(self) -> None:
        """ReLUs, poolings and at most one normalisation, below the next convolution."""
        for _ in range(self.dice.one_of([0, 1, 1, 2])):
            kind = self.dice.one_of([RELU, POOL, NORM])
            if kind == POOL:
                self.pooling()
            elif kind == RELU:
                self.pointwise(RELU)
            elif not self.fresh:
                self.pointwise(NORM)
                break
        if self.fresh:
            self.pointwise(RELU)

    def pointwise(self, kind: int) -> None:
        values = self.values(self.channels, self.height, self.width)
        self._add(kind, kind == RELU, values, None, self.channels, 1, _point(self.height), _point(self.width))

    def pooling(self) -> None:
        height, width = self._pooling_axis(self.height), self._pooling_axis(self.width)
        relu = self.dice.chance(0.5)
        values = self.values(self.channels, self.height, self.width) if relu else None
        self._add(POOL, relu, values, self.offsets(height, width), self.channels, 1, height, width)

    def convolution(self) -> None:
        """Of one to three groups of channels; now and then of more channels than a warp has lanes."""
        height, width = self._convolution_axis(self.height), self._convolution_axis(self.width)
        groups = self.dice.one_of([g for g in (1, 1, 2, self.channels) if self.channels % g == 0])
        channels = groups * self.dice.one_of([1, 2, 3, 35 if groups == 1 else 1])
        values = self.values(channels, height[0], width[0])
        self._add(CONV, False, values, None, channels, groups, height, width)

    def values(self, channels: int, height: int, width: int) -> Tensor:
        """Images with much that is equal, in one of three layouts."""
        dice, shape = self.dice, (self.batch, channels, height, width)
        if self.images == "tiles":
            tile = dice.integers(-1, 2, self.batch, channels, dice.number(1, 3), dice.number(1, 3))
            rows, columns = torch.arange(height) % tile.shape[2], torch.arange(width) % tile.shape[3]
            x = tile[:, :, rows][:, :, :, columns]
        elif self.images == "sparse":
            x = dice.which(0.08, *shape) * dice.integers(-1, 2, *shape)
        elif self.images == "random":
            x = dice.integers(0, 1, *shape)
        else:
            x = torch.full(shape, int(self.images == "constant"))
        x = x.to(self.dtype)
        if dice.chance(0.3):
            x[(x == 0) & dice.which(0.3, *shape)] = -0.0
        if dice.chance(0.4):
            x[tuple(dice.number(0, size - 1) for size in shape)] = 2
        if dice.chance(0.3):
            return x.contiguous(memory_format=torch.channels_last)
        return torch.cat([x, -x], 1).unflatten(1, (2, channels))[:, 0] if dice.chance(0.2) else x

    def offsets(self, height: Axis, width: Axis) -> Tensor:
        """Any member of its window; some lie in the padding."""
        shape, taps = (self.batch, self.channels, height[5], width[5]), height[1] * width[1]
        narrow = torch.uint8 if self.dice.chance(0.8) else torch.int32
        if self.dice.chance(0.6):
            return torch.full(shape, self.dice.number(0, taps - 1), dtype=narrow)
        return self.dice.integers(0, taps - 1, *shape).to(narrow)

    def _add(
        self,
        kind: int,
        relu: bool,
        values: Tensor | None,
        offsets: Tensor | None,
        channels: int,
        groups: int,
        height: Axis,
        width: Axis,
    ) -> None:
        places = []
        for tensor in (values, offsets):
            places.append(-1 if tensor is None else len(self.tensors))
            self.tensors += [] if tensor is None else [tensor]
        self.numbers += [kind, int(relu), *places, channels, groups, self.channels, *height, *width]
        self.channels, self.height, self.width, self.fresh = channels, height[0], width[0], kind == CONV

    def _pooling_axis(self, count: int) -> Axis:
        kernel, stride = self.dice.number(1, 3), self.dice.number(1, 2)
        padding = self.dice.number(0, kernel // 2)
        size = max(1, (count - 1) * stride + kernel - 2 * padding + self.dice.number(0, stride - 1))
        return size, kernel, stride, padding, 1, count

    def _convolution_axis(self, count: int) -> Axis:
        while True:
            kernel, stride, dilation = self.dice.number(1, 3), self.dice.one_of([1, 1, 2]), self.dice.one_of([1, 1, 2])
            padding = self.dice.one_of([0, 0, 1, kernel])
            spare = self.dice.number(0, stride - 1)
            size = (count - 1) * stride + dilation * (kernel - 1) + 1 - 2 * padding + spare
            if 1 <= size <= max(24, count):
                return size, kernel, stride, padding, dilation, count


def _point(size: int) -> Axis:
    return size, 1, 1, 0, 1, size


def _pooled(dice: Dice, size: int) -> Axis:
    """An axis of the pooling with the ties."""
    kernel, stride, dilation = dice.one_of([1, 2, 2, 3, 3, 4, 9]), dice.number(1, 3), dice.one_of([1, 1, 2])
    padding = dice.number(0, kernel // 2)
    count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return (size, kernel, stride, padding, dilation, count) if count > 0 else _point(size)


def _members(dice: Dice, units: int, height: Axis, width: Axis) -> tuple[Tensor, Tensor]:
    """Some windows, ascending, and in each some of the taps: most of them inside the image."""
    taps = height[1] * width[1]
    count = dice.number(0, min(units, dice.one_of([5, 60, 300]) if taps <= 16 else 5))
    windows = torch.randperm(units, generator=dice.tensors)[:count].sort().values
    place, tap = windows % (height[5] * width[5]), torch.arange(taps)
    rows = (place // width[5] * height[2] - height[3])[:, None] + tap // width[1] * height[4]
    columns = (place % width[5] * width[2] - width[3])[:, None] + tap % width[1] * width[4]
    inside = (rows >= 0) & (rows < height[0]) & (columns >= 0) & (columns < width[0])
    chosen = inside & dice.which(0.7, count, taps) | dice.which(0.01, count, taps)
    words = F.pad(chosen, (0, -taps % 64)).unflatten(1, (-1, 64)).long()
    return windows, (words << torch.arange(64)).sum(2)
