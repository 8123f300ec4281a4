"""A program evaluated exactly along polynomial arcs through its point.

Truth comes from *arcs* ``w(t) = w + t q_1 + t^2 q_2 + ...`` with integer coefficients. Along an arc every
value of the program is, for all small t > 0, one polynomial in t with rational coefficients, and a
comparison is decided by the first coefficient that is not zero: no step size, no rounding. The pattern
found (which member each select takes) is that of w(t) for all small t > 0, and ``lim grad f(w(t))`` is the
chain rule with that pattern evaluated at w itself.

Is f differentiable at w(t)? Where every comparison is strict, yes. A comparison that stays an equality is
harmless exactly when the two functions compared are the same polynomial in the parameters under that
pattern (a dead unit, two equal patches): then f is a polynomial near w(t). Equality as polynomials is
tested at a random point modulo 2^31 - 1 (Schwartz-Zippel; a wrong answer has probability below degree /
2^31). Samples that fail are dropped. So are those where powers of t that were not kept would have to decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import numpy as np

from .linear import Linear, linear_maps
from .program import PRIME, Array, OracleError, Poly, Program, Select

POWERS = 25  # coefficients that are kept, if no one says otherwise

Choice = Array | None  # of a select: the place of the member taken, [n, S]


def leading_sign(coefficients: Array) -> Array:
    """Sign for small t > 0 of polynomials [..., D, S] with the coefficient of t^d in entry d; 0 iff all
    vanish."""
    nonzero = coefficients != 0
    first = np.expand_dims(nonzero.argmax(axis=-2), -2)
    leading = np.take_along_axis(coefficients, first, axis=-2)[..., 0, :]
    return np.asarray(np.sign(leading).astype(np.int64))


@dataclass(frozen=True)
class Units:
    """``of[node]`` times the value of a node is an integer polynomial, whatever is selected; ``factors``: per Poly
    what multiplies each term [n, K], None where all are 1."""

    of: Array
    factors: tuple[Array | None, ...]


def units(program: Program) -> Units:
    of = np.ones(len(program.values), dtype=object)
    start = np.flatnonzero(program.constant | np.isin(np.arange(len(of)), program.parameters))
    if program.fractions or (program.values[start] != np.rint(program.values[start])).any():
        of[start] = [program.value(n).denominator for n in start]
    factors: list[Array | None] = []
    for op in program.ops:
        found = None
        if isinstance(op, Poly):
            terms = of[op.left] * of[op.right]
            if (terms != 1).any():
                whole = np.array([lcm(*row) for row in terms], dtype=object)
                of[op.out] = whole
                found = whole[:, None] // terms
        elif isinstance(op, Select):
            of[op.out] = [lcm(*of[row]) for row in op.members]
        else:
            raise OracleError("arcs need a program without smooth pieces that are no polynomials")
        factors.append(found)
    return Units(of, tuple(factors))


class Arcs:
    """A localized program prepared for evaluation along many arcs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.units = units(program)
        self.denominators, self.maps = linear_maps(program)
        self.big = any(int(u) >= 2**20 for u in self.units.of)

    def limits(self, arcs: Array, rng: np.random.Generator, powers: int = POWERS) -> tuple[Array, Array]:
        """Limits of the true gradient along arcs [E, S, P] (integer coefficients of t, t^2, ...), times the
        output's denominator: integers [S, P], and a mask [S] of the valid ones.

        Invalid: along that arc a comparison stays an equality between different functions, so f may not be
        differentiable there.
        """
        try:
            values, choices = self.forward(arcs.astype(object) if self.big else arcs, powers)
        except OverflowError:
            values, choices = self.forward(arcs.astype(object), powers)
        return self.backward(choices, arcs.shape[1]), self.identities(values, choices, rng)

    def forward(self, arcs: Array, powers: int = POWERS) -> tuple[Array, list[Choice]]:
        """Coefficients [N, D, S] of every node along the arcs, and the choices; int64 (OverflowError when it does
        not suffice) or Python integers."""
        program, of = self.program, self.units.of
        samples, degree = arcs.shape[1], self.degrees(len(arcs), powers)
        powers = int(degree.max()) + 1
        values = np.zeros((len(program.values), powers, samples), dtype=arcs.dtype)
        known = np.append(np.flatnonzero(program.constant), program.parameters)
        values[known, 0] = np.array([int(program.value(n) * of[n]) for n in known], dtype=arcs.dtype)[:, None]
        scale = of[program.parameters].astype(arcs.dtype)
        for e in range(min(len(arcs), powers - 1)):
            values[program.parameters, e + 1] = (arcs[e] * scale).T
        choices: list[Choice] = []
        for op, factors in zip(program.ops, self.units.factors, strict=True):
            choice: Choice = None
            if isinstance(op, Poly):
                self._poly(op, factors, values, degree)
            else:
                assert isinstance(op, Select)
                choice = self._select(op, values)
            choices.append(choice)
        return values, choices

    def degrees(self, steps: int, powers: int) -> Array:
        """The degree in t of every node, at most, and at most powers - 1."""
        degree = np.zeros(len(self.program.values), dtype=np.int64)
        degree[self.program.parameters] = min(steps, powers - 1)
        for op in self.program.ops:
            if isinstance(op, Poly):
                degree[op.out] = np.minimum((degree[op.left] + degree[op.right]).max(axis=1), powers - 1)
            elif isinstance(op, Select):
                degree[op.out] = degree[op.members].max(axis=1)
        return degree

    def _poly(self, op: Poly, factors: Array | None, values: Array, degree: Array) -> None:
        a, b = int(degree[op.left].max()), int(degree[op.right].max())
        left, right = values[op.left, : a + 1], values[op.right, : b + 1]  # [n, K, D, S]
        if factors is not None:
            left = left * factors.astype(values.dtype)[:, :, None, None]
        if values.dtype != object:
            terms = float(op.left.shape[1] * (min(a, b) + 1))
            if terms * float(np.abs(left).max(initial=0)) * float(np.abs(right).max(initial=0)) > 2.0**62:
                raise OverflowError("coefficients too large for int64")
        used = (right != 0).any(axis=(0, 1, 3))
        for d in range(a + 1):
            if not (left[:, :, d] != 0).any():
                continue
            for e in np.flatnonzero(used[: values.shape[1] - d]).tolist():
                if values.dtype == object:
                    values[op.out, d + e] += (left[:, :, d] * right[:, :, e]).sum(axis=1)
                else:
                    values[op.out, d + e] += np.einsum("nks,nks->ns", left[:, :, d], right[:, :, e])

    def _scaled(self, op: Select, values: Array) -> Array:
        """The members of a select in the unit of its result, [n, W, D, S]."""
        members: Array = values[op.members]
        of = self.units.of
        factors = of[op.out][:, None] // of[op.members]
        if (factors == 1).all():
            return members
        if values.dtype != object and float(np.abs(members).max(initial=0)) * float(factors.max()) > 2.0**62:
            raise OverflowError("coefficients too large for int64")
        return np.asarray(members * factors.astype(values.dtype)[:, :, None, None])

    def _select(self, op: Select, values: Array) -> Array:
        members = self._scaled(op, values)
        width = members.shape[1]
        below = np.zeros((len(members), width, members.shape[-1]), dtype=np.int64)
        for i in range(width):
            for j in range(i):
                sign = leading_sign(members[:, i] - members[:, j])
                below[:, i] += sign >= 0
                below[:, j] += sign < 0
        choice = (below == op.rank[:, None, None]).argmax(axis=1)  # [n, S]
        picked = np.take_along_axis(members, choice[:, None, None, :], axis=1)[:, 0]
        values[op.out] = picked
        return np.asarray(choice)

    def backward(self, choices: list[Choice], samples: int) -> Array:
        """The chain rule at the point with S given patterns: integers [S, P]."""
        program = self.program
        adjoint: Array = np.zeros((len(program.values), samples))
        adjoint[program.output] = 1.0
        for op, linear, choice in zip(program.ops[::-1], self.maps[::-1], choices[::-1], strict=True):
            flow = adjoint[op.out]
            if isinstance(op, Poly):
                assert linear is not None
                adjoint = self._pulled(adjoint, linear, flow)
            else:
                assert isinstance(op, Select) and choice is not None
                taken = np.take_along_axis(op.members, choice, axis=1)  # [n, S]
                factor = self.denominators[op.out][:, None] // self.denominators[taken]
                if (factor != 1).any():
                    adjoint, flow = adjoint.astype(object), flow.astype(object) * factor
                np.add.at(adjoint, (taken, np.arange(samples)[None, :]), flow)
        gradient = adjoint[program.parameters].T
        if gradient.dtype == object:
            return np.vectorize(int, otypes=[object])(gradient) if gradient.size else gradient
        return np.rint(gradient).astype(np.int64)

    def _pulled(self, adjoint: Array, linear: Linear, flow: Array) -> Array:
        if adjoint.dtype != object and linear.matrix.dtype != object:
            bound = float(np.abs(linear.matrix).sum(axis=0).max(initial=0)) * float(np.abs(flow).max(initial=0))
            if bound + float(np.abs(adjoint).max()) < 2.0**50:
                adjoint[linear.inputs] += linear.matrix.T @ flow
                return adjoint
        if adjoint.dtype != object:
            adjoint = np.rint(adjoint).astype(np.int64).astype(object)
            flow = np.rint(flow).astype(np.int64).astype(object)
        adjoint[linear.inputs] += linear.integers.T @ flow
        return adjoint

    def identities(self, values: Array, choices: list[Choice], rng: np.random.Generator) -> Array:
        """Mask [S]: every comparison that stays an equality along the arc compares identical polynomials of the
        parameters."""
        program = self.program
        samples = values.shape[-1]
        valid = np.ones(samples, dtype=bool)
        prints = np.zeros((len(program.values), samples), dtype=np.int64)
        for node in np.flatnonzero(program.constant):
            value = program.value(node)
            prints[node] = value.numerator * pow(value.denominator, -1, PRIME) % PRIME
        prints[program.parameters] = rng.integers(0, PRIME, (len(program.parameters), 1))
        for op, choice in zip(program.ops, choices, strict=True):
            if isinstance(op, Poly):
                prints[op.out] = (prints[op.left] * prints[op.right] % PRIME).sum(axis=1) % PRIME
            elif isinstance(op, Select):
                assert choice is not None
                members = prints[op.members]
                picked = np.take_along_axis(members, choice[:, None, :], axis=1)
                tied = (self._scaled(op, values) == values[op.out][:, None]).all(axis=2)  # [n, W, S]
                valid &= ~(tied & (members != picked)).any(axis=(0, 1))
                prints[op.out] = picked[:, 0]
        return valid
