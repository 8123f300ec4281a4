"""Time of ``decide`` on the systems of the budget table: 20,000 x 147 and 100,000 x 27, feasible and not.

``pytest benchmarks/bench_feasibility.py --benchmark-only``
"""

from __future__ import annotations

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


SHAPES = [(20_000, 147), (100_000, 27), (4_500, 27)]


@pytest.mark.parametrize("make", [gaussian, patches])
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
