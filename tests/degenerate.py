"""Systems on the edge between empty and nonempty whose answers are known by construction, and an exact referee."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import systems

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """Rows ``a - minus`` known up to ``radius``, with the answer."""

    kind: str
    a: Array
    minus: Array | None
    radius: Array | None
    nonempty: bool


def case(rng: np.random.Generator) -> Case:
    """A random system: a third from :func:`systems.planted`, the others from below, some with repeats or zeros."""
    if rng.random() < 0.33:
        plain = systems.planted(rng)
        return Case(plain.kind, plain.rows, None, None, plain.nonempty)
    columns = int(rng.integers(2, 13)) if rng.random() < 0.85 else int(rng.integers(13, 41))
    kind, nonempty, *arrays = _PLANTERS[int(rng.integers(len(_PLANTERS)))](rng, columns)
    arrays += [None] * (3 - len(arrays))
    order = rng.permutation(len(arrays[0]))
    if rng.random() < 0.2:  # repeated rows
        order = np.concatenate([order, rng.choice(order, size=2 * columns)])
    width = np.concatenate([rng.permutation(columns), np.full(columns if rng.random() < 0.2 else 0, columns)])
    a, minus, radius = (None if x is None else np.pad(x, ((0, 0), (0, 1)))[order][:, width] for x in arrays)
    assert a is not None
    return Case(kind, a, minus, radius, nonempty)


def _face(rng: np.random.Generator, columns: int) -> tuple[Array, Array, Array, int]:
    """Rows b_i and weights w_i, rows c e_n and nonnegative integer combinations of all these, and the sign c.

    The b_i are integers, triangular with pivots before the last column: independent of each other and of e_n.
    """
    count, sign = int(rng.integers(1, columns)), int(rng.choice([-1, 1]))
    base = np.triu(rng.integers(-99, 100, size=(count, columns)), 1)
    base[np.arange(count), np.arange(count)] = rng.choice([-1, 1], size=count)
    wall = np.eye(columns, dtype=np.int64)[-1:] * sign
    mixed = rng.integers(0, 3, size=(int(rng.integers(0, 4 * columns)), count + 1))
    further = mixed[mixed.any(axis=1)] @ np.vstack([base, wall])
    return base, rng.integers(1, 10, size=count), np.vstack([wall, further]), sign


def _one_unit(rng: np.random.Generator, columns: int) -> tuple[Any, ...]:
    """The b_i, c e_n, combinations of these, and ``-sum w_i b_i + delta e_n``, delta one unit in the last place.

    If delta has the sign of c, a p with b_i p = 1 and c p_n large is a direction; if not, c e_n and the rows
    that sum to delta e_n are opposite.
    """
    base, weights, further, sign = _face(rng, columns)
    dtype = (np.float32, np.float64)[int(rng.integers(2))]
    last, towards = -(weights @ base).astype(dtype), int(rng.choice([-1, 1]))
    last[-1] = np.nextafter(last[-1], dtype(np.inf * towards))
    return f"one unit, {dtype.__name__}", towards == sign, np.vstack([base, further, last[None]]).astype(dtype)


def _below_one_unit(rng: np.random.Generator, columns: int) -> tuple[Any, ...]:
    """The same with a delta that only the exact difference of the two terms holds."""
    base, weights, further, sign = _face(rng, columns)
    rows = np.vstack([base, further, -(weights @ base)[None]]).astype(np.float64)
    minus = rng.integers(-9, 10, size=rows.shape).astype(np.float64)
    a, towards = rows + minus, int(rng.choice([-1, 1]))
    a[-1, -1], minus[-1, -1] = rows[-1, -1], -towards * 2.0**-60
    return "below one unit, minus", towards == sign, a, minus


def _sided(rng: np.random.Generator, count: int, hidden: Array) -> Array:
    """Integer rows with a positive inner product with ``hidden``."""
    rows = rng.integers(-999, 1000, size=(count, len(hidden)))
    values = rows @ hidden
    return rows[values != 0] * np.sign(values[values != 0])[:, None]


def _orthogonal(rng: np.random.Generator, count: int, hidden: Array) -> Array:
    """Integer rows orthogonal to ``hidden``, whose last entry is 1."""
    rows = rng.integers(-99, 100, size=(count, len(hidden)))
    rows[:, -1] -= rows @ hidden
    return rows


def _hidden_relation(rng: np.random.Generator, columns: int) -> tuple[Any, ...]:
    """A positive combination of two, five or all but one of the rows vanishes; one side of a plane holds all others."""
    hidden = np.append(rng.integers(-9, 10, size=columns - 1), 1)
    support = int(rng.choice([2, 5, columns + 1]))
    base = _orthogonal(rng, support - 1, hidden)
    last = -(rng.integers(1, 5, size=support - 1) @ base)
    rows = np.vstack([_sided(rng, 4 * columns, hidden), base, last[None]])
    return f"hidden relation of {'n + 1' if support == columns + 1 else support}", False, rows.astype(np.float32)


def _thin(rng: np.random.Generator, columns: int) -> tuple[Any, ...]:
    """Rows within 1e-6 to 1e-12 of a plane's positive side."""
    hidden = np.append(rng.integers(-9, 10, size=columns - 1), 1)
    size = 10 ** int(rng.integers(3, 9))
    near = _sided(rng, 6 * columns, hidden)
    return "thin relative", True, (size * _orthogonal(rng, len(near), hidden) + near).astype(np.float64)


