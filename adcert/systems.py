"""Rows -> blocks -> decisions: one joint strict system per connected block of a rank, over all windows and samples."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from . import ops
from .certificate import FREE, Block, Column
from .differences import Part, RowSet, groups_of
from .feasibility import Decision, Proof, check_direction, check_proof, decide, glance
from .wide import decide_wide, glance_wide, is_wide

_REMEMBERED = 32  # rows from which on a block's direction is worth keeping for the next step
_BLOCKS = 256  # directions kept


@dataclass(frozen=True, eq=False)
class System:
    """Rows of one rank, before they are cut into blocks. Waits until they are all there.

    ``limit``: entries of a block that is still worth deciding, rows times columns.
    """

    layer: str
    rank: int
    rowsets: Sequence[RowSet]
    shapes: Mapping[str, tuple[int, ...]]
    limit: int | None = None

    def __post_init__(self) -> None:
        for rowset in self.rowsets:
            if rowset.arrival is not None:
                rowset.arrival.wait()


@dataclass(frozen=True, eq=False)
class Solved:
    """Blocks that were decided, and how many rows and blocks there are in all."""

    blocks: list[Block]
    rows: int
    count: int

    @property
    def empty(self) -> bool:
        """Some block is proved empty."""
        return any(block.proof is not None for block in self.blocks)


Answer = tuple[np.ndarray | None, Decision]  # the columns it is about, None for all of a block's, and the decision


class Team(Protocol):
    """Processes that have the same blocks to decide (:mod:`adcert.distributed`)."""

    def decide(self, count: int, answer: Callable[[int], Answer], short: bool) -> dict[int, Answer]:
        """Answers for ``count`` blocks, the same for all processes; ``short``: fewer if one is proved empty."""
        ...

    def leave(self, reason: str) -> None:
        """This process cannot go on; the others must not wait for it."""
        ...


@dataclass(frozen=True, eq=False)
class _Cut:
    """A block before it is decided. ``key``: under which its direction is remembered, () if it is not."""

    columns: tuple[Column, ...]
    plus: np.ndarray
    minus: np.ndarray | None
    radius: np.ndarray | None
    rules: tuple[str, ...]
    key: tuple[object, ...] = ()
    reason: str = ""  # why it is not decided at all


class Memory:
    """Directions of the last large blocks: what a block of the next step tries first. Bounded; holds no tensor."""

    def __init__(self) -> None:
        self._directions: OrderedDict[tuple[object, ...], tuple[int, ...]] = OrderedDict()

    def recall(self, key: tuple[object, ...]) -> tuple[int, ...] | None:
        return self._directions.get(key)

    def keep(self, key: tuple[object, ...], block: Block) -> None:
        """Small blocks are decided faster than they are looked up."""
        if block.direction is not None and len(block.rows) >= _REMEMBERED:
            self._directions[key] = block.direction
            self._directions.move_to_end(key)
            if len(self._directions) > _BLOCKS:
                self._directions.popitem(last=False)


def solve(system: System, short: bool = False, memory: Memory | None = None, team: Team | None = None) -> Solved:
    """Cut a system into its blocks and decide each of them.

    Two (leaf, group) column sets belong to one block iff some row has entries in both: the system
    splits exactly along these blocks. ``short``: begin with the largest block and decide none after one is proved
    empty; the others are only counted. ``memory``: of earlier steps. ``team``: shares what no glance decides; what the
    others answer is checked here.
    """
    offsets = _offsets(system)
    labels = _labels(system, offsets)
    order = np.argsort(labels, kind="stable")
    cuts = np.flatnonzero(np.diff(labels[order])) + 1
    members = [block for block in np.split(order, cuts) if len(block)]
    if short:
        members.sort(key=lambda block: -len(block))
    found: dict[int, Block] = {}

    def cut(number: int) -> _Cut:
        return _cut(system, offsets, members[number])

    def keep(number: int, cut: _Cut, answer: Answer) -> None:
        block = found[number] = _told(system, cut, answer)
        if memory is not None and cut.key:
            memory.keep(cut.key, block)

    if team is None:
        for number in range(len(members)):
            made = cut(number)
            keep(number, made, _answered(made, memory))
            if short and found[number].proof is not None:
                break
    else:
        held = {} if short else {number: cut(number) for number in range(len(members))}
        for number, made in held.items():
            seen = _glanced(made)  # what all processes answer alike need not travel
            if seen is not None:
                keep(number, made, seen)
        left = [number for number in range(len(members)) if number not in found]

        def share(k: int) -> _Cut:
            return held[left[k]] if held else cut(left[k])

        answers = team.decide(len(left), lambda k: _answered(share(k), memory), short) if left else {}
        for k, answer in sorted(answers.items()):
            keep(left[k], share(k), _checked(share(k), answer))
    rows = sum(len(found[k].rows) if k in found else len(block) for k, block in enumerate(members))
    return Solved([found[number] for number in sorted(found)], rows, len(members))


def count_blocks(system: System) -> tuple[int, int]:
    """Number of rows and of blocks, without deciding any."""
    labels = _labels(system, _offsets(system))
    return len(labels), len(np.unique(labels))


def _offsets(system: System) -> dict[str, int]:
    """Number of the first group of every leaf."""
    offsets, groups = {}, 0
    for leaf in dict.fromkeys(part.leaf for rowset in system.rowsets for part in rowset.parts):
        offsets[leaf] = groups
        groups += groups_of(system.shapes[leaf])[0]
    return offsets


def contradiction(system: System) -> Block | None:
    """A block of two exact rows of one filter that are opposite, with its proof; None if no such pair is seen.

    Linear in the number of rows: where ties abound it spares all linear programs.
    """
    found: dict[tuple[str, str], list[Part]] = defaultdict(list)
    for rowset in system.rowsets:
        for part in rowset.parts:
            alone = len(rowset.parts) == 1 and part.radius is None and _once(part.owner.numpy(), rowset.count)
            if alone and groups_of(system.shapes[part.leaf])[1] > 1:
                found[rowset.rule, part.leaf].append(part)
    for (rule, leaf), parts in found.items():
        plus, minus, group = parts[0].plus, parts[0].minus, parts[0].group
        if len(parts) > 1:
            dtypes = {part.plus.dtype for part in parts}
            dtype = plus.dtype if len(dtypes) == 1 else torch.float64
            plus, minus = (torch.cat([side.to(dtype) for side in sides]) for sides in _sides(parts))
            group = torch.cat([part.group for part in parts])
        pair = ops.opposite_rows(plus, minus, group)
        if len(pair):
            start = int(group[pair[0]]) * plus.shape[1]
            columns = (Column(leaf, np.arange(start, start + plus.shape[1])),)
            first, second = (side[pair].to(torch.float64).numpy() for side in (plus, minus))
            cut = _reduced(system, columns, first, second, None, [rule] * 2)
            block = _told(system, cut, _answered(cut))
            if block.proof is not None:
                return block
    return None


def _sides(parts: list[Part]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [part.plus for part in parts], [part.minus for part in parts]


def _once(owner: np.ndarray, count: int) -> bool:
    """Every number below ``count`` appears exactly once."""
    return len(owner) == count and bool((np.bincount(owner, minlength=count) == 1).all())


def _labels(system: System, offsets: dict[str, int]) -> np.ndarray:
    """int64 [rows]: equal iff the rows belong to one block."""
    rows = sum(rowset.count for rowset in system.rowsets)
    alone = rows > 0 and all(len(rowset.parts) == 1 for rowset in system.rowsets)
    if alone and all(_once(rowset.parts[0].owner.numpy(), rowset.count) for rowset in system.rowsets):
        groups = [offsets[part.leaf] + part.group.numpy() for rowset in system.rowsets for part in rowset.parts]
        owners = [part.owner.numpy() for rowset in system.rowsets for part in rowset.parts]
        return np.concatenate([group[np.argsort(owner)] for group, owner in zip(groups, owners, strict=True)])
    total = rows + sum(groups_of(system.shapes[leaf])[0] for leaf in offsets)
    left, right, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for rowset in system.rowsets:
        for part in rowset.parts:
            left.append(part.owner.numpy() + start)
            right.append(part.group.numpy() + offsets[part.leaf] + rows)
        start += rowset.count
    i, j = np.concatenate(left), np.concatenate(right)
    graph = coo_matrix((np.ones(len(i), np.int8), (i, j)), shape=(total, total))
    components: np.ndarray = connected_components(graph, directed=False)[1]
    return components[:rows]


def _cut(system: System, offsets: dict[str, int], members: np.ndarray) -> _Cut:
    """Fill the matrices of one block from the parts of its rows."""
    pieces: list[tuple[Part, np.ndarray, np.ndarray]] = []
    rules: list[str] = []
    start = done = 0
    used: dict[str, list[np.ndarray]] = defaultdict(list)
    for rowset in system.rowsets:
        mine = members[(members >= start) & (members < start + rowset.count)] - start
        if len(mine):
            number = np.full(rowset.count, -1)
            number[mine] = np.arange(done, done + len(mine))
            rules += [rowset.rule] * len(mine)
            done += len(mine)
            for part in rowset.parts:
                local = number[part.owner.numpy()]
                picked = np.flatnonzero(local >= 0)
                if len(picked):
                    pieces.append((part, local[picked], picked))
                    used[part.leaf].append(part.group.numpy()[picked])
        start += rowset.count
    columns, width = [], 0
    place: dict[str, np.ndarray] = {}  # of every group of a leaf: its first column
    for leaf in sorted(used, key=offsets.__getitem__):
        count, size = groups_of(system.shapes[leaf])
        groups = np.unique(np.concatenate(used[leaf]))
        place[leaf] = np.full(count, -1)
        place[leaf][groups] = width + size * np.arange(len(groups))
        columns += [Column(leaf, np.arange(group * size, (group + 1) * size)) for group in groups.tolist()]
        width += size * len(groups)
    if system.limit is not None and done * width > system.limit:
        reason = f"{done} rows of {width:,} columns, limit {system.limit:,} entries"
        return _Cut((), np.zeros((0, 0)), None, None, (), reason=reason)
    plus, minus = np.zeros((done, width)), np.zeros((done, width))
    radius = np.zeros((done, width)) if any(part.radius is not None for part, _, _ in pieces) else None
    for part, local, picked in pieces:
        at = place[part.leaf][part.group.numpy()[picked]]
        index = (local[:, None], at[:, None] + np.arange(groups_of(system.shapes[part.leaf])[1]))
        taken = torch.from_numpy(picked)
        plus[index] += part.plus[taken].to(torch.float64).numpy()
        minus[index] += part.minus[taken].to(torch.float64).numpy()
        if radius is not None and part.radius is not None:
            radius[index] += part.radius[taken].numpy()
    return _reduced(system, tuple(columns), plus, minus, radius, rules)


def _reduced(
    system: System,
    columns: tuple[Column, ...],
    plus: np.ndarray,
    minus: np.ndarray,
    radius: np.ndarray | None,
    rules: list[str],
) -> _Cut:
    """Drop repeated rows; each free row stands for a choice of its own, and equal ones are not independent."""
    names, subtracted = tuple(rules), minus if minus.any() else None
    if is_wide(*plus.shape) or FREE in rules:
        return _Cut(columns, plus, subtracted, radius, names)
    stacked = np.concatenate([plus, minus] if radius is None else [plus, minus, radius], axis=1)
    first = ops.distinct_rows(torch.from_numpy(np.ascontiguousarray(stacked))).numpy()
    plus, radius = plus[first], None if radius is None else radius[first]
    names, subtracted = tuple(rules[i] for i in first), None if subtracted is None else subtracted[first]
    key = (system.layer, system.rank, *((column.parameter, int(column.indices[0])) for column in columns))
    return _Cut(columns, plus, subtracted, radius, names, key)


def _glanced(cut: _Cut) -> Answer | None:
    """The block's decision, if every machine makes the same one."""
    if cut.reason:
        return None, Decision(None, None, None, cut.reason)
    if is_wide(*cut.plus.shape):
        return glance_wide(cut.plus, cut.minus, cut.radius)
    seen = glance(cut.plus, cut.minus, cut.radius)
    return None if seen is None else (None, seen)


