"""Theorem E4's joint system: one strict system over all parameters, whatever their order (THEORY.md, section 5).

AD's gradient is a Bouligand subgradient if a single p has ``<g, p> > 0`` for every row g: the gradient, with respect to
every trainable leaf, of a difference that no rule discharged. There are no layers in it, so it covers parameters that
are used again downstream (weight tying, recurrence), and it is nonempty wherever the lexicographic system is. What it
costs is a partial backward pass for every row that is not whole already, and those need activations. So the rows are
taken right before a backward pass frees them, if there is no other system (:meth:`Joint.alone`), or if the layered one
is in trouble, or if they cost next to nothing (:meth:`Joint.second`).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import backward
from .differences import Differences, RowSet
from .findings import Findings, Pending, Scope
from .partial import SECONDS, ball_parts
from .records import OpRecord
from .systems import Solved, System, solve
from .ties import exact_rows, normalized_rows

FEW = 64  # differences a second try may send through the partial backward engine
MANY = 1024  # differences of a step that has no other system
ENTRIES = 1 << 23  # of all rows over all their columns
EAGER = 100_000  # rows x trainable parameters of a network so small that its rows are taken in any case
_LIGHT = 1 << 18  # rows x units of such a network
_PLENTY = 256  # rows of a layered system that are not decided on the training thread

Fresh = Mapping[OpRecord, Findings]


class Refused(Exception):
    """Why the joint rows of a graph are not to be had."""


@dataclass(eq=False)
class Joint:
    """The joint rows of a step, graph by graph.

    ``missing``: why some graph has none, or "". ``pairs``: differences that went through the partial backward engine.
    """

    rowsets: list[RowSet] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    missing: str = ""
    pairs: int = 0

    def alone(self, scope: Scope, fresh: Fresh) -> None:
        """Rows of a graph without a layered system: what is pending goes through the engine."""
        deadline = time.monotonic() + SECONDS
        waiting = [pending for found in fresh.values() for pending in found.pending]
        try:
            _bounded(scope, waiting, MANY)
            for found in fresh.values():
                found.rowsets += [exact_rows(scope, rows) for rows in found.bulk]
                for pending in found.pending:
                    if pending.stages is not None:
                        pending = _normalized(scope, pending, found)
                    rows, zero = self._rows(scope, pending, deadline)
                    found.settle(pending, zero)
                    found.rowsets += rows
            self.rowsets += [rows for found in fresh.values() for rows in found.rowsets]
        except Refused as reason:
            self.missing = self.missing or str(reason)
        for found in fresh.values():
            found.bulk.clear()
            found.pending.clear()

    def second(self, scope: Scope, fresh: Fresh, earlier: Iterable[Findings], empty: Iterable[str]) -> None:
        """Rows of a graph that has a layered system, if they are cheap, or if that one is in trouble.

        ``earlier``: findings of the graphs before it; their rows may contradict the new ones. ``empty``: leaves of
        systems that are proved empty already.
        """
        deadline = time.monotonic() + SECONDS
        deep = _merged(pending for found in fresh.values() for pending in found.deep)
        for found in fresh.values():
            found.deep.clear()
        if self.missing:
            return
        try:
            systems = by_rank(scope, [*earlier, *fresh.values()])
            for leaf in empty:
                _hopeless(systems[scope.ranks.of[leaf]])
            if any(found.unlisted for found in fresh.values()):
                raise Refused("rows were left out, because others contradict each other")
            if deep and not _light(scope, deep):
                _bounded(scope, deep, FEW)
                _troubled(scope, systems, any(found.unsettled for found in (*earlier, *fresh.values())))
            for pending in deep:
                self.rowsets += self._rows(scope, pending, deadline)[0]
            self.rowsets += [rows for found in fresh.values() for rows in found.rowsets if not rows.below]
        except Refused as reason:
            self.missing = str(reason)

    def _rows(self, scope: Scope, asked: Pending, deadline: float) -> tuple[list[RowSet], Tensor]:
        """Whole gradients of the differences, and the mask of those that are exactly zero."""
        record, rowsets = asked.record, []
        self.pairs += len(asked.differences)
        zero = torch.zeros(len(asked.differences), dtype=torch.bool)
        doubts = 0
        try:
            for batch in backward.gradients(scope.graph, record.edge, asked.differences):
                nothing = torch.ones(batch.count, dtype=torch.bool)
                open_ = torch.ones(batch.count, dtype=torch.bool)
                for ball in batch.leaves.values():
                    nothing &= ball.zero().all(1)
                    open_ &= ~ball.nonzero().any(1)
                zero[batch.start : batch.start + batch.count] = nothing
                doubts += int((open_ & ~nothing).sum())
                if not bool(nothing.all()):
                    parts = ball_parts(scope.graph, batch.leaves, ~nothing)
                    rowsets.append(RowSet(record.name, asked.rule, int((~nothing).sum()), parts))
                if time.monotonic() > deadline:
                    raise Refused(f"its rows take more than {SECONDS:g} s of partial backward passes")
        except backward.Unsupported as error:
            raise Refused(f"{record.name}: no error bound for {error} in a partial backward pass") from error
        if doubts:
            self.doubts.append(f"{record.name}: {doubts} gradients are within rounding error of zero")
        return rowsets, zero


def _normalized(scope: Scope, pending: Pending, found: Findings) -> Pending:
    """Write the rows that :func:`adcert.ties.normalized_rows` can, whole ones here; returns the others."""
    pending = pending.merged()
    written = normalized_rows(scope, pending, found)
    found.settle(pending.select(written), torch.zeros(int(written.sum()), dtype=torch.bool))
    return pending.select(~written)


def _merged(pending: Iterable[Pending]) -> list[Pending]:
    """Each difference of a record and a rule once."""
    groups: dict[tuple[OpRecord, str], list[Differences]] = defaultdict(list)
    for item in pending:
        groups[item.record, item.rule].append(item.differences)
    merged = []
    for (record, rule), members in groups.items():
        plus, minus = torch.cat([d.plus for d in members]), torch.cat([d.minus for d in members])
        merged.append(Pending(record, Differences(plus, minus), rule, torch.arange(len(plus)), None).merged())
    return merged


def _count(pending: Iterable[Pending]) -> int:
    return sum(len(item.differences) for item in pending)


def _light(scope: Scope, deep: list[Pending]) -> bool:
    """Rows of a network so small that they cost next to nothing."""
    parameters = sum(leaf.numel() for leaf in scope.graph.leaves.trainable().values())
    units = sum(math.prod(record.input_shape) for record in scope.graph.record_of.values())
    return _count(deep) * parameters <= EAGER and _count(deep) * units <= _LIGHT


def _bounded(scope: Scope, pending: list[Pending], most: int) -> None:
    count, order = _count(pending), scope.ranks.order
    if count > most:
        raise Refused(f"{count} differences need a partial backward pass, limit {most}")
    leaves = frozenset(leaf for item in pending for leaf in order.own[item.record] | order.upstream[item.record])
    columns = sum(scope.graph.leaves.tensor(leaf).numel() for leaf in leaves)
    if count * columns > ENTRIES:
        raise Refused(f"{count} rows of {columns:,} parameters, limit {ENTRIES:,} entries")


def by_rank(scope: Scope, findings: Iterable[Findings]) -> dict[int, list[RowSet]]:
    """The rows of every layered system."""
    systems: dict[int, list[RowSet]] = defaultdict(list)
    for rowset in (rowset for found in findings for rowset in found.rowsets if rowset.parts):
        systems[scope.ranks.of[rowset.parts[0].leaf]].append(rowset)
    return systems


def _whole(rowsets: list[RowSet]) -> bool:
    """Every row is the whole gradient."""
    return not any(rowset.below for rowset in rowsets)


def _hopeless(rowsets: list[RowSet]) -> None:
    """A layered system that is empty; if its rows are whole, they are the joint system's and contradict there too."""
    if rowsets and _whole(rowsets):
        raise Refused(f"the rows of {rowsets[0].op} contradict each other, whatever else moves")


def _troubled(scope: Scope, systems: dict[int, list[RowSet]], doubts: bool) -> None:
    """Return if the joint system may do what the layered one does not; else say why it is not needed, or no help."""
    shapes = {leaf: tuple(scope.graph.leaves.tensor(leaf).shape) for leaf in scope.ranks.of}
    few = {rank: rows for rank, rows in systems.items() if sum(rowset.count for rowset in rows) <= _PLENTY}
    partly = [rank for rank, rows in systems.items() if not _whole(rows)]
    for rank in partly:
        if rank not in few:
            raise Refused(f"more than {_PLENTY} rows in the layered system of {systems[rank][0].op}")

    def solved(rank: int) -> Solved:
        return solve(System(few[rank][0].op, rank, few[rank], shapes), short=True)

    if not doubts and all(block.direction is not None for rank in partly for block in solved(rank).blocks):
        raise Refused("in one backward pass the rows that reach several layers have directions, and were not kept")
    for rank in few.keys() - set(partly):
        if solved(rank).empty:
            _hopeless(few[rank])
