"""Monitor(every=K): one step of each K, uniform and unbiased; the others run as if there was no monitor."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import adcert
from adcert import Monitor
from adcert.recorder import active, running
from adcert.sampling import count_drawn, drawn


def model() -> nn.Module:
    linear = nn.Linear(1, 1)
    nn.init.ones_(linear.weight)
    nn.init.zeros_(linear.bias)
    return adcert.convert(nn.Sequential(linear, nn.ReLU()))


def train(monitor: Monitor, steps: int) -> list[adcert.monitor.Step]:
    """Every third step touches the kink twice, the others never."""
    done = []
    for number in range(steps):
        x = torch.full((2, 1), float(number % 3))
        with monitor.step() as step:
            monitor.model(x).sum().backward()
        done.append(step)
    return done


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_each_window_has_one_step(every: int) -> None:
    steps = [step for step in range(1, 20 * every + 1) if drawn(step, every, seed=3) == step]
    assert [(step - 1) // every for step in steps] == list(range(20))
    for step in range(1, 20 * every + 1):
        assert (drawn(step, every, seed=3) - 1) // every == (step - 1) // every


@pytest.mark.parametrize("every", [2, 3, 5])
def test_the_draw_is_uniform_and_windows_are_independent(every: int) -> None:
    """6000 windows: the chi-square statistics of places and of neighbouring pairs of places stay below their 0.999
    quantiles (5 places: 4 degrees of freedom, 18.5; 25 pairs: 24, 51.2).
    """
    windows = 6000
    places = [drawn(1 + every * window, every, seed=0) - every * window for window in range(windows)]

    def statistic(counts: Counter[object], cells: int, total: int) -> float:
        expected = total / cells
        return sum((count - expected) ** 2 for count in counts.values()) / expected

    assert set(places) == set(range(1, every + 1))
    assert statistic(Counter(places), every, windows) < 18.5
    pairs = list(zip(places[::2], places[1::2], strict=True))
    assert statistic(Counter(pairs), every**2, len(pairs)) < 51.2


def test_estimates_are_unbiased_for_periodic_data() -> None:
    """The mean over 3000 seeds of K times the sampled sum, data of the same period K = 3, and an incomplete window:
    8 steps with values 6 0 0 6 0 0 6 0 sum to 18. One draw is 0 to 54 with deviation at most 3 sqrt(3) 6 < 16; the
    mean of 3000 stays within five of its own deviations.
    """
    values = [6, 0, 0, 6, 0, 0, 6, 0]
    found = [
        3 * sum(value for step, value in enumerate(values, 1) if drawn(step, 3, seed) == step) for seed in range(3000)
    ]
    assert abs(sum(found) / len(found) - 18) < 5 * 16 / 3000**0.5
    assert len(set(found)) > 1


def test_count_drawn() -> None:
    for every in (1, 4):
        for steps in range(30):
            expected = sum(drawn(step, every, 5) == step for step in range(1, steps + 1))
            assert count_drawn(steps, every, 5) == expected


def test_the_report_counts_and_estimates(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Monitor(model(), log=path, every=4, seed=1) as monitor:
        steps = train(monitor, 10)
    chosen = [step for step in range(1, 11) if drawn(step, 4, seed=1) == step]
    assert [step.number for step in steps if not step.skipped] == chosen
    touches = sum(2 for number in chosen if (number - 1) % 3 == 0)
    report = monitor.report()
    assert (report.steps, report.sampled, report.every) == (10, len(chosen), 4)
    assert (report.certified, report.touches) == (len(chosen), touches)
    assert (report.estimates["certified"], report.estimates["touches"]) == (4 * len(chosen), 4 * touches)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["every"]) for line in lines[:-1]] == [(number, 4) for number in chosen]
    assert lines[-1]["report"]["estimates"] == report.estimates


def test_without_sampling_the_estimates_are_the_totals() -> None:
    monitor = Monitor(model())
    train(monitor, 4)
    report = monitor.report()
    assert report.sampled == report.steps == 4
    assert all(getattr(report, name) == value for name, value in report.estimates.items())
    assert (report.estimates["certified"], report.estimates["touches"]) == (4, 4)


def test_a_skipped_step_records_nothing_and_says_so() -> None:
    monitor = Monitor(model(), every=3, seed=2)
    for _ in range(3):
        with monitor.step() as step:
            assert (active() is None) == bool(step.skipped)
            assert len(torch.overrides._get_current_function_mode_stack()) == (not step.skipped)
            loss = step.loss(monitor.model(torch.ones(1, 1)).sum())
            loss.backward()
        if step.skipped:
            assert step.summary == {}
            with pytest.raises(adcert.AdcertError, match=rf"step {step.number} has no certificate: with every=3"):
                step.certificate()
            with pytest.raises(adcert.AdcertError, match="after the step"):
                step.loss(loss)
        else:
            assert step.certificate().verdict is adcert.Verdict.CERTIFIED


def test_steps_do_not_nest_whether_drawn_or_not() -> None:
    monitor = Monitor(model(), every=2)
    for _ in range(2):
        with monitor.step(), pytest.raises(adcert.AdcertError, match="do not nest"), monitor.step():
            pass
    assert not running()


def test_failures_count_only_where_they_are_looked_for() -> None:
    """relu(w) - relu(-w) at 0 has no certificate: it raises in the drawn step of a window and in no other."""
    w = nn.Parameter(torch.zeros(1))
    monitor = Monitor(nn.ParameterList([w]), on_fail="raise", every=5, seed=0)
    raised = []
    for number in range(1, 11):
        try:
            with monitor.step():
                (torch.relu(w) - torch.relu(-w)).sum().backward()
        except adcert.UncertifiedError:
            raised.append(number)
    assert raised == [drawn(1, 5, 0), drawn(6, 5, 0)]
    assert monitor.report().estimates["uncertified"] == 10


def test_an_exception_in_a_skipped_step_passes_through() -> None:
    monitor = Monitor(model(), every=2, seed=0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), monitor.step():
            1 / 0  # noqa: B018
    report = monitor.report()
    assert (report.steps, report.sampled, report.aborted) == (2, 1, 1)
    assert not running()


def test_the_random_state_is_not_touched() -> None:
    import random

    monitor = Monitor(model(), every=3)
    states = torch.get_rng_state(), random.getstate()
    train(monitor, 6)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


@pytest.mark.parametrize("options", [{"every": 0}, {"every": True}, {"every": 2.0}, {"seed": None}, {"seed": "a"}])
def test_refusals(options: dict[str, object]) -> None:
    with pytest.raises(adcert.AdcertError, match=next(iter(options))):
        Monitor(model(), **options)  # type: ignore[arg-type]
