"""`adcert train --checkpoint`: killed and resumed, weights and totals are those of a run that was not killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World, variables
from torch import nn
from typer.testing import CliRunner, Result

from adcert.cli import _loop, app
from adcert.cli._checkpoint import FREE, _read
from adcert.cli._loop import Job, Outcome, Precision, StepResult
from adcert.cli._ranks import Ranks
from adcert.errors import AdcertError

DIGITS = ("--model", "fnn-relu6", "--data", "digits", "--batch-size", "300", "--epochs", "4", "--seed", "3")
POOLED = ("--model", "vgg11-bn", "--data", "digits", "--size", "32", "--batch-size", "2", "--steps", "10")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments, "--json", "--threads", "1"])


def trained(*arguments: str) -> dict[str, Any]:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def essence(found: dict[str, Any]) -> dict[str, Any]:
    """All that does not depend on the time of day or on where the run was interrupted."""
    kept = {name: found[name] for name in ("steps", "weights_sha256", "report", "layers", "test_accuracy")}
    if kept["report"] is not None:
        kept["report"] = {name: value for name, value in kept["report"].items() if name != "seconds"}
    return kept


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: value for key, value in line.get("report", line).items() if key != "seconds"} for line in found
    ]


def wait_for_lines(log: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_and_resumed(tmp_path: Path) -> None:
    """SIGKILL, wherever it happens to strike after the sixth verdict."""
    whole = trained(*POOLED, "--log", str(tmp_path / "whole"))
    log, checkpoint = tmp_path / "log", tmp_path / "checkpoint"
    options = (*POOLED, "--log", str(log), "--checkpoint", str(checkpoint), "--checkpoint-every", "4", "--resume")
    command = [sys.executable, "-m", "adcert", "train", *options, "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for_lines(log, 6, process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert log.read_bytes().count(b"\n") < 10
    resumed = trained(*options)
    assert 0 < resumed["steps_resumed"] < 10
    assert essence(resumed) == essence(whole)
    assert whole["report"]["ties"] > 0
    assert lines(log) == lines(tmp_path / "whole")


class Crash(Exception):
    pass


@pytest.mark.parametrize(
    ("crash", "every", "precision"),
    [(c, k, "fp32") for c in (1, 5, 7, 13, 16) for k in (1, 3)] + [(7, 1, "bf16"), (7, 1, "fp16")],
)
def test_resumed_in_any_epoch(tmp_path: Path, crash: int, every: int, precision: Precision) -> None:
    """Four steps an epoch, a checkpoint after each third step: begins before, at and after the end of an epoch.

    In fp16 the scale of the gradients belongs to the checkpoint: it falls in the first steps.
    """
    job = Job("fnn-relu6", "digits", 4, None, 300, 3, tmp_path / "whole", every=every, precision=precision)
    whole = _loop.run(job, lambda outcome, result: None)

    def fail(outcome: Outcome, result: StepResult) -> None:
        if result.step == crash:
            raise Crash

    options = {"every": every, "checkpoint": tmp_path / "checkpoint", "checkpoint_every": 3, "resume": True}
    options |= {"precision": precision}
    job = Job("fnn-relu6", "digits", 4, None, 300, 3, tmp_path / "log", **options)
    with pytest.raises(Crash):
        _loop.run(job, fail)
    resumed = _loop.run(job, lambda outcome, result: None)
    assert resumed.resumed == (crash - 1) // 3 * 3
    assert essence(resumed.as_dict()) == essence(whole.as_dict())
    numbers = [line["step"] for line in lines(tmp_path / "log") if "step" in line]
    assert numbers == [line["step"] for line in lines(tmp_path / "whole") if "step" in line]


def test_a_plain_run_too(tmp_path: Path) -> None:
    options = (*DIGITS, "--checkpoint", str(tmp_path / "checkpoint"), "--checkpoint-every", "5", "--plain")
    whole = trained(*options)
    (tmp_path / "checkpoint").unlink()
    assert trained(*options, "--resume")["weights_sha256"] == whole["weights_sha256"]  # nothing there: from the start
    again = trained(*options, "--resume")  # nothing left to train
    assert (again["steps"], again["steps_resumed"], again["weights_sha256"]) == (16, 16, whole["weights_sha256"])


def test_a_run_that_is_done(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = (*DIGITS, "--checkpoint", str(tmp_path / "checkpoint"), "--log", str(log))
    first = trained(*options)
    before = lines(log)
    second = trained(*options, "--resume")
    assert second["report"] == first["report"]
    assert lines(log) == before
    shown = CliRunner().invoke(app, ["train", *options, "--resume"])
    assert shown.exit_code == 0 and "no step was left to train" in shown.stdout


def test_the_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while it is written leaves the old one."""
    checkpoint = tmp_path / "checkpoint"
    options = (*DIGITS, "--checkpoint", str(checkpoint), "--resume")
    whole = trained(*options, "--checkpoint-every", "6")
    checkpoint.unlink()
    save, calls = torch.save, []

    def cut(content: object, file: Any) -> None:
        calls.append(file)
        if len(calls) == 3:
            file.write(b"PK\x03\x04 half of it")
            raise Crash
        save(content, file)

    monkeypatch.setattr(torch, "save", cut)
    assert isinstance(invoke(*options, "--checkpoint-every", "6").exception, Crash)
    monkeypatch.undo()
    resumed = trained(*options, "--checkpoint-every", "6")
    assert resumed["steps_resumed"] == 6
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def refused(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", *arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_usage(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    options = (*DIGITS, "--checkpoint", str(checkpoint))
    assert "--resume needs --checkpoint" in refused(*DIGITS, "--resume")
    assert "does not exist" in refused(*DIGITS, "--checkpoint", str(tmp_path / "no" / "file"))
    trained(*options, "--steps", "2")
    assert "exists: go on from it with --resume" in refused(*options)
    text = refused(*options, "--steps", "3", "--resume", "--strict")
    assert "of another job: steps 2, now 3, strict False, now True" in text
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "cannot read the checkpoint" in refused(*options, "--steps", "2", "--resume")
    torch.save({"format": "of somebody else"}, checkpoint)
    assert "is no checkpoint of adcert train" in refused(*options, "--steps", "2", "--resume")


def test_loading_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "evil",))

    torch.save({"format": "adcert train", "job": Evil()}, tmp_path / "checkpoint")
    job = Job("fnn-relu", "digits", checkpoint=tmp_path / "checkpoint", resume=True)
    with pytest.raises(AdcertError, match="cannot read the checkpoint"):
        _loop.run(job, lambda *_: None)
    assert not (tmp_path / "evil").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Bytes of the pickled part are altered: whatever torch stumbles over, the error names the file."""
    path = tmp_path / "checkpoint"
    torch.save({"format": "adcert train", "model": nn.Linear(3, 2).state_dict(), "step": 3}, path)
    whole = path.read_bytes()
    begin, dice = whole.find(b"data.pkl"), random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[begin + dice.randrange(600)] = dice.randrange(256)
        path.write_bytes(damaged)
        with pytest.raises(AdcertError, match="checkpoint"):
            _read(path)


def test_free_options_are_options() -> None:
    assert set(Job.__dataclass_fields__) > FREE


# Three processes: with two, sums of gradients do not depend on their order.


@pytest.fixture(scope="module")
def three() -> Iterator[World]:
    world = World(3)
    yield world
    world.close()


PARTED = Job("vgg11-bn", "digits", batch_size=6, steps=7, size=32, checkpoint_every=3, resume=True)


def parted(rank: int, job: Job, crash: int = 0, own: str = "") -> Any:
    """The job, up to step ``crash``; with ``own`` the last rank has another checkpoint."""

    def fail(outcome: Outcome, result: StepResult) -> None:
        if result.step == crash:
            raise Crash

    if own and rank == dist.get_world_size() - 1:
        job = replace(job, checkpoint=Path(own))
    try:
        return _loop.run(job, fail, Ranks("cpu", rank, dist.get_world_size())).as_dict()
    except Crash:
        return None
    except AdcertError as error:
        return str(error)


def start(rank: int, size: int, port: int, *options: str) -> subprocess.Popen[bytes]:
    """A process as torchrun starts it; what it says on stderr is shown if the test fails."""
    command = [sys.executable, "-m", "adcert", "train", *options, "--threads", "1"]
    environment = {**os.environ, **variables(rank, size, port)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def test_several_processes_killed_and_resumed(three: World, tmp_path: Path) -> None:
    """SIGKILL hits the first process after the fourth verdict; the others end themselves."""
    log, checkpoint = tmp_path / "log", tmp_path / "checkpoint"
    options = ["--model", "vgg11-bn", "--data", "digits", "--size", "32", "--batch-size", "6", "--steps", "7"]
    options += ["--log", str(log), "--checkpoint", str(checkpoint), "--checkpoint-every", "3", "--resume"]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [start(rank, 3, store.port, *options) for rank in range(3)]
    try:
        wait_for_lines(log, 4, processes[0])
        processes[0].send_signal(signal.SIGKILL)
        assert all(process.wait(60) for process in processes[1:])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert log.read_bytes().count(b"\n") < 7
    whole = three.run(parted, replace(PARTED, log=tmp_path / "whole", resume=False))
    resumed = three.run(parted, replace(PARTED, log=log, checkpoint=checkpoint))
    assert [found["steps_resumed"] for found in resumed] in ([3] * 3, [6] * 3)
    assert [essence(found) for found in resumed] == [essence(found) for found in whole]
    assert whole[0]["report"]["ties"] > 0 and whole[1]["report"]["certified"] == whole[0]["report"]["certified"]
    assert lines(log) == lines(tmp_path / "whole")


def test_several_processes_resume_together_or_not_at_all(three: World, tmp_path: Path) -> None:
    job = Job("fnn-relu6", "digits", batch_size=300, steps=5, checkpoint=tmp_path / "checkpoint", checkpoint_every=2)
    whole = three.run(parted, job)
    job = replace(job, checkpoint=tmp_path / "early")
    assert three.run(parted, job, 4) == [None] * 3  # at step 2
    job = replace(job, resume=True)
    (tmp_path / "broken").write_bytes(b"PK")
    reasons = three.run(parted, job, 0, str(tmp_path / "broken"))
    assert reasons[2].startswith(f"cannot read the checkpoint {tmp_path / 'broken'}")
    assert reasons[:2] == [f"rank 2: {reasons[2]}"] * 2
    reasons = three.run(parted, job, 0, str(tmp_path / "checkpoint"))
    assert all("that differ, of steps [2, 2, 5]: it has to be on a disk" in reason for reason in reasons)
    found = torch.load(tmp_path / "early", weights_only=True)
    next(iter(found["model"].values())).neg_()
    torch.save(found, tmp_path / "other")
    reasons = three.run(parted, job, 0, str(tmp_path / "other"))
    assert all("that differ, of steps [2, 2, 2]" in reason for reason in reasons)
    with pytest.raises(AdcertError, match="of another job: ranks 3, now 1; resume with the options it began with"):
        _loop.run(job, lambda *_: None)
    resumed = three.run(parted, job)
    assert [essence(found) for found in resumed] == [essence(found) for found in whole]
