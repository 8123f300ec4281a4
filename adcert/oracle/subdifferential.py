"""The Clarke subdifferential of a closure at its parameters, and what it says about a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np

from .arcs import POWERS, Arcs
from .cells import Cells, enumerate_cells, follow
from .gradients import Closure, Gradient, ad_gradient, flatten
from .hull import Hull, in_hull, near_hull
from .localize import localized
from .program import Array, Program
from .sampling import arcs as random_arcs
from .sampling import first_order
from .trace import Parameters, trace

__all__ = ["Element", "Judgement", "Subdifferential", "ad_gradient", "judge", "subdifferential"]

SAMPLES = 240
BUDGET = 2000
SMALL = 150  # decisions that are tried before any sampling


@dataclass(frozen=True)
class Element:
    """A limit of true gradients, over all trainable parameters, flattened and in their order.

    ``arc``: integer vectors (q_1, q_2, ...); the gradient at ``w + t q_1 + t^2 q_2 + ...`` (and at almost every point
    near it) tends to ``gradient`` as t decreases to 0. Usually there is only a direction q_1.
    """

    gradient: tuple[Fraction, ...]
    arc: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Judgement:
    """The oracle's opinion of g.

    ``member``: g in dC f(w)? True, False or None (unknown); ``bouligand``: g in dB f(w), None when unknown;
    ``exact``: the known elements are all of dB f(w), in rational arithmetic; ``gradient``: g, Fractions [P];
    ``known``: the elements; ``hull``: the combination or separator, over elements and then possible ones;
    ``reason``: how it was decided.
    """

    member: bool | None
    bouligand: bool | None
    exact: bool
    gradient: Array
    known: Subdifferential
    hull: Hull
    reason: str

    @property
    def elements(self) -> Array:
        """True Bouligand elements, Fractions [m, P]."""
        return self.known.matrix


@dataclass(frozen=True)
class Subdifferential:
    """What is known of dB f(w) and dC f(w), its convex hull.

    ``elements``: elements of dB f(w); ``possible``: further vectors that may be elements; ``complete``: there are no
    others, so that dC f(w) lies between the hulls of ``elements`` and of both.
    ``exact``: all numbers are exact; if not, floating point has rounded something (the values are then taken as
    computed) or some piece is not a polynomial. ``tolerance``: as how much rounded a gradient is taken.
    ``slices``: parameter name -> its entries. ``scaled`` (integers [m, P]) times ``unit`` are the elements.

    >>> import torch
    >>> w = torch.zeros(1, requires_grad=True)
    >>> known = subdifferential(lambda: w.abs().sum(), [w])
    >>> sorted(int(e.gradient[0]) for e in known.elements), known.complete
    ([-1, 1], True)
    >>> known.contains([torch.tensor([0.5])]), known.contains([torch.tensor([1.5])])
    (True, False)
    """

    scaled: Array = field(repr=False)
    scaled_possible: Array = field(repr=False)
    unit: Fraction = field(repr=False)
    arcs: tuple[tuple[tuple[int, ...], ...], ...] = field(repr=False)
    complete: bool
    exact: bool
    slices: dict[str, slice]
    shapes: dict[str, tuple[int, ...]]
    tolerance: float = 0.0

    @cached_property
    def matrix(self) -> Array:
        """The elements as Fractions [m, P]."""
        return _rational(self.scaled, self.unit)

    @cached_property
    def elements(self) -> tuple[Element, ...]:
        """Elements of dB f(w), each with an arc along which it is the limit of the gradient."""
        return tuple(Element(tuple(row), arc) for row, arc in zip(self.matrix, self.arcs, strict=True))

    @cached_property
    def possible(self) -> tuple[tuple[Fraction, ...], ...]:
        """Vectors that may be elements of dB f(w), too: first-order analysis cannot tell."""
        return tuple(map(tuple, _rational(self.scaled_possible, self.unit)))

    @property
    def differentiable(self) -> bool:
        """Whether f has one limit gradient only: it is strictly differentiable at w."""
        return self.complete and len(self.scaled) == 1 and not len(self.scaled_possible)

    def contains(self, g: Gradient, tolerance: float | None = None) -> bool | None:
        """Whether g is in dC f(w); None where the oracle cannot tell."""
        return self.judge(g, tolerance).member

    def judge(self, g: Gradient, tolerance: float | None = None) -> Judgement:
        """Whether g is in dC f(w), with proof.

        ``g``: by parameter name, by parameter in their order, or flat. ``tolerance``: how far g is from dC f(w) at
        least where the answer is False, in the max norm and relative to 1 + max |g|: gradients are rounded.
        """
        point = flatten(g, self.slices)
        room = self.tolerance if tolerance is None else tolerance
        return _decide(self, point, Fraction(room) * (1 + max(map(abs, point), default=0)) if room else Fraction(0))


class Evidence:
    """Elements found so far for a program, by all methods; grows with ``sample`` and ``cells``."""

    def __init__(self, program: Program, seed: int = 0) -> None:
        self.program = program
        self.local = localized(program)
        self.seed = seed
        self.elements: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {}  # scaled -> arc
        self.possible: set[tuple[int, ...]] = set()
        self.complete = False
        self.scale: Fraction | None = None
        self._arcs: Arcs | None = None

    @property
    def settled(self) -> bool:
        """Whether all of dB f(w) is known."""
        return self.complete and not self.possible

    def cells(self, budget: int) -> Cells:
        found = enumerate_cells(self.local, budget, self.seed)
        self._add(found)
        self.complete = found.complete
        if found.complete:
            self.possible = {tuple(e) for e in found.possible.tolist()} - set(self.elements)
        return found

    def _add(self, found: Cells) -> None:
        self._unit(found.scale)
        for element, direction in zip(found.certain.tolist(), found.directions.tolist(), strict=True):
            self.elements.setdefault(tuple(element), (tuple(direction),))
            self.possible.discard(tuple(element))

    def sample(self, samples: int, directions: Sequence[Array], seed: int) -> None:
        """Elements along random arcs; to first order only, where slopes are floats."""
        rng = np.random.default_rng((self.seed, seed))
        width = len(self.local.parameters)
        if self.local.smooth:
            chosen = first_order(self.local.slices, width, min(samples // 2, 400), rng)
            self._add(follow(self.local, np.concatenate([chosen, *map(np.atleast_2d, directions)]), self.seed))
            return
        for block in random_arcs(self.local.slices, width, samples, directions, rng):
            self.along(block, rng)

    def along(self, block: Array, rng: np.random.Generator, powers: int = POWERS) -> tuple[Array, Array]:
        """Limits along arcs [E, S, P], scaled, and which of them are valid."""
        if self._arcs is None:
            self._arcs = Arcs(self.local)
            self._unit(Fraction(1, int(self._arcs.denominators[self.local.output])))
        limits, valid = self._arcs.limits(block, rng, powers)
        for k in np.flatnonzero(valid):
            key = tuple(map(int, limits[k]))
            if key not in self.elements:
                self.elements[key] = tuple(tuple(map(int, step)) for step in block[:, k])
                self.possible.discard(key)
        return limits, valid

    def _unit(self, scale: Fraction) -> None:
        assert self.scale in (None, scale)
        self.scale = scale

    def known(self) -> Subdifferential:
        unit = self.scale or Fraction(1)
        exact, width = self.program.exact, len(self.program.parameters)
        ordered = sorted(self.elements)
        return Subdifferential(
            _integers(ordered, width),
            _integers(sorted(self.possible), width),
            unit,
            tuple(self.elements[key] for key in ordered),
            self.complete,
            exact,
            self.program.slices,
            self.program.shapes,
            1e-6 if self.program.smooth else max(1e-9, 100 * self.program.eps),
        )


def _integers(rows: Sequence[tuple[int, ...]], width: int) -> Array:
    small = all(-(2**40) < x < 2**40 for row in rows for x in row)
    return np.array(rows, dtype=np.int64 if small else object).reshape(-1, width)


def _rational(scaled: Array, unit: Fraction) -> Array:
    found = np.empty(scaled.shape, dtype=object)
    found.ravel()[:] = [unit * int(x) for x in scaled.ravel()]
    return found


def subdifferential(
    closure: Closure, parameters: Parameters, *, budget: int = BUDGET, samples: int = SAMPLES, seed: int = 0
) -> Subdifferential:
    """The Clarke subdifferential of ``closure()`` with respect to its trainable parameters, where they are now.

    The closure is run once and may call any PyTorch operation the oracle knows, in any wiring. ``parameters``: a
    module, a mapping or a sequence of tensors. All cells around w are enumerated, by at most ``budget`` decisions;
    where this is not conclusive, ``samples`` random arcs are walked as well (0: none).

    Raises :class:`OracleError` for an operation it does not know, and where f is not continuous or not finite.

    >>> import torch
    >>> w = torch.zeros(2, requires_grad=True)
    >>> known = subdifferential(lambda: torch.maximum(w[0], 2 * w[1]), [w])
    >>> sorted([int(x) for x in e.gradient] for e in known.elements)
    [[0, 2], [1, 0]]
    """
    evidence = Evidence(trace(closure, parameters), seed)
    evidence.cells(budget)
    if samples and (not evidence.settled):
        evidence.sample(samples, (), 1)
    return evidence.known()


def judge(
    closure: Closure,
    parameters: Parameters,
    g: Gradient | None = None,
    *,
    samples: int = SAMPLES,
    budget: int = BUDGET,
    seed: int = 0,
    tolerance: float | None = None,
) -> Judgement:
    """Decide whether g (autodiff's gradient, if it is not given) is in dC f(w), with as little work as it takes.

    A few cells, random arcs, all cells, more arcs, in this order. True comes with an exact convex combination of
    limits of gradients; False only with a separation from everything that the complete enumeration of cells allows. A
    sampled hull alone never yields False: it misses narrow cells.

    >>> import torch
    >>> w = torch.zeros(1, requires_grad=True)
    >>> judge(lambda: (w.relu() - (-w).relu()).sum(), [w]).member
    False
    """
    gradient = ad_gradient(closure, parameters) if g is None else g
    evidence = Evidence(trace(closure, parameters), seed)
    evidence.cells(min(budget, SMALL))
    if evidence.settled:
        return evidence.known().judge(gradient, tolerance)
    evidence.sample(samples, (), 1)
    answer = evidence.known().judge(gradient, tolerance)
    if answer.member is None and not evidence.complete and budget > SMALL:
        evidence.cells(budget)
        answer = evidence.known().judge(gradient, tolerance)
    if answer.member is None:
        evidence.sample(10 * samples, (), 2)
        answer = evidence.known().judge(gradient, tolerance)
    return answer


def _decide(known: Subdifferential, point: list[Fraction], room: Fraction) -> Judgement:
    g = np.array(point, dtype=object)
    whole = known.complete and not len(known.scaled_possible)
    member, bouligand, hull, reason = _place(known, point, room, whole)
    return Judgement(member, bouligand, whole and known.exact, g, known, hull, reason)


def _place(
    known: Subdifferential, point: list[Fraction], room: Fraction, whole: bool
) -> tuple[bool | None, bool | None, Hull, str]:
    """Member of dC, member of dB, proof, reason; in integers: g and the elements by a common unit."""
    target = [x / known.unit for x in point]
    factor = lcm(*(x.denominator for x in target))
    big = max((abs(x) for x in target), default=Fraction(0)) * factor
    elements, possible = known.scaled, known.scaled_possible
    if factor > 1 or big >= 2**40:
        elements, possible = (x.astype(object) * factor for x in (elements, possible))
    g = np.array([int(x * factor) for x in target], dtype=elements.dtype)
    width = room / known.unit * factor
    same = np.flatnonzero((elements == g).all(axis=1))
    near = same if len(same) else np.flatnonzero((np.abs(elements - g) <= width).all(axis=1))
    if len(near):
        return True, True, Hull(True, weights={int(near[0]): Fraction(1)}), "an element"
    bouligand = False if whole else None
    hull = _hull(elements, g, width) if len(elements) else Hull(False)
    if hull.member:
        return True, bouligand, hull, "a convex combination of elements"
    if known.complete and hull.member is not None:
        outer = _hull(np.concatenate([elements, possible]), g, width) if len(possible) else hull
        if outer.member is False:
            return False, False, outer, "separated from every cell"
        return None, bouligand, hull, "not in the hull of the elements; possible cells"
    reason = "too many cells" if hull.member is False else "no exact answer"
    return None, bouligand, hull, f"not in the hull of the elements; {reason}"


def _hull(elements: Array, g: Array, width: Fraction) -> Hull:
    """Membership exactly, or up to ``width`` where g is nearly in the hull: rounded, it seems."""
    found = in_hull(elements, g)
    if found.member or not width:
        return found
    if found.separator is not None:
        h = np.array(found.separator, dtype=object)
        room = width * sum(map(abs, found.separator))
        if ((elements - g).astype(object) @ h > room).all():
            return found
    return near_hull(elements, g, width)
