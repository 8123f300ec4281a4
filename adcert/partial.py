"""Rows that only a partial backward pass can give: rounded, with radii, each placed in its deepest nonzero rank."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from . import backward
from .balls import Ball
from .differences import Part, RowSet, groups_of
from .findings import Findings, Pending, Scope
from .layers import Graph
from .records import OpRecord
from .ties import normalized_rows

SECONDS = 2.0  # for one record's partial backward passes
LIMIT = 16384  # differences one record may send through the partial backward engine in a step


def finish(scope: Scope, found: Findings) -> None:
    """Settle what is pending by partial backward passes, or leave a doubt."""
    for pending in found.pending:
        if pending.stages is not None:
            pending = pending.merged()
            written = normalized_rows(scope, pending, found)
            found.settle(pending.select(written), torch.zeros(int(written.sum()), dtype=torch.bool))
            if scope.ranks.order.upstream[pending.record]:
                found.deep.append(pending.select(written))
            pending = pending.select(~written)
        if len(pending.differences):
            zero, whole = _partial_rows(scope, pending, found)
            found.settle(pending, zero)
            if not bool((zero | whole).all()):
                found.deep.append(pending.select(~(zero | whole)))
    found.pending.clear()


def give_up(found: Findings, why: str) -> None:
    """Leave what is pending in doubt, for the reason given."""
    for pending in found.pending:
        count = len(pending.differences)
        found.unsettled.append(f"{pending.record.name}: {count} differences left, {why}")
        found.settle(pending, torch.zeros(count, dtype=torch.bool))
        found.deep.append(pending)
    found.pending.clear()


def _partial_rows(scope: Scope, pending: Pending, found: Findings) -> tuple[Tensor, Tensor]:
    """Rows by the partial backward engine.

    Returns the masks of differences that are proved to be exactly zero, and of those whose row is the whole gradient.
    """
    record, d, rule = pending.record, pending.differences, pending.rule
    proved, whole = (torch.zeros(len(d), dtype=torch.bool) for _ in range(2))
    if len(d) > LIMIT:
        found.unsettled.append(f"{record.name}: {len(d)} differences need a partial backward pass, limit {LIMIT}")
        return proved, whole
    found.partial += len(d)
    start = time.perf_counter()
    try:
        # First the own layer alone: only rows that vanish there need the pass through the layers below.
        for batch in _timed(backward.gradients(scope.graph, record.edge, d, local=True)):
            rows = torch.arange(batch.start, batch.start + batch.count)
            proved[rows], whole[rows] = _place(scope, record, batch, rule, found, own=True)
        left = torch.nonzero(proved).flatten()
        for batch in _timed(backward.gradients(scope.graph, record.edge, d.select(left))):
            rows = left[batch.start : batch.start + batch.count]
            proved[rows], whole[rows] = _place(scope, record, batch, rule, found, own=False)
    except TimeoutError:
        found.unsettled.append(
            f"{record.name}: {len(d)} differences take more than {SECONDS:g} s of partial backward passes"
        )
        proved[:] = False
    except backward.Unsupported as error:
        found.unsettled.append(f"{record.name}: no error bound for {error} in a partial backward pass")
        proved[:] = False
    found.seconds += time.perf_counter() - start
    return proved, whole


def _timed(batches: Iterator[backward.Gradients]) -> Iterator[backward.Gradients]:
    """Batches until the time is up; raises TimeoutError then."""
    start = time.perf_counter()
    for batch in batches:
        yield batch
        if time.perf_counter() - start > SECONDS:
            raise TimeoutError


def _place(
    scope: Scope, record: OpRecord, batch: backward.Gradients, rule: str, found: Findings, own: bool
) -> tuple[Tensor, Tensor]:
    """Put every row into the deepest rank where it is provably nonzero and everything deeper is provably zero.

    ``own``: the batch covers w_l only. Returns the masks of rows that are exactly zero in all it covers, and of those
    that were placed and have nothing below.
    """
    order = scope.ranks.order
    covered = [leaf for leaf in batch.leaves if not own or leaf in order.own[record]]
    state = torch.zeros(batch.count, dtype=torch.int64)  # 0 open, 1 placed, 2 in doubt
    whole = torch.zeros(batch.count, dtype=torch.bool)
    by_rank: dict[int, list[str]] = {}
    for leaf in covered:
        by_rank.setdefault(scope.ranks.of[leaf], []).append(leaf)
    below = set(covered) | (order.upstream[record] if own else set())
    for rank in sorted(by_rank, reverse=True):
        leaves = by_rank[rank]
        below -= set(leaves)
        zero = torch.stack([batch.leaves[leaf].zero().all(1) for leaf in leaves]).all(0)
        nonzero = torch.stack([batch.leaves[leaf].nonzero().any(1) for leaf in leaves]).any(0)
        here = (state == 0) & nonzero
        if scope.strict and not order.own[record] & set(leaves):
            # The own-layer row is exactly zero and the gradients differ: a zero row of P_l.
            if bool(here.any()):
                found.rowsets.append(RowSet(record.name, rule, int(here.sum()), ()))
        elif bool(here.any()):
            parts = ball_parts(scope.graph, {leaf: batch.leaves[leaf] for leaf in leaves}, here)
            found.rowsets.append(RowSet(record.name, rule, int(here.sum()), parts, frozenset(below)))
            whole |= here & (not below)
        state[here] = 1
        state[(state == 0) & ~zero] = 2
    if scope.strict and rule == "touch" and bool((state == 0).any()):
        found.rowsets.append(RowSet(record.name, rule, int((state == 0).sum()), ()))
        state[state == 0] = 1
    doubts = int((state == 2).sum())
    if doubts:
        found.unsettled.append(f"{record.name}: {doubts} differences are within rounding error of zero")
    return state == 0, whole


def ball_parts(graph: Graph, leaves: dict[str, Ball], rows: Tensor) -> tuple[Part, ...]:
    """The rows of this mask, bool [count], of balls [count, numel], without their groups of zeros."""
    parts = []
    for leaf, ball in leaves.items():
        groups, width = groups_of(tuple(graph.leaves.tensor(leaf).shape))
        value = ball.value[rows].reshape(-1, groups, width)
        radius = torch.zeros_like(value) if ball.radius is None else ball.radius[rows].reshape(-1, groups, width)
        owner, group = torch.nonzero(((value != 0) | (radius != 0)).any(2), as_tuple=True)
        plus = value[owner, group]
        held = radius[owner, group]
        parts.append(Part(leaf, owner, group, plus, torch.zeros_like(plus), False, held if bool(held.any()) else None))
    return tuple(parts)
