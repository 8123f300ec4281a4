"""The fully connected networks of the published experiments: every step is decided, every touch is counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adcert
from adcert import Monitor, Verdict
from adcert.cli._loop import Job, Outcome, StepResult, run
from adcert.models import FNN, build

KINKS = {"fnn-relu": (0.0,), "fnn-relu6": (0.0, 6.0), "fnn-hardtanh": (-1.0, 1.0), "fnn-hardsigmoid": (-3.0, 3.0)}


def nothing(outcome: Outcome, result: StepResult) -> None:
    """Nobody watches."""


@pytest.mark.parametrize("name", FNN)
def test_an_epoch_on_digits(name: str) -> None:
    job = Job(model=name, data="digits", size=28, epochs=1)
    outcome = run(job, nothing)
    assert outcome.report is not None and outcome.report["steps"] == 11
    assert outcome.report["undecided"] == 0, outcome.report["reasons"]
    assert outcome.results[-1].loss < outcome.results[0].loss


def on_a_grid(model: nn.Module, step: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter / step).round() * step)


@pytest.mark.parametrize("name", FNN)
def test_touches_are_those_counted_by_hand(name: str) -> None:
    """Weights and images on grids: units hit the kinks of either layer all the time, on both sides."""
    model = build(name, 10, channels=1, size=8).double()
    on_a_grid(model, 2.0**-3)
    seen: list[Tensor] = []
    x = torch.randint(-2, 3, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0)).double() / 2
    y = torch.arange(16) % 10
    adcert.convert(model)
    with Monitor(model, queue=0).step() as step:
        h = x
        for module in model:
            if not isinstance(module, (nn.Flatten, nn.Linear)):
                seen.append(h.detach().clone())
            h = module(h)
        nn.functional.cross_entropy(h, y).backward()
    expected = [sum(int((units == kink).sum()) for kink in KINKS[name]) for units in seen]
    assert [layer["touches"] for layer in step.summary["layers"]] == expected
    assert expected[0] > 10
    assert step.certificate().verdict is not Verdict.UNDECIDED, step.certificate().reasons
    step.certificate().verify()
