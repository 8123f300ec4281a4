"""Margin programs over many rows: HiGHS sees a few of them, and the most violated others until none is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adcert._highs import MarginProgram
from adcert.exact import Ints
from adcert.scaling import Matrix

_FIRST = 30  # rows of the first program beyond twice the columns, half of them those of lowest margin
_ERROR = 1e-7  # of HiGHS: its feasibility tolerance
_MORE = 150  # most violated rows added at a time


@dataclass(frozen=True, eq=False)
class Separation:
    """Where the programs ended: HiGHS's margin and direction, the rows' values there, duals of tight rows."""

    margin: float
    direction: Matrix
    values: Matrix
    duals: dict[int, float]


def separate(
    matrix: Matrix,
    radius: Matrix | None,
    offsets: Matrix | None,
    low: Matrix,
    values: Callable[[Matrix], Matrix],
    deadline: float,
) -> Separation:
    """Maximises the least of ``offsets + matrix @ d - radius @ |d|`` over ``|d| <= 1``.

    ``low``: it begins with the rows where this is least. ``values(d)``: all rows' values as the caller measures
    them. Raises :class:`adcert._highs.SolverError`.
    """

    def pick(chosen: Ints) -> tuple[Matrix, Matrix | None, Matrix | None]:
        wide, added = (None if x is None else x[chosen] for x in (radius, offsets))
        return matrix[chosen], wide, added

    rows, columns = matrix.shape
    first = _FIRST + columns
    order: Ints = np.arange(rows)
    if rows > 2 * first:  # the lowest, and some from everywhere
        order = np.union1d(np.argpartition(low, first)[:first], np.linspace(0, rows - 1, first).astype(int))
    outside = np.ones(rows, dtype=np.bool_)
    outside[order] = False
    program = MarginProgram(*pick(order), deadline=deadline)
    while True:
        guess = program.solve()
        found = values(guess.direction)
        # Within HiGHS's own error a margin says nothing, and more rows would not change that.
        bar = 0.0 if guess.margin > 10 * _ERROR else min(0.0, guess.margin) - _ERROR
        violated = np.flatnonzero((found <= bar) & outside)
        if violated.size == 0:
            break
        if violated.size > _MORE:
            violated = violated[np.argpartition(found[violated], _MORE)[:_MORE]]
        program.add(*pick(violated))
        order = np.concatenate([order, violated])
        outside[violated] = False
    support = np.flatnonzero(guess.duals > 1e-9 * guess.duals.max(initial=0.0))
    return Separation(guess.margin, guess.direction, found, {int(order[i]): float(guess.duals[i]) for i in support})
