"""Certified step / plain step: two copies of one model train in turn, the ratio is taken pair by pair.

    pytest benchmarks/bench_steps.py --benchmark-only

The benchmark's own figure is a pair of steps; ``extra_info`` holds the plain step and the median ratio of the pairs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median

import pytest
import torch
from torch import Tensor, nn

import adcert
from adcert import data, models

PAIRS = 12
WARM_UP = 3


def trainer(model: nn.Module, monitor: adcert.Monitor | None, low: bool) -> Callable[[Tensor, Tensor], None]:
    """One training step of the main job, with or without a monitor; ``low``: under bfloat16 autocast."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def run(x: Tensor, y: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with nullcontext() if monitor is None else monitor.step():
            run(x, y)
        optimizer.step()

    return step


@pytest.mark.parametrize(
    ("name", "low"), [("vgg11", False), ("vgg11-bn", False), ("resnet18", False), ("vgg11-bn", True)]
)
def test_certified_over_plain(benchmark, name: str, low: bool) -> None:  # type: ignore[no-untyped-def]
    warm_up, pairs = (1, 3) if low else (WARM_UP, PAIRS)
    images = data.load("photos")
    batches = iter(data.Loader(images, 128, seed=0, steps=warm_up + pairs))
    plain = models.build(name, len(images.classes), seed=0)
    certified = adcert.convert(copy.deepcopy(plain))
    monitor = adcert.Monitor(certified)
    steps = {"plain": trainer(plain, None, low), "certified": trainer(certified, monitor, low)}
    seconds: dict[str, list[float]] = {"plain": [], "certified": []}

    def pair() -> None:
        x, y = next(batches)
        for kind, step in steps.items():
            start = time.perf_counter()
            step(x, y)
            seconds[kind].append(time.perf_counter() - start)

    for _ in range(warm_up):
        pair()
    benchmark.pedantic(pair, rounds=pairs, iterations=1)
    kept = {kind: times[warm_up:] for kind, times in seconds.items()}
    ratios = [a / b for a, b in zip(kept["certified"], kept["plain"], strict=True)]
    benchmark.extra_info["median ratio certified / plain"] = round(median(ratios), 3)
    benchmark.extra_info["median plain seconds"] = round(median(kept["plain"]), 4)
    report = monitor.report()
    benchmark.extra_info["median certified seconds"] = round(median(kept["certified"]), 4)
    benchmark.extra_info["certified, uncertified, undecided"] = (report.certified, report.uncertified, report.undecided)
    benchmark.extra_info["tied windows a step"] = report.ties // report.steps
    for a, b in zip(plain.parameters(), certified.parameters(), strict=True):
        assert torch.equal(a, b)