def _answered(cut: _Cut, memory: Memory | None = None) -> Answer:
    """The block's decision."""
    if cut.reason:
        return None, Decision(None, None, None, cut.reason)
    if is_wide(*cut.plus.shape):
        return decide_wide(cut.plus, cut.minus, cut.radius)
    warm = memory.recall(cut.key) if memory is not None and cut.key else None
    return None, decide(cut.plus, cut.minus, cut.radius, warm=warm)


def _checked(cut: _Cut, answer: Answer) -> Answer:
    """Another process's answer, if it holds."""
    chosen, found = answer
    width = cut.plus.shape[1]
    columns = np.arange(width) if chosen is None else chosen
    holds = len(columns) == 0 or (columns[-1] < width and bool((np.diff(columns) > 0).all()))
    if holds and found.direction is not None:
        whole = dict(zip(columns.tolist(), found.direction, strict=False))
        direction = [whole.get(k, 0) for k in range(width)]
        same = len(columns) == len(found.direction)
        holds = same and check_direction(cut.plus, direction, cut.minus, cut.radius)
    if holds and found.proof is not None:
        holds = check_proof(cut.plus, found.proof, cut.minus, cut.radius)
    return answer if holds else (None, Decision(None, None, None, "another rank's answer does not hold"))


def _told(system: System, cut: _Cut, answer: Answer) -> Block:
    """The block with its answer, and only what that rests on."""
    chosen, found = answer
    columns, plus, minus, radius, rules = cut.columns, cut.plus, cut.minus, cut.radius, cut.rules
    if chosen is not None:
        columns = _picked(columns, chosen)
        plus, minus = plus[:, chosen], None if minus is None else minus[:, chosen]
        radius = None if radius is None else radius[:, chosen]
    proof = found.proof
    if proof is not None:  # the other rows do not matter any more
        rest = list(proof.rows)
        plus, minus = plus[rest], None if minus is None else minus[rest]
        radius, rules = None if radius is None else radius[rest], tuple(rules[i] for i in rest)
        proof = Proof(tuple(range(len(rest))), proof.weights)
    return Block(
        layer=system.layer,
        rank=system.rank,
        columns=columns,
        rows=plus,
        minus=minus,
        radius=radius,
        rules=rules,
        direction=found.direction,
        proof=proof,
        reason=found.reason,
    )


def _picked(columns: tuple[Column, ...], chosen: np.ndarray) -> tuple[Column, ...]:
    """These columns of a block, those of one parameter together."""
    result, start = [], 0
    for leaf, run in groupby(columns, key=lambda column: column.parameter):
        indices = np.concatenate([column.indices for column in run])
        mine = chosen[(chosen >= start) & (chosen < start + len(indices))] - start
        start += len(indices)
        if len(mine):
            result.append(Column(leaf, indices[mine]))
    return tuple(result)
