"""Exact enumeration of the cells around w: which selections occur arbitrarily close to w.

A tree search over the ties at w in topological order. Along a branch each node has a limit gradient G (rational, over
the trainable parameters) and a fingerprint V, its value as a polynomial of the parameters at random points modulo
2^31 - 1. Choosing a member f over a member h adds the row G_f - G_h > 0:

* rows A p > 0 solvable: the cell is real, and w + t p lies in it for small t > 0 (up to null decisions);
* not solvable, y A = 0 with y >= 0, and sum y_k f_k is the zero polynomial (by fingerprint): no such cell;
* not solvable, but only to first order: the cell MAY exist (a cusp such as 0 < a < b^2). The branch is kept
  and its leaves are reported as ``possible``, not ``certain``.

So hull(certain) is contained in dC f(w), which is contained in hull(certain + possible).

A tied member whose terms all have one sign near w (a positive weight times a maximum with 0) has that sign: it never
loses, or never wins, against 0.

Not branched on, because neither choice changes a limit gradient: tied members with equal G (a touch with G = 0); nodes
that reach the loss only through zero weights or losing members. Their functions are replaced by a fresh unknown with
a random fingerprint, so an identity that still holds, holds whatever they are.

Where a program has smooth pieces that are no polynomials, G is a float. Rows are then rounded to multiples of 2^-30,
and a smooth piece of an equal fingerprint is the same unknown: evidence, not proof.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd

import numpy as np

from .hull import alternative
from .linear import Linear, linear_maps
from .program import PRIME, Array, Poly, Program, Select, Smooth

POINTS = 2  # random points of a fingerprint: a false identity has probability about (degree / 2^31)^2
MIXED = 2  # sign of a function near w not known
GRID = 2.0**30  # of rows, where slopes are floats


class BudgetError(Exception):
    pass


@dataclass(frozen=True)
class Node:
    """A branch: constraints so far, and a direction satisfying them strictly (None: only possible)."""

    rows: tuple[tuple[int, ...], ...]
    prints: tuple[tuple[int, ...], ...]
    witness: Array | None


Function = tuple[Array, Array]  # limit gradient [P] and fingerprint [POINTS], of one tied member


@dataclass
class _Group:
    """Rows of one select that decide alike: per option the winner, and the constraints that it wins."""

    rows: list[int] = field(default_factory=list)
    winners: list[Function] = field(default_factory=list)
    constraints: list[list[Function]] = field(default_factory=list)


@dataclass
class Search:
    program: Program  # localized
    budget: int
    rng: np.random.Generator
    fresh: dict[Hashable, Array] = field(default_factory=dict)
    found: dict[bytes, tuple[Array, Array | None]] = field(default_factory=dict)
    doubt: bool = False
    along: Array | None = None  # follow this direction only

    def __post_init__(self) -> None:
        program = self.program
        count, width = len(program.values), len(program.parameters)
        self.floating = program.smooth
        self.denominators, self.linear = linear_maps(program)
        self.relevant = _relevance(program, self.linear)
        self.gradient = _unit_rows(program, self.denominators, self.floating)
        self.prints: Array = np.zeros((count, POINTS), dtype=np.int64)
        for node in np.flatnonzero(program.constant):
            self.prints[node] = _residue(program.value(node))
        self.prints[program.parameters] = self.rng.integers(0, PRIME, (width, POINTS))
        self.signs: Array = np.sign(program.values).astype(np.int64)
        self.signs[(self.signs == 0) & ~program.constant] = MIXED

    @property
    def scale(self) -> Fraction:
        return Fraction(1, int(GRID) if self.floating else int(self.denominators[self.program.output]))

    def unknown(self, key: Hashable) -> Array:
        """The fingerprint of an unknown function; the same key is the same function."""
        if key not in self.fresh:
            self.fresh[key] = self.rng.integers(0, PRIME, POINTS)
        return self.fresh[key]

    def prepare(self) -> int:
        """What comes before the first tie; its number."""
        for k, op in enumerate(self.program.ops):
            if isinstance(op, Select):
                return k
            self.smooth_op(op, self.linear[k])
        return len(self.program.ops)

    def start(self) -> None:
        first = self.prepare()
        witness = self.rng.integers(-1000, 1001, len(self.program.parameters)).astype(object)
        self.descend(first, Node((), (), witness))

    def descend(self, k: int, node: Node) -> None:
        """Everything below a branch. Operation k and later ones overwrite what an earlier branch left."""
        while k < len(self.program.ops):
            op = self.program.ops[k]
            if isinstance(op, Select):
                for child in self.select(op, node):
                    self.descend(k + 1, child)
                return
            self.smooth_op(op, self.linear[k])
            k += 1
        element = self.gradient[self.program.output]
        if self.floating:
            element = np.rint(element * GRID).astype(np.int64)
        key = element.tobytes() if element.dtype != object else str(element.tolist()).encode()
        if key not in self.found or self.found[key][1] is None:
            self.found[key] = (element.copy(), node.witness)

    def smooth_op(self, op: Poly | Smooth, linear: Linear | None) -> None:
        if isinstance(op, Poly):
            self.poly(op, linear)
        else:
            self.smooth(op)

    def poly(self, op: Poly, linear: Linear | None) -> None:
        assert linear is not None
        self.gradient[op.out] = self._product(linear)
        left, right = self.prints[op.left], self.prints[op.right]  # [n, K, POINTS]
        self.prints[op.out] = (left * right % PRIME).sum(axis=1) % PRIME
        a, b = self.signs[op.left], self.signs[op.right]
        term = np.where((a == 0) | (b == 0), 0, np.where((a == MIXED) | (b == MIXED), MIXED, a * b))
        y = self.program.values[op.out]
        self.signs[op.out] = np.where(y != 0, np.sign(y), _agree(term))

    def _product(self, linear: Linear) -> Array:
        gradient: Array = self.gradient[linear.inputs]
        if self.floating:
            return linear.apply(gradient)
        if gradient.dtype == object or linear.matrix.dtype == object:
            return np.asarray(linear.integers @ gradient.astype(object))
        if linear.bound * float(np.abs(gradient).max(initial=0)) >= 2.0**40:
            raise OverflowError
        return np.asarray(np.rint(linear.apply(gradient.astype(np.float64))).astype(np.int64))

    def smooth(self, op: Smooth) -> None:
        self.gradient[op.out] = op.slope[:, None] * self.gradient[op.source]
        for k, source in enumerate(op.source):
            self.prints[op.out.start + k] = self.unknown((op.name, self.prints[source].tobytes()))
        y = self.program.values[op.out]
        self.signs[op.out] = np.where(y != 0, np.sign(y), MIXED)

    # ---- ties ------------------------------------------------------------------------------------

    def members(self, op: Select, row: int) -> list[Function]:
        """The tied members, their limit gradients in the units of the row."""
        nodes = op.members[row]
        target = self.denominators[op.out.start + row]
        factors = [target // d for d in self.denominators[nodes]]
        if all(f == 1 for f in factors):
            return [(self.gradient[n], self.prints[n]) for n in nodes]
        return [(self.gradient[n] * f, self.prints[n]) for n, f in zip(nodes, factors, strict=True)]

    def select(self, op: Select, node: Node) -> Iterator[Node]:
        """Branches of tied selects: rows whose members have different limit gradients choose a winner."""
        groups: dict[Hashable, _Group] = {}
        settled: list[tuple[int, Function]] = []
        signs = [self.sign(op, row) for row in range(len(op.members))]
        for row in range(len(op.members)):
            out, rank = op.out.start + row, int(op.rank[row])
            members = self.members(op, row)
            classes = self.classes(members)
            forced = self.forced(op, row)
            if forced is not None:
                settled.append((out, members[forced]))
            elif len(classes) == 1:
                settled.append((out, self.merged(classes[0], rank)))
            elif not self.relevant[out]:
                settled.append((out, (np.zeros_like(members[0][0]), self.merged(members, rank)[1])))
            else:
                key = rank, tuple(sorted(_key(g) + v.tobytes() for g, v in members))
                if key not in groups:
                    groups[key] = self.group(classes, rank, int(self.denominators[out]))
                groups[key].rows.append(out)
        for chosen, child in self.decide([group.constraints for group in groups.values()], node):
            for out, (g, v) in settled:
                self.gradient[out], self.prints[out] = g, v
            for group, n in zip(groups.values(), chosen, strict=True):
                for out in group.rows:
                    self.gradient[out], self.prints[out] = group.winners[n]
            self.signs[op.out] = signs
            yield child

    def classes(self, members: list[Function]) -> list[list[Function]]:
        """Members with equal limit gradients together."""
        classes: list[list[Function]] = []
        for member in members:
            for known in classes:
                if self.equal(known[0][0], member[0]):
                    known.append(member)
                    break
            else:
                classes.append([member])
        return classes

    def equal(self, left: Array, right: Array) -> bool:
        return bool((np.abs(left - right) * GRID < 0.5).all() if self.floating else (left == right).all())

    def merged(self, members: list[Function], rank: int) -> Function:
        """The rank-th smallest of functions with one limit gradient: an unknown unless they are identical."""
        prints = sorted(v.tobytes() for _, v in members)
        if prints[0] == prints[-1]:
            return members[0]
        if rank in (0, len(members) - 1):
            prints = sorted(set(prints))
        name = "min" if rank == 0 else "max" if rank == len(members) - 1 else rank
        return members[0][0], self.unknown((name, *prints))

    def sign(self, op: Select, row: int) -> int:
        """The weak sign of a selected function near w."""
        y = self.program.values[op.out.start + row]
        if y != 0:
            return int(np.sign(y))
        signs, rank = self.signs[op.members[row]], op.rank[row]
        for extreme, side in ((len(signs) - 1, 1), (0, -1)):
            if rank == extreme and np.isin(signs, (0, side)).any():
                return 0 if np.isin(signs, (0, -side)).all() else side
        return int(_agree(signs[None])[0])

    def forced(self, op: Select, row: int) -> int | None:
        """The winner of two, where the signs near w say it: the larger of f >= 0 and h <= 0 is f."""
        if op.members.shape[1] != 2:
            return None
        a, b = self.signs[op.members[row]]
        side = 1 if op.rank[row] == 1 else -1
        if a in (0, side) and b in (0, -side):
            return 0
        return 1 if b in (0, side) and a in (0, -side) else None

    def group(self, classes: list[list[Function]], rank: int, unit: int) -> _Group:
        """All ways to choose a winning class: those below it and those above it, one constraint each."""
        group = _Group()
        sizes = [len(c) for c in classes]
        total, single = sum(sizes), [len({v.tobytes() for _, v in c}) == 1 for c in classes]
        if rank not in (0, total - 1) and not all(single):
            self.doubt = True  # to second order, members of one class may lie on both sides of the winner
        for n in range(len(classes)):
            others = [m for m in range(len(classes)) if m != n]
            for below in self.subsets(others, rank, total):
                beneath = sum(sizes[m] for m in below)
                if not beneath <= rank < beneath + sizes[n]:
                    continue
                winner = self.merged(classes[n], rank - beneath)
                constraints = []
                for m in others:
                    side = 1 if m in below else -1
                    rival = self.merged(classes[m], sizes[m] - 1 if m in below else 0)
                    print_ = side * (winner[1] - rival[1]) % PRIME * (unit % PRIME) % PRIME
                    constraints.append((side * (winner[0] - rival[0]), print_))
                group.winners.append(winner)
                group.constraints.append(constraints)
        return group

    def subsets(self, others: list[int], rank: int, total: int) -> Iterator[tuple[int, ...]]:
        """The classes that may be below a winner: none for a minimum, all for a maximum, else any subset."""
        if rank in (0, total - 1):
            return iter([tuple(others if rank else ())])
        if 2 ** len(others) > self.budget:
            raise BudgetError
        return _subsets(others)

    def decide(self, options: list[list[list[Function]]], node: Node) -> Iterator[tuple[list[int], Node]]:
        """All ways to choose one option per decision that the constraints do not exclude."""
        if not options:
            yield [], node
            return
        for n, constraints in enumerate(options[0]):
            child = self.constrain(node, constraints)
            if child is not None:
                for rest, leaf in self.decide(options[1:], child):
                    yield [n, *rest], leaf

    def constrain(self, node: Node, constraints: list[Function]) -> Node | None:
        """The node with more strict rows; None if provably empty."""
        if self.along is not None:
            rows_ = [np.array(self.primitive(g, v)[0], dtype=object) for g, v in constraints]
            return node if all(row @ self.along > 0 for row in rows_) else None
        self.budget -= 1
        if self.budget < 0:
            raise BudgetError
        rows, prints = list(node.rows), list(node.prints)
        known = set(zip(rows, prints, strict=True))
        for g, v in constraints:
            row, mark = self.primitive(g, v)
            opposite = tuple(-x for x in row), tuple(-x % PRIME for x in mark)
            if opposite in known:
                return None
            if (row, mark) not in known:
                known.add((row, mark))
                rows.append(row)
                prints.append(mark)
        witness = node.witness
        if witness is not None:
            added = np.array(rows[len(node.rows) :], dtype=object).reshape(-1, len(witness))
            if not all(added @ witness > 0):
                answer = alternative(np.array(rows, dtype=object))
                witness = None if answer.direction is None else np.array(answer.direction, dtype=object)
                if answer.weights is not None and _identity(answer.weights, prints):
                    return None
        return Node(tuple(rows), tuple(prints), witness)

    def primitive(self, g: Array, v: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A row divided by its greatest common divisor, and its function's fingerprint with it."""
        row = [int(x) for x in (np.rint(g * GRID) if self.floating else g)]
        divisor = gcd(*row)
        inverse = pow(divisor, -1, PRIME) if divisor % PRIME else 1
        if self.floating:
            divisor, inverse = 1, 1
        return tuple(x // divisor for x in row), tuple(int(x) * inverse % PRIME for x in v)


def _subsets(items: list[int]) -> Iterator[tuple[int, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(items, k) for k in range(len(items) + 1))


def _key(g: Array) -> bytes:
    return str(g.tolist()).encode() if g.dtype == object else np.asarray(g).tobytes()


def _agree(terms: Array) -> Array:
    """Weak sign of sums of terms with the given signs, [n, K] -> [n]."""
    mixed = (terms == MIXED).any(axis=1)
    positive, negative = (terms == 1).any(axis=1), (terms == -1).any(axis=1)
    return np.where(mixed | (positive & negative), MIXED, positive.astype(np.int64) - negative)


def _identity(weights: dict[int, int], prints: list[tuple[int, ...]]) -> bool:
    return all(sum(y * prints[k][r] for k, y in weights.items()) % PRIME == 0 for r in range(POINTS))


def _residue(value: Fraction) -> int:
    return value.numerator * pow(value.denominator, -1, PRIME) % PRIME


def _unit_rows(program: Program, denominators: Array, floating: bool) -> Array:
    width = len(program.parameters)
    small = max(map(int, denominators), default=1) < 2**20
    kind = np.float64 if floating else np.int64 if small else object
    gradient = np.zeros((len(program.values), width), dtype=kind)
    gradient[program.parameters, np.arange(width)] = 1
    return gradient


def _relevance(program: Program, maps: list[Linear | None]) -> Array:
    """The nodes whose limit gradient can reach that of the output at w."""
    relevant = np.zeros(len(program.values), dtype=bool)
    relevant[program.output] = True
    for op, linear in zip(reversed(program.ops), reversed(maps), strict=True):
        rows = relevant[op.out]
        if not rows.any():
            continue
        if isinstance(op, Poly):
            assert linear is not None
            relevant[linear.inputs] |= (linear.matrix[rows] != 0).any(axis=0)
        elif isinstance(op, Smooth):
            relevant[op.source[rows & (op.slope != 0)]] = True
        else:
            relevant[op.members[rows]] = True
    return relevant
