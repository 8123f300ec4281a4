"""Algorithm 1 on one graph: every touch and tie becomes a discharged decision, a row, or a reason for doubt.

Default: Algorithm 1 sharpened by E1 (zero gradients), E2 and E3 (irrelevance) and the lexicographic form of E4: a
row goes to the deepest layer in which it is provably nonzero while everything deeper is provably zero.
``strict``: the paper's own Algorithm 1, every row in its own layer, with Algorithm 2's shortcut (a shared or distinct
bias settles touches) only where that bias is really there.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import backward
from .balls import Ball
from .bias import Bias, bias_of
from .differences import Differences, Expansion, Part, RowSet, groups_of, unit_parts
from .equality import cell_inputs, follow, maximisers, prove_expansion_zero, selected_inputs, tied_members
from .layers import Graph, Order
from .records import OpRecord, take
from .relevance import rectified, relevant_inputs, relevant_outputs
from .rows import expand
from .systems import System, solve

CHEAP = 8  # differences worth a partial backward pass without asking whether it can matter
SECONDS = 2.0  # for one record's partial backward passes
PARTIAL_LIMIT = 4096  # differences one record may send through the partial backward engine in a step


@dataclass(eq=False)
class Findings:
    """What the decisions of one record came to."""

    windows: int = 0
    ties: int = 0
    touches: int = 0
    differing: int = 0
    exemptions: Counter[str] = field(default_factory=Counter)
    rowsets: list[RowSet] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    partial: int = 0  # differences that went through the partial backward engine, and the seconds they took
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Ranks:
    """Rank of every leaf: 2 i for layer i's weights, 2 i + 1 for the biases that are split off them."""

    order: Order
    of: dict[str, int]
    bias: dict[OpRecord, Bias]
    pairs: dict[OpRecord, tuple[Tensor, Differences]]  # of every record with ties: window, selected minus other


def rank_leaves(graph: Graph, order: Order, strict: bool) -> Ranks:
    """Split a layer's bias from its other parameters where every record of the layer agrees on it.

    The bias block of a same-group tie is exactly zero and that of a touch is -1, so ranking the bias above the
    weights settles all touches by moving every bias down (Algorithm 2's remark), without any row of the weights.
    """
    of: dict[str, int] = {}
    chosen: dict[OpRecord, Bias] = {}
    present = set(graph.record_of.values())
    tied = {record: _tied_pairs(record) for record in present if record.ties is not None}
    pairs = defaultdict(list)
    for record, (_, differences) in tied.items():
        base, followed = _follow(graph, record, differences, strict)
        pairs[base].append(followed)
    for index, layer in enumerate(order.layers):
        for leaf in layer.leaves:
            of[leaf] = 2 * index
        biases = {record: bias_of(graph, record, order.own[record]) for record in layer.records if record in present}
        if _splits(order, biases, pairs):
            for record, bias in biases.items():
                if bias is not None:
                    chosen[record] = bias
                    of[bias.leaf] = 2 * index + 1
    return Ranks(order, of, chosen, tied)


def _splits(order: Order, biases: dict[OpRecord, Bias | None], pairs: dict[OpRecord, list[Differences]]) -> bool:
    used = {bias.leaf for bias in biases.values() if bias is not None}
    for record, bias in biases.items():
        for leaf in order.own[record]:
            if leaf in used and (bias is None or bias.leaf != leaf):
                return False  # here the same parameter is not a bias
        for d in pairs[record] if bias is not None else []:
            both = (d.plus >= 0) & (d.minus >= 0)
            if bias is not None and not torch.equal(bias.group(d.plus[both]), bias.group(d.minus[both])):
                return False  # ties across biases: solve jointly with the weights
    return True


@dataclass(frozen=True, eq=False)
class Scope:
    """What resolving a record needs: the graph, the ranks of its leaves, and the mode."""

    graph: Graph
    ranks: Ranks
    strict: bool
    contradictions: list[str] = field(default_factory=list)  # layers whose exact rows are proved empty already


