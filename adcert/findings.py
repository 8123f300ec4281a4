"""What the decisions of one record come to, and what they are made with: plain records."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .between import Free
from .bias import Bias
from .differences import Differences, RowSet, unique_pairs
from .layers import Graph, Order
from .records import OpRecord
from .stages import Stages


@dataclass(frozen=True, eq=False)
class Ranks:
    """Rank of every leaf: 2 i for layer i's weights, 2 i + 1 for the biases that are split off them."""

    order: Order[OpRecord]
    of: dict[str, int]
    bias: dict[OpRecord, Bias]


@dataclass(frozen=True, eq=False)
class Scope:
    """What resolving a record needs: the graph, the ranks of its leaves, and the mode.

    ``layered``: False where the parameters have no order by depth, so that only rows over all parameters count.
    """

    graph: Graph
    ranks: Ranks
    strict: bool
    layered: bool = True


@dataclass(frozen=True, eq=False)
class Pending:
    """Differences of ``record``'s y that only a partial backward pass can settle, or give whole rows of.

    ``uses``: of every decision that rests on one of them, its number; ``windows``: that decision's window, for ties.
    ``stages``: set where :func:`adcert.ties.normalized_rows` can write their rows instead.
    """

    record: OpRecord
    differences: Differences
    rule: str
    uses: Tensor
    windows: Tensor | None
    stages: Stages | None = None

    def select(self, keep: Tensor) -> Pending:
        """The differences of this mask, with the decisions that rest on them."""
        mine = keep[self.uses]
        windows = None if self.windows is None else self.windows[mine]
        uses = (torch.cumsum(keep, 0) - 1)[self.uses[mine]]
        return Pending(self.record, self.differences.select(keep), self.rule, uses, windows, self.stages)

    def merged(self) -> Pending:
        """Each difference once."""
        places, inverse = unique_pairs(self.differences.plus, self.differences.minus)
        distinct = Differences(places[:, 0], places[:, 1])
        return Pending(self.record, distinct, self.rule, inverse[self.uses], self.windows, self.stages)


@dataclass(frozen=True, eq=False)
class Bulk:
    """Ties whose rows are exact patch differences of the stages' first convolution, before any patch is gathered.

    ``weight``: its leaf; ``chosen``, ``other``: flat units of its output, int64 [K].
    """

    stages: Stages
    weight: str
    chosen: Tensor
    other: Tensor

    def __len__(self) -> int:
        return int(self.chosen.numel())

    def head(self, count: int) -> Bulk:
        return Bulk(self.stages, self.weight, self.chosen[:count], self.other[:count])


@dataclass(eq=False)
class Findings:
    """What the decisions of one record came to.

    ``mixed``: touches whose proxy is no one-sided derivative, which only :mod:`adcert.hull` does without.
    ``unsettled``: about its row in a layered system, which the joint system does
    without. ``deep``: differences whose layered row is not the whole gradient, or is unsettled.
    """

    windows: int = 0
    ties: int = 0
    touches: int = 0
    exemptions: Counter[str] = field(default_factory=Counter)
    rowsets: list[RowSet] = field(default_factory=list)
    bulk: list[Bulk] = field(default_factory=list)
    pending: list[Pending] = field(default_factory=list)
    deep: list[Pending] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)  # even splits that no system covers
    unsettled: list[str] = field(default_factory=list)
    open: list[Tensor] = field(default_factory=list)  # windows with a member that is not in T_j, in pieces
    free: Free = field(default_factory=Free)
    rests: bool = False  # something was decided by gradients of earlier layers, not by the own layer alone
    unlisted: int = 0  # rows that were counted only, since others prove a system empty
    partial: int = 0  # differences that went through the partial backward engine, and the seconds they took
    seconds: float = 0.0

    def own_alone(self) -> bool:
        """Before anything pending is settled: did E2, E3, biases and exact own rows of touches decide everything?"""
        rules = {rule for rule, count in self.exemptions.items() if count}
        ties = any(rowset.rule == "tie" for rowset in self.rowsets)
        return not (self.pending or self.bulk or ties or rules - {"bias", "flat", "irrelevant"})

    @property
    def differing(self) -> int:
        """Number of windows whose S_j \\ T_j is nonempty, as far as it is known."""
        seen = np.zeros(self.windows if self.open else 0, dtype=np.bool_)
        for windows in self.open:
            seen[windows.numpy()] = True
        return int(np.count_nonzero(seen))

    def settle(self, pending: Pending, zero: Tensor) -> None:
        """Take in which of the pending differences were proved to be zero."""
        discharged = zero[pending.uses]
        self.exemptions["zero gradient" if pending.rule == "touch" else "congruent"] += int(discharged.sum())
        if pending.windows is not None:
            self.open.append(pending.windows[~discharged])
