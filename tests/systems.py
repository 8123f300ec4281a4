"""Strict homogeneous systems with known answers, and an exact solver that shares nothing with adcert."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import Any

import numpy as np


def fourier_motzkin(rows: list[list[int]]) -> bool:
    """Whether some p has ``<row, p> > 0`` for all integer rows, by eliminating the unknowns in turn."""
    system = {_primitive(row) for row in rows}
    columns = len(rows[0]) if rows else 0
    for j in range(columns):
        if any(not any(row) for row in system):
            return False
        positive = [row for row in system if row[j] > 0]
        negative = [row for row in system if row[j] < 0]
        system = {row for row in system if row[j] == 0}
        for a in positive:
            for b in negative:
                system.add(_primitive([x * -b[j] + y * a[j] for x, y in zip(a, b, strict=True)]))
    return not system


def _primitive(row: Any) -> tuple[int, ...]:
    values = [int(x) for x in row]
    divisor = gcd(*values) or 1
    return tuple(x // divisor for x in values)


def integers(array: np.ndarray[Any, Any]) -> list[list[int]]:
    """Rows of floats as integers, each row scaled by one positive factor."""
    result = []
    for row in array:
        fractions = [Fraction(float(x)) for x in row]
        scale = max((x.denominator for x in fractions), default=1)  # powers of two: the largest is a common multiple
        result.append([int(x * scale) for x in fractions])
    return result


@dataclass(frozen=True)
class Planted:
    """A system with its answer."""

    kind: str
    rows: np.ndarray[Any, Any]
    nonempty: bool


def planted(rng: np.random.Generator) -> Planted:
    """A random system with a planted answer: feasible, empty, or one unit in the last place from that."""
    kind = str(rng.choice(["feasible", "empty", "near feasible", "near empty", "thin", "scaled empty"]))
    columns = int(rng.integers(1, 13)) if rng.random() < 0.9 else int(rng.integers(13, 28))
    count = int(rng.integers(1, 3 * columns + 2))
    nonempty = kind in ("feasible", "near feasible", "thin")
    rows = _PLANTERS[kind](rng, count, columns)
    order = rng.permutation(len(rows))
    return Planted(kind, rows[order], nonempty)


def _feasible(rng: np.random.Generator, count: int, columns: int) -> np.ndarray[Any, Any]:
    """float32 rows whose exact inner product with a hidden integer vector is positive."""
    rows = rng.standard_normal((count, columns)).astype(np.float32)
    hidden = rng.integers(-1000, 1001, size=columns)
    hidden[int(rng.integers(columns))] = 997
    for k, row in enumerate(rows):
        value = sum(Fraction(float(x)) * int(p) for x, p in zip(row, hidden, strict=True))
        if value < 0:
            rows[k] = -row
        elif value == 0:
            rows[k] = hidden
    return rows


def _empty(rng: np.random.Generator, count: int, columns: int) -> np.ndarray[Any, Any]:
    """Random integer rows, one of them minus a positive combination of the others."""
    rows = rng.integers(-9, 10, size=(count, columns))
    weights = rng.integers(1, 6, size=count)
    return np.vstack([rows, -(weights @ rows)]).astype(np.float32)


def _scaled_empty(rng: np.random.Generator, count: int, columns: int) -> np.ndarray[Any, Any]:
    """The same with rows and columns multiplied by wildly different powers of two."""
    rows = _empty(rng, count, columns).astype(np.float64)
    rows = np.ldexp(rows, rng.integers(-300, 300, size=(len(rows), 1)))
    return np.ldexp(rows, rng.integers(-300, 300, size=(1, columns)))


def _independent(rng: np.random.Generator, count: int, columns: int) -> np.ndarray[Any, Any]:
    """``count`` <= ``columns`` rows, triangular with unit diagonal: independent by construction."""
    rows = np.triu(rng.integers(-(2**20), 2**20, size=(count, columns)), 1)
    rows[np.arange(count), np.arange(count)] = rng.choice([-1, 1], size=count)
    return rows


def _near_feasible(rng: np.random.Generator, count: int, columns: int) -> np.ndarray[Any, Any]:
    """Independent rows and minus a positive combination of them, one entry off by one unit in the last place.

    The entry lies in a column where no independent row has a pivot, so the last row is independent of the
    others too.
    """
    if columns == 1:
        return np.array([[np.nextafter(0.0, 1.0)]])
    count = min(count, columns - 1)
    rows = _independent(rng, count, columns)
    last = -(rng.integers(1, 1000, size=count) @ rows).astype(np.float64)
    # The last column belongs to no pivot: e_last is outside the span of the triangular rows unless count ==
    # columns.
    last[-1] = np.nextafter(last[-1], np.inf * int(rng.choice([-1, 1])))
    return np.vstack([rows.astype(np.float64), last])


def _near_empty(rng: np.random.Generator, count: int, columns: int) -> np.ndarray[Any, Any]:
    """n independent rows and minus a positive combination, moved by one unit in the last place: still empty.

    The rows are +-e_j, so the moved row is again a combination, with weights changed by one unit in the last
    place.
    """
    del count
    signs = rng.choice([-1.0, 1.0], size=columns)
    weights = rng.integers(1, 1000, size=columns).astype(np.float64)
    j = int(rng.integers(columns))
    weights[j] = np.nextafter(weights[j], np.inf * int(rng.choice([-1, 1])))
    return np.vstack([np.diag(signs), -(signs * weights)])


def _thin(rng: np.random.Generator, count: int, columns: int) -> np.ndarray[Any, Any]:
    """A cone one unit in the last place wide around a hidden axis: rows +-(1 + ulp) e_j +- e_0."""
    rows = [np.eye(columns)[0]]
    for j in range(1, columns):
        slope = float(rng.integers(1, 2**20)) / 2**10
        low, high = np.zeros(columns), np.zeros(columns)
        low[[0, j]] = -slope, 1.0
        high[[0, j]] = np.nextafter(slope, np.inf), -1.0
        rows += [low, high]
    del count
    return np.vstack(rows)


_PLANTERS = {
    "feasible": _feasible,
    "empty": _empty,
    "near feasible": _near_feasible,
    "near empty": _near_empty,
    "thin": _thin,
    "scaled empty": _scaled_empty,
}
