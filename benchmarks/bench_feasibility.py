"""Time of ``decide``: 20,000 x 147 and 100,000 x 27, feasible and not, easy and nearly degenerate; a few rows.

``pytest benchmarks/bench_feasibility.py --benchmark-only``
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from adcert.feasibility import check_direction, check_proof, decide


def gaussian(rows: int, columns: int, nonempty: bool, seed: int) -> np.ndarray[Any, Any]:
    """float32 [rows, columns], turned to one side of a hidden vector if ``nonempty``."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns)).astype(np.float32)
    if nonempty:
        matrix[matrix.astype(np.float64) @ rng.standard_normal(columns) < 0] *= -1
    return matrix


def patches(rows: int, columns: int, nonempty: bool, seed: int) -> np.ndarray[Any, Any]:
    """The same from differences of 8-bit pixels, many of them equal, as in low precision training."""
    rng = np.random.default_rng(seed)
    matrix = rng.integers(-8, 9, size=(rows, columns)).astype(np.float32) / 256
    matrix[rng.random(matrix.shape) < 0.5] = 0.0
    matrix = matrix[matrix.any(axis=1)]
    if nonempty:
        values = matrix.astype(np.float64) @ rng.integers(-1000, 1000, size=columns)
        matrix = matrix[values != 0] * np.sign(values[values != 0])[:, None].astype(np.float32)
    return matrix


def thin(rows: int, columns: int, relative: float, seed: int) -> np.ndarray[Any, Any]:
    """float64, relative margins along a hidden direction between ``relative`` and ten times that."""
    rng = np.random.default_rng(seed)
    matrix, hidden = rng.standard_normal((rows, columns)), rng.standard_normal(columns)
    hidden /= np.linalg.norm(hidden)
    margins = np.linalg.norm(matrix, axis=1) * relative * (1 + 9 * rng.random(rows))
    return matrix - np.outer(matrix @ hidden - margins, hidden)


def relation(rows: int, columns: int, support: int, nudge: int, seed: int) -> np.ndarray[Any, Any]:
    """float64 integers on one side of a plane, and ``support`` rows in it that cancel but for ``nudge`` units.

    The nudge is one unit in the last place of one entry towards the plane's positive side (nonempty) or none.
    """
    rng = np.random.default_rng(seed)
    hidden = np.append(rng.integers(1, 51, size=columns - 1), 1)
    others = rng.integers(-(2**20), 2**20, size=(rows - support, columns))
    others = others[others @ hidden != 0]
    others *= np.sign(others @ hidden)[:, None]
    base = rng.integers(-512, 512, size=(support - 1, columns))
    base[:, -1] -= base @ hidden
    last = -(rng.integers(1, 4, size=support - 1) @ base).astype(np.float64)
    last[0] = np.nextafter(last[0], np.inf) if nudge else last[0]
    return rng.permutation(np.vstack([others, base, last[None]]))


