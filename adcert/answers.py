"""Answers about A p > 0 and their exact checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adcert.exact import System, combination_is_zero
from adcert.signs import first_failure


@dataclass(frozen=True)
class Proof:
    """Gordan: ``sum_k weights[k] * row[rows[k]] == 0`` exactly, weights positive integers."""

    rows: tuple[int, ...]
    weights: tuple[int, ...]


@dataclass(frozen=True)
class Decision:
    """What is known about ``{p : A p > 0}``.

    ``nonempty`` is True with integers ``direction``, False with a ``proof``, or None (undecided); ``reason``
    names the stage that decided, or says why none did.
    """

    nonempty: bool | None
    direction: tuple[int, ...] | None
    proof: Proof | None
    reason: str


def are_integers(values: Sequence[object]) -> bool:
    """Whether all are Python's own integers."""
    return set(map(type, values)) <= {int}  # neither bool nor NumPy's


def is_direction(system: System, direction: Sequence[int]) -> bool:
    """See :func:`adcert.feasibility.check_direction`."""
    if len(direction) != system.shape[1] or not are_integers(direction):
        return False
    return first_failure(system, direction) is None


def is_proof(system: System, proof: Proof) -> bool:
    """See :func:`adcert.feasibility.check_proof`."""
    rows, weights = proof.rows, proof.weights
    if not rows or len(rows) != len(weights) or len(set(rows)) != len(rows):
        return False
    if not (are_integers(rows) and are_integers(weights)):
        return False
    if not (min(rows) >= 0 and max(rows) < system.shape[0] and min(weights) > 0):
        return False
    return bool(system.is_exact[list(rows)].all()) and combination_is_zero(system, rows, weights)
