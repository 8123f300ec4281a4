"""Functions of the parameters as straight-line programs over numbered scalars, with exact values at a point.

A node is a number: a constant (a Fraction), a trainable parameter, or the result of

* ``Poly``: ``y_i = sum_k v[left_ik] v[right_ik]``, the only smooth operation (constants are nodes like others, node 1
  is the constant 1: affine maps are polynomials, too, and so are products of parameters);
* ``Select``: ``y_i`` is the rank_i-th smallest of ``v[members_i]``: maximum, minimum, median, sorting;
* ``Smooth``: ``y_i = phi(v[source_i])`` with a differentiable phi that is no polynomial: its slope is a float.

Every kinked activation is a polynomial of maxima and minima. Graph builds programs and folds what is constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Values = Sequence[Fraction | float]

PRIME = 2**31 - 1
ZERO, ONE = 0, 1  # the first two nodes
MAX, MIN = -1, 0  # ranks

_GRID = 2.0**12  # multiples of 1 / _GRID that are small enough are added and multiplied exactly in float64


class OracleError(Exception):
    """What was asked cannot be computed exactly; the message says why. (Not a TypeError: torch would swallow it.)"""


@dataclass(frozen=True)
class Poly:
    """``v[out] = sum_k v[left[:, k]] * v[right[:, k]]``; unused places hold ZERO twice."""

    out: slice
    left: Array  # [n, K]
    right: Array  # [n, K]


@dataclass(frozen=True)
class Select:
    """``v[out]``: of ``v[members]`` the rank-th smallest, counted from 0; MAX is the last. Where a row is padded by
    repeating a member, the rank is MIN or MAX."""

    out: slice
    members: Array  # [n, W]
    rank: Array  # [n]


@dataclass(frozen=True)
class Smooth:
    """``v[out] = phi(v[source])``, differentiable there, with the slope as computed; ``name`` says which phi."""

    out: slice
    source: Array  # [n]
    slope: Array  # [n] float64
    name: str


Op = Poly | Select | Smooth


@dataclass(frozen=True)
class Program:
    """A function near one point.

    ``ops`` in the order of evaluation; ``values``: float64 [N], exact but where ``fractions`` has the node;
    ``constant``: bool [N]; ``parameters``: the nodes of the P parameters; ``slices``: name -> its entries of the P;
    ``shapes``: name -> shape; ``output``: the node of the loss. ``exact``: all of it is rational and nothing was
    rounded; else offsets or slopes stand for what floating point did. ``eps``: that of the coarsest type.
    """

    ops: tuple[Op, ...]
    values: Array
    fractions: dict[int, Fraction]
    constant: Array
    parameters: Array
    slices: dict[str, slice]
    shapes: dict[str, tuple[int, ...]]
    output: int
    exact: bool
    eps: float = 2.0**-52

    def value(self, node: int | np.integer[Any]) -> Fraction:
        """The exact value of a node at the point."""
        known = self.fractions.get(int(node))
        return Fraction(float(self.values[node])) if known is None else known

    @property
    def smooth(self) -> bool:
        return any(isinstance(op, Smooth) for op in self.ops)

    @property
    def point(self) -> list[Fraction]:
        """The parameters, exactly."""
        return [self.value(node) for node in self.parameters]


class Graph:
    """Builds a program node by node. All arguments and results are arrays of nodes.

    >>> graph = Graph()
    >>> w = graph.parameter(np.array([0.0, 2.0]))
    >>> y = graph.poly(np.stack([w, w], axis=-1), np.stack([w, np.full(2, ONE)], axis=-1))  # w^2 + w
    >>> graph.values[y].tolist()
    [0.0, 6.0]
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.size = 0
        self._values: Array = np.zeros(256)
        self._constant: Array = np.zeros(256, dtype=bool)
        self.fractions: dict[int, Fraction] = {}
        self._known: dict[float | Fraction, int] = {}
        self.exact = True
        self.eps = 2.0**-52
        self.loose = False  # after the first smooth piece values are floats: torch's, where there are any
        self._new(np.array([0.0, 1.0]), True)
        self._known.update({0.0: ZERO, 1.0: ONE})

    @property
    def values(self) -> Array:
        return self._values[: self.size]

    @property
    def constant(self) -> Array:
        return self._constant[: self.size]

    def _new(self, values: Array, constant: bool) -> Array:
        start, self.size = self.size, self.size + len(values)
        if self.size > len(self._values):
            room = 2 * self.size
            self._values = np.concatenate([self._values, np.zeros(room - len(self._values))])
            self._constant = np.concatenate([self._constant, np.zeros(room - len(self._constant), dtype=bool)])
        self._values[start : self.size] = values
        self._constant[start : self.size] = constant
        return np.arange(start, self.size)

    def parameter(self, values: Array) -> Array:
        return self._new(np.asarray(values, dtype=np.float64).ravel(), False).reshape(np.shape(values))

    def number(self, value: Fraction | float) -> int:
        """The node of a constant."""
        exact = float(value)
        key: float | Fraction = exact if exact == value else Fraction(value)
        if key not in self._known:
            node = int(self._new(np.array([exact]), True)[0])
            if exact != value:
                self.fractions[node] = Fraction(value)
            self._known[key] = node
        return self._known[key]

    def numbers(self, values: Array) -> Array:
        """The nodes of float64 constants; raises OracleError for NaN and infinities."""
        values = np.asarray(values, dtype=np.float64)
        if not np.isfinite(values).all():
            raise OracleError("the oracle needs finite values")
        distinct, inverse = np.unique(values.ravel(), return_inverse=True)
        nodes = np.array([self.number(float(x)) for x in distinct], dtype=np.int64)
        return nodes[inverse].reshape(values.shape) if len(nodes) else np.zeros(values.shape, dtype=np.int64)

    def value(self, node: int | np.integer[Any]) -> Fraction:
        known = self.fractions.get(int(node))
        return Fraction(float(self._values[node])) if known is None else known

    # ---- operations ------------------------------------------------------------------------------

    def poly(self, left: Array, right: Array, known: Values | None = None) -> Array:
        """``sum_k v[left[..., k]] v[right[..., k]]``. ``known``: the values, if the caller has them."""
        shape, terms = left.shape[:-1], left.shape[-1]
        left, right = left.reshape(-1, terms), right.reshape(-1, terms)
        dead = (left == ZERO) | (right == ZERO)
        if dead.any():
            left, right = np.where(dead, ZERO, left), np.where(dead, ZERO, right)
        plain = (~dead).sum(axis=1)
        result = np.zeros(len(left), dtype=np.int64)
        single = plain == 1
        if single.any():  # one term with the factor 1 is a new name for a node
            rows = np.flatnonzero(single)
            at = (~dead[rows]).argmax(axis=1)
            a, b = left[rows, at], right[rows, at]
            named = (a == ONE) | (b == ONE)
            result[rows[named]] = np.where(a == ONE, b, a)[named]
            single[rows[~named]] = False
        rest = np.flatnonzero((plain > 0) & ~single)
        if len(rest):
            values = None if known is None else [known[k] for k in rest.tolist()]
            result[rest] = self._poly(left[rest], right[rest], values)
        return result.reshape(shape)

    def _poly(self, left: Array, right: Array, known: Values | None) -> Array:
        used = (left != ZERO).any(axis=0)
        left, right = left[:, used], right[:, used]
        values = self._evaluate(left, right) if known is None else known
        folded = (self._constant[left] & self._constant[right]).all(axis=1)
        result = np.zeros(len(left), dtype=np.int64)
        for k in np.flatnonzero(folded).tolist():
            result[k] = self.number(values[k])
        open_rows = np.flatnonzero(~folded)
        if len(open_rows):
            nodes = self._function([values[k] for k in open_rows.tolist()])
            self.ops.append(Poly(_slice(nodes), left[open_rows], right[open_rows]))
            result[open_rows] = nodes
        return result

    def _function(self, values: Values) -> Array:
        """New nodes with these exact values."""
        floats = np.array([float(x) for x in values])
        nodes = self._new(floats, False)
        for node, exact, rounded in zip(nodes, values, floats, strict=True):
            if exact != rounded:
                self.fractions[int(node)] = Fraction(exact)
        return nodes

    def _evaluate(self, left: Array, right: Array) -> Values:
        a, b = self._values[left], self._values[right]
        if self.loose:
            return list((a * b).sum(axis=1))
        if not (self.fractions and self._has_fraction(left, right)):
            bound = left.shape[1] * float(np.abs(a).max(initial=0.0)) * float(np.abs(b).max(initial=0.0))
            if bound < 2.0**28 and _on_grid(a) and _on_grid(b):
                return list((a * b).sum(axis=1))
        return [
            sum((self.value(i) * self.value(j) for i, j in zip(x, y, strict=True) if i != ZERO), Fraction(0))
            for x, y in zip(left, right, strict=True)
        ]

    def _has_fraction(self, *nodes: Array) -> bool:
        inexact = np.fromiter(self.fractions, dtype=np.int64)
        return any(bool(np.isin(inexact, part).any()) for part in nodes)

    def select(self, members: Array, rank: Array | int) -> Array:
        """Of ``v[members[..., :]]`` the rank-th smallest (MAX, MIN or a number)."""
        shape, width = members.shape[:-1], members.shape[-1]
        members = members.reshape(-1, width)
        ranks: Array = np.broadcast_to(np.asarray(rank, dtype=np.int64), (len(members),)) % max(width, 1)
        result = members[:, 0].copy()
        rest = np.flatnonzero((members != members[:, :1]).any(axis=1))
        if len(rest):
            members, ranks = members[rest], ranks[rest]
            winner = self._winners(members, ranks)
            folded = self._constant[members].all(axis=1)
            result[rest[folded]] = winner[folded]
            open_rows = np.flatnonzero(~folded)
            if len(open_rows):
                nodes = self._function([self.value(w) for w in winner[open_rows]])
                self.ops.append(Select(_slice(nodes), members[open_rows], ranks[open_rows]))
                result[rest[open_rows]] = nodes
        return result.reshape(shape)

    def _winners(self, members: Array, rank: Array) -> Array:
        """One member of each row that has the value of that rank."""
        order = np.argsort(self._values[members], axis=1, kind="stable")
        winner = np.take_along_axis(members, np.take_along_axis(order, rank[:, None], axis=1), axis=1)[:, 0]
        if self.fractions and self._has_fraction(members):
            for k, row in enumerate(members):
                winner[k] = sorted(row, key=self.value)[int(rank[k])]
        return np.asarray(winner)

    def smooth(self, source: Array, values: Array, slope: Array, name: str) -> Array:
        """``phi(v[source])`` with these values and slopes; the same name is the same phi."""
        flat, slope, values = source.ravel(), np.ravel(slope), np.ravel(values)
        if not (np.isfinite(values).all() and np.isfinite(slope).all()):
            raise OracleError(f"the oracle needs finite values and slopes ({name})")
        result = np.zeros(len(flat), dtype=np.int64)
        folded = self._constant[flat]
        result[folded] = self.numbers(values[folded])
        if not folded.all():
            self.exact, self.loose = False, True
            nodes = self._function([float(x) for x in values[~folded]])
            self.ops.append(Smooth(_slice(nodes), flat[~folded], slope[~folded].astype(np.float64), name))
            result[~folded] = nodes
        return result.reshape(source.shape)

    # ---- shorthands ------------------------------------------------------------------------------

    def scale(self, nodes: Array, factor: Fraction | float) -> Array:
        return self.mul(nodes, np.full(nodes.shape, self.number(factor)))

    def mul(self, left: Array, right: Array) -> Array:
        left, right = np.broadcast_arrays(left, right)
        return self.poly(left[..., None], right[..., None])

    def add(self, *nodes: Array) -> Array:
        stacked = np.stack(np.broadcast_arrays(*nodes), axis=-1)
        return self.poly(stacked, np.full(stacked.shape, ONE))

    def sub(self, left: Array, right: Array) -> Array:
        left, right = np.broadcast_arrays(left, right)
        stacked = np.stack([left, right], axis=-1)
        return self.poly(stacked, np.where([True, False], ONE, self.number(-1)) * np.ones_like(stacked))

    def total(self, nodes: Array) -> Array:
        """Sums over the last dimension."""
        return self.poly(nodes, np.full(nodes.shape, ONE))

    def maximum(self, left: Array | int, right: Array | int) -> Array:
        return self.select(np.stack(np.broadcast_arrays(left, right), axis=-1), MAX)

    def minimum(self, left: Array | int, right: Array | int) -> Array:
        return self.select(np.stack(np.broadcast_arrays(left, right), axis=-1), MIN)

    def program(
        self, parameters: Array, slices: dict[str, slice], shapes: dict[str, tuple[int, ...]], output: int
    ) -> Program:
        return Program(
            tuple(self.ops), self.values.copy(), dict(self.fractions), self.constant.copy(), parameters, slices, shapes,
            output, self.exact, self.eps,
        )  # fmt: skip


def _slice(nodes: Array) -> slice:
    return slice(int(nodes[0]), int(nodes[-1]) + 1)


def _on_grid(values: Array) -> bool:
    scaled = values * _GRID
    return bool((scaled == np.rint(scaled)).all())
