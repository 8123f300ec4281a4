"""Wolfe's minimum norm point algorithm in exact rational arithmetic: it always decides A p > 0.

Let x be the point of least norm in the convex hull of the rows. If x = 0, the weights of x are Gordan's proof
that the system is empty; if not, ``<row, x> >= |x|^2 > 0`` for every row, so x is a direction (Gordan's
alternative in one algorithm). Wolfe (Math. Programming 11, 1976) keeps x as the affine minimiser of affinely
independent rows (a corral); the norm of x strictly decreases, so no corral returns and in exact arithmetic
the algorithm ends without any anti-cycling rule. Rows may be rescaled by positive factors freely: that
changes x but not the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import flint

from adcert.errors import AdcertError
from adcert.exact import System, primitive, true_integers
from adcert.signs import first_failure

Rational = flint.fmpq

_SMALL = 30  # rows
_NEGLIGIBLE = 0.05  # seconds


class OutOfTimeError(AdcertError):
    """The deadline passed before the exact algorithm ended."""


def minimum_norm(
    system: System,
    start: Sequence[int],
    weights: Sequence[int],
    deadline: float,
    improve: Callable[[tuple[int, ...]], tuple[int, ...] | None] = lambda point: None,
) -> tuple[tuple[int, ...] | None, dict[int, int] | None]:
    """Decides a ``system`` without radius and zero rows, starting from ``weights`` > 0 of the rows ``start``.

    ``improve`` may turn a failing point into a direction. Returns (direction, None) with integers p such
    that ``A p > 0``, or (None, proof) with positive integer weights per row.

    >>> minimum_norm(System.read([[1.0, 0.0], [-1.0, 1.0]]), [0], [1], float("inf"))[0]
    (1, 2)
    >>> minimum_norm(System.read([[1.0], [-3.0]]), [0], [1], float("inf"))[1]
    {0: 3, 1: 1}
    """
    corral = _Corral(system)
    for row, weight in zip(start, weights, strict=True):
        corral.add(row, Rational(weight))
    while True:
        point = corral.minimise(deadline)
        if not any(point):
            return None, corral.proof()
        direction = tuple(point)
        failure = first_failure(system, direction)
        if failure is None:
            return direction, None
        better = improve(direction)
        if better is not None:
            return better, None
        corral.add(failure, Rational(0))


def nearest_point(
    system: System, start: Sequence[int], weights: Sequence[int], deadline: float
) -> tuple[list[int], tuple[int, ...]]:
    """Of the rows ``start``: those whose convex hull holds the point of least norm in its interior, and the point.

    >>> nearest_point(System.read([[1.0, 1.0], [1.0, -1.0]]), [0, 1], [1, 1], float("inf"))
    ([0, 1], (1, 0))
    """
    corral = _Corral(system)
    for row, weight in zip(start, weights, strict=True):
        corral.add(row, Rational(weight))
    point = tuple(corral.minimise(deadline))
    return corral.index, point


def exact_seconds(rows: Sequence[Sequence[int]]) -> float:
    """A guess of the time of one exact solve with ``rows``, which cannot be interrupted; 0 while it is negligible.

    About 0.03 s at 147 rows of 39 bits, growing with the third power of the rows and more than the bits.
    """
    if len(rows) <= _SMALL:
        return 0.0
    bits = max(max(map(int.bit_length, row)) for row in rows)
    guess: float = 0.03 * (len(rows) / 147) ** 3 * (bits / 39) ** 1.6
    return guess if guess > _NEGLIGIBLE else 0.0


class _Corral:
    """Rows with rational weights; each row is an integer vector, a positive multiple of the true one."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.index: list[int] = []
        self.rows: list[list[int]] = []
        self.exponents: list[int] = []  # the integer row is the true one times two to this power
        self.weights: list[flint.fmpq] = []

    def add(self, row: int, weight: flint.fmpq) -> None:
        (integers,), (exponent,) = true_integers(self.system, [row])
        # Rows of similar norms keep the corrals small; any positive factor is allowed.
        shift = max(0, 56 - max((abs(x).bit_length() for x in integers), default=0))
        self.rows.append([x << shift for x in integers])
        self.exponents.append(shift - exponent)
        self.index.append(row)
        self.weights.append(weight)

    def minimise(self, deadline: float) -> list[int]:
        """Wolfe's minor cycle: the affine minimiser of the rows kept, up to a positive factor."""
        while True:
            # The Gram matrix has entries of twice the bits.
            if time.monotonic() + 3 * exact_seconds(self.rows) > deadline:
                raise OutOfTimeError("out of time in the exact minimum norm point algorithm; allow more seconds")
            target = self._affine_minimiser()
            if target is None:
                continue
            if all(y > 0 for y in target):
                self.weights = [Rational(y) for y in target]
                combination = flint.fmpz_mat([target]) * flint.fmpz_mat(self.rows)
                return primitive([int(x) for x in combination.entries()])
            total, mass = sum(target), sum(self.weights, Rational(0))
            goal = [Rational(y, total) for y in target]
            here = [w / mass for w in self.weights]
            step = min(w / (w - y) for w, y in zip(here, goal, strict=True) if y <= 0)
            self._keep([w + step * (y - w) for w, y in zip(here, goal, strict=True)])

    def _affine_minimiser(self) -> list[int] | None:
        """Integer weights of positive sum; None after a step that only dropped an affinely dependent row."""
        matrix = flint.fmpz_mat(self.rows)
        gram = matrix * matrix.transpose()
        try:
            solution = gram.solve(flint.fmpz_mat([[1]] * len(self.rows)))
        except ZeroDivisionError:
            return self._dependent(gram)
        denominator = flint.fmpz(1)
        for entry in solution.entries():
            denominator = denominator.lcm(entry.q)
        return primitive([int(entry.p * (denominator // entry.q)) for entry in solution.entries()])

    def _dependent(self, gram: flint.fmpz_mat) -> list[int] | None:
        basis, nullity = gram.nullspace()
        vectors = [[int(basis[i, j]) for i in range(len(self.rows))] for j in range(nullity)]
        for vector in vectors:
            if sum(vector) != 0:  # the affine hull passes through the origin
                sign = 1 if sum(vector) > 0 else -1
                return [sign * x for x in vector]
        # Affinely dependent: slide along the dependency, which leaves the point where it is, until a weight
        # vanishes.
        vector = vectors[0]
        step = min(w / x for w, x in zip(self.weights, vector, strict=True) if x > 0)
        self._keep([w - step * x for w, x in zip(self.weights, vector, strict=True)])
        return None

    def _keep(self, weights: list[flint.fmpq]) -> None:
        kept = [i for i, w in enumerate(weights) if w > 0]
        self.index = [self.index[i] for i in kept]
        self.rows = [self.rows[i] for i in kept]
        self.exponents = [self.exponents[i] for i in kept]
        self.weights = [weights[i] for i in kept]

    def proof(self) -> dict[int, int]:
        """Positive integer weights on the TRUE rows whose combination vanishes (the point is the origin)."""
        least = min(self.exponents)
        weights = primitive([int(w.p) << (e - least) for w, e in zip(self.weights, self.exponents, strict=True)])
        return dict(zip(self.index, weights, strict=True))
