"""Certified step / plain step: two copies of one model train in turn, the ratio is taken pair by pair.

    pytest benchmarks/bench_steps.py --benchmark-only

The benchmark's own figure is a pair of steps; ``extra_info`` holds the plain step and the median ratio of the pairs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from torch import Tensor, nn

import adcert
from adcert import data, models

PAIRS = 12
WARM_UP = 3


def trainer(model: nn.Module, monitor: adcert.Monitor | None) -> Callable[[Tensor, Tensor], None]:
    """One training step of the main job, with or without a monitor."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        if monitor is None:
            nn.functional.cross_entropy(model(x), y).backward()
        else:
            with monitor.step():
                nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("name", ["vgg11", "vgg11-bn", "resnet18"])
def test_certified_over_plain(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    images = data.load("photos")
    batches = iter(data.Loader(images, 128, seed=0, steps=WARM_UP + PAIRS))
    plain = models.build(name, len(images.classes), seed=0)
    certified = adcert.convert(copy.deepcopy(plain))
    monitor = adcert.Monitor(certified)
    steps = {"plain": trainer(plain, None), "certified": trainer(certified, monitor)}
    seconds: dict[str, list[float]] = {"plain": [], "certified": []}

    def pair() -> None:
        x, y = next(batches)
        for kind, step in steps.items():
            start = time.perf_counter()
            step(x, y)
            seconds[kind].append(time.perf_counter() - start)

    for _ in range(WARM_UP):
        pair()
    benchmark.pedantic(pair, rounds=PAIRS, iterations=1)
    kept = {kind: times[WARM_UP:] for kind, times in seconds.items()}
    ratios = [a / b for a, b in zip(kept["certified"], kept["plain"], strict=True)]
    benchmark.extra_info["median ratio certified / plain"] = round(median(ratios), 3)
    benchmark.extra_info["median plain seconds"] = round(median(kept["plain"]), 4)
    benchmark.extra_info["verdicts"] = str(monitor.report().certified) + " certified"
    for a, b in zip(plain.parameters(), certified.parameters(), strict=True):
        assert torch.equal(a, b)
