"""Strict homogeneous systems A p > 0 (the sets P_l of Algorithm 1): a direction or a proof of emptiness.

Every direction and every proof that leaves :func:`decide` has passed :func:`check_direction` or
:func:`check_proof`; the stages of :mod:`adcert.search` only propose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from adcert.answers import Decision, Proof, is_direction, is_proof
from adcert.exact import System
from adcert.search import Search

__all__ = ["Decision", "Proof", "check_direction", "check_proof", "decide", "glance"]


def decide(
    A: Any,
    minus: Any = None,
    radius: Any = None,
    *,
    warm: Sequence[float] | None = None,
    seconds: float = 10.0,
) -> Decision:
    """Decides whether some p has ``<row, p> > 0`` for every true row.

    Arguments: ``A``, ``minus``, ``radius``: float32 or float64 [rows, columns]; true row k lies within
    ``|radius[k]|`` (entrywise) of the exact difference ``A[k] - minus[k]``. ``warm``: a direction to try
    first. ``seconds``: wall-clock budget, after which the answer is None. No rows: nonempty, direction zeros.
    A zero row without radius: empty. Rows with a radius can certify, but never take part in a proof of
    emptiness. Without a radius and with enough time every system is decided.

    Raises: :class:`adcert.errors.AdcertError` for NaN or infinite entries, wrong shapes or dtypes.

    >>> decide([[1.0, 0.0], [-1.0, 2.0]]).nonempty
    True
    >>> decide([[1.0], [-1.0]]).proof
    Proof(rows=(0, 1), weights=(1, 1))
    """
    return Search(System.read(A, minus, radius), warm, time.monotonic() + seconds).run()


def glance(A: Any, minus: Any = None, radius: Any = None) -> Decision | None:
    """:func:`decide`'s answer if comparisons of single entries are enough for it: the same on every machine.

    >>> glance([[1.0, 2.0], [3.0, -4.0]]).direction, glance([[1.0, 0.0], [-1.0, 2.0]])
    ((1, 0), None)
    """
    return Search(System.read(A, minus, radius), None, math.inf).glance()


def check_direction(A: Any, direction: Sequence[int], minus: Any = None, radius: Any = None) -> bool:
    """Exactly whether ``<row, direction> > 0`` for every true row; False unless it is one int per column.

    >>> check_direction([[1.0, -1.0]], (1, 0)), check_direction([[1.0, -1.0]], (1, 1))
    (True, False)
    """
    return is_direction(System.read(A, minus, radius), direction)


def check_proof(A: Any, proof: Proof, minus: Any = None, radius: Any = None) -> bool:
    """Exactly whether ``proof`` holds: distinct rows of radius 0, positive integers, combination zero.

    >>> check_proof([[1.0], [-2.0]], Proof((0, 1), (2, 1)))
    True
    """
    return is_proof(System.read(A, minus, radius), proof)