def decide_record(scope: Scope, record: OpRecord) -> Findings:
    """Discharge every touch and tie of a record."""
    found = Findings(touches=len(record.touches))
    _touches(scope, record, found)
    if record.ties is not None:
        found.windows = record.output.numel()
        found.ties = len(record.ties.windows)
        _ties(scope, record, found)
    return found


def _touches(scope: Scope, record: OpRecord, found: Findings) -> None:
    units = record.touches
    if len(units) and not scope.strict:
        keep = relevant_inputs(scope.graph, record, units)
        found.exemptions["irrelevant"] += int((~keep).sum())
        units = units[keep]
    base = record
    source = scope.graph.record_of.get(base.edge[0])
    while source is not None and rectified(scope.graph, source):  # max 0 under a ReLU: every maximiser touches
        base, units = source, maximisers(source, units)
        source = scope.graph.record_of.get(base.edge[0])
    if len(units):
        _resolve(scope, base, Differences(torch.full_like(units, -1), units), "touch", found)


def _tied_pairs(record: OpRecord) -> tuple[Tensor, Differences]:
    """(window, selected member minus other member) of every pair of every tie."""
    owner, cells = tied_members(record)
    members, chosen = cell_inputs(record, owner, cells), selected_inputs(record, owner)
    other = members != chosen
    return owner[other], Differences(chosen[other], members[other])


def _ties(scope: Scope, record: OpRecord, found: Findings) -> None:
    owner, d = scope.ranks.pairs[record]
    chosen, members = d.plus, d.minus
    if len(owner) and rectified(scope.graph, record):
        keep = take(record.output, owner) > 0
        found.exemptions["flat"] += int((~keep).sum())
        owner, members, chosen = owner[keep], members[keep], chosen[keep]
    if len(owner) and not scope.strict:
        keep = relevant_outputs(scope.graph, record, owner)
        found.exemptions["irrelevant"] += int((~keep).sum())
        owner, members, chosen = owner[keep], members[keep], chosen[keep]
    if len(owner):
        differing = _resolve(scope, record, Differences(chosen, members), "tie", found)
        found.differing = len(torch.unique(owner[differing]))


