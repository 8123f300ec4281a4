"""Rows -> blocks -> decisions: one joint strict system per connected block of a rank, over all windows and samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .certificate import Block, Column
from .differences import Part, RowSet, groups_of
from .feasibility import Decision, Proof, decide


@dataclass(frozen=True, eq=False)
class System:
    """Rows of one rank, before they are cut into blocks."""

    layer: str
    rank: int
    rowsets: Sequence[RowSet]
    shapes: Mapping[str, tuple[int, ...]]


def solve(system: System) -> list[Block]:
    """Cut a system into its blocks and decide each of them.

    Two (leaf, group) column sets belong to one block iff some row has entries in both: the system
    splits exactly along these blocks.
    """
    rows = sum(rowset.count for rowset in system.rowsets)
    if rows == 0:
        return []
    offsets, groups = {}, 0
    for leaf in dict.fromkeys(part.leaf for rowset in system.rowsets for part in rowset.parts):
        offsets[leaf] = groups
        groups += groups_of(system.shapes[leaf])[0]
    labels = _components(system.rowsets, offsets, rows, groups)
    blocks = []
    order = np.argsort(labels[:rows], kind="stable")
    cuts = np.flatnonzero(np.diff(labels[order])) + 1
    for members in np.split(order, cuts):
        blocks.append(_block(system, offsets, members))
    return blocks


def _components(rowsets: Sequence[RowSet], offsets: dict[str, int], rows: int, groups: int) -> np.ndarray:
    left, right, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for rowset in rowsets:
        for part in rowset.parts:
            left.append(part.owner.numpy() + start)
            right.append(part.group.numpy() + offsets[part.leaf] + rows)
        start += rowset.count
    i, j = np.concatenate(left), np.concatenate(right)
    graph = coo_matrix((np.ones(len(i), np.int8), (i, j)), shape=(rows + groups, rows + groups))
    labels: np.ndarray = connected_components(graph, directed=False)[1]
    return labels


def _block(system: System, offsets: dict[str, int], members: np.ndarray) -> Block:
    """Fill the matrices of one block from the parts of its rows and decide it."""
    place = {}
    pieces: list[tuple[Part, np.ndarray, np.ndarray]] = []
    rules: list[str] = []
    start = done = 0
    used: dict[str, set[int]] = defaultdict(set)
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
                    used[part.leaf] |= set(part.group.numpy()[picked].tolist())
        start += rowset.count
    columns, width = [], 0
    for leaf in sorted(used, key=offsets.__getitem__):
        size = groups_of(system.shapes[leaf])[1]
        for group in sorted(used[leaf]):
            place[leaf, group] = width
            columns.append(Column(leaf, np.arange(group * size, (group + 1) * size)))
            width += size
    plus, minus = np.zeros((done, width)), np.zeros((done, width))
    radius = np.zeros((done, width)) if any(part.radius is not None for part, _, _ in pieces) else None
    for part, local, picked in pieces:
        at = np.array([place[part.leaf, group] for group in part.group.numpy()[picked].tolist()])
        index = (local[:, None], at[:, None] + np.arange(groups_of(system.shapes[part.leaf])[1]))
        taken = torch.from_numpy(picked)
        plus[index] += part.plus[taken].to(torch.float64).numpy()
        minus[index] += part.minus[taken].to(torch.float64).numpy()
        if radius is not None and part.radius is not None:
            radius[index] += part.radius[taken].numpy()
    return _decided(system, tuple(columns), plus, minus, radius, rules)


def _decided(
    system: System,
    columns: tuple[Column, ...],
    plus: np.ndarray,
    minus: np.ndarray,
    radius: np.ndarray | None,
    rules: list[str],
) -> Block:
    """Drop repeated rows, decide, and keep only what the answer rests on."""
    stacked = np.concatenate([plus, minus] if radius is None else [plus, minus, radius], axis=1)
    _, first = np.unique(stacked, axis=0, return_index=True)
    first.sort()
    plus, minus = plus[first], minus[first]
    radius = None if radius is None else radius[first]
    names = tuple(rules[i] for i in first)
    subtracted = minus if minus.any() else None
    answer: Decision = decide(plus, subtracted, radius)
    proof = answer.proof
    if proof is not None:  # the other rows do not matter any more
        rest = list(proof.rows)
        plus, subtracted = plus[rest], None if subtracted is None else subtracted[rest]
        radius, names = None if radius is None else radius[rest], tuple(names[i] for i in rest)
        proof = Proof(tuple(range(len(rest))), proof.weights)
    return Block(
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
