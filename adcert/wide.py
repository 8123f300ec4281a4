"""Systems A p > 0 of few rows and very many columns: decided on the few columns that matter.

K rows span at most K columns. A direction that uses only some columns is a direction of the whole system, and the
rows' other entries need not be kept for its check; a proof of emptiness on some columns that fails on the whole system
names the columns to add, which raise the rank. Work and memory are a few passes over A.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adcert.answers import Decision, Proof
from adcert.exact import Floats, Ints
from adcert.feasibility import check_proof, decide, glance

WIDE = 2048  # columns, and
_TIMES = 4  # as many columns as rows
_ADDED = 8  # columns that a failing proof adds
_DEEPEST = 256  # largest entries of every row that are tried where only the radii stand in the way
_WHOLE = 1 << 20  # entries of a system that is decided as it is if its columns in part will not do

Matrix = NDArray[np.float64]


def is_wide(rows: int, columns: int) -> bool:
    """Whether :func:`decide_wide` is worth its while."""
    return columns > max(WIDE, _TIMES * rows)


def decide_wide(
    a: Floats, minus: Floats | None = None, radius: Floats | None = None, *, seconds: float = 10.0
) -> tuple[Ints, Decision]:
    """The columns that the answer rests on, ascending, and :func:`adcert.feasibility.decide`'s answer on them.

    With a proof the columns are all those that are not zero in its rows; its check on them is one on all columns.

    >>> A = np.zeros((2, 5000))
    >>> A[:, 7], A[1, 4000] = (1.0, -1.0), 3.0
    >>> columns, answer = decide_wide(A)
    >>> columns.tolist(), answer.nonempty
    ([7, 4000], True)
    """
    deadline = time.monotonic() + seconds
    seen = glance_wide(a, minus, radius)
    if seen is not None:
        return seen
    difference = a.astype(np.float64, copy=False) if minus is None else np.subtract(a, minus, dtype=np.float64)
    each, chosen = 1, _largest(difference, 1)
    while each <= _DEEPEST and 2 * len(chosen) < a.shape[1] and time.monotonic() < deadline:
        answer = decide(*_at(chosen, a, minus, radius), seconds=seconds)
        if answer.nonempty:
            return chosen, answer
        if answer.proof is not None and check_proof(a, answer.proof, minus, radius):
            return _columns_of(a, minus, answer.proof), answer
        proof = answer.proof or decide(*_at(chosen, a, minus, None), seconds=seconds).proof
        more = chosen[:0] if proof is None else _violated(difference, radius, proof)
        if not len(np.setdiff1d(more, chosen)):  # nothing is missing but margins above the radii
            each *= 4
            more = _largest(difference, each)
        chosen = np.union1d(chosen, more)
    if a.size > _WHOLE:
        why = f"{len(chosen)} of {a.shape[1]} columns give neither a direction above every radius nor a proof"
        return chosen, Decision(None, None, None, why)
    return np.arange(a.shape[1]), decide(a, minus, radius, seconds=max(0.01, deadline - time.monotonic()))


def glance_wide(a: Floats, minus: Floats | None = None, radius: Floats | None = None) -> tuple[Ints, Decision] | None:
    """Of a single row, the entry that is farthest from zero; see :func:`adcert.feasibility.glance`.

    More rows need their other columns: whether they are independent counts, too.
    """
    if a.shape[0] != 1:
        return None
    with np.errstate(over="ignore"):  # a difference that overflows is of its sign
        margin = np.abs(a[0].astype(np.float64, copy=False) - (0.0 if minus is None else minus[0]))
    if radius is not None:
        margin = margin - radius[0]
    best = np.array([int(np.argmax(margin))], dtype=np.int64)
    answer = glance(*_at(best, a, minus, radius))
    return (best, answer) if answer is not None and answer.nonempty else None


def _at(columns: Ints, *arrays: Floats | None) -> list[Any]:
    return [None if t is None else t[:, columns] for t in arrays]


def _largest(values: Matrix, count: int) -> Ints:
    """Columns of the ``count`` largest entries of every row, but no zeros."""
    size, count = np.abs(values), min(count, values.shape[1])
    top = np.argpartition(size, -count, axis=1)[:, -count:]
    return np.unique(top[np.take_along_axis(size, top, axis=1) > 0]).astype(np.int64)


def _violated(difference: Matrix, radius: Floats | None, proof: Proof) -> Ints:
    """Columns in which the combination of rows is clearly not zero, the clearest first."""
    rows = list(proof.rows)
    top = max(proof.weights)
    weights = np.array([float(w / top) for w in proof.weights])
    value = weights @ difference[rows]
    noise = weights @ np.abs(difference[rows]) * 2.0**-40
    if radius is not None:
        noise += 2 * (weights @ radius[rows])
    value[np.abs(value) <= noise] = 0
    return _largest(value[None], _ADDED)


def _columns_of(a: Floats, minus: Floats | None, proof: Proof) -> Ints:
    """The columns that are not zero in the proof's rows."""
    rows = list(proof.rows)
    some = a[rows].any(axis=0)
    if minus is not None:
        some |= minus[rows].any(axis=0)
    return np.flatnonzero(some)
