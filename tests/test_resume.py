"""A monitor's state: a resumed job goes on with totals, draw and log as if it had never been killed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adcert
from adcert import Monitor


def model() -> nn.Module:
    linear = nn.Linear(1, 1)
    nn.init.ones_(linear.weight)
    nn.init.zeros_(linear.bias)
    return adcert.convert(nn.Sequential(linear, nn.ReLU()))


def train(monitor: Monitor, first: int, last: int) -> None:
    """Steps of the given numbers; every third one has two touches, every fourth is undecided."""
    for number in range(first, last + 1):
        with monitor.step():
            y = monitor.model(torch.full((2, 1), float(number % 3)))
            if number % 4 == 0:
                y = y * (y > 0)
            y.sum().backward()


def totals(monitor: Monitor) -> dict[str, Any]:
    report = asdict(monitor.report())
    report["seconds"] = sorted(report["seconds"])
    return report


def lines(path: Path) -> list[dict[str, Any]]:
    """The log without its times."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for line in found:
        line.get("report", line).pop("seconds", None)
    return found


def saved(state: dict[str, Any], path: Path) -> Any:
    """Through a file that may hold tensors and plain objects only."""
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def killed(log: Path, keep: int, done: int, **options: Any) -> dict[str, Any]:
    """The state after ``keep`` steps of a job that did ``done`` and then died, without closing anything."""
    monitor = Monitor(model(), log=log, **options).__enter__()
    train(monitor, 1, keep)
    state = monitor.state_dict()
    train(monitor, keep + 1, done)
    monitor.flush()
    return state


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("keep", "done"), [(0, 0), (0, 4), (5, 5), (5, 9), (12, 12)])
@pytest.mark.parametrize("inside", [False, True])
def test_totals_and_log_are_those_of_a_job_that_was_not_killed(
    tmp_path: Path, every: int, keep: int, done: int, inside: bool
) -> None:
    with Monitor(model(), log=tmp_path / "whole", every=every, seed=7) as whole:
        train(whole, 1, 12)
    log = tmp_path / "log"
    state = saved(killed(log, keep, done, every=every, seed=7), tmp_path / "state.pt")
    beyond = log.read_text().splitlines()[-1:] if done > keep else []
    with log.open("a") as file:
        file.write('{"step": 10, "verd')  # the kill cut a line
    resumed = Monitor(model(), log=log, every=every, seed=7)
    if not inside:
        resumed.load_state_dict(state)
    with resumed:
        if inside:
            resumed.load_state_dict(state)
        train(resumed, keep + 1, 12)
    assert totals(resumed) == totals(whole)
    assert lines(log) == lines(tmp_path / "whole")
    superseded = (tmp_path / "log.superseded").read_text().splitlines()
    assert superseded[-1] == '{"step": 10, "verd'
    assert set(beyond) <= set(superseded)


def test_a_job_killed_again_and_again(tmp_path: Path) -> None:
    with Monitor(model(), log=tmp_path / "whole", every=2) as whole:
        train(whole, 1, 12)
    log = tmp_path / "log"
    state = killed(log, 2, 5, every=2)
    for keep in (4, 4, 7, 11):
        monitor = Monitor(model(), log=log, every=2)
        monitor.load_state_dict(state)
        monitor.__enter__()
        train(monitor, monitor.report().steps + 1, keep)
        state = json.loads(json.dumps(monitor.state_dict()))
        train(monitor, keep + 1, keep + 2)
        monitor.flush()
    with Monitor(model(), log=log, every=2) as monitor:
        monitor.load_state_dict(state)
        train(monitor, 12, 12)
    assert totals(monitor) == totals(whole)
    assert lines(log) == lines(tmp_path / "whole")


