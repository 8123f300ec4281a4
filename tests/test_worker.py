"""The worker: order, bounds, no lost verdict whatever happens on either thread."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import adcert
from adcert import monitor as driver
from adcert.assembly import Share
from adcert.certificate import Certificate, Verdict
from adcert.conclusion import Observed
from adcert.worker import Bounds, Desk


def feed(one: Desk, jobs: int) -> None:
    for job in range(jobs):
        one.submit(job)
    one.flush()


# ---- the desk alone ------------------------------------------------------------------------------


def desk(do, fail=None, jobs: int = 2, nbytes: int = 100) -> Desk:
    return Desk(do, fail or (lambda job, reason: None), Bounds(jobs, nbytes))


def test_jobs_are_done_in_order_on_one_other_thread():
    done: list[tuple[int, str]] = []
    one = desk(lambda job: done.append((job, threading.current_thread().name)))
    for job in range(20):
        one.submit(job)
    one.flush()
    assert done == [(job, "adcert") for job in range(20)]


def test_no_thread_without_a_queue():
    names: list[str] = []
    desk(lambda job: names.append(threading.current_thread().name), jobs=0).submit(1)
    assert names == [threading.current_thread().name]


@pytest.mark.parametrize(("jobs", "nbytes", "size", "most"), [(2, 10**9, 1, 3), (50, 100, 40, 3), (50, 10, 1000, 1)])
def test_the_queue_is_bounded(jobs: int, nbytes: int, size: int, most: int):
    """``most`` jobs at a time, with the one in work; a single job of any size is taken."""
    go = threading.Event()
    one = desk(lambda job: go.wait(10), jobs=jobs, nbytes=nbytes)
    taken = 0

    def hand_in() -> None:
        nonlocal taken
        for job in range(8):
            one.submit(job, size)
            taken += 1

    feeder = threading.Thread(target=hand_in)
    feeder.start()
    deadline = time.monotonic() + 5
    while taken < most - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert most - 1 <= taken <= most
    go.set()
    feeder.join()
    one.flush()
    assert taken == 8


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_a_job_that_fails_is_reported_and_the_next_one_is_done(error: BaseException):
    done, failed = [], []

    def do(job: int) -> None:
        if job == 1:
            raise error
        done.append(job)

    one = desk(do, lambda job, reason: failed.append((job, type(error).__name__ in reason)), jobs=9)
    with pytest.warns(RuntimeWarning, match=type(error).__name__):
        feed(one, 3)
    assert done == [0, 2]
    assert failed == [(1, True)]


def test_warnings_as_errors_do_not_kill_the_worker():
    import warnings

    failed = []

    def do(job: int) -> None:
        raise ValueError

    one = desk(do, lambda job, reason: failed.append(job))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.submit(1)
        one.submit(2)
        one.flush()
    assert failed == [1, 2]


def test_a_thread_that_dies_over_a_job_fails_that_job_only(monkeypatch: pytest.MonkeyPatch):
    """As if the interpreter had killed the thread: it is gone, and the job it had taken is neither done nor failed."""
    done, failed = [], []
    one = desk(done.append, lambda job, reason: failed.append((job, reason)), jobs=9)
    run, threads = one._run, []

    def die_first() -> None:
        threads.append(threading.current_thread())
        if len(threads) == 1:
            one._working = True
        else:
            run()

    monkeypatch.setattr(one, "_run", die_first)
    with pytest.warns(RuntimeWarning, match="died"):
        feed(one, 4)
    assert done == [1, 2, 3]
    assert [job for job, _ in failed] == [0]
    assert len(threads) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_fail_does_not_stop_the_other_jobs():
    done: list[int] = []

    def do(job: int) -> None:
        if job == 0:
            raise ValueError
        done.append(job)

    def fail(job: int, reason: str) -> None:
        raise RuntimeError("must not")

    feed(desk(do, fail, jobs=9), 3)
    assert done == [1, 2]


def test_an_interrupt_while_waiting_for_room_loses_nothing(monkeypatch: pytest.MonkeyPatch):
    done: list[int] = []
    go = threading.Event()

    def do(job: int) -> None:
        go.wait(10)
        done.append(job)

    one = desk(do, jobs=1)
    one.submit(0)
    wait = one._changed.wait

    def interrupt(seconds: float) -> bool:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return wait(seconds)

    monkeypatch.setattr(one._changed, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        one.submit(1)
    monkeypatch.setattr(one._changed, "wait", wait)
    go.set()
    one.flush()
    assert done == [0, 1]


def test_idle_threads_end_and_come_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("adcert.worker._IDLE", 0.05)
    done: list[int] = []
    one = desk(done.append)
    for job in range(3):
        one.submit(job)
        one.flush()
        deadline = time.monotonic() + 5
        while one._thread is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert one._thread is None
    assert done == [0, 1, 2]


# ---- the monitor ---------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return adcert.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 1)))


def steps(monitor: adcert.Monitor, model: nn.Module, count: int) -> list[driver.Step]:
    result = []
    for _ in range(count):
        with monitor.step() as step:
            model(torch.randint(0, 2, (2, 1, 8, 8)).float()).sum().backward()
        result.append(step)
    return result


def slow(seconds: float):
    conclude = driver.conclude

    def run(observed: Observed, memory: object) -> Certificate:
        time.sleep(seconds)
        return conclude(observed)

    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_training_thread_does_not_wait_for_verdicts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    conclude, go = driver.conclude, threading.Event()

    def held(observed: Observed, memory: object) -> Certificate:
        go.wait(60)
        return conclude(observed)

    monkeypatch.setattr(driver, "conclude", held)
    with adcert.Monitor(network(), log=tmp_path / "log") as monitor:
        several = steps(monitor, monitor.model, 4)
        assert several[0]._certificate is None  # nobody waited
        go.set()
        assert several[-1].certificate().verdict is Verdict.CERTIFIED
        assert several[0].summary["step"] == 1
    assert [line.get("step") for line in lines(tmp_path / "log")] == [1, 2, 3, 4, None]
    assert monitor.report().certified == 4


def test_same_verdicts_with_and_without_a_queue():
    def summaries(queue: int) -> list[dict]:
        torch.manual_seed(1)
        with adcert.Monitor(network(), queue=queue) as monitor:
            found = [step.summary for step in steps(monitor, monitor.model, 3)]
        return [{key: value for key, value in summary.items() if key != "seconds"} for summary in found]

    assert summaries(0) == summaries(8)


def test_raise_waits_for_the_verdict(monkeypatch: pytest.MonkeyPatch):
    w = nn.Parameter(torch.zeros(1))
    monitor = adcert.Monitor(nn.ParameterList([w]), on_fail="raise")
    with pytest.raises(adcert.UncertifiedError), monitor.step():
        (torch.relu(w) - torch.relu(-w)).sum().backward()


def test_a_worker_that_fails_makes_the_step_undecided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    conclude, calls = driver.conclude, []

    def second_fails(observed: Observed, memory: object) -> Certificate:
        calls.append(observed)
        if len(calls) == 2:
            raise MemoryError("no room")
        return conclude(observed)

    monkeypatch.setattr(driver, "conclude", second_fails)
    with pytest.warns(RuntimeWarning, match="no room"), adcert.Monitor(network(), log=tmp_path / "log") as monitor:
        several = steps(monitor, monitor.model, 3)
    assert [step.certificate().verdict.value for step in several] == ["certified", "undecided", "certified"]
    assert "no room" in several[1].certificate().reasons[0]
    several[1].certificate().verify()
    assert [line.get("verdict") for line in lines(tmp_path / "log")][:3] == ["certified", "undecided", "certified"]
    assert (monitor.report().undecided, monitor.report().steps) == (1, 3)


def test_an_exception_in_the_training_loop_keeps_the_verdicts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(driver, "conclude", slow(0.05))
    for error in (KeyboardInterrupt, RuntimeError):
        path = tmp_path / error.__name__
        with pytest.raises(error), adcert.Monitor(network(), log=path) as monitor:
            steps(monitor, monitor.model, 3)
            with monitor.step():
                raise error
        assert [line.get("verdict") for line in lines(path)][:3] == ["certified"] * 3
        assert lines(path)[-1]["report"]["aborted"] == 1


def test_the_log_is_complete_when_the_program_ends_without_close(tmp_path: Path):
    program = f"""