def repeated(rows: int, columns: int, nonempty: bool, seed: int) -> np.ndarray[Any, Any]:
    """Multiples by powers of two of a hundredth of the rows."""
    rng = np.random.default_rng(seed)
    few = gaussian(max(4 * columns, rows // 100), columns, nonempty, seed)
    size = np.ldexp(np.float32(1.0), rng.integers(-3, 4, size=(rows, 1)))
    return few[rng.integers(0, len(few), size=rows)] * size


def zero_columns(rows: int, columns: int, nonempty: bool, seed: int) -> np.ndarray[Any, Any]:
    """Three columns in four are zero."""
    matrix = np.zeros((rows, columns), dtype=np.float32)
    matrix[:, ::4] = gaussian(rows, len(range(0, columns, 4)), nonempty, seed)
    return matrix


SHAPES = [(20_000, 147), (100_000, 27), (4_500, 27)]


@pytest.mark.parametrize("make", [gaussian, patches, repeated, zero_columns])
@pytest.mark.parametrize("nonempty", [True, False], ids=["nonempty", "empty"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_decide(benchmark: Any, rows: int, columns: int, nonempty: bool, make: Any) -> None:
    matrices = [make(rows, columns, nonempty, seed) for seed in range(3)]
    decisions = []

    def run() -> None:
        decisions.append([decide(matrix, seconds=30.0) for matrix in matrices])

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(systems=len(matrices), reasons=[d.reason for d in decisions[-1]])
    for matrix, decision in zip(matrices, decisions[-1], strict=True):
        assert decision.nonempty is nonempty
        assert check_direction(matrix, decision.direction) if nonempty else check_proof(matrix, decision.proof)


@pytest.mark.parametrize("relative", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_thin_cone(benchmark: Any, rows: int, columns: int, relative: float) -> None:
    matrices = [thin(rows, columns, relative, seed) for seed in range(4)]
    decisions, seconds = [], []

    def run() -> None:
        for matrix in matrices:
            start = time.perf_counter()
            decisions.append(decide(matrix, seconds=30.0))
            seconds.append(time.perf_counter() - start)

    benchmark.pedantic(run, rounds=1)
    reasons = [decision.reason for decision in decisions]
    benchmark.extra_info.update(systems=len(matrices), reasons=reasons, worst=round(max(seconds), 4))
    for matrix, decision in zip(matrices, decisions, strict=True):
        assert check_direction(matrix, decision.direction)


@pytest.mark.parametrize("nudge", [0, 1], ids=["empty", "nonempty"])
@pytest.mark.parametrize("support", [2, 5, -1], ids=["2", "5", "n"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_one_unit_in_the_last_place(benchmark: Any, rows: int, columns: int, support: int, nudge: int) -> None:
    matrix = relation(rows, columns, support if support > 0 else columns, nudge, 1)
    decision = benchmark.pedantic(lambda: decide(matrix, seconds=30.0), rounds=3)
    benchmark.extra_info.update(reason=decision.reason)
    assert decision.nonempty is bool(nudge)
    assert check_direction(matrix, decision.direction) if nudge else check_proof(matrix, decision.proof)


@pytest.mark.parametrize("nonempty", [True, False], ids=["nonempty", "empty"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_two_terms(benchmark: Any, rows: int, columns: int, dtype: Any, nonempty: bool) -> None:
    """Differences of pixels given as two terms: the 4,500 x 27 are a block of a step under bfloat16."""
    matrix = patches(rows, columns, nonempty, 3)
    minus = (np.random.default_rng(4).integers(8, 248, size=matrix.shape) / 256).astype(dtype)
    decision = benchmark.pedantic(lambda: decide(matrix + minus, minus, seconds=30.0), rounds=5)
    assert decision.nonempty is nonempty


@pytest.mark.parametrize("size", [0.0, 1e-11, 1e-7])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_radius(benchmark: Any, rows: int, columns: int, size: float) -> None:
    matrix = gaussian(rows, columns, True, 0)
    radius = np.abs(matrix) * np.float32(size)
    decision = benchmark.pedantic(lambda: decide(matrix, radius=radius, seconds=30.0), rounds=3)
    assert check_direction(matrix, decision.direction, radius=radius)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("columns", [27, 288])
@pytest.mark.parametrize("kind", ["generic", "opposite"])
def test_few_rows(benchmark: Any, rows: int, columns: int, kind: str) -> None:
    """A block of a step in float32: float64 arrays, two terms."""
    rng = np.random.default_rng(0)
    a, minus = rng.integers(0, 256, size=(2, rows, columns)) / 255
    if kind == "opposite":
        a, minus = np.vstack([a, minus[:1]]), np.vstack([minus, a[:1]])
    decision = benchmark(decide, a, minus)
    benchmark.extra_info.update(reason=decision.reason)
    assert decision.nonempty is (kind == "generic")


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_warm_start(benchmark: Any, rows: int, columns: int) -> None:
    matrix = gaussian(rows, columns, True, 0)
    warm = decide(matrix, seconds=30.0).direction
    decision = benchmark(lambda: decide(matrix, warm=warm))
    assert decision.reason == "warm direction"


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_check_direction(benchmark: Any, rows: int, columns: int) -> None:
    matrix = gaussian(rows, columns, True, 0)
    direction = decide(matrix, seconds=30.0).direction
    assert benchmark(check_direction, matrix, direction)