def test_a_log_with_earlier_lines_of_another_job(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Monitor(model(), log=log) as earlier:
        train(earlier, 1, 2)
    before = log.read_text()
    state = killed(log, 1, 3)
    with Monitor(model(), log=log) as resumed:
        resumed.load_state_dict(state)
        train(resumed, 2, 2)
    assert log.read_text().startswith(before)
    assert [line.get("step") for line in lines(log)] == [1, 2, None, 1, 2, None]


def test_a_job_that_ended_goes_on(tmp_path: Path) -> None:
    """The state was taken before the end: the report of that end moves out of the way."""
    log = tmp_path / "log"
    with Monitor(model(), log=log) as monitor:
        train(monitor, 1, 2)
        state = monitor.state_dict()
    with Monitor(model(), log=log) as resumed:
        resumed.load_state_dict(state)
        train(resumed, 3, 3)
    assert [line.get("step") for line in lines(log)] == [1, 2, 3, None]
    ended = monitor.state_dict()  # taken after it: that report stays
    assert ended["log"]["stop"] > state["log"]["stop"]


def test_a_log_that_begins_at_the_resumption_says_what_was_before(tmp_path: Path) -> None:
    monitor = Monitor(model())
    train(monitor, 1, 4)
    state = monitor.state_dict()
    assert state["log"] is None
    with Monitor(model(), log=tmp_path / "log") as resumed:
        resumed.load_state_dict(state)
        train(resumed, 5, 5)
    first, second, last = lines(tmp_path / "log")
    assert (first["resumed"]["steps"], first["resumed"]["undecided"], second["step"]) == (4, 1, 5)
    assert last["report"]["steps"] == 5


def test_a_line_after_a_cut_one_stands_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"step": 1}\n{"st')
    with Monitor(model(), log=log) as monitor:
        train(monitor, 1, 1)
    assert log.read_text().splitlines()[:2] == ['{"step": 1}', '{"st']
    assert [json.loads(line).get("step") for line in log.read_text().splitlines()[2:]] == [1, None]


def test_the_state_waits_for_verdicts_and_not_for_a_running_step() -> None:
    monitor = Monitor(model())
    train(monitor, 1, 8)
    counts = monitor.state_dict()["totals"]["counts"]
    assert counts["certified"] + counts["undecided"] == 8
    with monitor.step(), pytest.raises(adcert.AdcertError, match="between two steps"):
        monitor.state_dict()
    with pytest.raises(ZeroDivisionError), monitor.step():
        1 / 0  # noqa: B018
    assert monitor.state_dict()["totals"]["aborted"] == 1


def change(path: tuple[str, ...], value: Any) -> Callable[[dict[str, Any]], Any]:
    def edit(state: dict[str, Any]) -> Any:
        place = state
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        return state

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: {}, "not the state of a monitor"),
        (lambda state: torch.zeros(3), "not the state of a monitor"),
        (lambda state: model().state_dict(), "not the state of a monitor"),
        (change(("version",), 2), "version 2"),
        (change(("every",), 3), "saved with every=3, this monitor has every=2"),
        (change(("seed",), 1), "saved with seed=1"),
        (change(("strict",), True), "saved with strict=True"),
        (change(("strict",), 0), "saved with strict=0"),
        (change(("more",), 0), "damaged: the state should have"),
        (change(("totals",), None), "damaged: totals should have"),
        (change(("totals", "steps"), -1), "damaged: steps should be a number"),
        (change(("totals", "steps"), 1.0), "damaged: steps should be a number"),
        (change(("totals", "steps"), 99), "not what every=2 draws"),
        (change(("totals", "sampled"), 3), "damaged"),
        (change(("totals", "counts", "ties"), 5), "the ties of the layers do not add up"),
        (change(("totals", "counts", "rows"), True), "damaged"),
        (change(("totals", "counts", "certified"), 3), "damaged"),
        (change(("totals", "layers", "1"), {"ties": 0}), "damaged: layer '1' should have"),
        (change(("totals", "layers"), [1]), "damaged: layers"),
        (change(("totals", "theorems"), {"Theorem 4": 9}), "more theorems"),
        (change(("totals", "reasons"), {1: 2}), "damaged: reasons"),
        (change(("totals", "seconds", "analysis"), float("nan")), "damaged: seconds"),
        (change(("rooms",), {"1": "many"}), "damaged: rooms"),
        (change(("log", "stop"), 0), "damaged: the log ends"),
        (change(("log", "crc32"), None), "damaged: the log's crc32"),
        (change(("log", "crc32"), 1), "not the one of the resumed job"),
        (change(("log", "stop"), 10**9), "ends after"),
    ],
)
def test_a_state_that_is_damaged_or_of_something_else(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    log = tmp_path / "log"
    log.write_text("an earlier line\n")
    state = killed(log, 4, 6, every=2)
    monitor = Monitor(model(), log=log, every=2)
    before = log.read_bytes()
    with pytest.raises(adcert.AdcertError, match=message):
        monitor.load_state_dict(edit(copy.deepcopy(state)))
    assert log.read_bytes() == before  # nothing has changed
    assert not (tmp_path / "log.superseded").exists()
    assert monitor.report() == Monitor(model(), every=2).report()
    monitor.load_state_dict(state)
    assert monitor.report().steps == 4


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ('{"step": 1, "verdict": "certified"}\n', "of another job"),
        ('{"step": 6}\n{"step": 6}\n', "after step 6 with a line of another job"),
        ("not JSON\n", "of another job"),
        ('{"report": {}}\n{"step": 5}\n', "of another job"),
    ],
)
def test_lines_of_another_job_are_not_thrown_away(tmp_path: Path, tail: str, message: str) -> None:
    log = tmp_path / "log"
    state = killed(log, 4, 4)
    with log.open("a") as file:
        file.write(tail)
    before = log.read_bytes()
    with pytest.raises(adcert.AdcertError, match=message):
        Monitor(model(), log=log).load_state_dict(state)
    assert log.read_bytes() == before


def test_a_log_that_is_gone(tmp_path: Path) -> None:
    state = killed(tmp_path / "log", 4, 4)
    (tmp_path / "log").unlink()
    with pytest.raises(adcert.AdcertError, match=r'No such file.*state\["log"\] = None'):
        Monitor(model(), log=tmp_path / "log").load_state_dict(state)
    state["log"] = None
    with Monitor(model(), log=tmp_path / "log") as monitor:
        monitor.load_state_dict(state)
    assert lines(tmp_path / "log")[0]["resumed"]["steps"] == 4


def test_a_resumption_that_fails_may_be_tried_again(tmp_path: Path) -> None:
    """A refused state inside the block leaves the log as the killed job left it, with its cut line."""
    log = tmp_path / "log"
    state = killed(log, 2, 3)
    with log.open("a") as file:
        file.write('{"step": 4')
    before = log.read_bytes()
    with pytest.raises(adcert.AdcertError, match="every=2"), Monitor(model(), log=log, every=2) as wrong:
        wrong.load_state_dict(state)
    assert log.read_bytes() == before
    with Monitor(model(), log=log) as right:
        right.load_state_dict(state)
        train(right, 3, 3)
    assert [line.get("step") for line in lines(log)] == [1, 2, 3, None]


def test_a_monitor_that_has_seen_steps() -> None:
    monitor = Monitor(model())
    train(monitor, 1, 1)
    with pytest.raises(adcert.AdcertError, match="seen steps already"):
        monitor.load_state_dict(monitor.state_dict())


def test_a_log_that_is_no_file() -> None:
    with Monitor(model(), log="/dev/null") as monitor:
        train(monitor, 1, 1)
        assert monitor.state_dict()["log"] is None