import sys, time, torch, adcert
from adcert import monitor
conclude = monitor.conclude
monitor.conclude = lambda observed, memory: (time.sleep(0.2), conclude(observed))[1]
w = torch.nn.Parameter(torch.ones(1))
m = adcert.Monitor(torch.nn.ParameterList([w]), log={str(tmp_path / "log")!r}).__enter__()
for _ in range(3):
    with m.step():
        torch.relu(w).sum().backward()
sys.exit(4)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 4
    assert [line["step"] for line in lines(tmp_path / "log")] == [1, 2, 3]


def test_a_log_that_cannot_be_written_is_told_and_costs_no_verdict(tmp_path: Path):
    class Full(io.FileIO):
        def write(self, data: bytes) -> int:
            raise OSError("no space left")

    model = network()
    monitor = adcert.Monitor(model, log=tmp_path / "log").__enter__()
    assert monitor._log is not None
    monitor._log.close()
    monitor._log._file = Full(tmp_path / "log", "ab")
    (step,) = steps(monitor, model, 1)
    assert step.certificate().verdict is Verdict.CERTIFIED
    with pytest.raises(adcert.AdcertError, match="no space left"):
        monitor.flush()
    assert monitor.report().certified == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_is_told_to_make_its_own_monitor(tmp_path: Path):
    log = tmp_path / "log"
    with adcert.Monitor(network(), log=log) as monitor:
        steps(monitor, monitor.model, 1)
        monitor.flush()
        monitor._desk._process = -1  # as the child would find it
        with pytest.raises(adcert.AdcertError, match="forked"):
            steps(monitor, monitor.model, 1)
        monitor.close()
        assert not log.read_text().count("report")  # the log is the parent's
        monitor._desk._process = os.getpid()
    assert log.read_text().count("report") == 1


