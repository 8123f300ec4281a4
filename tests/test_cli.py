"""The command line, on runs of a few steps: output, files and exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from adcert import Certificate, gallery, models
from adcert.cli import _loop, app
from adcert.cli._console import _plain
from adcert.cli._loop import Job, LayerTotals, StepResult, digest
from adcert.cli._show import Display
from adcert.cli._train import ModelName

TINY = ("train", "--model", "fnn-relu", "--data", "digits", "--batch-size", "8", "--steps", "3")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def trained(*options: str) -> dict[str, Any]:
    result = invoke(*TINY, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_choices_match_the_library() -> None:
    assert set(get_args(ModelName)) == set(models.MODELS)


@pytest.mark.parametrize("command", ["train", "gallery", "verify", "info", "analyze"])
def test_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_no_arguments_is_usage() -> None:
    assert invoke().exit_code == 2


def test_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "adcert", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "gallery" in done.stdout


def test_plain_training_has_no_report() -> None:
    found = trained("--plain")
    assert found["report"] is None
    assert found["layers"] == {}
    assert (found["steps"], found["steps_planned"]) == (3, 3)
    assert 0 <= found["test_accuracy"] <= 1


def test_certified_training_counts_every_step() -> None:
    found = trained()
    report = found["report"]
    assert report["steps"] == report["certified"] + report["uncertified"] + report["undecided"] == 3
    assert report["undecided"] == 0, report["reasons"]
    assert len(found["layers"]) == 2  # two ReLU layers
    assert sum(layer["touches"] for layer in found["layers"].values()) == report["touches"]


def test_weights_are_bitwise_those_of_the_plain_run() -> None:
    assert trained()["weights_sha256"] == trained("--plain")["weights_sha256"]


def test_weights_are_bitwise_those_of_the_plain_run_with_pooling() -> None:
    options = ("train", "--model", "vgg11-bn", "--batch-size", "4", "--steps", "2", "--json")
    one, two = invoke(*options), invoke(*options, "--plain")
    assert json.loads(one.stdout)["weights_sha256"] == json.loads(two.stdout)["weights_sha256"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_are_bitwise_those_of_the_plain_run_under_autocast(precision: str) -> None:
    options = ("train", "--model", "vgg11-bn", "--batch-size", "4", "--steps", "3", "--precision", precision, "--json")
    one, two = (json.loads(invoke(*options, *more).stdout) for more in ((), ("--plain",)))
    assert one["weights_sha256"] == two["weights_sha256"]
    assert one["report"]["steps"] == 3 and one["job"]["precision"] == precision


def test_seed_decides() -> None:
    assert trained("--plain")["weights_sha256"] == trained("--plain")["weights_sha256"]
    assert trained("--plain")["weights_sha256"] != trained("--plain", "--seed", "1")["weights_sha256"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (("--epochs", "2"), 4),
        ((), 2),
        (("--epochs", "1", "--steps", "3"), 2),
        (("--epochs", "2", "--steps", "3"), 3),
    ],
)
def test_epochs_and_steps(options: tuple[str, ...], steps: int) -> None:
    """1438 training digits hold two batches of 700."""
    command = ("train", "--model", "fnn-relu", "--data", "digits", "--batch-size", "700", "--plain", "--json")
    assert json.loads(invoke(*command, *options).stdout)["steps"] == steps


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_same_as_a_loop_written_by_hand(precision: str) -> None:
    """The job against ten lines of stock PyTorch."""
    from adcert.data import Loader, load

    narrow = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    images = load("digits", 8)
    model = models.build("fnn-relu", 10, 1, 8, 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for x, y in Loader(images, 8, seed=0, steps=3):
        optimizer.zero_grad()
        with torch.autocast("cpu", narrow, enabled=narrow is not None):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    assert digest(model) == trained("--precision", precision)["weights_sha256"]


def test_log_has_one_line_a_step_and_a_report(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    found = trained("--log", str(log))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines[:-1]] == [1, 2, 3]
    assert lines[-1]["report"]["steps"] == found["report"]["steps"]


def test_certificates_are_saved_and_verify(tmp_path: Path) -> None:
    folder = tmp_path / "certificates"
    trained("--certificates", str(folder))
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"step-{k:06d}.adcert" for k in (1, 2, 3)]
    result = invoke("verify", "--json", *map(str, files))
    records = json.loads(result.stdout)
    assert all(record["valid"] for record in records)
    certified = [Certificate.load(file).verdict.value == "certified" for file in files]
    assert result.exit_code == (0 if all(certified) else 1)


def test_only_failed_certificates(tmp_path: Path) -> None:
    report = trained("--certificates", str(tmp_path), "--only-failed")["report"]
    assert len(list(tmp_path.iterdir())) == report["steps"] - report["certified"]


def test_check_exits_by_the_verdicts() -> None:
    result = invoke(*TINY, "--check", "--json")
    report = json.loads(result.stdout)["report"]
    assert result.exit_code == (0 if report["certified"] == report["steps"] else 1)


def test_one_step_of_three(tmp_path: Path) -> None:
    log, folder = tmp_path / "run.jsonl", tmp_path / "certificates"
    found = trained("--every", "3", "--log", str(log), "--certificates", str(folder))
    report = found["report"]
    assert (report["steps"], report["sampled"], report["estimates"]["certified"]) == (3, 1, 3 * report["certified"])
    number = json.loads(log.read_text().splitlines()[0])["step"]
    assert [file.name for file in folder.iterdir()] == [f"step-{number:06d}.adcert"]
    assert found["weights_sha256"] == trained("--plain")["weights_sha256"]
    assert "not drawn" in invoke(*TINY, "--every", "3", "--check").stdout
    assert invoke(*TINY, "--every", "1000", "--check").exit_code == 1  # nothing was drawn, nothing is certified


class Same(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.maximum(x, x.clone())


def test_check_fails_on_an_unsupported_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The greater of equals, by torch.maximum: every step undecided. Exit 0, but 1 with --check; the reason shows."""

    def hard(name: str, classes: int, channels: int, size: int, seed: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), Same())

    monkeypatch.setattr(models, "build", hard)
    result = invoke(*TINY, "--check")
    assert result.exit_code == 1
    assert "undecided" in result.output
    assert "maximum" in result.output.lower()
    assert invoke(*TINY).exit_code == 0


