"""Theorem 5's rank test: are rows of floats linearly independent over the rationals? A yes is a proof.

If the rows of touches are, every choice of sides has a direction: ``A p = s`` is solvable for every s. So the rank
condition is nothing beside the strict system: where it holds the system is nonempty, and the system may be nonempty
where it fails. What it adds is that the sides do not matter: AD's gradient is affine in the proxy of each touch, every
vertex is in dB, so proxies anywhere between the one-sided derivatives leave it in dC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flint
import numpy as np

from .exact import System, true_integers

ENTRIES = 1 << 20  # of the largest matrix that is asked about
_PRIMES = (2**61 - 1, 2**64 - 59)


def independent(rows: Any, minus: Any = None, radius: Any = None) -> bool:
    """Whether the rows ``rows - minus`` [K, n] (float32 or float64, none rounded) are linearly independent.

    Full rank modulo a prime proves full rank. False where two primes do not show it (the rank over the integers, which
    takes seconds, would say the same but for one matrix in 10^18), for more than a million entries, and for rows with a
    radius.

    Raises:
        AdcertError: for arrays that are not finite floats of one shape.

    >>> independent([[1.0, 2.0], [2.0, 4.0]]), independent([[1.0, 2.0], [2.0, 4.000001]])
    (False, True)
    """
    system = System.read(rows, minus, radius)
    count, width = system.shape
    if count == 0:
        return True
    if system.radius is not None or count > width or count * width > ENTRIES:
        return False
    if count == 1:
        return bool(system.difference.any())
    used = np.flatnonzero(system.difference.any(axis=0))
    if len(used) < count:
        return False
    integers = true_integers(System(*_columns(system, used)), range(count))[0]
    return any(_rank(integers, prime) == count for prime in _PRIMES)


def _columns(system: System, used: np.ndarray[Any, Any]) -> tuple[Any, Any, None]:
    return system.a[:, used], None if system.minus is None else system.minus[:, used], None


def _rank(integers: Sequence[Sequence[int]], prime: int) -> int:
    reduced = [[x % prime for x in row] for row in integers]
    return int(flint.nmod_mat(len(reduced), len(reduced[0]), [x for row in reduced for x in row], prime).rank())
