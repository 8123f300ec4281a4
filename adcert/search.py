"""The stages of :func:`adcert.feasibility.decide`: screens, HiGHS, refinement, exact decision.

Each stage proposes and returns what passed the exact check, or None.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np

from adcert._highs import SolverError
from adcert.answers import Decision, Proof, are_integers, is_direction, is_proof
from adcert.cutting import separate
from adcert.exact import NARROW_BITS, Ints, System, relation, round_direction, times, true_integers
from adcert.minnorm import OutOfTimeError, exact_seconds, minimum_norm, nearest_point
from adcert.refine import along_face, refine, shorten
from adcert.scaling import Matrix, Scaled, distinct_lines, least_squares, transposed_times
from adcert.signs import first_failure

_MANY = 4  # rows per column
_LARGE = 40  # rows of an exact solve


def _floating(row: Sequence[int], shift: Ints) -> Matrix:
    """The integers ``row`` as a row of the scaled picture, of largest entry about 1."""
    bits = [abs(x).bit_length() - int(s) if x else -(1 << 30) for x, s in zip(row, shift, strict=True)]
    top = max(bits)
    pairs = zip(row, shift, strict=True)
    return np.array([float(Fraction(x) / Fraction(2) ** (top + int(s))) for x, s in pairs])


class Search:
    """The stages of :func:`decide`, each of which returns a checked decision or None."""

    def __init__(self, system: System, warm: Sequence[float] | None, deadline: float) -> None:
        self.system = system
        self.warm = warm
        self.deadline = deadline
        self.why = "no stage decided"
        self.kept: Ints = np.arange(system.shape[0])
        self.scaled: Scaled
        self.guess: Matrix
        self.low: Matrix
        self.duals: dict[int, float] = {}

    def run(self) -> Decision:
        """The first decision of the stages; undecided when time is up or no stage has one."""
        try:
            for stage in self.stages():
                decision = stage()
                if decision is not None:
                    return decision
        except OutOfTimeError as error:
            return Decision(None, None, None, str(error))
        return Decision(None, None, None, self.why)

    def glance(self) -> Decision | None:
        """What comparisons of single entries decide: no sum is rounded, so every machine gives the same answer."""
        stages = (self.no_rows, self.zero_row, self.single_row, self.column)
        return next((decision for decision in (stage() for stage in stages) if decision is not None), None)

    def stages(self) -> Iterator[Callable[[], Decision | None]]:
        yield from (self.glance, self.warm_start, self.opposite_rows, self.few_rows)
        self.scaled = Scaled.of(self.system, self.kept)
        yield from (self.sum_of_rows, self.independent_rows, self.widened, self.linear_program)
        if self.system.radius is not None:
            yield self.exact_rows_only
        else:
            yield from (self.support, self.face, self.refined, self.minimum_norm)

    def nonempty(self, direction: Sequence[int] | None, reason: str) -> Decision | None:
        if direction is None or not is_direction(self.system, direction):
            return None
        return Decision(True, tuple(direction), None, reason)

    def empty(self, weights: dict[int, int], reason: str) -> Decision | None:
        order = sorted(weights)
        proof = Proof(tuple(order), tuple(weights[k] for k in order))
        return Decision(False, None, proof, reason) if is_proof(self.system, proof) else None

    def propose(self, p: Matrix, reason: str) -> Decision | None:
        """Tries a floating direction of the scaled system at 29 bits, then with every bit it has."""
        if not (self.scaled.margins(p) > 0).all():
            return None
        for bits in (NARROW_BITS, 53):
            decision = self.nonempty(self.scaled.unscale(round_direction(p, bits)), reason)
            if decision is not None:
                return decision
        return None

    def no_rows(self) -> Decision | None:
        rows, columns = self.system.shape
        return Decision(True, (0,) * columns, None, "no rows") if rows == 0 else None

    def zero_row(self) -> Decision | None:
        # Float subtraction with gradual underflow is zero only where the exact difference is.
        zero = ~self.system.difference.any(axis=1) & self.system.is_exact
        return self.empty({int(np.argmax(zero)): 1}, "zero row") if zero.any() else None

    def single_row(self) -> Decision | None:
        if self.system.shape[0] > 1:
            return None
        return self.column(reason="single row")

    def column(self, reason: str = "column") -> Decision | None:
        """One entry that is strictly of one sign in every row, by more than its radius."""
        low, high = self.system.difference.min(axis=0), self.system.difference.max(axis=0)
        strict = np.flatnonzero((low > 0) | (high < 0))  # a radius may rule out some
        for j in strict[: 64 if self.system.radius is not None else 1].tolist():
            direction = [0] * low.size
            direction[j] = 1 if low[j] > 0 else -1
            decision = self.nonempty(direction, reason)
            if decision is not None:
                return decision
        return None

    def warm_start(self) -> Decision | None:
        if self.warm is None or len(self.warm) != self.system.shape[1]:
            return None
        if are_integers(self.warm):
            return self.nonempty([int(x) for x in self.warm], "warm direction")
        return self.nonempty(round_direction(np.array(self.warm, dtype=np.float64), NARROW_BITS), "warm direction")

    def opposite_rows(self) -> Decision | None:
        """Keeps one row of each ray; two rows on opposite rays are a proof."""
        self.kept, opposite = distinct_lines(self.system)
        for k, other in opposite[:8]:
            weights = self._relation([k, other], int(np.argmax(np.abs(self.system.difference[k]))))
            decision = weights and self.empty(weights, "opposite rows")
            if decision:
                return decision
        return None

    def few_rows(self) -> Decision | None:
        """Where a quarter of the rows lie on the far side of their sum, a few of them are likely to be a proof."""
        columns = self.system.shape[1]
        # Of N rows in general position, each as likely as its opposite, at least that many of n columns are
        # contradictory with probability 0.999 (Wendel: the chance is that of n heads or more in N - 1 tosses).
        count = 2 * columns + 8 * math.isqrt(columns) + 8
        if self.system.radius is not None or self.kept.size < 4 * count:
            return None
        difference = self.system.difference
        with np.errstate(all="ignore"):  # a difference may overflow: this only chooses rows
            low = times(difference, transposed_times(difference, np.ones(difference.shape[0])))[self.kept]
        if 4 * np.count_nonzero(low <= 0) < low.size:
            return None
        even = np.linspace(0, low.size - 1, count).astype(int)
        index = self.kept[np.union1d(even, np.argpartition(low, count // 4)[: count // 4])]
        part = Search(self.system.take(index), None, self.deadline)
        part.scaled, part.low = Scaled.of(part.system, part.kept), np.zeros(index.size)
        part.linear_program()
        return self._gordan([int(k) for k in index[sorted(part.duals)]], "highs")

    def _relation(self, index: Sequence[int], column: int | None = None) -> dict[int, int] | None:
        """Weights of the linear relation of the rows ``index`` (in one column) if it is unique and nonnegative."""
        part = slice(None) if column is None else slice(column, column + 1)
        rows, exponents = true_integers(self.system.columns(part), index)
        if exact_seconds(rows) > self.deadline - time.monotonic():
            return None
        weights = relation(rows)
        if weights is None or not all(y >= 0 for y in weights):
            return None
        largest = max(exponents)
        terms = zip(index, weights, exponents, strict=True)
        return {int(k): y << (largest - e) for k, y, e in terms if y}

    def sum_of_rows(self) -> Decision | None:
        self.guess = self.scaled.mean_direction()
        self.low = self.scaled.margins(self.guess)
        return self.propose(self.guess, "sum of rows")

    def widened(self) -> Decision | None:
        """Newton steps on the lowest margins; where they fail they have chosen the program's first rows."""
        if self.low.size < 2:
            return None
        self.guess, self.low = self.scaled.widen(self.guess, self.low, self.deadline - time.monotonic())
        return self.propose(self.guess, "least squares")

    def independent_rows(self) -> Decision | None:
        """Solves A p = 1: possible if the rows are independent; else the residual y has A^T y = 0."""
        rows = self.scaled.rows
        if rows.shape[0] > rows.shape[1]:
            return None
        ones = np.ones(rows.shape[0])
        p = least_squares(rows, ones, 0.0, 2 * rows.shape[0])
        decision = self.propose(p, "independent rows")
        if decision is not None:
            return decision
        residual = ones - times(rows, p)
        small = 1e-6 * np.abs(residual).max()
        if self.system.radius is not None or residual.min() < -small:
            return None
        return self._gordan([int(self.kept[i]) for i in np.flatnonzero(residual > small)], "dependent rows")

    def linear_program(self) -> Decision | None:
        """HiGHS's proposals; whatever goes wrong there, the exact stages that follow may still decide."""
        scaled = self.scaled
        matrix, back = scaled.program

        def direction(d: Matrix) -> Matrix:
            return d if back is None else times(back, d)

        try:
            found = separate(
                matrix, scaled.radius, None, self.low, lambda d: scaled.margins(direction(d)), self.deadline
            )
        except SolverError as error:
            self.why = str(error)
            return None
        self.guess = direction(found.direction)
        self.duals = {int(self.kept[i]): dual for i, dual in found.duals.items()}
        return self.propose(self.guess, "highs") if (found.values > 0).all() else None

    def support(self) -> Decision | None:
        """A Gordan proof from the rows with duals."""
        return self._gordan(sorted(self.duals), "highs")

    def _gordan(self, index: Sequence[int], reason: str = "refined") -> Decision | None:
        weights = self._relation(index) if 0 < len(index) <= self.system.shape[1] + 1 else None
        return self.empty(weights, reason) if weights else None

    def refined(self) -> Decision | None:
        """More digits around HiGHS's direction, or its opposite: in a thin cone the two look alike."""
        point = round_direction(self.guess, 53) if self.duals and self._many() else None
        if point is None:
            return None
        return self._refine(point) or self._refine([-x for x in point])

    def face(self) -> Decision | None:
        """Where the rows with duals all but prove emptiness, the other rows decide along them."""
        if not self._many() or not 0 < len(self.duals) < self.system.shape[1]:
            return None
        tight, normal = nearest_point(self.system, *self._start(), self.deadline)
        if not any(normal):
            return None
        row = _floating(normal, self.scaled.shift)
        places = np.searchsorted(self.kept, tight).tolist()
        direction, union = along_face(self.scaled, places, row, self.low, self.deadline)
        if direction is not None:
            point = round_direction(direction, 53)
            return self._refine(point) if point is not None else None
        return self._gordan([int(self.kept[i]) for i in union])

    def _start(self) -> tuple[list[int], list[int]]:
        """The rows with duals and positive integers close to these."""
        support = sorted(self.duals) or [int(self.kept[0])]
        return support, [max(1, round(self.duals.get(k, 1.0) * 2.0**40)) for k in support]

    def _refine(self, point: Sequence[int]) -> Decision | None:
        for direction, duals in refine(self.system, self.kept, self.scaled, point, self.deadline):
            if direction is not None:
                return self._short(direction, "refined")
            decision = self._gordan(sorted(duals))
            if decision is not None:
                return decision
        return None

    def _many(self) -> bool:
        """In smaller systems the exact algorithm ends sooner than more programs do."""
        rows, columns = self.kept.size, self.system.shape[1]
        return rows > _MANY * columns or min(rows, columns) > _LARGE

    def _short(self, direction: Sequence[int], reason: str) -> Decision | None:
        """With few bits if the system allows it."""
        return self.nonempty(shorten(direction, 64), reason) or self.nonempty(direction, reason)

    def minimum_norm(self) -> Decision | None:
        """The exact end: Wolfe's algorithm from the support of the duals."""
        direction, proof = minimum_norm(self.system, *self._start(), self.deadline, self._improve)
        self.why = "the exact algorithm's answer did not pass its check"
        if proof is not None:
            return self.empty(proof, "minimum norm")
        assert direction is not None
        return self._short(direction, "minimum norm")

    def _improve(self, point: tuple[int, ...]) -> tuple[int, ...] | None:
        short = shorten(point, 64)
        if first_failure(self.system, short) is None:
            return short
        if not self._many():
            return None
        for direction, _ in refine(self.system, self.kept, self.scaled, self.scaled.rescale(point), self.deadline):
            if direction is not None:
                return direction
        return None

    def exact_rows_only(self) -> Decision | None:
        """The rows without a radius may prove emptiness, or their direction may satisfy the others."""
        self.why = "no direction found above every radius, and the rows without radius prove nothing"
        index = np.flatnonzero(self.system.is_exact)
        if index.size == 0:
            return None
        exact = System(self.system.a[index], None if self.system.minus is None else self.system.minus[index], None)
        part = Search(exact, None, self.deadline).run()
        if part.proof is not None:
            rows = (int(index[k]) for k in part.proof.rows)
            return self.empty(dict(zip(rows, part.proof.weights, strict=True)), part.reason)
        if part.nonempty is None:
            self.why = part.reason
        return self.nonempty(part.direction, part.reason)
