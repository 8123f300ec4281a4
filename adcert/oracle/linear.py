"""The derivatives of a program's polynomials at its point, as integer matrices between limit gradients."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np

from .program import Array, Poly, Program, Select


@dataclass(frozen=True)
class Linear:
    """A Poly near w: gradients of its rows from those of the nodes they depend on, in units of 1 / denominators."""

    inputs: Array  # [m] nodes
    matrix: Array  # [n, m]
    bound: float  # largest sum of absolute values in a row

    @cached_property
    def sparse(self) -> tuple[Array, Array] | None:
        """Where most entries are 0: per row the places [n, K] and values [n, K] of the others."""
        width = int((self.matrix != 0).sum(axis=1).max(initial=0))
        if width * 8 > self.matrix.shape[1]:
            return None
        places = np.argsort(self.matrix == 0, axis=1, kind="stable")[:, :width]
        return places, np.take_along_axis(self.matrix, places, axis=1)

    def apply(self, gradient: Array) -> Array:
        """The matrix times [m, P], both in floats."""
        if self.sparse is None:
            return np.asarray(self.matrix @ gradient)
        places, entries = self.sparse
        return np.asarray(np.einsum("nk,nkp->np", entries, gradient[places]))

    @property
    def integers(self) -> Array:
        """The matrix in Python integers."""
        return self.matrix if self.matrix.dtype == object else self.matrix.astype(np.int64).astype(object)


def linear_maps(program: Program) -> tuple[Array, list[Linear | None]]:
    """Per node d with d * G integral whatever is selected, and the maps of all Poly in these units. Where slopes are
    floats, 1."""
    denominators = np.ones(len(program.values), dtype=object)
    maps: list[Linear | None] = []
    for op in program.ops:
        if isinstance(op, Poly):
            maps.append(_linear(program, op, denominators))
            continue
        maps.append(None)
        if isinstance(op, Select) and not program.smooth:
            for k, members in enumerate(op.members):
                denominators[op.out.start + k] = lcm(*denominators[members])
    return denominators, maps


def _linear(program: Program, op: Poly, denominators: Array) -> Linear:
    """d y = sum_k v[right] d v[left] + v[left] d v[right]."""
    used = np.unique(np.concatenate([op.left.ravel(), op.right.ravel()]))
    inputs = used[~program.constant[used]]
    place = np.full(int(used.max(initial=0)) + 1, -1)
    place[inputs] = np.arange(len(inputs))
    rows = np.arange(len(op.left))[:, None] + 0 * op.left
    pairs = [(rows, place[a], b) for a, b in ((op.left, op.right), (op.right, op.left))]
    a, b = program.values[op.left], program.values[op.right]
    whole = not _fractional(program, op) and bool((a == np.rint(a)).all() and (b == np.rint(b)).all())
    plain = all(d == 1 for d in denominators[inputs])
    if program.smooth or (whole and plain):
        matrix = np.zeros((len(op.left), len(inputs)))
        for r, c, other in pairs:
            chosen = c >= 0
            np.add.at(matrix, (r[chosen], c[chosen]), program.values[other[chosen]])
        return Linear(inputs, matrix, float(np.abs(matrix).sum(axis=1).max(initial=0)))
    return _rational(program, op, denominators, inputs, pairs)


def _fractional(program: Program, op: Poly) -> bool:
    return bool(program.fractions) and any(int(n) in program.fractions for n in np.union1d(op.left, op.right))


def _rational(
    program: Program, op: Poly, denominators: Array, inputs: Array, pairs: list[tuple[Array, Array, Array]]
) -> Linear:
    table: list[dict[int, Fraction]] = [{} for _ in op.left]
    for r, c, other in pairs:
        for row, column, node in zip(r.ravel(), c.ravel(), other.ravel(), strict=True):
            if column >= 0:
                table[row][column] = table[row].get(column, Fraction(0)) + program.value(node)
    matrix = np.zeros((len(op.left), len(inputs)), dtype=object)
    for row, entries in enumerate(table):
        shares = {c: x / denominators[inputs[c]] for c, x in entries.items()}
        unit = lcm(*(x.denominator for x in shares.values()))
        denominators[op.out.start + row] = unit
        for column, share in shares.items():
            matrix[row, column] = int(share * unit)
    bound = max((int(sum(abs(x) for x in row)) for row in matrix), default=0)
    if bound < 2**52:
        matrix = matrix.astype(np.float64)
    return Linear(inputs, matrix, float(min(bound, 2**1000)))
