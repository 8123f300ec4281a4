"""The callback inside the real Lightning: same weights, every optimiser step has a verdict, resumption, errors."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import World, assert_goes_on, launched
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import adcert
from adcert.cli._loop import digest
from adcert.recorder import running

lightning = pytest.importorskip("lightning.pytorch", reason="the callback is for Lightning")
from adcert.integrations.lightning import Certify  # noqa: E402 - after the library is known to be there

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning: few workers, no validation loop


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2))
        adcert.convert(self)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def batches() -> DataLoader[Any]:
    """Five batches of two."""
    x = torch.arange(10 * 36, dtype=torch.float32).reshape(10, 1, 6, 6) % 5
    return DataLoader(TensorDataset(x, torch.arange(10) % 2), batch_size=2)


def fit(module: Module, *callbacks: object, path: str | None = None, **options: Any) -> Module:
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "accumulate_grad_batches": 2}
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings | options,
    )
    trainer.fit(module, batches(), ckpt_path=path)
    return module


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def totals(monitor: adcert.Monitor) -> dict[str, Any]:
    return asdict(monitor.report()) | {"seconds": None}


def by_hand(accumulate: int) -> adcert.Monitor:
    """The same steps in a loop of our own."""
    module = Module()
    optimizer = module.configure_optimizers()
    loader = list(batches())
    with adcert.Monitor(module) as monitor:
        for _ in range(2):
            for start in range(0, 5, accumulate):
                optimizer.zero_grad()
                with monitor.step():
                    for x, y in loader[start : start + accumulate]:
                        (F.cross_entropy(module.net(x), y) / accumulate).backward()
                optimizer.step()
    return monitor


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_optimiser_step_is_certified_and_changes_nothing(tmp_path: Path, accumulate: int) -> None:
    plain = fit(Module(), accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    certify = Certify(log=tmp_path / "log")
    certified = fit(Module(), certify, accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    assert digest(certified) == digest(plain)
    assert certify.monitor is not None
    report = certify.monitor.report()
    assert (report.steps, report.certified, report.aborted) == ({1: 10, 2: 6}[accumulate],) * 2 + (0,)
    assert [line.get("step") for line in lines(tmp_path / "log")] == [*range(1, report.steps + 1), None]


def test_the_totals_are_those_of_a_loop_by_hand() -> None:
    certify = Certify()
    fit(Module(), certify)
    assert certify.monitor is not None
    assert totals(certify.monitor) == totals(by_hand(2))


def test_a_resumed_fit_goes_on(tmp_path: Path) -> None:
    whole, log = Certify(), tmp_path / "log"
    weights = digest(fit(Module(), whole, max_epochs=3))
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)

    class Failing(Module):
        calls = 0

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.calls += 1
            if self.calls == 12:  # in step 7, after the checkpoints of steps 3 and 6, the ends of epochs
                raise ZeroDivisionError
            return super().training_step(batch, index)

    with pytest.raises(ZeroDivisionError):
        fit(Failing(), Certify(log=log), saver, max_epochs=3, enable_checkpointing=True)
    assert lines(log)[-1]["report"]["steps"] == 7
    resumed = Certify(log=log)
    module = fit(Module(), resumed, max_epochs=3, path=str(tmp_path / "step=3.ckpt"))
    assert digest(module) == weights
    assert whole.monitor is not None and resumed.monitor is not None
    assert totals(resumed.monitor) == totals(whole.monitor)
    assert [line.get("step") for line in lines(log)] == [*range(1, 10), None]


def test_a_checkpoint_amid_an_accumulated_gradient(tmp_path: Path) -> None:
    """Of the third of five batches, two to a step: it holds one step, and whoever resumes goes on."""
    path = tmp_path / "amid.ckpt"

    class Saver(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 2:
                trainer.save_checkpoint(path)

    certify, resumed = Certify(), Certify()
    fit(Module(), certify, Saver(), max_epochs=1)
    assert certify.monitor is not None and certify.monitor.report().certified == 3
    (state,) = (found for found in torch.load(path, weights_only=False)["callbacks"].values() if "totals" in found)
    assert (state["totals"]["steps"], state["totals"]["sampled"]) == (1, 1)
    fit(Module(), resumed, path=str(path), max_epochs=2)
    assert resumed.monitor is not None and resumed.monitor.report().certified > 3


def test_an_exception_leaves_no_step_behind() -> None:
    class Failing(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            super().training_step(batch, index).backward()
            raise ZeroDivisionError

    certify = Certify()
    with pytest.raises(ZeroDivisionError) as caught:
        fit(Failing(), certify)
    assert any(entry.name == "training_step" for entry in caught.traceback)
    assert not running()
    assert not torch.overrides._get_current_function_mode_stack()
    assert certify.monitor is not None and certify.monitor.report().aborted == 1


def test_on_fail_raise_stops_before_the_optimiser() -> None:
    class Undecided(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            y = self.net(batch[0])
            return (y * (y > 0)).sum()

    module = Undecided()
    before = digest(module)
    with pytest.raises(adcert.UncertifiedError, match="step 1 is undecided"):
        fit(module, Certify(on_fail="raise"))
    assert digest(module) == before
    assert not running()


def test_what_the_callback_cannot_do_is_refused() -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    class Quasi(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(adcert.AdcertError, match="manual optimisation"):
        fit(Manual(), Certify(), accumulate_grad_batches=1)
    with pytest.raises(adcert.AdcertError, match="LBFGS evaluates its closure several times"):
        fit(Quasi(), Certify(), accumulate_grad_batches=1)
    assert not running()


def test_scalars_reach_the_loggers(tmp_path: Path) -> None:
    logger = lightning.loggers.CSVLogger(tmp_path)
    certify = Certify(every=2)
    fit(Module(), certify, logger=logger, log_every_n_steps=1)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    column, step = names.index("adcert/certified"), names.index("step")
    found = [(int(cells[step]), cells[column]) for cells in (row.split(",") for row in rows[1:]) if cells[column]]
    assert certify.monitor is not None and certify.monitor.report().sampled == 3
    assert [value for _, value in found] == ["1.0", "2.0", "3.0"]
    assert [(number - 1) // 2 for number, _ in found] == [0, 1, 2]


# Two processes.


@pytest.fixture(scope="module")
def two() -> Iterator[World]:
    world = World(2)
    world.run(launched)
    yield world
    world.close()


DDP = {"strategy": "ddp", "devices": 2}


def found_by(certify: Certify) -> dict[str, Any]:
    """What every rank has to find."""
    monitor = certify.monitor
    assert monitor is not None
    certificates = [
        (c.verdict.value, c.reasons, {name: p.tolist() for name, p in c.directions.items()}, list(c.shapes))
        for c in monitor.certificates
    ]
    return {"totals": totals(monitor), "certificates": certificates}


class FailingEighth(Module):
    """Raises in its eighth batch: the second one of step 5, in the third epoch of two steps."""

    calls = 0

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.calls += 1
        if self.calls == 8:
            raise ZeroDivisionError
        return super().training_step(batch, index)


def ddp_jobs(rank: int, folder: Path) -> dict[str, Any]:
    """A job without a monitor, one with, and one that fails and goes on."""
    options = {**DDP, "max_epochs": 3}
    whole, failing, resumed = Certify(log=folder / "whole"), Certify(log=folder / "log"), Certify(log=folder / "log")
    digests = [digest(fit(Module(), **options)), digest(fit(Module(), whole, **options))]
    saver = lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        fit(FailingEighth(), failing, saver, **options, enable_checkpointing=True)
    digests.append(digest(fit(Module(), resumed, **options, path=str(folder / "step=2.ckpt"))))
    return {"digests": digests, "whole": found_by(whole), "resumed": found_by(resumed)}


def test_ddp_certifies_the_global_batch_and_goes_on(two: World, tmp_path: Path) -> None:
    """Five samples a rank: three batches an epoch, two steps; the first batch of the first one runs under no_sync."""
    names = [name for name, _ in Module().named_parameters()]
    steps = assert_goes_on(two.run(ddp_jobs, tmp_path), names, tmp_path)
    assert [line["windows"] for line in steps[:2]] == [2 * 2 * 2 * 8, 2 * 1 * 1 * 8]  # ranks, batches, samples


class Signed(lightning.LightningModule):
    """``sign relu(w x)``: with both signs it is w x, whose derivative at w = 0 is not autodiff's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, sign = batch
        return (sign * torch.relu(x @ self.weight)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def lemma_2(rank: int) -> list[Any]:
    module, certify = Signed(), Certify()
    one = torch.tensor([[1.0], [-1.0]])
    alone = adcert.certify(lambda: module.training_step((one[rank], one[rank]), 0), module, group="local")
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[certify], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **DDP,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(one, one)))
    return [alone.verdict.value, *found_by(certify)["certificates"][0]]


