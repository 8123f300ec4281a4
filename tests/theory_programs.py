"""Programs of docs/theory.md, section 1, in exact arithmetic: values, AD's g, idle elements, rows, true gradients.

Independent of adcert and of torch. A program is a list of elements in topological order; the last one is the loss.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

Vector = tuple[Fraction, ...]
Rule = Callable[["Point", int], list[list[Vector]] | None]


@dataclass
class Element:
    """``kind``: entry (of w), affine, product, kink, max or rank; ``inputs``: numbers of earlier elements.

    ``weights``: coefficients and constant of affine; (D-, D+) of kink; (k,) of rank, the k-th largest. ``proxy`` and
    ``chosen``: what AD uses at a touch, and the member among ties (its place in the list of ties), for this point.
    """

    kind: str
    inputs: tuple[int, ...]
    weights: tuple[int, ...] = ()
    proxy: Fraction = Fraction(0)
    chosen: int = 0


@dataclass
class Program:
    parameters: int
    elements: list[Element]

    def values(self, w: Sequence[Fraction]) -> list[Fraction]:
        found: list[Fraction] = []
        for element in self.elements:
            u = [found[i] for i in element.inputs]
            if element.kind == "entry":
                found.append(Fraction(w[element.weights[0]]))
            elif element.kind == "affine":
                found.append(
                    sum((c * x for c, x in zip(element.weights, u, strict=False)), Fraction(element.weights[-1]))
                )
            elif element.kind == "product":
                found.append(u[0] * u[1])
            elif element.kind == "kink":
                found.append(u[0] * element.weights[u[0] > 0])
            else:
                found.append(sorted(u, reverse=True)[_rank(element) - 1])
        return found

    def branches(self, values: list[Fraction], number: int) -> list[Vector]:
        """Local gradients of the active branches of an element: one for a smooth element."""
        element = self.elements[number]
        u = [values[i] for i in element.inputs]
        if element.kind == "entry":
            return [()]
        if element.kind == "affine":
            return [tuple(map(Fraction, element.weights[:-1]))]
        if element.kind == "product":
            return [(u[1], u[0])]
        if element.kind == "kink":
            sides = element.weights if u[0] == 0 else (element.weights[u[0] > 0],)
            return [(Fraction(side),) for side in sides]
        ties = [i for i, x in enumerate(u) if x == values[number]]
        return [tuple(Fraction(j == i) for j in range(len(u))) for i in ties]

    def gradient(self, w: Sequence[Fraction]) -> Vector | None:
        """The true gradient of the loss at w; None unless every element is evidently smooth there."""
        values = self.values(w)
        g: list[Vector] = []
        for number in range(len(self.elements)):
            branches = self.branches(values, number)
            candidates = {self._chain(number, branch, g) for branch in branches}
            if len(candidates) > 1:
                return None
            g.append(candidates.pop())
        return g[-1]

    def _chain(self, number: int, local: Vector, g: list[Vector]) -> Vector:
        element = self.elements[number]
        if element.kind == "entry":
            return tuple(Fraction(j == element.weights[0]) for j in range(self.parameters))
        return _combine(local, [g[i] for i in element.inputs], self.parameters)


@dataclass
class Point:
    """A program at w, with AD's proxies.

    ``direction``: the branches are those along it instead (Theorem R); ``forced``: local vectors of some elements.
    """

    program: Program
    w: Vector
    direction: Vector | None = None
    forced: dict[int, Vector] = field(default_factory=dict)
    values: list[Fraction] = field(default_factory=list)
    local: list[Vector] = field(default_factory=list)
    g: list[Vector] = field(default_factory=list)
    branches: list[list[Vector]] = field(default_factory=list)
    gammas: list[list[Vector]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = self.program.values(self.w)
        for number, element in enumerate(self.program.elements):
            branches = self.program.branches(self.values, number)
            gammas = [self.program._chain(number, branch, self.g) for branch in branches]
            if number in self.forced:
                local = self.forced[number]
            elif self.direction is not None and len(branches) > 1:
                local = branches[self._along(number, gammas)]
            elif element.kind == "kink" and len(branches) > 1:
                local = (element.proxy,)
            else:
                local = branches[element.chosen % len(branches)]
            self.branches.append(branches)
            self.gammas.append(gammas)
            self.local.append(local)
            self.g.append(self.program._chain(number, local, self.g))

    def _along(self, number: int, gammas: list[Vector]) -> int:
        """The branch taken along the direction."""
        assert self.direction is not None
        element = self.program.elements[number]
        if element.kind == "kink":
            slope = dot(self.g[element.inputs[0]], self.direction)
            return int(slope > 0)
        above = sum(self.values[i] > self.values[number] for i in element.inputs)
        order = sorted(range(len(gammas)), key=lambda i: dot(gammas[i], self.direction), reverse=True)
        return order[_rank(element) - above - 1]

    def idle(self, ignores: Callable[[Point, int, int], bool] | None = None) -> set[int]:
        """The largest idle set; ``ignores``: another, possibly wrong, idea of which reader ignores an element."""
        ignores = ignores or partials_vanish
        found: set[int] = set()
        readers: dict[int, set[int]] = {}
        for number, element in enumerate(self.program.elements):
            for i in element.inputs:
                readers.setdefault(i, set()).add(number)
        for number in reversed(range(len(self.program.elements) - 1)):
            if all(v in found or ignores(self, v, number) for v in readers.get(number, ())):
                found.add(number)
        return found

    def rows(self, idle: set[int], rank_rule: Rule | None = None) -> list[list[list[Vector]]] | None:
        """Of every selection outside ``idle`` the alternatives, lists of rows of which one has to hold; None: no p."""
        found = []
        for number, element in enumerate(self.program.elements):
            if number in idle or len(self.branches[number]) < 2:
                continue
            rule = kink_rows if element.kind == "kink" else rank_rule or order_rows
            alternatives = rule(self, number)
            if alternatives is None:
                return None
            if [] not in alternatives:
                found.append(alternatives)
        return found


def partials_vanish(point: Point, reader: int, number: int) -> bool:
    """Section 2.1: every active branch has partial derivative 0, and so has AD."""
    places = [k for k, i in enumerate(point.program.elements[reader].inputs) if i == number]
    return all(branch[k] == 0 for branch in [*point.branches[reader], point.local[reader]] for k in places)


def kink_rows(point: Point, number: int) -> list[list[Vector]] | None:
    """Section 3.2."""
    left, right = point.gammas[number]
    if left == right:
        return [[]] if point.g[number] == left else None
    y = point.g[point.program.elements[number].inputs[0]]
    if point.g[number] not in (left, right):
        return None
    return [[y if point.g[number] == right else tuple(-x for x in y)]]


def order_rows(point: Point, number: int) -> list[list[Vector]] | None:
    """Section 3.3; a maximum has rank 1."""
    element = point.program.elements[number]
    above = sum(point.values[i] > point.values[number] for i in element.inputs)
    rank = _rank(element) - above
    own = point.g[number]
    others = [gamma for gamma in point.gammas[number] if gamma != own]
    equal = len(point.gammas[number]) - len(others)
    alternatives = []
    for up in itertools.product((False, True), repeat=len(others)):
        if sum(up) <= rank - 1 and sum(up) + equal >= rank:
            alternatives.append([_minus(x, own) if u else _minus(own, x) for u, x in zip(up, others, strict=True)])
    return alternatives


def maximum_rows(point: Point, number: int) -> list[list[Vector]] | None:
    """Wrong for ranks other than the first: every other member has to lose."""
    own = point.g[number]
    return [[_minus(own, gamma) for gamma in point.gammas[number] if gamma != own]]


def direction(rows: list[list[list[Vector]]], size: int, rng: random.Random, tries: int = 60) -> Vector | None:
    """Some p that satisfies one alternative of every selection, exactly, or None if none was met."""
    for _ in range(tries):
        p = tuple(Fraction(rng.randint(-9, 9)) * 10 ** rng.randint(0, 3) for _ in range(size))
        if any(p) and all(any(all(dot(row, p) > 0 for row in rows_) for rows_ in each) for each in rows):
            return p
    return None


def limit_is(point: Point, p: Vector, rng: random.Random) -> bool:
    """Do true gradients along w + t p + t^2 noise tend to AD's? Exact arithmetic, two sizes of t."""
    for size in (16, 24):
        t = Fraction(1, 10**size)
        noise = [Fraction(rng.randint(-999, 999), 101) for _ in p]
        there = [w + t * a + t * t * b for w, a, b in zip(point.w, p, noise, strict=True)]
        true = point.program.gradient(there)
        if true is not None and any(abs(x - y) > 10**9 * t for x, y in zip(true, point.g[-1], strict=True)):
            return False
    return True


