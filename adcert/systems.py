"""Rows -> blocks -> decisions: one joint strict system per connected block of a rank, over all windows and samples."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from . import ops
from .certificate import FREE, Block, Column
from .differences import Part, RowSet, groups_of
from .feasibility import Proof, decide
from .wide import decide_wide, is_wide

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


def solve(system: System, short: bool = False, memory: Memory | None = None) -> Solved:
    """Cut a system into its blocks and decide each of them.

    Two (leaf, group) column sets belong to one block iff some row has entries in both: the system
    splits exactly along these blocks. ``short``: begin with the largest block and decide none after one is proved
    empty; the others are only counted. ``memory``: of earlier steps.
    """
    offsets = _offsets(system)
    labels = _labels(system, offsets)
    order = np.argsort(labels, kind="stable")
    cuts = np.flatnonzero(np.diff(labels[order])) + 1
    members = [block for block in np.split(order, cuts) if len(block)]
    if short:
        members.sort(key=lambda block: -len(block))
    blocks: list[Block] = []
    rows = 0
    for block in members:
        if short and blocks and blocks[-1].proof is not None:
            rows += len(block)
        else:
            blocks.append(_block(system, offsets, block, memory))
            rows += len(blocks[-1].rows)
    return Solved(blocks, rows, len(members))


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
            block = _decided(system, columns, first, second, None, [rule] * 2)
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


def _block(system: System, offsets: dict[str, int], members: np.ndarray, memory: Memory | None) -> Block:
    """Fill the matrices of one block from the parts of its rows and decide it."""
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
        return Block(system.layer, system.rank, (), np.zeros((0, 0)), reason=reason)
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
    return _decided(system, tuple(columns), plus, minus, radius, rules, memory)


def _decided(
    system: System,
    columns: tuple[Column, ...],
    plus: np.ndarray,
    minus: np.ndarray,
    radius: np.ndarray | None,
    rules: list[str],
    memory: Memory | None = None,
) -> Block:
    """Drop repeated rows, decide, and keep only what the answer rests on."""
    names, subtracted = tuple(rules), minus if minus.any() else None
    if is_wide(*plus.shape):
        chosen, answer = decide_wide(plus, subtracted, radius)
        columns = _picked(columns, chosen)
        plus, subtracted = plus[:, chosen], None if subtracted is None else subtracted[:, chosen]
        radius = None if radius is None else radius[:, chosen]
        key: tuple[object, ...] = ()
    elif FREE in rules:  # each free row stands for a choice of its own: equal ones are not independent
        key = ()
        answer = decide(plus, subtracted, radius)
    else:
        stacked = np.concatenate([plus, minus] if radius is None else [plus, minus, radius], axis=1)
        first = ops.distinct_rows(torch.from_numpy(np.ascontiguousarray(stacked))).numpy()
        plus, radius = plus[first], None if radius is None else radius[first]
        names, subtracted = tuple(rules[i] for i in first), None if subtracted is None else subtracted[first]
        key = (system.layer, system.rank, *((column.parameter, int(column.indices[0])) for column in columns))
        answer = decide(plus, subtracted, radius, warm=memory.recall(key) if memory else None)
    proof = answer.proof
    if proof is not None:  # the other rows do not matter any more
        rest = list(proof.rows)
        plus, subtracted = plus[rest], None if subtracted is None else subtracted[rest]
        radius, names = None if radius is None else radius[rest], tuple(names[i] for i in rest)
        proof = Proof(tuple(range(len(rest))), proof.weights)
    block = Block(
        layer=system.layer,
        rank=system.rank,
        columns=columns,
        rows=plus,
        minus=subtracted,
        radius=radius,
        rules=names,
        direction=answer.direction,
        proof=proof,
        reason=answer.reason,
    )
    if memory is not None and key:
        memory.keep(key, block)
    return block


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
