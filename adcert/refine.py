"""Further digits for systems that are nearly empty, or nearly not: margin programs around an exact point.

Where the cone is some 1e-12 wide, rows that HiGHS cannot tell from zero along the point p decide. With their
exact values v and s some times the worst of them, ``max c : v + s <row, d> >= c s, |d| <= 1`` is an ordinary
program with numbers of size 1, and p + s d is the next point (iterative refinement of a linear program). Only
guesses: the caller checks the points and the duals exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from adcert._highs import SolverError
from adcert.cutting import separate
from adcert.exact import Ints, System, times
from adcert.scaling import Matrix, Scaled
from adcert.signs import exact_values, first_failure

_BITS = 160  # kept of the point
_ROUNDS = 6
_REACH = 8  # log2 of the step's size over the size of the failing values
_FARTHEST = 32
_STEP_BITS = 30
_FLAT = 1e-7  # of a row's length, below which what is left of it orthogonal to others is rounding


def shorten(point: Sequence[int], bits: int) -> tuple[int, ...]:
    """``point`` rounded towards zero to integers of at most ``bits`` bits, by a common power of two.

    >>> shorten((9, -5, 1), 3)
    (4, -2, 0)
    """
    excess = max(0, max(abs(x).bit_length() for x in point) - bits)
    return tuple((x >> excess) if x >= 0 else -(-x >> excess) for x in point)


def refine(
    system: System, kept: Ints, scaled: Scaled, point: Sequence[int], deadline: float
) -> Iterator[tuple[tuple[int, ...] | None, dict[int, float]]]:
    """Rounds from a ``point`` of the scaled system: a direction of the given one (the last round) or None, and duals.

    ``scaled`` is the picture of the rows ``kept``, without radius; ``point`` is not zero.
    """
    reach = _REACH
    for _ in range(_ROUNDS):
        point = shorten(point, _BITS)
        step = _step(system, kept, scaled, point, reach, deadline)
        if step is None or not any(step[0]):
            return
        point, duals, margin = step
        reach = _REACH if margin > 0 else reach + 2 * _REACH  # not far enough
        direction = scaled.unscale(point)
        if direction is not None and first_failure(system, direction) is None:
            yield direction, duals
            return
        yield None, duals
        if reach > _FARTHEST:
            return


def along_face(
    scaled: Scaled, tight: Sequence[int], normal: Matrix, low: Matrix, deadline: float
) -> tuple[Matrix | None, list[int]]:
    """A floating direction orthogonal to the rows ``tight``, or the rows that with them seem to exclude any.

    ``normal``: the combination of the rows ``tight`` nearest to zero. Where it is all but zero, a direction p
    has to be all but orthogonal to these rows, and then ``<normal, p> > 0`` and the other rows, all restricted
    to their orthogonal complement, decide.
    """
    rows = scaled.rows / scaled.norms[:, None]
    basis, sizes, _ = np.linalg.svd(rows[tight].T)
    frame = basis[:, int((sizes > _FLAT * sizes[0]).sum()) :]
    rows = times(rows, frame)
    others = np.flatnonzero(np.einsum("kn,kn->k", rows, rows) > _FLAT**2)
    last = normal @ frame
    length = float(np.sqrt(last @ last))
    if others.size == 0 or length == 0:
        return None, []
    rows = np.concatenate([rows[others], last[None] / length])
    order = np.append(low[others], 0.0)
    try:
        found = separate(rows, None, None, order, lambda d: times(rows, d), deadline)
    except SolverError:
        return None, []
    if (found.values > 0).all():
        return frame @ found.direction, []
    return None, [*tight, *(int(others[i]) for i in found.duals if i < others.size)]


def _step(
    system: System, kept: Ints, scaled: Scaled, point: Sequence[int], far: int, deadline: float
) -> tuple[tuple[int, ...], dict[int, float], float] | None:
    """The next point, duals and the program's margin; steps are ``2**far`` times the worst failure long."""
    length = max(abs(x).bit_length() for x in point)
    floating = np.array([x / (1 << length) for x in point])
    floats = times(scaled.rows, floating)
    # Entries are below 1, so a step of size s moves a row by less than s times the columns.
    columns = len(point)
    worst = max(1e-14, -float(floats.min()))
    near = np.flatnonzero(floats <= columns * worst * 2.0 ** (far + 2))
    values = _values(system, kept[near], scaled, near, point, length)
    failing = np.abs(values[values <= 0])
    top = float(failing.max(initial=0.0)) or float(np.abs(values).min(initial=1.0))
    reach = min(-1, int(np.frexp(top)[1]) + far) if top > 0 else -1000
    offsets = np.ldexp(values, -reach)
    close = np.flatnonzero(offsets <= columns)
    near, offsets = near[close], offsets[close]
    matrix, back = scaled.program
    matrix = matrix[near]
    if back is None:  # no step along the point itself, which would change nothing
        matrix[:, int(np.argmax(np.abs(floating)))] = 0.0
    try:
        found = separate(matrix, None, offsets, offsets, lambda d: offsets + times(matrix, d), deadline)
    except SolverError:
        return None
    direction = np.where(matrix.any(axis=0), found.direction, 0.0)
    direction = direction if back is None else times(back, direction)
    shift = _STEP_BITS - reach - length
    moved = [round(float(d) * 2.0**_STEP_BITS) for d in direction]
    base = [x << shift if shift >= 0 else x >> -shift for x in point]
    duals = {int(kept[near[i]]): dual for i, dual in found.duals.items()}
    return tuple(x + d for x, d in zip(base, moved, strict=True)), duals, found.margin


def _values(system: System, index: Ints, scaled: Scaled, near: Ints, point: Sequence[int], length: int) -> Matrix:
    """Nearly exact values of the scaled rows along ``point / 2**length``."""
    direction = scaled.unscale(point)
    assert direction is not None
    _, mantissa, exponent = exact_values(system, index, direction)
    values: Matrix = np.ldexp(mantissa, exponent + scaled.lift[near] - int(scaled.shift.max(initial=0)) - length)
    return values