@pytest.mark.parametrize("queue", [-1, 1.5, True, "8"])
def test_bad_queue(queue: object):
    with pytest.raises(adcert.AdcertError, match="queue"):
        adcert.Monitor(network(), queue=queue)  # type: ignore[arg-type]


def test_a_failing_end_of_a_step_leaves_the_training_alone(monkeypatch: pytest.MonkeyPatch):
    def defect(*_: object) -> list[str]:
        raise KeyError("a defect")

    monkeypatch.setattr(driver.Step, "_look", defect)
    monitor = adcert.Monitor(network())
    (step,) = steps(monitor, monitor.model, 1)
    assert step.certificate().verdict is Verdict.UNDECIDED
    assert "KeyError" in step.certificate().reasons[0]
    step.certificate().verify()


def test_a_kept_alias_keeps_no_step_alive():
    """h.detach() that the user keeps holds its own memory, not the graph tensor it came from."""
    import gc
    import weakref

    model, kept, graphs = network(), [], []
    monitor = adcert.Monitor(model)
    gc.disable()
    try:
        for _ in range(3):
            with monitor.step():
                y = model[0](torch.ones(2, 1, 8, 8))
                kept.append(y.detach())
                graphs.append(weakref.ref(y))
                model[1:](y).sum().backward()
            del y
        assert [ref() for ref in graphs] == [None] * 3
    finally:
        gc.enable()


def test_what_waits_holds_no_graph(monkeypatch: pytest.MonkeyPatch):
    """A step in the queue keeps its rows and lists only: no activation, no autograd node."""
    import gc
    import weakref

    kept: list[Share] = []
    monkeypatch.setattr(driver.Monitor, "_conclude", lambda self, job: kept.append(job[1]))
    model = network()
    nn.init.ones_(model[0].weight)
    monitor = adcert.Monitor(model, queue=0)
    with monitor.step():
        y = model[0](torch.ones(2, 1, 8, 8))
        activation = weakref.ref(y.untyped_storage())
        model[1:](y).sum().backward()
        del y
    gc.collect()
    assert activation() is None
    assert 0 < kept[0].nbytes < 10_000
