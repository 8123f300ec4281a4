"""Certified and plain training steps under ``torch.compile``, in turn in one process.

    pytest benchmarks/bench_compile.py --benchmark-only -s

Both are compiled by inductor into one graph each. ``extra_info`` as in bench_steps.py; ``difference``: the largest
distance of a parameter of the two after the last step, since the compiler fuses the two programs in different ways.
"""

from __future__ import annotations

from typing import Any

import pytest
from training import Case, Race, affordable, photos

WARM_UP, PAIRS = 3, 12
SECONDS = 30.0


@pytest.mark.parametrize("case", [Case(name, compiled=True) for name in ("vgg11", "vgg11-bn", "resnet18")], ids=str)
def test_compiled_certified_over_compiled(benchmark: Any, case: Case) -> None:
    batches = iter(photos(128, WARM_UP + 2 * PAIRS))
    race = Race(case)
    each = [race.pair(*next(batches)) for _ in range(WARM_UP)][-1]
    benchmark.pedantic(
        race.pair, setup=lambda: (next(batches), {}), rounds=affordable(SECONDS, each, 3, PAIRS)
    )
    together = [next(batches) for _ in range(affordable(SECONDS / 2, each, 2, PAIRS))]
    totals = race.totals(together)
    plain, certified = (list(model.parameters()) for model in race.models)
    difference = max(float((p - q).detach().abs().max()) for p, q in zip(plain, certified, strict=True))
    benchmark.extra_info |= vars(case) | race.ratios(WARM_UP) | race.verdicts()
    benchmark.extra_info |= {"throughput": round(totals["certified"] / totals["plain"], 3), "difference": difference}
    print(case, benchmark.extra_info)
