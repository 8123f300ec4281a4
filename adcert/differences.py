"""Differences of two units' gradients, and what is known of them inside one layer: plain records, no graph."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .records import OpRecord
from .transfer import Arrival


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
class RowSet:
    """``count`` rows of one rule whose entries, in leaves of one rank, are spread over ``parts``.

    ``op``: name of the record they belong to. ``below``: leaves in which these rows may be nonzero too; they must
    rank lower, which is checked again at the end of the step. A row without any part is a zero row. ``arrival``: of
    the parts' ``plus`` and ``minus`` where they come from a device; a :class:`adcert.systems.System` waits for it.
    """

    op: str
    rule: str
    count: int
    parts: tuple[Part, ...]
    below: frozenset[str] = frozenset()
    arrival: Arrival | None = None


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


def unique_pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct pairs [U, 2] of int64 numbers >= -1 and the number of every pair, as ``torch.unique`` of rows."""
    if len(first) == 0:
        return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    size = int(second.max()) + 2
    keys, inverse = torch.unique((first + 1) * size + second + 1, return_inverse=True)
    return torch.stack([keys // size - 1, keys % size - 1], 1), inverse


def broadcast_index(index: Tensor, out: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    if out == shape:
        return index
    table = torch.arange(math.prod(shape)).reshape(shape).expand(out)
    moved = table[torch.unravel_index(index.clamp(min=0), out)] if out else table.expand(len(index))
    return torch.where(index >= 0, moved, -1)
