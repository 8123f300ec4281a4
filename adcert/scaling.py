"""Floating point pictures of a system, for the stages that only propose: scaling, duplicates, low margins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from adcert.exact import Ints, System, row_slices, times

Matrix = NDArray[np.float64]

_GRAM = 4  # columns per row from which on p = A^T y is used
_CLOSE = 1e-9  # of ratios that may be equal but for rounding
_UNEVEN = 2.0**-8  # a column this low beside rows of size 1 is scaled up
_ROUNDS = 12
_STEPS = 16
_DAMPING = 0.03
_INNER = 40
_SERIAL = 9000


def _finite_difference(system: System) -> Matrix:
    """The rounded difference; rows where it overflows are divided by 4 (any positive factor is allowed)."""
    difference = system.difference
    wild = ~np.isfinite(difference).all(axis=1)
    if wild.any() and system.minus is not None:
        difference = difference.copy()
        difference[wild] = system.a[wild].astype(np.float64) / 4 - system.minus[wild].astype(np.float64) / 4
    return difference


def _shifted(values: Matrix, exponent: Ints) -> Matrix:
    """``values * 2**exponent``; a product where no power of two overflows, which is several times faster."""
    if np.abs(exponent).max(initial=0) < 1000:
        return np.asarray(values * np.ldexp(1.0, exponent))
    return np.asarray(np.ldexp(values, exponent))


def _column_shifts(size: Matrix) -> Ints:
    """int64 [n]: mean exponents of the columns of ``size`` >= 0, in alternation with those of the rows."""
    exponent = np.frexp(size)[1].astype(np.float64)
    present = size > 0
    in_row, in_column = np.maximum(present.sum(axis=1), 1), np.maximum(present.sum(axis=0), 1)
    column = np.zeros(size.shape[1])
    for _ in range(_ROUNDS):
        row = np.where(present, exponent - column, 0.0).sum(axis=1) / in_row
        column = np.where(present, exponent - row[:, None], 0.0).sum(axis=0) / in_column
    return np.rint(column).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Scaled:
    """Rows scaled by powers of two to a largest entry in [1/2, 1); columns too if their sizes differ much.

    ``rows``: float64 [K, n]; ``radius``: the same or None; ``shift``: int64 [n]; ``lift``: int64 [K]. Row k is
    the given one times ``2**(lift_k - shift)``, a direction q is ``p_j = q_j * 2**-shift_j`` of the given system.
    """

    rows: Matrix
    radius: Matrix | None
    shift: Ints
    lift: Ints

    @classmethod
    def of(cls, system: System, index: Ints) -> Scaled:
        """The scaled picture of the rows ``index``."""
        rows, radius = _finite_difference(system), system.radius
        if index.size < rows.shape[0]:
            rows, radius = rows[index], None if radius is None else radius[index]
        size = np.abs(rows) if radius is None else np.maximum(np.abs(rows), radius)
        lift = -np.frexp(size.max(axis=1, initial=0.0))[1].astype(np.int64)
        scaled = _shifted(rows, lift[:, None])
        heights = np.maximum(scaled.max(axis=0, initial=0.0), -scaled.min(axis=0, initial=0.0))
        shift = np.zeros(rows.shape[1], dtype=np.int64)
        if heights[heights > 0].min(initial=1.0) < _UNEVEN:
            shift = _column_shifts(size)
            exponent = np.where(size > 0, np.frexp(size)[1] - shift, -(1 << 30))
            lift = -exponent.max(axis=1, initial=-(1 << 30))
            scaled = _shifted(rows, lift[:, None] - shift)
        wide = None if radius is None else _shifted(radius.astype(np.float64), lift[:, None] - shift)
        return cls(scaled, wide, shift, lift)

    @cached_property
    def norms(self) -> Matrix:
        """float64 [K]: Euclidean norms of the rows, zero rows 1."""
        norms = np.sqrt(np.einsum("kn,kn->k", self.rows, self.rows))
        return np.where(norms > 0, norms, 1.0)

    @cached_property
    def program(self) -> tuple[Matrix, Matrix | None]:
        """A matrix M, and B or None: margin programs on M; with many columns M is the Gram matrix and p = B d."""
        if self.radius is not None or self.rows.shape[1] <= _GRAM * self.rows.shape[0]:
            return self.rows, None
        gram = self.rows @ self.rows.T
        top = np.abs(gram).max()
        return gram / top, self.rows.T / top

    def margins(self, p: Matrix) -> Matrix:
        """float64 [K]: ``(<row, p> - <radius, |p|>) / |row|``, rounded."""
        values = times(self.rows, p)
        if self.radius is not None:
            values = values - times(self.radius, np.abs(p))
        return values / self.norms

    def mean_direction(self) -> Matrix:
        """float64 [n]: the sum of the normalised rows, normalised."""
        return _unit(transposed_times(self.rows, 1.0 / self.norms))

    def widen(self, p: Matrix, margins: Matrix, seconds: float) -> tuple[Matrix, Matrix]:
        """Newton steps that lift the lowest margins to a common level: the best direction and its margins.

        Each step takes the 2 n rows (at most half) of lowest margin, damped least squares moves them up to
        the level just above them. It separates thousands of rows to within a few violations in some ten
        steps, or gives up early.
        """
        best, count = (p, margins), int((margins <= 0).sum())
        end, stalled = time.monotonic() + seconds, 0
        columns = self.rows.shape[1]
        lowest = min(2 * columns, margins.size // 2)
        for step in range(_STEPS):
            if count == 0 or stalled > 2 or (step == 3 and 4 * count > margins.size) or time.monotonic() > end:
                break
            level = max(float(np.partition(margins, lowest)[lowest]), 1e-12)
            low = np.flatnonzero(margins < level)
            rows = self.rows[low] if self.radius is None else self.rows[low] - self.radius[low] * np.sign(p)
            rows = rows / self.norms[low, None]
            p = _unit(p + least_squares(rows, level - margins[low], _DAMPING * low.size / columns, _INNER))
            margins = self.margins(p)
            violations = int((margins <= 0).sum())
            stalled = 0 if violations < count else stalled + 1
            if violations < count:
                best, count = (p, margins), violations
        return best

    def unscale(self, q: Sequence[int] | None) -> tuple[int, ...] | None:
        """Exact integers proportional to ``q_j * 2**-shift_j``."""
        if q is None:
            return None
        top = int(self.shift.max(initial=0))
        return tuple(x << (top - int(s)) for x, s in zip(q, self.shift, strict=True))

    def rescale(self, p: Sequence[int]) -> tuple[int, ...]:
        """The inverse: exact integers proportional to ``p_j * 2**shift_j``."""
        least = int(self.shift.min(initial=0))
        return tuple(x << (int(s) - least) for x, s in zip(p, self.shift, strict=True))


def transposed_times(matrix: Matrix, vector: Matrix) -> Matrix:
    """``matrix.T @ vector`` without BLAS threads; see :func:`adcert.exact.times`."""
    step = max(1, _SERIAL // max(1, matrix.shape[1]))
    result = np.zeros(matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        result += vector[start : start + step] @ matrix[start : start + step]
    return result


def least_squares(matrix: Matrix, target: Matrix, damping: float, steps: int) -> Matrix:
    """Conjugate gradients (CGLS, from zero) for min |matrix x - target|^2 + damping |x|^2."""
    solution = np.zeros(matrix.shape[1])
    residual = target.copy()
    gradient = transposed_times(matrix, residual)
    search, size = gradient, float(gradient @ gradient)
    goal = size * 1e-20
    for _ in range(steps):
        if not size > goal:
            break
        image = times(matrix, search)
        length = size / float(image @ image + damping * (search @ search))
        solution = solution + length * search
        residual = residual - length * image
        gradient = transposed_times(matrix, residual) - damping * solution
        before, size = size, float(gradient @ gradient)
        search = gradient + (size / before) * search
    return solution


def _unit(p: Matrix) -> Matrix:
    norm = float(np.sqrt(p @ p))
    return p / norm if 0 < norm < np.inf else p


class _Fingerprint:
    """uint64 per row: equal for equal rows, different almost surely otherwise (-0.0 is 0.0)."""

    def __init__(self, columns: int) -> None:
        mixed = np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # as in SplitMix64
        self.odd = (mixed ^ (mixed >> np.uint64(27))) | np.uint64(1)

    def __call__(self, rows: Matrix) -> NDArray[np.uint64]:
        bits = (rows + 0.0).view(np.uint64)
        bits = (bits ^ (bits >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        bits ^= bits >> np.uint64(29)
        return np.asarray((bits * self.odd).sum(axis=1, dtype=np.uint64))


def _suspects(rows: Matrix) -> Ints:
    """Rows (sorted) that may be proportional to another one: a ratio of two inner products is the same there."""
    angle = np.arange(1.0, rows.shape[1] + 1) ** 2
    with np.errstate(all="ignore"):
        products = times(rows, np.stack([np.sin(angle), np.cos(angle)], axis=1))
        ratio = products[:, 0] / products[:, 1]
        order = np.argsort(ratio)
        ratio = ratio[order]
        close = np.abs(np.diff(ratio)) <= _CLOSE * np.abs(ratio[1:])
    return np.unique(np.concatenate([order[:-1][close], order[1:][close]]))


def distinct_lines(system: System) -> tuple[Ints, list[tuple[int, int]]]:
    """Indices of one row per ray (sorted), and pairs of rows without radius that seem opposite."""
    suspects = _suspects(_finite_difference(system))
    if suspects.size == 0:
        return np.arange(system.shape[0]), []
    if suspects.size == system.shape[0]:
        return _compare_lines(system)
    kept, opposite = _compare_lines(system.take(suspects))
    alone = np.ones(system.shape[0], dtype=np.bool_)
    alone[suspects] = False
    alone[suspects[kept]] = True
    return np.flatnonzero(alone), [(int(suspects[i]), int(suspects[j])) for i, j in opposite]


def _compare_lines(system: System) -> tuple[Ints, list[tuple[int, int]]]:
    """:func:`distinct_lines` by comparing all rows.

    Dividing by the largest entry maps proportional rows to bitwise equal ones, since division rounds
    correctly. Both answers are guesses where the differences were rounded: the caller checks them.
    """
    rows = _finite_difference(system)
    count, columns = rows.shape
    fingerprint = _Fingerprint(columns)
    line, turned = np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=np.bool_)
    for part in row_slices(rows.shape):
        piece = rows[part]
        top = np.abs(piece).max(axis=1, initial=0.0)
        top[top == 0] = 1.0
        first = piece[np.arange(len(piece)), np.argmax(piece != 0, axis=1)] if columns else top
        turned[part] = first < 0
        line[part] = fingerprint(piece / np.where(first < 0, -top, top)[:, None])
        if system.radius is not None:
            line[part] += np.uint64(3) * fingerprint(system.radius[part] / top[:, None])
    ray = np.where(turned, line * np.uint64(5) + np.uint64(1), line)
    kept = np.sort(np.unique(ray, return_index=True)[1])
    exact = kept[system.is_exact[kept]]
    order = exact[np.argsort(line[exact])]  # one row is left of each ray, so two of a line are opposite
    twice = np.flatnonzero(line[order[1:]] == line[order[:-1]]).tolist()
    return kept, [(int(order[i]), int(order[i + 1])) for i in twice]