def _radius(rng: np.random.Generator, columns: int) -> tuple[Any, ...]:
    """Radii that eat half of every margin along a hidden direction, margins at least 1e-2 of the row."""
    hidden = np.append(rng.integers(-9, 10, size=columns - 1), 1)
    rows = _sided(rng, 4 * columns, hidden)
    rows = rows[rows @ hidden > 10 * np.abs(hidden).sum()]
    rows = np.vstack([rows, 99 * hidden[None]]).astype(np.float64)
    margin = rows @ hidden / np.abs(hidden).sum()
    return "radius", True, rows, None, rng.random(rows.shape) * margin[:, None] / 2


def _empty_beside_radius(rng: np.random.Generator, columns: int) -> tuple[Any, ...]:
    """A vanishing combination of exact rows among rows with radii."""
    _, _, rows = _hidden_relation(rng, columns)
    radius = np.zeros_like(rows)
    radius[: 2 * columns] = 2.0**-10  # the relation comes after 4 n other rows
    return "relation beside radii", False, rows, None, radius


_PLANTERS: list[Callable[[np.random.Generator, int], tuple[Any, ...]]] = [
    _one_unit,
    _one_unit,
    _below_one_unit,
    _hidden_relation,
    _thin,
    _radius,
    _empty_beside_radius,
]


def exact_rows(*terms: Array | None) -> list[list[list[int]]]:
    """Each term's rows as integers times one power of two per row, common to all terms."""
    present = [None if term is None else np.asarray(term, dtype=np.float64).tolist() for term in terms]
    first = next(term for term in present if term is not None)
    result: list[list[list[int]]] = [[] for _ in terms]
    for k, row in enumerate(first):
        ratios = [[x.as_integer_ratio() for x in (term[k] if term else [0.0] * len(row))] for term in present]
        scale = max((below for row_ratios in ratios for _, below in row_ratios), default=1)
        for target, row_ratios in zip(result, ratios, strict=True):
            target.append([above * (scale // below) for above, below in row_ratios])
    return result


def referee(problem: Case, direction: Sequence[int] | None, proof: Any) -> None:
    """Checks the evidence for an answer with Python's integers alone."""
    if direction is not None:
        a, minus, radius = exact_rows(problem.a, problem.minus, problem.radius)
        assert all(type(p) is int for p in direction) and len(direction) == problem.a.shape[1]
        for row, second, wide in zip(a, minus, radius, strict=True):
            terms = zip(row, second, wide, direction, strict=True)
            assert sum((x - y) * p - abs(r * p) for x, y, r, p in terms) > 0
        return
    index = list(proof.rows)
    assert index and len(set(index)) == len(index) == len(proof.weights)
    assert all(type(w) is int and w > 0 for w in proof.weights)
    assert problem.radius is None or not problem.radius[index].any()
    columns = np.asarray(problem.a[index], dtype=np.float64).T
    second = np.zeros_like(columns) if problem.minus is None else np.asarray(problem.minus[index]).T
    a, minus = exact_rows(columns, second)  # a power of two per column: the combination is zero in each
    for row, other in zip(a, minus, strict=True):
        assert sum(w * (x - y) for w, x, y in zip(proof.weights, row, other, strict=True)) == 0
