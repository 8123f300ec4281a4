"""Scalars in a real event file, in the order of the steps, without waiting for verdicts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import adcert
from adcert.integrations.scalars import Scalars
from adcert.integrations.tensorboard import TensorBoard

NAMES = ("windows", "ties", "touches", "differing", "rows", "certified", "uncertified", "undecided")


def model() -> nn.Module:
    linear = nn.Linear(1, 1)
    nn.init.ones_(linear.weight)
    nn.init.zeros_(linear.bias)
    return adcert.convert(nn.Sequential(linear, nn.ReLU()))


def one(monitor: adcert.Monitor, number: int) -> adcert.monitor.Step:
    """Two touches in every third step; the second of four is undecided."""
    with monitor.step() as step:
        y = monitor.model(torch.full((2, 1), float(number % 3)))
        (y * (y > 0) if number % 4 == 1 else y).sum().backward()
    return step


def test_the_event_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="it reads and writes event files")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    with adcert.Monitor(model()) as monitor, TensorBoard(writer, monitor, prefix="a/") as board:
        for number in range(6):
            board.add(one(monitor, number))
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(f"a/{name}" for name in NAMES)
    found = {name: [(event.step, event.value) for event in events.Scalars(f"a/{name}")] for name in NAMES}
    assert found["touches"] == [(1, 2), (2, 0), (3, 0), (4, 2), (5, 0), (6, 0)]
    assert found["certified"] == [(1, 1), (2, 1), (3, 2), (4, 3), (5, 4), (6, 4)]
    assert found["undecided"] == [(1, 0), (2, 1), (3, 1), (4, 1), (5, 1), (6, 2)]


def test_nobody_waits_for_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is held up: steps are taken all the same, and written once it goes on."""
    from adcert import monitor as driver

    go, conclude = threading.Event(), driver.conclude
    monkeypatch.setattr(driver, "conclude", lambda *args: go.wait(20) and conclude(*args))
    monitor = adcert.Monitor(model())
    scalars = Scalars(monitor)
    for number in range(3):
        scalars.add(one(monitor, number))
        assert list(scalars.settled()) == []
    go.set()
    assert [number for number, _ in scalars.settled(wait=True)] == [1, 2, 3]
    assert list(scalars.settled(wait=True)) == []


def test_skipped_and_aborted_steps_have_no_numbers() -> None:
    monitor = adcert.Monitor(model(), every=2)
    scalars = Scalars(monitor)
    for number in range(6):
        if number == 2:
            for _ in range(2):
                with pytest.raises(ZeroDivisionError), monitor.step() as step:
                    1 / 0  # noqa: B018
                scalars.add(step)
        scalars.add(one(monitor, number))
    found = [number for number, _ in scalars.settled(wait=True)]
    assert [(number - 1) // 2 for number in found] == [0, 2, 3]


def test_a_resumed_run_counts_on() -> None:
    first = adcert.Monitor(model())
    for number in range(4):
        one(first, number)
    second = adcert.Monitor(model())
    second.load_state_dict(first.state_dict())
    scalars = Scalars(second)
    scalars.add(one(second, 4))
    ((number, numbers),) = scalars.settled(wait=True)
    assert (number, numbers["certified"], numbers["undecided"]) == (5, 4, 1)