def test_tables_without_a_terminal() -> None:
    result = invoke(*TINY)
    assert result.exit_code == 0
    for word in ("certified", "uncertified", "undecided", "test accuracy", "discharged by"):
        assert word in result.stdout
    assert "step 3/3" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plain", "--check"), "--plain does not certify"),
        (("--only-failed",), "needs --certificates"),
        (("--log", "no/such/folder/run.jsonl"), "does not exist"),
        (("--model", "alexnet"), "alexnet"),
        (("--data", "coco"), "unknown data 'coco'; known: photos, digits, cifar10"),
        (("--batch-size", "100000"), "larger than the"),
        (("--steps", "0"), "--steps"),
    ],
)
def test_usage_errors_exit_2(options: tuple[str, ...], message: str) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", "--model", "fnn-relu", *options])
    assert result.exit_code == 2
    assert message in result.output


def test_interrupt_still_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Display, outcome: _loop.Outcome, result: StepResult) -> None:
        if result.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "update", interrupted)
    result = invoke(*TINY, "--json")
    assert result.exit_code == 130
    found = json.loads(result.stdout)
    assert found["interrupted"]
    assert found["steps"] == 3  # the one trained meanwhile is reported as well


def test_verify_rejects_damage(tmp_path: Path) -> None:
    bad = tmp_path / "bad.adcert"
    bad.write_bytes(b"not a certificate")
    result = invoke("verify", "--json", str(bad))
    assert result.exit_code == 1
    (record,) = json.loads(result.stdout)
    assert not record["valid"]
    assert record["error"]
    assert "invalid" in invoke("verify", str(bad)).stdout


def test_verify_missing_file_is_usage(tmp_path: Path) -> None:
    assert invoke("verify", str(tmp_path / "none")).exit_code == 2


def test_gallery_agrees_with_the_theory() -> None:
    result = invoke("gallery", "--json")
    records = json.loads(result.stdout)
    assert result.exit_code == 0, [record for record in records if record["contradiction"]]
    assert [record["row"] for record in records] == [row.number for row in gallery.ROWS]
    assert {record["autodiff"][0] for record in records if record["row"] == "14"} == {"nan"}


def test_gallery_table() -> None:
    result = invoke("gallery")
    assert result.exit_code == 0
    assert "relu(x) - relu(-x)" in result.stdout


