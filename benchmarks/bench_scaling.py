"""How the cost of a certified step grows: with the batch, with the ties, with the rows of a system.

`pytest benchmarks/bench_scaling.py --benchmark-only`
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_feasibility import patches
from training import Batch, Case, Race, affordable, photos

from adcert.feasibility import decide

CASE = Case("vgg11-bn")
WARM_UP, PAIRS = 2, 8
SECONDS = 8.0  # for the pairs of one row
STRIPED = 0.5  # of the images, in the step that measures how many ties stripes make


def race(benchmark: Any, batches: list[Batch]) -> None:
    """Times pairs over the batches; the benchmark's figure is a pair of steps."""
    runner = Race(CASE)
    each = [runner.pair(*batch) for batch in batches[:WARM_UP]][-1]
    left = iter(batches[WARM_UP:])
    rounds = affordable(SECONDS, each, 3, PAIRS)
    benchmark.pedantic(lambda x, y: runner.pair(x, y), setup=lambda: (next(left), {}), rounds=rounds)
    benchmark.extra_info |= runner.ratios(WARM_UP) | runner.verdicts()
    assert runner.same_weights()


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_batch_size(benchmark: Any, size: int) -> None:
    race(benchmark, photos(size, WARM_UP + PAIRS))
    benchmark.extra_info["batch"] = size


def striped(count: int, share: float, generator: torch.Generator) -> Batch:
    """Noise, in which windows tie by accident only; ``share`` of the images repeat one column of it.

    There every activation equals its neighbour in the row, in all layers, but for the borders' padding.
    """
    x = torch.randn(count, 3, 32, 32, generator=generator)
    chosen = round(share * count)
    x[:chosen] = x[:chosen, :, :, :1]
    return x, torch.randint(10, (count,), generator=generator)


def ties_of_stripes(generator: torch.Generator) -> float:
    """Ties per window in striped images alone, as the monitor counts them."""
    runner = Race(CASE)
    runner.steps["certified"](*striped(64, STRIPED, generator))
    runner.settle()
    report = runner.monitor.report()
    return report.ties / report.windows / STRIPED


@pytest.mark.parametrize("percent", [0, 1, 5, 20, 50])
def test_tie_rate(benchmark: Any, percent: int) -> None:
    generator = torch.Generator().manual_seed(0)
    share = min(1.0, percent / 100 / ties_of_stripes(generator))
    race(benchmark, [striped(128, share, generator) for _ in range(WARM_UP + PAIRS)])
    achieved = round(100 * benchmark.extra_info["tie_rate"], 2)
    benchmark.extra_info |= {"wanted_percent": percent, "achieved_percent": achieved}


@pytest.mark.parametrize("nonempty", [True, False], ids=["nonempty", "empty"])
@pytest.mark.parametrize("rows", [100, 1_000, 10_000, 100_000])
def test_rows(benchmark: Any, rows: int, nonempty: bool) -> None:
    """``decide`` on differences of 8-bit pixels under a 3x3 filter over RGB: 27 unknowns."""
    matrix = patches(rows, 27, nonempty, seed=0)
    decision = benchmark.pedantic(decide, (matrix,), {"seconds": 30.0}, rounds=5, warmup_rounds=1)
    assert decision.nonempty is nonempty
    benchmark.extra_info |= {"rows": len(matrix), "nonempty": nonempty, "reason": decision.reason}
