"""The run on a GPU, tried on the CPU: every part works, what fails costs its own figures only, nothing is lost."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import markdown_tables
import pytest
import render
import torch
from gpu import capture, check, external, kernels, machine, paths, plugin, prepare, run, steps, timing
from gpu import render as gpu_render
from gpu.session import Part, PoisonedError, Results
from gpu.timing import Device
from places import opened
from training import Case

from adcert import ops

ROOT = Path(__file__).resolve().parent.parent
LATER = 1e12  # a time of day that never comes


def results(folder: Path) -> Results:
    about = machine.describe(dry=True)
    return Results(folder / "gpu-dry.json", {"datetime": "2026-01-02T03:04:05", "machine": about, "parts": {}})


def saved(kept: Results) -> dict[str, Any]:
    return dict(json.loads(kept.path.read_text()))


# what a part may rely on


def test_every_figure_is_saved_before_the_next_is_measured(tmp_path: Path) -> None:
    kept = results(tmp_path)
    part = Part(kept, "one", 60)

    def second() -> dict[str, Any]:
        assert saved(kept)["parts"]["one"]["figures"] == [{"case": "a", "value": 1}]
        return {"value": 2}

    part.each("figures", {"a": lambda: {"value": 1}, "b": second})
    assert saved(kept)["parts"]["one"]["figures"][1] == {"case": "b", "value": 2}
    assert not list(tmp_path.glob("*.part"))


def test_a_case_fails_alone(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("no /home/somebody/file.py today")

    part = Part(results(tmp_path), "one", 60)
    part.each("figures", {"a": broken, "b": lambda: {"value": 2}})
    assert part.data["figures"] == [{"case": "b", "value": 2}]
    (error,) = part.data["errors"]
    assert error["case"] == "a"
    assert error["message"] == "no file.py today"
    assert error["where"][-1].startswith("test_gpu_benchmarks.py:")


def test_no_case_is_begun_without_time(tmp_path: Path) -> None:
    part = Part(results(tmp_path), "one", 0.3)
    part.each("figures", {"a": lambda: time.sleep(0.2), "b": lambda: {}, "c": lambda: {}}, least=0.2)
    assert "figures" not in part.data
    assert part.data["notes"] == ["figures: out of time before 2 of 3 cases: b, ..."]


def test_a_lost_gpu_ends_the_process_but_not_the_part(tmp_path: Path) -> None:
    kept = results(tmp_path)
    spec = run.Spec("one", "", 60, 1)
    begun: list[str] = []

    def case(name: str) -> dict[str, Any]:
        begun.append(name)
        if name == "b":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {}

    def body(part: Part) -> None:
        part.each("figures", {name: lambda name=name: case(name) for name in "abc"})

    with pytest.raises(PoisonedError, match="figures: b"):
        run.run_part(spec, kept, LATER, body, lambda: True)
    assert saved(kept)["parts"]["one"]["status"] == "again"
    kept = Results(kept.path)  # another process
    run.run_part(spec, kept, LATER, body, lambda: True)
    assert begun == ["a", "b", "c"]
    assert saved(kept)["parts"]["one"]["status"] == "done"


def test_parts_that_do_not_fit_into_the_time_are_skipped(tmp_path: Path) -> None:
    kept = results(tmp_path)
    run.run_part(run.Spec("one", "", 60, 20), kept, time.time() + 10, lambda part: 1 / 0)
    assert saved(kept)["parts"]["one"] == {"status": "skipped", "why": "10 s were left, it needs 20 s"}


# the run


PARTS = (
    run.Spec("fails", "test_gpu_benchmarks:fails", 60, 1),
    run.Spec("alone", "test_gpu_benchmarks:alone", 60, 1, external=True),
    run.Spec("dies", "test_gpu_benchmarks:dies", 60, 1),
    run.Spec("hangs", "test_gpu_benchmarks:hangs", 0.5, 0.1, grace=0.5),
    run.Spec("late", "test_gpu_benchmarks:fails", 60, 1e6),
)


def fails(device: Device, part: Part) -> None:
    part.row("figures", {"value": 1})
    raise ValueError("not a number")


def alone(part: Part, dry: bool) -> None:
    part.set(value=dry)


def dies(device: Device, part: Part) -> None:
    part.each("figures", {"a": lambda: {}, "b": lambda: os._exit(9), "c": lambda: {}})


def hangs(device: Device, part: Part) -> None:
    part.each("figures", {"a": lambda: {}, "b": lambda: time.sleep(600)}, least=0.0)


def test_whatever_happens_to_a_part_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")]))
    status = run.main(["--dry", "--parts", "test_gpu_benchmarks:PARTS", "--results", str(tmp_path)])
    parts = json.loads((tmp_path / "gpu-dry.json").read_text())["parts"]
    assert status == 1
    assert {name: part["status"] for name, part in parts.items()} == {
        "fails": "failed", "alone": "done", "dies": "done", "hangs": "done", "late": "skipped",
    }  # fmt: skip
    assert parts["fails"]["figures"] == [{"value": 1}]
    assert parts["fails"]["failure"]["message"] == "not a number"
    assert parts["alone"]["value"] is True
    assert [row["case"] for row in parts["dies"]["figures"]] == ["a", "c"]
    assert [(crash["exit_status"], crash["at"]) for crash in parts["dies"]["crashes"]] == [(9, "figures: b")]
    assert [row["case"] for row in parts["hangs"]["figures"]] == ["a"]
    assert "Timeout" in parts["hangs"]["crashes"][0]["output"]
    printed = capsys.readouterr().out
    assert "| late | skipped | 0 s |" in printed
    assert "a process ended (9) at figures: b" in printed


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--only", "tests,teh"])
    assert "unknown parts: teh" in capsys.readouterr().err


# each part, on the CPU


HERE = [(spec, place) for spec in run.PARTS if not spec.external for place in ("cpu", "kernels")]
UNLIKE = ("compile", "resnet50")  # not on the emulated device, which torch.compile does not know


@pytest.mark.parametrize(
    ("spec", "place"),
    [
        pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}")
        for pair in HERE
        if pair[0].name not in UNLIKE or pair[1] == "cpu"
    ],
)
def test_part(spec: run.Spec, place: str, tmp_path: Path) -> None:
    """On the emulated device too, which is strict about what lies where, with the CUDA sources compiled for the CPU."""
    kept = results(tmp_path)
    with opened(place) as opening:
        device = Device(dry=True, name=opening.device)
        run.run_part(spec, kept, LATER, lambda part: run.found(spec.function)(device, part), device.poisoned)
    part = saved(kept)["parts"][spec.name]
    assert part["status"] == "done"
    assert "errors" not in part
    assert "notes" not in part
    tables = [rows for name, rows in part.items() if isinstance(rows, list)]
    assert all(row.get("same", True) for rows in tables for row in rows)
    assert tables or part["passed"] > 20
    assert "cannot be shown" not in gpu_render.render(saved(kept))


def test_the_script(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    command = [str(script), "--dry", "--only", "bandwidth", "--results", str(tmp_path)]
    environ = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert "nvcc: " in done.stderr
    assert "saved: gpu-dry.json" in done.stdout
    found = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert found["libraries"].startswith("found")
    assert found["parts"]["bandwidth"]["gb_s"] > 0
    assert str(ROOT) not in (tmp_path / "gpu-dry.json").read_text()


def test_make_bench_leaves_the_gpu_alone() -> None:
    assert not [path for path in (ROOT / "benchmarks" / "gpu").iterdir() if path.name.startswith(("bench_", "test_"))]


# what must be there first


def test_missing_packages_are_named_with_the_command_that_fetches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "missing", lambda: ["highspy", "flint"])
    with pytest.raises(SystemExit) as stop:
        prepare.packages(tmp_path / "site", tmp_path / "wheels")
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    said = str(stop.value)
    assert f"python3 -m pip download --no-deps --only-binary=:all: --python-version {python} " in said
    assert "--platform manylinux_2_28_" in said
    pins = (ROOT / "requirements" / "run.txt").read_text()
    assert said.split("benchmarks/wheels ")[1].split("\n")[0].split() == [
        line for line in pins.splitlines() if line.startswith(("highspy==", "python-flint=="))
    ]


@pytest.mark.parametrize("pip", [True, False])
def test_wheels_are_put_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: bool) -> None:
    wheel = tmp_path / "tiny_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny_thing.py", "value = 1\n")
        file.writestr("tiny_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        file.writestr("tiny_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        file.writestr("tiny_thing-1.0.dist-info/RECORD", "")
    if not pip:
        monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    prepare.install(tmp_path / "site", [wheel])
    assert (tmp_path / "site" / "tiny_thing.py").read_text() == "value = 1\n"


def test_libraries_of_another_version_are_noticed() -> None:
    text = (ROOT / "csrc" / "library.cpp").read_text()
    assert prepare.other_schemas(text) == ""
    assert "the sources have" in prepare.other_schemas(text.replace("Tensor x, int capacity=-1", "Tensor x"))
    assert prepare.other_schemas(text.replace('"relu(', '"relu_of_old(')) == "adcert::relu_of_old is not registered"


# the tests and the sanitizer


def test_only_tests_that_need_a_gpu_run_and_their_outcomes_are_kept(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('device', ['cpu', 'cuda'])\n"
        "@pytest.mark.parametrize('value', [1, 2])\n"
        "def test_value(device, value): assert value == 1, 'wrong'\n"
        "def test_on_the_cpu(): pass\n"
        "@pytest.mark.skipif(True, reason='needs a GPU')\n"
        "def test_graph(): pass\n"
    )
    path = tmp_path / "outcomes"
    status, output = external.finished(external.pytest(path, [str(tmp_path)], 2), 60)
    assert status == 1, output
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    counted = external.counts(lines)
    assert {key: counted[key] for key in ("passed", "failed", "error", "skipped")} == {
        "passed": 1, "failed": 1, "error": 0, "skipped": 1,
    }  # fmt: skip
    (failure,) = counted["failures"]
    assert failure["test"].endswith("test_value[2-cuda]")
    assert "wrong" in failure["message"]
    assert external.culprits(lines) == [failure["test"]]
    assert lines[0].get("worker", "gw0").startswith("gw")


def test_the_first_failure_of_each_process_is_the_suspect() -> None:
    lines = [
        {"test": test, "outcome": outcome, "worker": worker, "message": ""}
        for test, outcome, worker in (
            ("a", "passed", "gw0"), ("b", "failed", "gw0"), ("c", "error", "gw1"), ("d", "failed", "gw0"),
        )
    ]  # fmt: skip
    assert external.culprits(lines) == ["b", "c"]


def test_a_command_that_takes_too_long_is_ended_with_its_children() -> None:
    status, output = external.finished(["bash", "-c", "echo begun; sleep 300 & sleep 300"], 1.0)
    assert (status, output) == (None, "begun\n")


SANITIZER = """#!/usr/bin/env bash
case "$*" in
*"--tool memcheck"*) shift 6; "$@" && echo "========= ERROR SUMMARY: 0 errors" ;;
*"--tool racecheck"*) echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"; exit 86 ;;
*) echo "========= Error: Device not supported"; exit 1 ;;
esac
"""


def test_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    part = Part(results(tmp_path), "sanitizer", 100)
    external.sanitizer(part, dry=True)
    first, second, third = part.data["tools"]
    assert first["clean"]
    assert first["summary"] == "ERROR SUMMARY: 0 errors"
    assert first["checks"].endswith("checks passed on cpu")
    assert not second["clean"]
    assert "2 hazards" in second["output"]
    assert third["refused"]
    assert part.data["notes"] == ["compute-sanitizer refused the device or its arguments"]
    assert "2 hazards" in gpu_render.sanitizers(part.results.data)


# what is measured


@pytest.mark.parametrize("geometry", kernels.GEOMETRIES)
@pytest.mark.parametrize("layout", kernels.LAYOUTS)
@pytest.mark.parametrize("dtype", [*kernels.DTYPES, torch.float64])
def test_images_have_the_ties_they_should(dtype: torch.dtype, layout: str, geometry: str) -> None:
    device = Device(dry=True)
    for rate in (0.0, 0.5, 1.0):
        case = kernels.Case("vgg11", dtype, layout, geometry, rate)
        x = kernels.image(case, device)
        assert x.is_contiguous(memory_format=kernels.LAYOUTS[layout])
        found = ops.max_pool2d(x, *case.window, relu=True)
        share = len(found.windows) / found.output.numel()
        assert share == rate if rate in (0.0, 1.0) else 0.3 < share < 0.7
        assert len(found.touches) == 0
        assert ((x > 0).float().mean() - 0.5).abs() < 0.5


def test_checks_notice_a_wrong_answer() -> None:
    x = torch.tensor([1.0, float("nan"), 0.0])
    check.same(x, x.clone(), "values")
    with pytest.raises(AssertionError, match=r"values: 1 of 3 entries differ, first at \[2\]"):
        check.same(x, torch.tensor([1.0, float("nan"), -0.0]), "values")
    with pytest.raises(AssertionError, match="values"):
        check.same(x, x.half(), "values")
    theirs = ops.relu(torch.zeros(5))
    check.same_record(ops.relu(torch.zeros(5), capacity=2), theirs, 2)
    with pytest.raises(AssertionError, match="counts"):
        check.same_record(ops.relu(torch.zeros(4), capacity=9)._replace(output=theirs.output), theirs, 9)


def test_the_arguments_of_a_real_step_are_captured() -> None:
    calls = check.network(norm=False)
    assert {"resolve_ties", "conv_patches", "distinct_rows"} <= calls.keys()
    for name, arguments in calls.items():
        check.resolved(name, capture.largest(arguments), torch.device("cpu"))


def test_host_waits_are_told_apart() -> None:
    with steps.counted(Device(dry=True)) as seen:
        for phase, text in (("forward", "called a synchronizing CUDA operation"), ("backward", "something else")):
            seen.enter(phase)
            warnings.warn(text, stacklevel=1)
    assert {phase: sum(places.values()) for phase, places in seen.places.items()} == {
        "forward": 1, "backward": 0, "end of the block": 0, "optimizer": 0, "worker": 0,
    }  # fmt: skip
    (place,) = seen.places["forward"]
    assert place.startswith("test_gpu_benchmarks.py:")


def test_a_batch_that_does_not_fit_is_made_smaller() -> None:
    def measure(case: Case, device: Device, size: int) -> dict[str, Any]:
        if size > 64:
            raise torch.cuda.OutOfMemoryError("no room")
        return {"seen": size}

    row = steps.fitting(measure, Case("vgg11"), Device(dry=True), [256, 128, 64, 32])
    assert (row["batch"], row["seen"]) == (64, 64)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        steps.fitting(measure, Case("vgg11"), Device(dry=True), [256, 128])


# how it is shown


def promised(**kinds: Any) -> dict[str, Any]:
    spans = {"ratio_q1": 1.0, "ratio_q3": 1.2}
    names = {"model": "vgg11", "low": False, "certified": 3, "uncertified": 0}
    times = [names | spans | {"ratio": 1.01}, names | spans | {"ratio": 1.6, "low": True}]
    times.append(names | spans | {"ratio": 0.9, "certified": 0})
    forward = {"layout": "channels_last", "dtype": "bfloat16", "shape": [1, 2, 3, 4], "window": "k2"}
    return {
        "parts": {
            "steps": {"times": times, "memory": [names | {"added_percent": 2.4}]},
            "kernels": {"forward": [forward | {"ratio": ratio} for ratio in (0.5, 0.61)]},
        }
    }


def test_what_was_promised_is_judged() -> None:
    assert list(gpu_render.judged(promised())) == [
        ("certified / plain step, vgg11 float32", "1.01 (1.00 to 1.20)", "1.02", True),
        ("certified / plain step, vgg11 bfloat16 autocast", "1.60 (1.00 to 1.20)", "1.5", False),
        ("certified / plain step, vgg11 float32", "nothing decided: 0.90 (1.00 to 1.20)", "1.02", False),
        ("forward / torch, channels_last bfloat16 1x2x3x4 k2, worst of the tie rates", "0.61", "0.60", False),
        ("added peak memory, vgg11 float32", "+2.4 %", "2 %", False),
    ]


def test_a_part_that_was_cut_off_does_not_hide_the_others(tmp_path: Path) -> None:
    kept = results(tmp_path)
    kept.data["parts"] = {"steps": {"status": "running", "times": [{"model": "vgg11"}]}, "tests": {"status": "done"}}
    shown = gpu_render.render(kept.data)
    assert "cannot be shown: KeyError" in shown
    assert "| tests | done |" in shown


def test_the_chief_figures_go_between_their_own_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = results(tmp_path)
    kept.data["parts"] = {"tests": {"status": "done", "passed": 7, "failed": 0, "error": 0, "skipped": 1}}
    kept.save()
    text = tmp_path / "README.md"
    text.write_text((ROOT / "README.md").read_text())
    render.main([str(kept.path), "--write", str(text)])
    assert "| tests | 7 | 0 | 0 | 1 |" in text.read_text()
    begin, end = render.GPU
    assert text.read_text().split(begin)[0] == (ROOT / "README.md").read_text().split(begin)[0]
    assert text.read_text().split(end)[1] == (ROOT / "README.md").read_text().split(end)[1]


def test_examples() -> None:
    for module in (machine, markdown_tables, paths, plugin, gpu_render):
        assert doctest.testmod(module).attempted > 0
        assert doctest.testmod(module).failed == 0


def test_the_dry_device_times_calls() -> None:
    calls: list[str] = []
    row = timing.Device(dry=True).compare(lambda: calls.append("ours"), lambda: calls.append("torch"))
    assert row["pairs"] == 2
    assert calls[-4:] == ["ours", "torch", "torch", "ours"]  # the order alternates