def _resolve(scope: Scope, record: OpRecord, differences: Differences, rule: str, found: Findings) -> Tensor:
    """Settle differences of y's units (``plus`` must win); returns the mask of those that were not discharged."""
    base, followed = _follow(scope.graph, record, differences, scope.strict)
    open_ = followed.plus != followed.minus
    found.exemptions["zero gradient" if rule == "touch" else "zero slope"] += int((~open_).sum())
    rows = torch.nonzero(open_).flatten()
    bias = scope.ranks.bias.get(base)
    if bias is not None and len(rows):
        current = followed.select(rows)
        plus = torch.where(current.plus >= 0, bias.group(current.plus.clamp(min=0)), -1)
        minus = torch.where(current.minus >= 0, bias.group(current.minus.clamp(min=0)), -1)
        moved = plus != minus
        _bias_rows(scope, base, bias, Differences(plus[moved], minus[moved]), rule, found)
        rows = rows[~moved]
    if len(rows):
        current = followed.select(rows)
        size = max(int(current.plus.max()), int(current.minus.max())) + 2
        keys, inverse = torch.unique((current.plus + 1) * size + current.minus + 1, return_inverse=True)
        distinct = Differences(keys // size - 1, keys % size - 1)
        zero = _own_rows(scope, base, distinct, rule, found)[inverse]
        name = "zero gradient" if rule == "touch" else "congruent"
        found.exemptions[name] += int(zero.sum())
        open_[rows[zero]] = False
    return open_


def _follow(graph: Graph, record: OpRecord, differences: Differences, strict: bool) -> tuple[OpRecord, Differences]:
    """Go through recorded operations that feed this one directly: their parameters are the deepest ones.

    In strict mode only from a pooling to the ReLU under it (one layer phi o rho of the paper).
    """
    steps = 0
    while True:
        source = graph.record_of.get(record.edge[0])
        if source is None:
            return record, differences
        joined = record.ties is not None and not record.relu and source.ties is None and steps == 0
        if strict and not joined:
            return record, differences
        record, differences, steps = source, follow(source, differences), steps + 1


def _bias_rows(scope: Scope, record: OpRecord, bias: Bias, groups: Differences, rule: str, found: Findings) -> None:
    if len(groups) == 0:
        return
    found.exemptions["bias"] += len(groups)
    pairs = torch.unique(torch.stack([groups.plus, groups.minus], 1), dim=0)
    shape = tuple(scope.graph.leaves.tensor(bias.leaf).shape)
    owner = torch.arange(len(pairs))
    parts = unit_parts(bias.leaf, shape, Differences(pairs[:, 0], pairs[:, 1]), owner)
    order = scope.ranks.order
    below = (order.upstream[record] | order.own[record]) - {bias.leaf}
    found.rowsets.append(RowSet(record, rule, len(pairs), tuple(parts), below))


def _own_rows(scope: Scope, record: OpRecord, d: Differences, rule: str, found: Findings) -> Tensor:
    """Rows of the own layer, exact where the structure allows; returns the mask of differences proved zero."""
    expansion = expand(scope.graph, record.edge, d)
    zero = torch.zeros(len(d), dtype=torch.bool)
    if not (scope.strict and rule == "touch"):  # the paper asks a row of every touch, even a zero one
        zero = prove_expansion_zero(scope.graph, expansion)
    # Leaves of earlier layers that skip into tau_l are reached on other paths too: only w_l's parts are whole.
    expansion.parts = [part for part in expansion.parts if part.leaf in scope.ranks.order.own[record]]
    hard = expansion.hard | _entangled(scope.graph, expansion)
    own = expansion.own_nonzero() & ~hard
    if bool(own.any()):
        parts = _renumbered(expansion.parts, own)
        found.rowsets.append(RowSet(record, rule, int(own.sum()), parts, scope.ranks.order.upstream[record]))
    left = ~own & ~zero
    if scope.strict and rule == "touch" and bool((left & ~hard).any()):
        found.rowsets.append(RowSet(record, rule, int((left & ~hard).sum()), ()))
        left &= hard
    rest = torch.nonzero(left).flatten()
    if len(rest) > CHEAP and _contradicts(scope, record, found):
        found.doubts.append(
            f"{record.name}: {len(rest)} differences left, the exact rows contradict each other already"
        )
    elif len(rest):
        zero[rest] = _partial_rows(scope, record, d.select(rest), rule, found)
    return zero


def _contradicts(scope: Scope, record: OpRecord, found: Findings) -> bool:
    """Do exact rows known so far prove a system empty? Then the step's verdict needs no partial backward pass."""
    if not scope.contradictions and found.rowsets:
        shapes = {leaf: tuple(scope.graph.leaves.tensor(leaf).shape) for leaf in scope.ranks.of}
        own = [rowset for rowset in found.rowsets if rowset.record is record and rowset.parts]
        by_rank: dict[int, list[RowSet]] = {}
        for rowset in own:
            by_rank.setdefault(scope.ranks.of[rowset.parts[0].leaf], []).append(rowset)
        for rank, rowsets in by_rank.items():
            if any(block.proof is not None for block in solve(System(record.name, rank, rowsets, shapes))):
                scope.contradictions.append(record.name)
    return bool(scope.contradictions)


def _entangled(graph: Graph, expansion: Expansion) -> Tensor:
    """Rows in which two parts meet in one group, or scaled parts stand beside others: not exact as they are."""
    bad = torch.zeros(expansion.count, dtype=torch.bool)
    parts = expansion.parts
    for index, part in enumerate(parts):
        for other in parts[index + 1 :]:
            both = torch.isin(part.owner, other.owner)
            if not bool(both.any()):
                continue
            if part.scaled or other.scaled:
                bad[part.owner[both]] = True
            elif part.leaf == other.leaf:
                groups = groups_of(tuple(graph.leaves.tensor(part.leaf).shape))[0]
                mine, theirs = part.owner * groups + part.group, other.owner * groups + other.group
                bad[part.owner[torch.isin(mine, theirs)]] = True
    return bad


def _renumbered(parts: list[Part], keep: Tensor) -> tuple[Part, ...]:
    number = torch.cumsum(keep, 0) - 1
    result = []
    for part in parts:
        mask = keep[part.owner]
        if bool(mask.any()):
            owner = number[part.owner[mask]]
            result.append(Part(part.leaf, owner, part.group[mask], part.plus[mask], part.minus[mask]))
    return tuple(result)


def _partial_rows(scope: Scope, record: OpRecord, d: Differences, rule: str, found: Findings) -> Tensor:
    """Rows by the partial backward engine; returns the mask of differences proved to be exactly zero."""
    proved = torch.zeros(len(d), dtype=torch.bool)
    if len(d) > PARTIAL_LIMIT:
        found.doubts.append(f"{record.name}: {len(d)} differences need a partial backward pass, limit {PARTIAL_LIMIT}")
        return proved
    found.partial += len(d)
    start = time.perf_counter()
    try:
        # First the own layer alone: only rows that vanish there need the pass through the layers below.
        for batch in _timed(backward.gradients(scope.graph, record.edge, d, local=True)):
            stop = batch.start + batch.count
            proved[batch.start : stop] = _place(scope, record, batch, rule, found, own=True)
        left = torch.nonzero(proved).flatten()
        for batch in _timed(backward.gradients(scope.graph, record.edge, d.select(left))):
            rows = left[batch.start : batch.start + batch.count]
            proved[rows] = _place(scope, record, batch, rule, found, own=False)
    except TimeoutError:
        found.doubts.append(
            f"{record.name}: {len(d)} differences take more than {SECONDS:g} s of partial backward passes"
        )
        proved[:] = False
    except backward.Unsupported as error:
        found.doubts.append(f"{record.name}: no error bound for {error} in a partial backward pass")
        proved[:] = False
    found.seconds += time.perf_counter() - start
    return proved


def _timed(batches: Iterator[backward.Gradients]) -> Iterator[backward.Gradients]:
    """Batches until the time is up; raises TimeoutError then."""
    start = time.perf_counter()
    for batch in batches:
        yield batch
        if time.perf_counter() - start > SECONDS:
            raise TimeoutError


def _place(scope: Scope, record: OpRecord, batch: backward.Gradients, rule: str, found: Findings, own: bool) -> Tensor:
    """Put every row into the deepest rank where it is provably nonzero and everything deeper is provably zero.

    ``own``: the batch covers w_l only. Returns the mask of rows that are exactly zero in all it covers.
    """
    order = scope.ranks.order
    covered = [leaf for leaf in batch.leaves if not own or leaf in order.own[record]]
    state = torch.zeros(batch.count, dtype=torch.int64)  # 0 open, 1 placed, 2 in doubt
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
                found.rowsets.append(RowSet(record, rule, int(here.sum()), ()))
        elif bool(here.any()):
            parts = _ball_parts(scope.graph, {leaf: batch.leaves[leaf] for leaf in leaves}, here)
            found.rowsets.append(RowSet(record, rule, int(here.sum()), parts, frozenset(below)))
        state[here] = 1
        state[(state == 0) & ~zero] = 2
    if scope.strict and rule == "touch" and bool((state == 0).any()):
        found.rowsets.append(RowSet(record, rule, int((state == 0).sum()), ()))
        state[state == 0] = 1
    doubts = int((state == 2).sum())
    if doubts:
        found.doubts.append(f"{record.name}: {doubts} differences are within rounding error of zero")
    return state == 0


def _ball_parts(graph: Graph, leaves: dict[str, Ball], rows: Tensor) -> tuple[Part, ...]:
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
