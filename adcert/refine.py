"""One more digit group for directions of nearly empty systems: a margin program around an exact point.

Where the cone is some 1e-17 wide, rows that no float can tell from zero along the point p decide. Their exact
values v are of size s; ``max c : v + s <row, d> >= c s, |d| <= 1`` is then an ordinary program with numbers
of size 1, and p + s d is the next guess. Only a guess: the caller checks it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from adcert._highs import MarginProgram, SolverError
from adcert.exact import Ints, System, times, true_integers
from adcert.scaling import Matrix, Scaled
from adcert.signs import estimate, first_failure

_BITS = 128  # kept of the point
_ENTRIES = 1 << 22  # of the rows whose exact values are computed
_FIRST, _MORE = 100, 200  # rows of a program beyond twice the columns, and rows added at a time
_ROUNDS = 6
_REACH = 8  # log2 of the step's size over the size of the failing values
_STEP_BITS = 30


def shorten(point: Sequence[int], bits: int) -> tuple[int, ...]:
    """``point`` rounded towards zero to integers of at most ``bits`` bits, by a common power of two.

    >>> shorten((9, -5, 1), 3)
    (4, -2, 0)
    """
    excess = max(0, max(abs(x).bit_length() for x in point) - bits)
    return tuple((x >> excess) if x >= 0 else -(-x >> excess) for x in point)


def refine(system: System, kept: Ints, scaled: Scaled, point: Sequence[int], deadline: float) -> tuple[int, ...] | None:
    """A direction near ``point`` that makes all rows positive, or None.

    ``scaled`` is the picture of the rows ``kept``, without column scaling and without radius.
    """
    if scaled.shift.any() or scaled.radius is not None:
        return None
    p = shorten(point, _BITS)
    for _ in range(_ROUNDS):
        value, bound = estimate(system, p)
        close = np.flatnonzero(value[kept] <= bound[kept])
        if not 0 < close.size * len(p) <= _ENTRIES:
            return None
        step = _step(system, kept[close], scaled.rows[close], p, deadline)
        if step is None:
            return None
        p = step
        if first_failure(system, p) is None:
            return p
    return None


def _program(rows: Matrix, offsets: Matrix, deadline: float) -> Matrix | None:
    """d with ``offsets + rows @ d > 0``, |d| <= 1, from the rows of lowest value and then the violated ones."""
    inside = np.zeros(offsets.size, dtype=np.bool_)
    most = min(offsets.size, _FIRST + 2 * rows.shape[1])
    chosen = np.argpartition(offsets, most - 1)[:most]
    program = MarginProgram(rows[chosen], None, deadline, offsets[chosen])
    while True:
        inside[chosen] = True
        guess = program.solve()
        values = offsets + times(rows, guess.direction)
        chosen = np.flatnonzero((values <= 0) & ~inside)
        if guess.margin <= 0:
            return None
        if chosen.size == 0:
            return guess.direction
        if chosen.size > _MORE:
            chosen = chosen[np.argpartition(values[chosen], _MORE)[:_MORE]]
        program.add(rows[chosen], None, offsets[chosen])


def _step(system: System, index: Ints, rows: Matrix, p: tuple[int, ...], deadline: float) -> tuple[int, ...] | None:
    length = max(abs(x).bit_length() for x in p)
    integers, _ = true_integers(system, index.tolist())
    values = []
    for row in integers:
        size = max(abs(x) for x in row).bit_length() + length
        values.append(sum(map(int.__mul__, row, p)) / (1 << size))
    exact = np.array(values)
    failing = np.abs(exact[exact <= 0])
    top = float(failing.max(initial=0.0)) or float(np.abs(exact).min(initial=1.0))
    reach = math.frexp(top)[1] + _REACH if top > 0 else -1000
    offsets = np.ldexp(exact, -reach)
    try:
        direction = _program(rows, offsets, deadline)
    except SolverError:
        return None
    if direction is None or not np.isfinite(direction).all():
        return None
    shift = _STEP_BITS - reach - length
    moved = [round(float(d) * 2.0**_STEP_BITS) for d in direction]
    base = [x << shift if shift >= 0 else x >> -shift for x in p]
    return tuple(x + d for x, d in zip(base, moved, strict=True))
