"""The one place that knows HiGHS: max c such that <row, p> - <radius, |p|> >= c, |p| <= 1, 0 <= c <= 1.

HiGHS proposes, exact arithmetic disposes: nothing here is trusted by the caller. Every status is checked all
the same, because a refused model followed by ``run`` reports success with objective 0.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

from adcert.errors import AdcertError

Matrix = NDArray[np.float64]

_local = threading.local()
_OPTIONS = (
    ("output_flag", False),
    ("threads", 1),
    ("presolve", "off"),
    ("solver", "simplex"),
    # With perturbed costs the dual simplex method runs on for ever where a hundred rows all but cancel.
    ("dual_simplex_cost_perturbation_multiplier", 0.0),
)
# The rows are scaled already and another scaling doubles the iterations, but without it some programs stall.
_FAST, _SAFE = 0, 1
_SMALLEST = 1e-8  # HiGHS drops entries below 1e-9 by itself


class SolverError(AdcertError):
    """HiGHS refused a model or did not reach an optimum; the caller must not use its numbers."""


@dataclass(frozen=True, eq=False)
class Guess:
    """An optimum HiGHS claims: margin c, direction p (float64 [n]), row duals >= 0 (float64 [rows added])."""

    margin: float
    direction: Matrix
    duals: Matrix


def _require(status: Any, what: str) -> None:
    if status != highspy.HighsStatus.kOk:
        raise SolverError(f"HiGHS: {what} returned {status}")


def _solver() -> Any:
    """This thread's long-lived solver; one thread, set before its first run."""
    if not hasattr(_local, "solver"):
        solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
        for name, value in _OPTIONS:
            _require(solver.setOptionValue(name, value), f"option {name}")
        _local.solver = solver
    return _local.solver


class MarginProgram:
    """A margin program that grows by rows and hot-starts. Its rows should have entries of size about 1.

    With a radius every unknown is split into p = u - v, u, v in [0, 1]: at an optimum ``<a, p> - <r, |p|>``
    is then the coefficient a - r on u and -(a + r) on v. ``offsets`` are added to the rows' values, and c may
    then be as low as -1.
    """

    def __init__(
        self, rows: Matrix, radius: Matrix | None, offsets: Matrix | None = None, *, deadline: float = math.inf
    ) -> None:
        self.columns = rows.shape[1]
        self.split = radius is not None
        self.deadline = deadline
        self.solver = _solver()
        coefficients = self._coefficients(rows, radius)
        count, width = coefficients.shape
        cost, lower = np.zeros(width), np.full(width, 0.0 if self.split else -1.0)
        cost[-1], lower[-1] = 1.0, 0.0 if offsets is None else -1.0
        starts, index, values = self._sparse(coefficients)
        status = self.solver.passModel(
            width,
            count,
            values.size,
            int(highspy.MatrixFormat.kRowwise),
            int(highspy.ObjSense.kMaximize),
            0.0,
            cost,
            lower,
            np.ones(width),
            np.zeros(count) if offsets is None else -offsets,
            np.full(count, highspy.kHighsInf),
            starts,
            index,
            values,
            np.zeros(width, dtype=np.int32),
        )
        _require(status, "passModel")

    def _coefficients(self, rows: Matrix, radius: Matrix | None) -> Matrix:
        parts = [rows] if radius is None else [rows - radius, -rows - radius]
        dense = np.concatenate([*parts, np.full((rows.shape[0], 1), -1.0)], axis=1)
        return np.where(np.abs(dense) < _SMALLEST, 0.0, dense)

    @staticmethod
    def _sparse(dense: Matrix) -> tuple[NDArray[np.int32], NDArray[np.int32], Matrix]:
        mask = dense != 0
        starts = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])[:-1]
        return starts.astype(np.int32), np.nonzero(mask)[1].astype(np.int32), dense[mask]

    def add(self, rows: Matrix, radius: Matrix | None, offsets: Matrix | None = None) -> None:
        """Appends rows; the next :meth:`solve` starts from the last basis."""
        starts, index, values = self._sparse(self._coefficients(rows, radius))
        count = rows.shape[0]
        lower = np.zeros(count) if offsets is None else -offsets
        infinite = np.full(count, highspy.kHighsInf)
        status = self.solver.addRows(count, lower, infinite, values.size, starts, index, values)
        _require(status, "addRows")

    def solve(self) -> Guess:
        """Runs the simplex method; :class:`SolverError` on anything but an optimum within the deadline."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise SolverError("HiGHS: out of time")
        # HiGHS's clock runs on through all models of one solver object.
        _require(
            self.solver.setOptionValue("time_limit", self.solver.getRunTime() + remaining),
            "option time_limit",
        )
        status = self._run(_FAST, 4 * self.columns + 200)
        if self.solver.getModelStatus() == highspy.HighsModelStatus.kIterationLimit:
            status = self._run(_SAFE, int(highspy.kHighsIInf))
        model = self.solver.getModelStatus()
        if status != highspy.HighsStatus.kOk or model != highspy.HighsModelStatus.kOptimal:
            raise SolverError(f"HiGHS: run returned {status}, model status {model}")
        solution = self.solver.getSolution()
        values = np.array(solution.col_value, dtype=np.float64)
        duals = np.abs(np.array(solution.row_dual, dtype=np.float64))
        if not (np.isfinite(values).all() and np.isfinite(duals).all()):
            raise SolverError("HiGHS: the solution holds a NaN or an infinity")
        direction = values[:-1]
        if self.split:
            direction = direction[: self.columns] - direction[self.columns :]
        return Guess(float(values[-1]), direction, duals)

    def _run(self, scaling: int, iterations: int) -> Any:
        for name, value in (("simplex_scale_strategy", scaling), ("simplex_iteration_limit", iterations)):
            _require(self.solver.setOptionValue(name, value), f"option {name}")
        return self.solver.run()