def test_gallery_exits_1_on_a_contradiction(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = gallery.Measurement(gallery.ROWS[0], (0.0,), False, "certified", ())
    monkeypatch.setattr("adcert.cli._gallery.measure", lambda row: wrong)
    result = invoke("gallery")
    assert result.exit_code == 1
    assert "certified, but the gradient is not in dC" in result.stderr


def test_info() -> None:
    found = json.loads(invoke("info", "--json").stdout)
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert any("relu" in name for name in found["operators"])
    assert all("CPU" in kernels for kernels in found["operators"].values())
    text = invoke("info").stdout
    assert "library" in text
    assert ("no CUDA kernels: torch" in text) == (torch.version.cuda is None)


def test_json_has_no_nan() -> None:
    assert _plain({"a": [float("nan"), float("inf"), 1.5], 2: (True, None)}) == {
        "a": ["nan", "inf", 1.5],
        "2": [True, None],
    }


def test_layer_totals_by_hand() -> None:
    totals = LayerTotals()
    layer = {"windows": 10, "ties": 3, "touches": 2, "differing": 1, "rows": 4, "blocks": 1}
    totals.add(layer | {"exemptions": {"congruent": 5}})
    totals.add(layer | {"differing": 0, "exemptions": {"congruent": 1, "irrelevant": 2}})
    assert dict(totals.counts) == {
        "windows": 20,
        "ties": 6,
        "touches": 4,
        "differing": 1,
        "rows": 8,
        "blocks": 2,
    }
    assert dict(totals.exemptions) == {"congruent": 6, "irrelevant": 2}
    assert totals.steps_differing == 1


def summary(verdict: str, *reasons: str) -> dict[str, Any]:
    counts = {"windows": 9, "ties": 1234, "touches": 2, "differing": 1, "rows": 4, "blocks": 1}
    return counts | {
        "verdict": verdict,
        "reasons": list(reasons),
        "seconds": {"analysis": 0.25},
        "layers": [],
    }


def test_live_table_on_a_terminal() -> None:
    console = Console(force_terminal=True, width=80, file=sys.stderr, legacy_windows=False)
    with console.capture() as shown, Display(console) as display:
        outcome = _loop.Outcome(Job(), 2, 1)
        display.update(outcome, StepResult(1, 2.0, 0.5, 1.0, summary("certified"), None))
        display.update(outcome, StepResult(2, 1.0, 0.75, 1.0, summary("undecided", "why"), 0.5))
    text = shown.get()
    for word in ("1,234", "25.0%", "1 certified", "1 undecided", "2/2"):
        assert word in text


def test_plain_lines_are_few_and_show_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(Console(stderr=True, width=200))
    outcome = _loop.Outcome(Job(), 200, 1)
    for step in range(1, 201):
        found = summary("undecided", "aten::abs") if step == 137 else summary("certified")
        display.update(outcome, StepResult(step, 1.0, 0.5, 1.0, found, None))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 22
    assert any("step 137/200" in line and "aten::abs" in line for line in lines)


def test_digest_sees_one_bit() -> None:
    model = torch.nn.Linear(2, 1)
    before = digest(model)
    with torch.no_grad():
        model.bias.copy_(torch.nextafter(model.bias, model.bias + 1))
    assert digest(model) != before


def analyzed(*arguments: str) -> dict[str, Any]:
    result = invoke("analyze", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_analyze_names_the_theorem() -> None:
    small = ("--size", "8", "--channels", "1")
    found = analyzed("fnn-relu", *small)
    assert (found["theorem"], found["claim"], found["problems"]) == ("Theorem 4", "bouligand", [])
    assert analyzed("fnn-relu", *small, "--batch-size", "1")["theorem"] == "Theorem 1"
    shown = invoke("analyze", "vgg11", "--batch-size", "1")
    assert shown.exit_code == 0
    assert "each has to be checked" in shown.stdout and "(Lemma 7)" in shown.stdout
    assert invoke("analyze", "vgg11", "--batch-size", "1", "--check").exit_code == 1
    assert invoke("analyze", "fnn-relu", *small, "--check").exit_code == 0


OWN = """
import torch
def network():
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
def with_example():
    return network(), torch.zeros(1, 4)
def unrecorded():
    class Step(torch.nn.Module):
        def forward(self, x):
            return x * (x > 0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), Step())
def nothing():
    return 3
"""


def test_analyze_a_network_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert analyzed("own_networks:network", "--shape", "4")["theorem"] == "Theorem 4"
    assert analyzed("own_networks:with_example")["theorem"] == "Theorem 1"
    refused = invoke("analyze", "own_networks:unrecorded", "--shape", "4")
    assert refused.exit_code == 1 and "no step can be certified" in refused.stdout
    for arguments in (("own_networks:missing",), ("own_networks:nothing",), ("no_such_module:network",)):
        assert invoke("analyze", *arguments).exit_code == 2
    for shape in ("4,x", "0", "-1,2", "5"):
        assert invoke("analyze", "own_networks:network", "--shape", shape).exit_code == 2
    assert invoke("analyze", "no-such-network").exit_code == 2
