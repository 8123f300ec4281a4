"""The callback inside the real Trainer of transformers: same weights, every optimiser step, resumption, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import World, assert_goes_on, launched
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert.cli._loop import digest
from adcert.recorder import running

transformers = pytest.importorskip("transformers", reason="the callback is for its Trainer")
pytest.importorskip("accelerate", reason="the Trainer needs it")
from adcert.integrations.transformers import Certify  # noqa: E402 - after the library is known to be there


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2))
        adcert.convert(self)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(pixels), labels)}


def samples() -> list[dict[str, Tensor]]:
    """Ten: five batches of two."""
    x = torch.arange(10 * 36, dtype=torch.float32).reshape(10, 1, 6, 6) % 5
    return [{"pixels": pixels, "labels": torch.tensor(k % 2)} for k, pixels in enumerate(x)]


def made(model: nn.Module, path: Path, *callbacks: object, **options: Any) -> Any:
    """A Trainer."""
    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=2,
        learning_rate=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings | options,
    )
    return transformers.Trainer(model, arguments, train_dataset=samples(), callbacks=list(callbacks))


def train(model: nn.Module, path: Path, *callbacks: object, resume: str | None = None, **options: Any) -> nn.Module:
    made(model, path, *callbacks, **options).train(resume_from_checkpoint=resume)
    return model


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_optimiser_step_is_certified_and_changes_nothing(tmp_path: Path, accumulate: int) -> None:
    plain = train(Network(), tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=0.01)
    with Certify(log=tmp_path / "log") as certify:
        certified = train(Network(), tmp_path, certify, gradient_accumulation_steps=accumulate, max_grad_norm=0.01)
    assert digest(certified) == digest(plain)
    assert certify.monitor is not None
    report = certify.monitor.report()
    assert (report.steps, report.certified, report.aborted) == ({1: 10, 2: 6}[accumulate],) * 2 + (0,)
    windows = lines(tmp_path / "log")[0]["windows"]
    assert windows == accumulate * 2 * 2 * 4  # of two samples with two channels of four windows a batch
    assert [line.get("step") for line in lines(tmp_path / "log")] == [*range(1, report.steps + 1), None]


class Failing(Network):
    """Raises in its 12th forward pass: of step 7, after the checkpoint of step 6 or 4."""

    calls = 0

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 12:
            raise ZeroDivisionError
        return super().forward(pixels, labels)


def test_a_resumed_train_goes_on(tmp_path: Path) -> None:
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4}
    with Certify(log=tmp_path / "whole") as whole:
        weights = digest(train(Network(), tmp_path / "a", whole, **options))
    log = tmp_path / "log"
    with pytest.raises(ZeroDivisionError), Certify(log=log) as killed:
        train(Failing(), tmp_path / "b", killed, **options)
    assert not running()
    assert not torch.overrides._get_current_function_mode_stack()
    assert killed.monitor is not None
    assert (killed.monitor.report().certified, killed.monitor.report().aborted) == (6, 1)
    with Certify(log=log) as resumed:
        model = train(Network(), tmp_path / "b", resumed, resume=str(tmp_path / "b" / "checkpoint-4"), **options)
    assert digest(model) == weights
    assert whole.monitor is not None and resumed.monitor is not None
    assert asdict(resumed.monitor.report()) | {"seconds": 0} == asdict(whole.monitor.report()) | {"seconds": 0}
    assert [line.get("step") for line in lines(log)] == [line.get("step") for line in lines(tmp_path / "whole")]


def test_a_checkpoint_without_a_monitor(tmp_path: Path) -> None:
    """The monitor joins later: its first step is the first one it sees."""
    options = {"save_strategy": "steps", "save_steps": 3}
    train(Network(), tmp_path, **options)
    with Certify() as certify:
        train(Network(), tmp_path, certify, resume=str(tmp_path / "checkpoint-3"), **options)
    assert certify.monitor is not None and certify.monitor.report().certified == 3


def test_on_fail_raise_stops_before_the_optimiser(tmp_path: Path) -> None:
    class Undecided(Network):
        def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
            y = self.net(pixels)
            return {"loss": (y * (y > 0)).sum()}

    model = Undecided()
    before = digest(model)
    with pytest.raises(adcert.UncertifiedError, match="step 1 is undecided"), Certify(on_fail="raise") as certify:
        train(model, tmp_path, certify)
    assert digest(model) == before
    assert not running()


def test_outside_its_block_the_callback_refuses(tmp_path: Path) -> None:
    with pytest.raises(adcert.AdcertError, match="in a with block"):
        train(Network(), tmp_path, Certify())


def test_the_trainer_may_be_handed_over(tmp_path: Path) -> None:
    trainer = made(Network(), tmp_path)
    with Certify(trainer) as certify:
        trainer.train()
    assert certify.monitor is not None and certify.monitor.report().certified == 6
    trainer.train()  # without the callback
    assert certify.monitor.report().steps == 6


# Two processes.


@pytest.fixture(scope="module")
def two() -> Iterator[World]:
    world = World(2)
    world.run(launched)
    yield world
    world.close()


def found_by(certify: Certify) -> dict[str, Any]:
    """What every rank has to find."""
    assert certify.monitor is not None
    certificates = [
        (c.verdict.value, c.reasons, {name: p.tolist() for name, p in c.directions.items()}, list(c.shapes))
        for c in certify.monitor.certificates
    ]
    return {"totals": asdict(certify.monitor.report()) | {"seconds": None}, "certificates": certificates}


class FailingEighth(Network):
    """Raises in its eighth batch: the second one of step 5, in the third epoch of two steps."""

    calls = 0

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 8:
            raise ZeroDivisionError
        return super().forward(pixels, labels)


def jobs(rank: int, folder: Path) -> dict[str, Any]:
    """A job without a monitor, one with, and one that fails and goes on."""
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2}
    digests = [digest(train(Network(), folder / "plain", **options))]
    trainer = made(Network(), folder / "a", **options)
    with Certify(trainer, log=folder / "whole") as whole:
        trainer.train()
    digests.append(digest(trainer.model))
    trainer = made(FailingEighth(), folder / "b", **options)
    with pytest.raises(ZeroDivisionError), Certify(trainer, log=folder / "log"):
        trainer.train()
    trainer = made(Network(), folder / "b", **options)
    with Certify(trainer, log=folder / "log") as resumed:
        trainer.train(resume_from_checkpoint=str(folder / "b" / "checkpoint-2"))
    digests.append(digest(trainer.model))
    return {"digests": digests, "whole": found_by(whole), "resumed": found_by(resumed)}


def test_several_processes_certify_the_global_batch_and_go_on(two: World, tmp_path: Path) -> None:
    """Five samples a rank: three batches an epoch, two steps; the first batch of the first one runs under no_sync."""
    names = [name for name, _ in Network().named_parameters()]
    steps = assert_goes_on(two.run(jobs, tmp_path), names, tmp_path)
    assert steps[0]["windows"] == 2 * 2 * 2 * 8  # ranks, batches, samples


def around(rank: int, folder: Path) -> list[Any]:
    """The loss is not computed by the model that the Trainer hands out, which would average."""
    trainer = made(Network(), folder, max_steps=1)
    trainer.compute_loss = lambda model, inputs, **rest: trainer.model(**inputs)["loss"]
    with Certify(trainer) as certify:
        trainer.train()
    assert certify.monitor is not None
    return [(c.verdict.value, c.reasons) for c in certify.monitor.certificates]


def test_gradients_that_nobody_averaged_are_not_certified(two: World, tmp_path: Path) -> None:
    first, second = two.run(around, tmp_path)
    assert first == second
    [(verdict, reasons)] = first
    assert verdict == "undecided" and any("not those of rank 0" in reason for reason in reasons)


def refusals(rank: int, folder: Path) -> list[str]:
    said = []
    with pytest.raises(adcert.AdcertError) as caught, Certify() as certify:
        train(Network(), folder, certify)
    said.append(str(caught.value))
    trainer = made(Network(), folder)
    trainer._wrap_model = lambda model, *_: nn.Sequential(model)  # nothing averages
    with pytest.raises(adcert.AdcertError) as caught, Certify(trainer):
        trainer.train()
    return [*said, str(caught.value)]


def test_processes_that_nothing_averages_are_refused(two: World, tmp_path: Path) -> None:
    first, second = two.run(refusals, tmp_path)
    assert first == second
    assert "of 2 processes the callback has to see what averages their gradients" in first[0]
    assert "with Sequential it does not see one" in first[1]