def random_point(rng: random.Random) -> Point:
    """Two or three parameters, six to twelve elements, small integers: ties, touches and zero weights abound."""
    parameters = rng.randint(2, 3)
    elements = [Element("entry", (), (j,)) for j in range(parameters)]
    for _ in range(rng.randint(5, 10)):
        elements.append(_random_element(rng, len(elements)))
    last = range(parameters, len(elements))
    elements.append(Element("affine", tuple(last), (*(rng.choice((0, 0, 1, 1, -1, 2)) for _ in last), 0)))
    return Point(Program(parameters, elements), tuple(Fraction(rng.choice((0, 0, 0, 1))) for _ in range(parameters)))


def _random_element(rng: random.Random, count: int) -> Element:
    kind = rng.choice(("affine", "affine", "kink", "kink", "max", "rank", "product"))
    if kind == "affine":
        inputs = tuple(rng.sample(range(count), min(count, rng.randint(1, 3))))
        return Element(
            kind, inputs, (*(rng.choice((-2, -1, -1, 0, 1, 1)) for _ in inputs), rng.choice((0, 0, 0, -1, 1)))
        )
    if kind == "product":
        return Element(kind, (rng.randrange(count), rng.randrange(count)))
    if kind == "kink":
        sides = rng.choice(((0, 1), (0, 1), (1, 0), (-1, 1), (1, 1), (2, 1)))
        proxy = Fraction(rng.choice((*sides, *sides, *sides, 5)))
        return Element(kind, (rng.randrange(count),), sides, proxy)
    inputs = tuple(rng.sample(range(count), min(count, rng.randint(2, 3))))
    rank = 1 if kind == "max" else rng.randint(1, len(inputs))
    return Element(kind, inputs, (rank,), chosen=rng.randrange(3))


def dot(a: Vector, b: Vector) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def _minus(a: Vector, b: Vector) -> Vector:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _combine(local: Vector, vectors: list[Vector], size: int) -> Vector:
    total = [Fraction(0)] * size
    for a, vector in zip(local, vectors, strict=True):
        total = [x + a * y for x, y in zip(total, vector, strict=True)]
    return tuple(total)


def _rank(element: Element) -> int:
    return element.weights[0]
