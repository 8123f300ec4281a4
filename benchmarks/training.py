"""What the benchmarks of training steps share: the networks, the step, and how two kinds of step are timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

import adcert
from adcert import data, models

Batch = tuple[Tensor, Tensor]
Run = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Case:
    """A network of the main job. ``low``: bfloat16 autocast; ``inplace``: every ReLU works in place.

    ``compiled``: both steps run ``torch.compile`` of their model, with inductor.
    """

    model: str
    low: bool = False
    inplace: bool = False
    size: int = 32
    channels_last: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        further = f"{'-inplace' if self.inplace else ''}{'-compiled' if self.compiled else ''}"
        return f"{self.model}-{'bfloat16' if self.low else 'float32'}{further}"

    def build(self, classes: int = 10, device: torch.device | str = "cpu") -> nn.Module:
        model = models.build(self.model, classes, size=self.size, seed=0).to(device)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = self.inplace
        return model


CASES = (
    Case("vgg11"),
    Case("vgg11-bn"),
    Case("vgg11-bn", inplace=True),
    Case("resnet18"),
    Case("vgg11", low=True),
    Case("vgg11-bn", low=True),
)


def photos(size: int, count: int) -> list[Batch]:
    """``count`` batches of ``size`` photographs, the same ones every time."""
    return list(data.Loader(data.load("photos"), size, seed=0, steps=count))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def trainer(model: nn.Module, monitor: adcert.Monitor | None, low: bool) -> Run:
    """One training step of the main job, with or without a monitor."""
    descent = optimizer(model)

    def run(x: Tensor, y: Tensor) -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]

    def step(x: Tensor, y: Tensor) -> None:
        descent.zero_grad()
        with nullcontext() if monitor is None else monitor.step():
            run(x, y)
        descent.step()

    return step


class Race:
    """Two copies of one network that see the same batches, one of them under a monitor."""

    def __init__(self, case: Case, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        plain = case.build(device=device)
        certified = adcert.convert(copy.deepcopy(plain))
        self.models = plain, certified
        self.monitor = adcert.Monitor(certified)
        run = [torch.compile(model, fullgraph=True) if case.compiled else model for model in self.models]
        self.steps: dict[str, Run] = {
            "plain": trainer(run[0], None, case.low),
            "certified": trainer(run[1], self.monitor, case.low),
        }
        self.seconds: dict[str, list[float]] = {"plain": [], "certified": []}

    def settle(self) -> None:
        """Wait for whatever the monitor has deferred to a worker."""
        self.monitor.flush()

    def now(self) -> float:
        """The time, once the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def pair(self, x: Tensor, y: Tensor) -> float:
        """One step each, in turn first; returns the wall time of all.

        What is deferred is waited for between the two, untimed: it would slow down the plain step. :meth:`totals` pays.
        """
        began, kinds = time.perf_counter(), list(self.steps)
        for kind in kinds[:: 1 if len(self.seconds["plain"]) % 2 else -1]:
            start = self.now()
            self.steps[kind](x, y)
            self.seconds[kind].append(self.now() - start)
            self.settle()
        return time.perf_counter() - began

    def totals(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Wall time of consecutive steps, deferred work included; in the order plain, certified, certified, plain."""
        totals = dict.fromkeys(self.steps, 0.0)
        half = (len(batches) + 1) // 2
        for part, kinds in ((batches[:half], ("plain", "certified")), (batches[half:], ("certified", "plain"))):
            for kind in kinds:
                totals[kind] += self.together(kind, part)[1]
        return totals

    def together(self, kind: str, batches: Sequence[Batch]) -> tuple[float, float]:
        """Wall time of consecutive steps of one kind, during which nobody waits for the device.

        Until the device has done them; and until the last verdict is there too.
        """
        start = self.now()
        for x, y in batches:
            self.steps[kind](x, y)
        done = self.now()
        if kind == "certified":
            self.settle()
        return done - start, time.perf_counter() - start

    def same_weights(self) -> bool:
        """Whether both networks' parameters and buffers are bitwise equal."""
        ours, theirs = ([t.flatten().view(torch.uint8) for t in model.state_dict().values()] for model in self.models)
        return all(map(torch.equal, ours, theirs))

    def ratios(self, warm_up: int = 0) -> dict[str, Any]:
        """Medians of the pairs after the warm-up, and the quartiles of their ratios certified / plain."""
        plain, certified = self.seconds["plain"][warm_up:], self.seconds["certified"][warm_up:]
        ratios = [c / p for c, p in zip(certified, plain, strict=True)]
        return {
            "pairs": len(ratios),
            "plain_s": round(median(plain), 4),
            "certified_s": round(median(certified), 4),
            **spread(ratios),
        }

    def verdicts(self) -> dict[str, Any]:
        """What the monitor saw: steps per verdict and windows with a tie."""
        report = self.monitor.report()
        return {
            "certified": report.certified,
            "uncertified": report.uncertified,
            "undecided": report.undecided,
            "reasons": list(report.reasons)[:3],
            "ties_per_step": report.ties // max(1, report.steps),
            "tie_rate": round(report.ties / max(1, report.windows), 5),
        }


def spread(ratios: Sequence[float], name: str = "ratio") -> dict[str, float]:
    """The median and the quartiles.

    >>> spread([1.0, 1.1, 1.2, 1.3, 1.4])
    {'ratio': 1.2, 'ratio_q1': 1.1, 'ratio_q3': 1.3}
    """
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * list(ratios)
    return {name: round(middle, 3), f"{name}_q1": round(low, 3), f"{name}_q3": round(high, 3)}


def affordable(seconds: float, each: float, least: int, most: int) -> int:
    """How often something that takes ``each`` seconds is repeated in ``seconds``."""
    return max(least, min(most, int(seconds / each)))
