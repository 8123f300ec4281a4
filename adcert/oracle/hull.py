"""Theorems of the alternative over the integers: a direction or a combination, always checked exactly.

The float solver (HiGHS) only proposes; what it says counts for nothing until integer arithmetic confirms it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import flint
import highspy
import numpy as np

from .program import PRIME, Array


@dataclass(frozen=True)
class Alternative:
    """Exactly one of: ``direction`` h with A h > 0; ``weights`` y >= 0, y != 0, with y A = 0; neither: not
    decided."""

    direction: tuple[int, ...] | None = None
    weights: dict[int, int] | None = None  # row -> positive integer


@dataclass(frozen=True)
class Hull:
    """``member`` True (``weights``: element -> positive Fraction, sum 1), False (``separator`` h with
    <h, e> > <h, g> for every element e), or None (the solver's answer did not survive the exact check)."""

    member: bool | None
    weights: dict[int, Fraction] | None = None
    separator: tuple[int, ...] | None = None


_OPTIONS: dict[str, bool | int | str] = {"output_flag": False, "threads": 1, "presolve": "off", "solver": "simplex"}
_SOLVER = highspy.Highs()  # type: ignore[no-untyped-call]
for _option, _value in _OPTIONS.items():
    _SOLVER.setOptionValue(_option, _value)


def alternative(rows: Array) -> Alternative:
    """Gordan: does A h > 0 have a solution? ``rows``: integers [K, P].

    >>> alternative(np.array([[1, 2], [1, -1]])).direction is not None
    True
    >>> alternative(np.array([[1, 2], [-2, -4]])).weights
    {0: 2, 1: 1}
    """
    rows = np.asarray(rows)
    if len(rows) == 0:
        return Alternative(direction=(0,) * rows.shape[1])
    zero = np.flatnonzero(~(rows != 0).any(axis=1))
    if len(zero):
        return Alternative(weights={int(zero[0]): 1})
    for sign in (1, -1):
        column = np.flatnonzero((sign * rows > 0).all(axis=0))
        if len(column):
            axis = [0] * rows.shape[1]
            axis[int(column[0])] = sign
            return Alternative(direction=tuple(axis))
    solution = _solve(rows)
    if solution is None:
        return Alternative()
    direction = _round_direction(rows, solution[0])
    if direction is not None:
        return Alternative(direction=direction)
    return Alternative(weights=_exact_combination(rows, solution[1]))


def in_hull(elements: Array, g: Array) -> Hull:
    """Is g in the convex hull of the elements? ``elements``: integers [m, P], ``g``: integers [P].

    >>> in_hull(np.array([[0, 0], [2, 0], [0, 2]]), np.array([1, 1])).member
    True
    >>> in_hull(np.array([[0, 0], [2, 0], [0, 2]]), np.array([2, 1])).member
    False
    """
    elements = np.asarray(elements)
    answer = _by_subset(elements - np.asarray(g))
    if answer.direction is not None:
        return Hull(False, separator=answer.direction)
    if answer.weights is None:
        return Hull(None)
    total = sum(answer.weights.values())
    weights = {k: Fraction(y, total) for k, y in answer.weights.items()}
    combination = sum((w * elements[k].astype(object) for k, w in weights.items()), start=0 * g.astype(object))
    assert sum(weights.values()) == 1
    assert all(combination == g)
    return Hull(True, weights=weights)


def _by_subset(rows: Array, first: int = 80, step: int = 40) -> Alternative:
    """``alternative`` on a growing subset of the rows: shortest first, then those the last direction
    violates most."""
    chosen = np.argsort(np.abs(rows).sum(axis=1), kind="stable")[:first]
    while True:
        answer = alternative(rows[chosen])
        if answer.weights is not None:
            return Alternative(weights={int(chosen[k]): y for k, y in answer.weights.items()})
        if answer.direction is None:
            return answer
        products = rows @ np.array(answer.direction, dtype=object)
        if all(products > 0):
            return answer
        worst = np.argsort(products.astype(np.float64), kind="stable")[:step]
        chosen = np.concatenate([chosen, np.setdiff1d(worst[products[worst] <= 0], chosen)])


def _solve(rows: Array) -> tuple[Array, Array] | None:
    """maximise c subject to (a_k / |a_k|_1) h >= c, |h| <= 1, 0 <= c <= 1: optimal h and row duals."""
    count, width = rows.shape
    sizes = np.abs(rows).sum(axis=1).astype(np.float64)
    scaled = rows.astype(np.float64) / sizes[:, None]
    table = np.concatenate([scaled, -np.ones((count, 1))], axis=1)
    columns = np.append(np.full(width, -1.0), 0.0), np.ones(width + 1)
    bounds = np.zeros(count), np.full(count, np.inf)
    found = _run(table, np.eye(width + 1)[width], columns, bounds, highspy.ObjSense.kMaximize)
    return None if found is None else (found[0][:width], np.abs(found[1]) / sizes)


def _round_direction(rows: Array, h: Array) -> tuple[int, ...] | None:
    exact = rows.astype(object)
    for bits in (4, 10, 26, 45):
        direction = np.array([round(float(x) * 2**bits) for x in h], dtype=object)
        if all(exact @ direction > 0):
            return tuple(direction)
    return None


def _exact_combination(rows: Array, duals: Array) -> dict[int, int] | None:
    """Positive integers y on the support of the duals with y A = 0, by guessing small fractions, then
    exactly."""
    support = np.flatnonzero(duals > 1e-7 * duals.max(initial=0.0))
    if len(support) == 0:
        return None
    exact = rows[support].astype(object)
    ratios = [Fraction(float(y / duals[support].min())).limit_denominator(5000) for y in duals[support]]
    scale = lcm(*(r.denominator for r in ratios))
    guess = [int(r * scale) for r in ratios]
    if not any(np.array(guess, dtype=object) @ exact):
        return dict(zip(map(int, support), guess, strict=True))
    solved = null_vector(exact)
    if solved is None or min(solved) < 0:
        return None
    return {int(k): y for k, y in zip(support, solved, strict=True) if y > 0}


def null_vector(rows: Array) -> list[int] | None:
    """The integer y with y A = 0 and first nonzero entry positive, if the left null space of the integers A
    [K, P] is one-dimensional and y is small: elimination modulo a prime, rational reconstruction, exact
    check.

    >>> null_vector(np.array([[1, 2], [3, 6]]))
    [3, -1]
    """
    count = len(rows)
    table = np.array(rows.T % PRIME, dtype=np.int64)
    pivots: list[int] = []
    for k in range(count):
        rank = len(pivots)
        below = np.flatnonzero(table[rank:, k])
        if len(below) == 0:
            continue
        table[[rank, rank + below[0]]] = table[[rank + below[0], rank]]
        table[rank] = table[rank] * pow(int(table[rank, k]), -1, PRIME) % PRIME
        factors = table[:, k].copy()
        factors[rank] = 0
        table = (table - factors[:, None] * table[rank]) % PRIME
        pivots.append(k)
    free = [k for k in range(count) if k not in pivots]
    if len(free) != 1:
        return None
    ratios = [Fraction(0)] * count
    ratios[free[0]] = Fraction(1)
    for rank, pivot in enumerate(pivots):
        ratios[pivot] = _reconstruct(-int(table[rank, free[0]]))
    scale = lcm(*(x.denominator for x in ratios))
    answer = [int(x * scale) for x in ratios]
    if any(np.array(answer, dtype=object) @ rows.astype(object)):
        return _large_null_vector(rows)
    return [-x for x in answer] if next(x for x in answer if x) < 0 else answer


def _large_null_vector(rows: Array) -> list[int] | None:
    """The same without a bound on y, by fraction-free elimination."""
    space, dimension = flint.fmpz_mat([[int(x) for x in column] for column in rows.T]).nullspace()
    if dimension != 1:
        return None
    answer = [int(space[k, 0]) for k in range(len(rows))]
    divisor = gcd(*answer)
    first = next(x for x in answer if x)
    return [x // (divisor if first > 0 else -divisor) for x in answer]


def near_hull(elements: Array, g: Array, tolerance: Fraction) -> Hull:
    """Is a point within ``tolerance`` of g, in the max norm, in the convex hull of the elements? Rational [m, P], [P].

    ``weights`` make such a point; ``separator`` h has <h, e> > <h, g> + tolerance |h|_1 for every element e. Both are
    checked in rational arithmetic.

    >>> thirds = np.array([[Fraction(1, 3)], [Fraction(2, 3)]], dtype=object)
    >>> near_hull(thirds, np.array([Fraction(0.3333)]), Fraction(1, 1000)).member
    True
    """
    count, width = elements.shape
    table = np.zeros((2 * width + 1, count + 1))
    elements, g = elements.astype(object), g.astype(object)
    offsets = (elements - g).astype(np.float64).T
    size = max(float(np.abs(offsets).max(initial=0.0)), 1e-300)
    table[:width, :count], table[width : 2 * width, :count] = offsets / size, -offsets / size
    table[: 2 * width, count], table[2 * width, :count] = -1.0, 1.0
    lower, upper = np.full(2 * width + 1, -np.inf), np.zeros(2 * width + 1)
    lower[-1] = upper[-1] = 1.0
    found = _run(table, np.eye(count + 1)[count], (0.0, np.inf), (lower, upper), highspy.ObjSense.kMinimize)
    if found is None:
        return Hull(None)
    shares = [max(Fraction(float(x)), Fraction(0)) for x in found[0][:count]]
    shares = [x / sum(shares) for x in shares]
    off = sum((x * e for x, e in zip(shares, elements, strict=True) if x), start=-1 * g.astype(object))
    if all(abs(x) <= tolerance for x in off):
        return Hull(True, weights={k: x for k, x in enumerate(shares) if x})
    duals = found[1][:width] - found[1][width : 2 * width]
    for sign in (1, -1):
        h = np.array([sign * round(float(x) * 2**45) for x in duals], dtype=object)
        room = tolerance * sum(map(abs, h))
        if all(h @ (e - g) > room for e in elements):
            return Hull(False, separator=tuple(h))
    return Hull(None)


def _run(
    table: Array, cost: Array, columns: tuple[float | Array, float | Array], bounds: tuple[Array, Array], sense: Any
) -> tuple[Array, Array] | None:
    """Optimal values and row duals of a linear program; None unless HiGHS says that they are optimal."""
    count, width = table.shape
    table = np.where(np.abs(table) < 1e-9, 0.0, table)  # HiGHS warns of them; its answer is checked anyway
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = width, count
    lp.sense_ = sense
    lp.col_cost_ = cost
    lp.col_lower_, lp.col_upper_ = (np.broadcast_to(np.asarray(x, dtype=np.float64), (width,)).copy() for x in columns)
    lp.row_lower_, lp.row_upper_ = bounds
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.arange(count + 1, dtype=np.int32) * width
    lp.a_matrix_.index_ = np.tile(np.arange(width, dtype=np.int32), count)
    lp.a_matrix_.value_ = table.ravel()
    if _SOLVER.passModel(lp) != highspy.HighsStatus.kOk:
        return None
    _SOLVER.run()
    if _SOLVER.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    solution = _SOLVER.getSolution()
    return np.array(solution.col_value), np.array(solution.row_dual)


def _reconstruct(residue: int) -> Fraction:
    """The fraction a / b with a = residue * b modulo PRIME and |a|, b < 2^15.5 if there is one (half of
    Euclid)."""
    a, b, x, y = PRIME, residue % PRIME, 0, 1
    while b * b > PRIME // 2:
        q = a // b
        a, b, x, y = b, a - q * b, y, x - q * y
    return Fraction(b, y) if y else Fraction(0)
