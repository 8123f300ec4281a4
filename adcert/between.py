"""Touches whose proxy lies strictly between the one-sided derivatives: in dC by Theorem E5.

A class is a touch, or all touches whose units add one bias entry and have one ``lambda`` (proxy = lambda D- +
(1 - lambda) D+). A path through the network meets a class at most once, so AD's gradient is affine in each lambda; it
is a convex combination of the gradients with every class at one side. Each of these is in dB by E4 if the system has a
direction for every choice of their signs, which it has where the rows of a block that holds such a touch are linearly
independent, one row for each class, and where nothing else depends on the choice: a decision downstream may rest on its
own layer only, not on gradients of earlier ones.

Such rows bear the rule "free". They join the others at the end of the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .certificate import FREE, Block
from .differences import Differences, RowSet, unit_parts
from .independence import independent
from .records import OpRecord

if TYPE_CHECKING:
    from .findings import Findings

@dataclass(frozen=True, eq=False)
class Classes:
    """Bias entries of one record's touches: ``groups`` int64 [K], entries of ``leaf``; ``weight``: their lambda."""

    op: str
    leaf: str
    groups: Tensor
    weight: Fraction
    below: frozenset[str]


@dataclass(eq=False)
class Free:
    """What one record's touches of this kind come to: bias entries, and exact rows of the own layer."""

    classes: list[Classes] = field(default_factory=list)
    rowsets: list[RowSet] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.classes or self.rowsets)


def joined(found: Iterable[Free], shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[RowSet], list[str]]:
    """The rows of a whole step, one for each class, and why some bias entry is no class."""
    rowsets, doubts = [], []
    weights: dict[tuple[str, int], set[Fraction]] = defaultdict(set)
    members: dict[str, list[Classes]] = defaultdict(list)
    for free in found:
        rowsets += free.rowsets
        for item in free.classes:
            members[item.leaf].append(item)
            for group in item.groups.tolist():
                weights[item.leaf, group].add(item.weight)
    for leaf, items in members.items():
        groups = torch.unique(torch.cat([item.groups for item in items]))
        if any(len(weights[leaf, group]) > 1 for group in groups.tolist()):
            doubts.append(f"{items[0].op}: units that share an entry of {leaf} touch kinks with several lambdas")
        below = frozenset[str]().union(*(item.below for item in items))
        d = Differences(torch.full_like(groups, -1), groups)
        parts = tuple(unit_parts(leaf, shapes[leaf], d, torch.arange(len(groups))))
        rowsets.append(RowSet(items[0].op, FREE, len(groups), parts, below))
    return rowsets, doubts


def entangled(above: Mapping[OpRecord, set[OpRecord]], findings: Mapping[OpRecord, Findings]) -> list[str]:
    """Records that were decided by gradients of earlier layers, some of which have proxies between the sides."""
    doubts = []
    for record, found in findings.items():
        if not found.rests:
            continue
        for source in above[record] | ({record} if found.windows else set()):
            if source in findings and findings[source].free:
                doubts.append(f"{record.name}: rests on proxies of {source.name} between the one-sided derivatives")
    return doubts


def judged(block: Block) -> Block:
    """A decided block as it is, unless it holds free rows: then what counts is that its rows are independent."""
    free = [k for k, rule in enumerate(block.rules) if rule == FREE]
    if not free or (block.proof is not None and not set(block.proof.rows) & set(free)):
        return block
    if block.direction is not None and independent(block.rows, block.minus, block.radius):
        return block
    reason = f"{len(free)} touches have proxies between the one-sided derivatives, and rows that are not independent"
    return replace(block, direction=None, proof=None, reason=reason)
