"""The cells around a point, with the limit gradient of each: all of them, or those that given directions lead into."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .program import Array, Program
from .search import BudgetError, Node, Search


@dataclass(frozen=True)
class Cells:
    """``certain``, ``possible``: integers [m, P], distinct, times ``1 / scale`` the limit gradients; ``directions``:
    one p per certain element.

    ``complete``: the search ended within its budget, so every cell near w has its limit gradient in one of
    the two.
    """

    certain: Array
    possible: Array
    directions: Array
    complete: bool
    scale: Fraction = Fraction(1)


def enumerate_cells(program: Program, budget: int = 2000, seed: int = 0) -> Cells:
    """All cells around the point of a localized program, by at most ``budget`` decisions; ``complete`` False when the
    budget ran out.

    ``certain`` holds the leaves found so far in either case; it is correct, merely not all of them.
    """
    search = Search(program, budget, np.random.default_rng(seed))
    complete = True
    try:
        try:
            search.start()
        except OverflowError:
            search = Search(program, budget, np.random.default_rng(seed))
            search.gradient = search.gradient.astype(object)
            search.start()
    except BudgetError:
        complete = False
    width = len(program.parameters)
    certain = [(e, p) for e, p in search.found.values() if p is not None]
    possible = [e for e, p in search.found.values() if p is None]
    return Cells(
        _stack([e for e, _ in certain], width),
        _stack(possible, width),
        np.array([p for _, p in certain], dtype=object).reshape(-1, width),
        complete and not search.doubt,
        search.scale,
    )


def follow(program: Program, directions: Array, seed: int = 0) -> Cells:
    """The limit gradients of the cells into which these directions (integers [S, P]) lead, where they decide all
    ties to first order. Not complete, but cheap."""
    search = Search(program, 4096, np.random.default_rng(seed))  # subsets of ties; following costs no decisions
    if search.gradient.dtype == np.int64:
        search.gradient = search.gradient.astype(object)
    first = search.prepare()
    for direction in directions.astype(object):
        search.along = direction
        with suppress(BudgetError):  # too many ways to order the ties of one median
            search.descend(first, Node((), (), direction))
    width = len(program.parameters)
    return Cells(
        _stack([e for e, _ in search.found.values()], width),
        _stack([], width),
        np.array([p for _, p in search.found.values()], dtype=object).reshape(-1, width),
        False,
        search.scale,
    )


def _stack(elements: list[Array], width: int) -> Array:
    if not elements:
        return np.zeros((0, width), dtype=np.int64)
    return np.stack(elements)
