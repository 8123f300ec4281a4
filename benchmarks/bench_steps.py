"""Certified, plain and naive training steps, in turn in one process; the ratios are taken pair by pair.

    pytest benchmarks/bench_steps.py --benchmark-only

The benchmark's own figure is a pair of steps. ``extra_info``: ``ratio`` with its quartiles, how long the certified step
holds up the training thread, without what the monitor defers to a worker; ``throughput``, wall time of consecutive
certified steps up to the last verdict over that of plain ones, where everything is paid; ``naive_ratio``, the direct
Algorithm 2 of naive.py, with how much of it was run.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import naive
import pytest
from training import CASES, Batch, Case, Race, affordable, optimizer, photos

WARM_UP, PAIRS = 3, 20
SECONDS = 35.0  # for the pairs, and half of it for consecutive steps: slow cases run fewer
NAIVE_STEPS, NAIVE_PAIRS = 2, 16


@pytest.mark.parametrize("case", CASES, ids=str)
def test_certified_over_plain(benchmark: Any, case: Case) -> None:
    batches = iter(photos(128, WARM_UP + 2 * PAIRS))
    race = Race(case)
    direct = case.build()
    naive_step = naive.trainer(direct, optimizer(direct), NAIVE_PAIRS, case.low)
    naive_steps: list[naive.Step] = []
    warm_up, each = 0, 0.0
    while warm_up < WARM_UP and warm_up * each < SECONDS / 3:
        each = race.pair(*next(batches))
        warm_up += 1

    def with_naive() -> tuple[Batch, dict[str, Any]]:
        batch = next(batches)
        if len(naive_steps) < NAIVE_STEPS:
            naive_steps.append(naive_step(*batch))
        return batch, {}

    benchmark.pedantic(race.pair, setup=with_naive, rounds=affordable(SECONDS, each, 3, PAIRS))
    info = race.ratios(warm_up)
    together = [next(batches) for _ in range(affordable(SECONDS / 2, each, 2, PAIRS))]
    totals = race.totals(together)
    naive_seconds = median(step.seconds for step in naive_steps)
    benchmark.extra_info |= vars(case) | info | race.verdicts()
    benchmark.extra_info |= {
        "throughput": round(totals["certified"] / totals["plain"], 3),
        "throughput_steps": len(together),
        "naive_s": round(naive_seconds, 2),
        "naive_ratio": round(naive_seconds / info["plain_s"], 1),
        "naive_note": naive_steps[-1].note,
    }
    assert race.same_weights()