def test_each_rank_alone_is_certified_and_the_global_batch_is_not(two: World) -> None:
    """relu(w) on one rank and -relu(-w) on the other: their sum is w, and autodiff's gradient is 0."""
    first, second = two.run(lemma_2)
    assert first == second
    alone, both, reasons, _, names = first
    assert (alone, both, names) == ("certified", "uncertified", ["weight"])
    assert "empty" in reasons[0]


def lost_log(rank: int, folder: Path) -> str:
    saver = lightning.callbacks.ModelCheckpoint(folder, "last", every_n_train_steps=1)
    fit(Module(), Certify(log=folder / "log"), saver, **DDP, max_epochs=1, enable_checkpointing=True)
    if rank == 0:
        (folder / "log").write_text("")
    with pytest.raises(adcert.AdcertError) as caught:
        fit(Module(), Certify(log=folder / "log"), **DDP, path=str(folder / "last.ckpt"))
    return str(caught.value)


def test_a_rank_that_cannot_go_on_stops_all(two: World, tmp_path: Path) -> None:
    began = time.monotonic()
    first, second = two.run(lost_log, tmp_path)
    assert first.startswith(f"the log {tmp_path / 'log'} ends after 0 bytes")
    assert second == f"rank 0: {first}"
    assert time.monotonic() - began < 30  # of a time-out of 60


class Unaveraged(Module):
    def configure_model(self) -> None:
        """Nothing is sharded."""


def other_strategies(rank: int) -> list[str]:
    said = []
    sharded = lightning.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    for module, strategy, options in ((Unaveraged(), sharded, {}), (Module(), "ddp", {"group": "local"})):
        with pytest.raises(adcert.AdcertError) as caught:
            fit(module, Certify(**options), strategy=strategy, devices=2)
        said.append(str(caught.value))
    return said


def test_processes_that_nothing_averages_are_refused(two: World) -> None:
    first, second = two.run(other_strategies)
    assert first == second
    assert "with ModelParallelStrategy it does not see one" in first[0]
    assert "leave group= out" in first[1]
