"""A program near its point: what is strict there is decided, what does not matter there is left out."""

from __future__ import annotations

from typing import Any

import numpy as np

from .program import Array, Graph, Poly, Program, Select, Smooth


def localized(program: Program) -> Program:
    """The same function near the point, with only what matters there: strict maxima and minima become names for
    their winners, and what the output does not depend on is left out.

    Every select that is left is tied. Valid in a neighbourhood of the point only.
    """
    graph = Graph()
    graph.exact, graph.eps = program.exact, program.eps
    place = np.full(len(program.values), -1, dtype=np.int64)
    for node in np.flatnonzero(program.constant):
        place[node] = graph.number(program.value(node) if int(node) in program.fractions else program.values[node])
    place[program.parameters] = graph.parameter(program.values[program.parameters])
    graph.fractions.update(
        (int(place[node]), program.fractions[int(node)])
        for node in program.parameters
        if int(node) in program.fractions
    )
    needed = _needed(program)
    memo: dict[tuple[int, ...], int] = {}
    for op in program.ops:
        rows = np.flatnonzero(needed[op.out])
        out = np.arange(op.out.start, op.out.stop)[rows]
        if len(rows) == 0:
            continue
        if isinstance(op, Poly):
            values = [program.value(n) if int(n) in program.fractions else program.values[n] for n in out]
            place[out] = graph.poly(place[op.left[rows]], place[op.right[rows]], values)
        elif isinstance(op, Smooth):
            place[out] = graph.smooth(place[op.source[rows]], program.values[out], op.slope[rows], op.name)
        else:
            place[out] = _local_selects(program, graph, place, op, rows, memo)
    return graph.program(place[program.parameters], program.slices, program.shapes, int(place[program.output]))


def _local_selects(
    program: Program, graph: Graph, place: Array, op: Select, rows: Array, memo: dict[tuple[int, ...], int]
) -> Array:
    result = np.zeros(len(rows), dtype=np.int64)
    pending: dict[tuple[int, ...], list[int]] = {}
    for k, row in enumerate(rows):
        tied, rank, width = _tied(program, op, row)
        nodes = place[tied]
        if rank in (0, width - 1):
            nodes = np.unique(nodes)
            rank, width = (0 if rank == 0 else len(nodes) - 1), len(nodes)
        key = (rank, *sorted(map(int, nodes)))
        if len(np.unique(nodes)) == 1:
            result[k] = nodes[0]
        elif key in memo:
            result[k] = memo[key]
        else:
            pending.setdefault(key, []).append(k)
    by_width: dict[int, list[tuple[int, ...]]] = {}
    for key in pending:
        by_width.setdefault(len(key) - 1, []).append(key)
    for keys in by_width.values():
        nodes = graph.select(np.array([key[1:] for key in keys]), np.array([key[0] for key in keys]))
        for key, node in zip(keys, nodes, strict=True):
            memo[key] = int(node)
            result[pending[key]] = node
    return result


def _tied(program: Program, op: Select, row: int | np.integer[Any]) -> tuple[Array, int, int]:
    """The members of a row that have the selected value, and the rank among them."""
    members, rank = op.members[row], int(op.rank[row])
    node = op.out.start + int(row)
    if program.fractions:
        target = program.value(node)
        comparison = np.array([(v > target) - (v < target) for v in map(program.value, members)])
    else:
        comparison = np.sign(program.values[members] - program.values[node])
    tied = members[comparison == 0]
    if rank == 0:
        return tied, 0, len(tied)
    if rank == len(members) - 1:
        return tied, len(tied) - 1, len(tied)
    return tied, rank - int((comparison < 0).sum()), len(tied)


def _needed(program: Program) -> Array:
    """The nodes on which the output depends near the point."""
    needed = np.zeros(len(program.values), dtype=bool)
    needed[program.output] = True
    for op in reversed(program.ops):
        rows = np.flatnonzero(needed[op.out])
        if len(rows) == 0:
            continue
        if isinstance(op, Poly):
            needed[op.left[rows]] = True
            needed[op.right[rows]] = True
        elif isinstance(op, Smooth):
            needed[op.source[rows]] = True
        else:
            for row in rows:
                needed[_tied(program, op, row)[0]] = True
    return needed
