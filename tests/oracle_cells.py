"""Exact enumeration of the cells around w: which activation patterns occur arbitrarily close to w.

A tree search over the decisions at w (touched ReLUs, tied windows) in topological order. Along a branch each
unit has a limit gradient G (integers, over the trainable parameters) and a fingerprint V, its value as a
polynomial of the parameters at random points modulo 2^31 - 1. A decision f > 0 adds the row G_f:

* rows A p > 0 solvable: the cell is real, and w + t p lies in it for small t > 0 (up to null decisions);
* not solvable, y A = 0 with y >= 0, and sum y_k f_k is the zero polynomial (by fingerprint): no such cell;
* not solvable, but only to first order: the cell MAY exist (a cusp such as 0 < a < b^2). The branch is kept
  and its leaves are reported as ``possible``, not ``certain``.

So hull(certain) is contained in dC f(w), which is contained in hull(certain + possible).

A touched unit whose terms all have one sign near w (a nonzero weight times a ReLU output) has that sign:
its other side is empty too.

Not branched on, because neither choice changes a limit gradient: a touch with G = 0; tied members with
equal G; units that reach the loss only through zero weights, losing window members or strictly inactive
ReLUs. Their functions are replaced by a fresh unknown with a random fingerprint, so an identity that still
holds, holds whatever they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import numpy as np
from oracle_hull import alternative
from oracle_program import PRIME, Add, Affine, Array, Pool, Program, Relu, jacobians

POINTS = 2  # random points of a fingerprint: a false identity has probability about (degree / 2^31)^2


@dataclass(frozen=True)
class Cells:
    """``certain``, ``possible``: integers [m, P], distinct; ``directions``: one p per certain element.

    ``complete``: the search ended within its budget, so every cell near w has its limit gradient in one of
    the two.
    """

    certain: Array
    possible: Array
    directions: Array
    complete: bool


MIXED = 2  # sign of a function near w not known


@dataclass(frozen=True)
class _Register:
    """Units on the current branch. ``gradient``: [n, P]; ``prints``: [n, POINTS]; ``signs``: [n], the weak
    sign of the function near w: -1, 0 (identically zero), 1 or MIXED."""

    gradient: Array
    prints: Array
    signs: Array


class _BudgetError(Exception):
    pass


@dataclass(frozen=True)
class _Node:
    """A branch: constraints so far, and a direction satisfying them strictly (None: only possible)."""

    rows: tuple[tuple[int, ...], ...]
    prints: tuple[tuple[int, ...], ...]
    witness: Array | None


@dataclass
class _Search:
    program: Program
    budget: int
    rng: np.random.Generator
    fresh: dict[Hashable, Array] = field(default_factory=dict)
    found: dict[bytes, tuple[Array, Array | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        program = self.program
        point = self.rng.integers(0, PRIME, (POINTS, program.parameters + 1))
        point[:, :-1] = np.where(program.trainable, point[:, :-1], program.theta[:-1] % PRIME)
        point[:, -1] = 0
        self.point = point
        self.relevant = _relevance(program)
        self.matrices = [
            jacobians(op, program.values[op.source], program.theta) if isinstance(op, Affine) else None
            for op in program.ops
        ]

    def unknown(self, key: Hashable) -> Array:
        """The fingerprint of an unknown function; the same key is the same function."""
        if key not in self.fresh:
            self.fresh[key] = self.rng.integers(0, PRIME, POINTS)
        return self.fresh[key]

    def start(self) -> None:
        program = self.program
        width = int(program.trainable.sum())
        inputs = len(program.inputs)
        prints = np.broadcast_to((program.inputs % PRIME)[:, None], (inputs, POINTS))
        witness = self.rng.integers(-1000, 1001, width).astype(object)
        gradient = np.zeros((inputs, width), dtype=np.int64)
        register = _Register(gradient, prints, np.sign(program.inputs))
        self.descend(0, [register], _Node((), (), witness))

    def descend(self, k: int, registers: list[_Register], node: _Node) -> None:
        program = self.program
        if k == len(program.ops):
            self.leaf(program.weights @ registers[-1].gradient, node)
            return
        op = program.ops[k]
        source = registers[op.source]
        if isinstance(op, Affine):
            self.descend(k + 1, [*registers, self.affine(k, op, source)], node)
        elif isinstance(op, Add):
            self.descend(k + 1, [*registers, _add(source, registers[op.other])], node)
        else:
            decided = self.relu(op, k + 1, source, node) if isinstance(op, Relu) else self.pool(op, k + 1, source, node)
            for register, child in decided:
                self.descend(k + 1, [*registers, register], child)

    def leaf(self, element: Array, node: _Node) -> None:
        key = element.tobytes()
        if key not in self.found or self.found[key][1] is None:
            self.found[key] = (element, node.witness)

    def affine(self, k: int, op: Affine, z: _Register) -> _Register:
        matrices = self.matrices[k]
        assert matrices is not None
        by_input, by_parameter = matrices
        gradient = by_input @ z.gradient + by_parameter[:, :-1][:, self.program.trainable]
        columns = []
        for r in range(POINTS):
            product = (z.prints[op.inputs, r] * self.point[r][op.weights]) % PRIME
            columns.append((product.sum(axis=1) + self.point[r][op.bias]) % PRIME)
        y = self.program.values[k + 1]
        signs = np.where(y != 0, np.sign(y), self.affine_signs(op, z.signs))
        return _Register(np.rint(gradient).astype(np.int64), np.stack(columns, axis=1), signs)

    def affine_signs(self, op: Affine, signs: Array) -> Array:
        """Sign of a sum: that of its terms if they agree. A trainable parameter that is 0 has no sign near
        w."""
        of_parameter = np.sign(self.program.theta)
        of_parameter[:-1][self.program.trainable & (of_parameter[:-1] == 0)] = MIXED
        z, theta = signs[op.inputs], of_parameter[op.weights]
        term = np.where((z == 0) | (theta == 0), 0, np.where((z == MIXED) | (theta == MIXED), MIXED, z * theta))
        return _agree(np.concatenate([term, of_parameter[op.bias][:, None]], axis=1))

    def relu(self, op: Relu, out: int, z: _Register, node: _Node) -> Iterator[tuple[_Register, _Node]]:
        """Branches of a ReLU: positive units pass, negative ones vanish, touched ones are decided class by
        class."""
        y, g, v = self.program.values[op.source], z.gradient, z.prints
        gradient, prints = np.where(y[:, None] > 0, g, 0), np.where(y[:, None] > 0, v, 0)
        signs = np.where(y > 0, 1, 0)
        classes: dict[bytes, list[int]] = {}
        for i in np.flatnonzero(y == 0):
            if not v[i].any() and not g[i].any():
                continue
            if not g[i].any() or not self.relevant[out][i]:
                prints[i], signs[i] = self.unknown(("relu", v[i].tobytes())), 1
                continue
            classes.setdefault(g[i].tobytes() + v[i].tobytes(), []).append(int(i))
        groups = list(classes.values())
        sides = [[side for side in (-1, 1) if z.signs[m[0]] in (side, MIXED)] for m in groups]
        options = [
            [[(side * g[m[0]], side * v[m[0]])] for side in allowed] for m, allowed in zip(groups, sides, strict=True)
        ]
        for chosen, child in self.decide(options, node):
            new = _Register(gradient.copy(), prints.copy(), signs.copy())
            for members, allowed, n in zip(groups, sides, chosen, strict=True):
                if allowed[n] > 0:
                    new.gradient[members], new.prints[members] = g[members], v[members]
                    new.signs[members] = 1
            yield new, child

    def pool(self, op: Pool, out: int, z: _Register, node: _Node) -> Iterator[tuple[_Register, _Node]]:
        """Branches of a pooling: windows whose tied members have different limit gradients choose a
        winner."""
        y, g, v = self.program.values[op.source], z.gradient, z.prints
        best = y[op.members].max(axis=1)
        gradient = np.zeros((len(op.members), g.shape[1]), dtype=np.int64)
        prints = np.zeros((len(op.members), POINTS), dtype=np.int64)
        signs = np.where(best > 0, 1, np.where(best < 0, -1, _agree(z.signs[op.members])))
        classes: dict[Hashable, tuple[list[int], list[tuple[Array, Array]]]] = {}
        for j, members in enumerate(op.members):
            tied = sorted({int(i) for i in members if y[i] == best[j]})
            rivals = self.merge([(g[i], v[i]) for i in tied])
            if len(rivals) == 1:
                gradient[j], prints[j] = rivals[0]
            elif not self.relevant[out][j]:
                prints[j] = self.unknown(("pool", tuple(sorted(r[1].tobytes() for r in rivals))))
            else:
                key = tuple(sorted(r[0].tobytes() + r[1].tobytes() for r in rivals))
                classes.setdefault(key, ([], rivals))[0].append(j)
        options = [
            [[(w[0] - r[0], w[1] - r[1]) for m, r in enumerate(rivals) if m != n] for n, w in enumerate(rivals)]
            for _, rivals in classes.values()
        ]
        for winners, child in self.decide(options, node):
            new = _Register(gradient.copy(), prints.copy(), signs)
            for (windows, rivals), winner in zip(classes.values(), winners, strict=True):
                new.gradient[windows], new.prints[windows] = rivals[winner]
            yield new, child

    def merge(self, members: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
        """Tied members with equal limit gradients become one: their maximum, an unknown unless they are
        identical."""
        by_gradient: dict[bytes, tuple[Array, dict[bytes, Array]]] = {}
        for g, v in members:
            by_gradient.setdefault(g.tobytes(), (g, {}))[1][v.tobytes()] = v
        merged = []
        for g, prints in by_gradient.values():
            only = next(iter(prints.values()))
            merged.append((g, only if len(prints) == 1 else self.unknown(("max", tuple(sorted(prints))))))
        return merged

    def decide(self, options: list[list[list[tuple[Array, Array]]]], node: _Node) -> Iterator[tuple[list[int], _Node]]:
        """All ways to choose one option per decision that the constraints do not exclude."""
        if not options:
            yield [], node
            return
        for n, constraints in enumerate(options[0]):
            child = self.constrain(node, constraints)
            if child is not None:
                for rest, leaf in self.decide(options[1:], child):
                    yield [n, *rest], leaf

    def constrain(self, node: _Node, constraints: list[tuple[Array, Array]]) -> _Node | None:
        """The node with more strict rows; None if provably empty."""
        self.budget -= 1
        if self.budget < 0:
            raise _BudgetError
        rows, prints = list(node.rows), list(node.prints)
        known = set(zip(rows, prints, strict=True))
        for g, v in constraints:
            row, mark = tuple(map(int, g)), tuple(int(x) % PRIME for x in v)
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
                answer = alternative(np.array(rows, dtype=np.int64))
                witness = None if answer.direction is None else np.array(answer.direction, dtype=object)
                if answer.weights is not None and _identity(answer.weights, prints):
                    return None
        return _Node(tuple(rows), tuple(prints), witness)


def _agree(terms: Array) -> Array:
    """Weak sign of sums or maxima of terms with the given signs, [n, K] -> [n]."""
    mixed = (terms == MIXED).any(axis=1)
    positive, negative = (terms == 1).any(axis=1), (terms == -1).any(axis=1)
    return np.where(mixed | (positive & negative), MIXED, positive.astype(np.int64) - negative)


def _add(z: _Register, other: _Register) -> _Register:
    return _Register(
        z.gradient + other.gradient,
        (z.prints + other.prints) % PRIME,
        _agree(np.stack([z.signs, other.signs], axis=1)),
    )


def _identity(weights: dict[int, int], prints: list[tuple[int, ...]]) -> bool:
    return all(sum(y * prints[k][r] for k, y in weights.items()) % PRIME == 0 for r in range(POINTS))


def _relevance(program: Program) -> list[Array]:
    """Per register: the units whose limit gradient can reach that of the loss at w."""
    relevant = [np.zeros(len(v), dtype=bool) for v in program.values]
    relevant[-1] |= program.weights != 0
    for k in range(len(program.ops) - 1, -1, -1):
        op, out = program.ops[k], relevant[k + 1]
        y = program.values[op.source]
        if isinstance(op, Affine):
            by_input, _ = jacobians(op, y, program.theta)
            relevant[op.source] |= (by_input[out] != 0).any(axis=0)
        elif isinstance(op, Relu):
            relevant[op.source] |= out & (y >= 0)
        elif isinstance(op, Pool):
            tied = y[op.members] == y[op.members].max(axis=1, keepdims=True)
            relevant[op.source][op.members[tied & out[:, None]]] = True
        else:
            relevant[op.source] |= out
            relevant[op.other] |= out
    return relevant


def enumerate_cells(program: Program, budget: int = 2000, seed: int = 0) -> Cells:
    """All cells around w, by at most ``budget`` decisions; ``complete`` False when the budget ran out.

    ``certain`` holds the leaves found so far in either case; it is correct, merely not all of them.
    """
    search = _Search(program, budget, np.random.default_rng(seed))
    complete = True
    try:
        search.start()
    except _BudgetError:
        complete = False
    width = int(program.trainable.sum())
    certain = [(e, p) for e, p in search.found.values() if p is not None]
    possible = [e for e, p in search.found.values() if p is None]
    return Cells(
        np.array([e for e, _ in certain], dtype=np.int64).reshape(-1, width),
        np.array(possible, dtype=np.int64).reshape(-1, width),
        np.array([p for _, p in certain], dtype=object).reshape(-1, width),
        complete,
    )
