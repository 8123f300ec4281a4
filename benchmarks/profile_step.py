"""Where the time of a certified step goes, stage by stage, beside a plain step: the tables of ``profile.md``.

    python benchmarks/profile_step.py --model vgg11-bn --steps 20

Two copies of one model train in turn on the same batches; medians over the steps. The worker's time runs beside the
training thread's and is listed apart from it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from contextlib import nullcontext
from statistics import median

import torch
from torch import nn

import adcert
from adcert import data, models

WARM_UP = 4
STAGES = ("forward", "audit", "rows", "backward", "end of the block", "optimizer", "step")


class Timer:
    """Milliseconds since the last call, by stage."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = defaultdict(list)
        self.last = time.perf_counter()

    def start(self) -> None:
        self.last = time.perf_counter()

    def lap(self, stage: str) -> float:
        now = time.perf_counter()
        self.seen[stage].append(1e3 * (now - self.last))
        self.last = now
        return self.seen[stage][-1]

    def medians(self) -> dict[str, float]:
        return {stage: median(times[WARM_UP:]) for stage, times in self.seen.items()}


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    monitor: adcert.Monitor | None,
    batch: tuple[torch.Tensor, torch.Tensor],
    low: bool,
    timer: Timer,
) -> None:
    x, y = batch
    begin = time.perf_counter()
    optimizer.zero_grad()
    timer.start()
    with nullcontext() if monitor is None else monitor.step() as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = nn.functional.cross_entropy(model(x), y)
        timer.lap("forward")
        loss.backward()  # type: ignore[no-untyped-call]
        timer.lap("backward")
    timer.lap("end of the block")
    optimizer.step()
    timer.lap("optimizer")
    timer.seen["step"].append(1e3 * (time.perf_counter() - begin))
    if seen is not None:  # the analysis runs at the start of the backward pass
        seconds = seen.summary["seconds"]
        for stage in ("audit", "rows", "partial", "solve"):
            timer.seen[stage].append(1e3 * seconds[stage])
        timer.seen["backward"][-1] -= timer.seen["audit"][-1] + timer.seen["rows"][-1]
        timer.seen["ties"].append(seen.summary["ties"])


def measure(name: str, count: int, low: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Medians by stage of plain and certified steps."""
    images = data.load("photos")
    plain = models.build(name, len(images.classes), seed=0)
    certified = adcert.convert(copy.deepcopy(plain))
    timers = Timer(), Timer()
    with adcert.Monitor(certified) as monitor:
        runs = [(plain, None), (certified, monitor)]
        jobs = [
            (m, torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4), seer) for m, seer in runs
        ]
        for batch in data.Loader(images, 128, seed=0, steps=count + WARM_UP):
            for (model, optimizer, seer), timer in zip(jobs, timers, strict=True):
                step(model, optimizer, seer, batch, low, timer)
    return timers[0].medians(), timers[1].medians()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(models.MODELS), help="may be given several times")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bfloat16", action="store_true", help="under bfloat16 autocast")
    arguments = parser.parse_args()
    for name in arguments.model or ["vgg11", "vgg11-bn", "resnet18"]:
        plain, certified = measure(name, arguments.steps, arguments.bfloat16)
        title = f"{name}{', bfloat16 autocast' if arguments.bfloat16 else ''}"
        print(f"\n{title}: {certified['ties']:,.0f} tied windows a step, milliseconds\n")
        print("| stage | plain | certified |\n|---|---|---|")
        for stage in STAGES:
            print(f"| {stage} | {plain.get(stage, 0.0):.2f} | {certified[stage]:.2f} |")
        print(f"| (of rows: partial backward engine) | | {certified['partial']:.2f} |")
        print(f"| (worker: systems and proofs) | | {certified['solve']:.2f} |")


if __name__ == "__main__":
    main()
