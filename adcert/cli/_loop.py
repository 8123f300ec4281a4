"""The training job itself: no printing here, so that the display and the tests share it."""

from __future__ import annotations

import dataclasses
import hashlib
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import convert, data, models
from ..certificate import Verdict
from ..distributed import everywhere
from ..monitor import Monitor
from ..step import Step
from ._checkpoint import Training
from ._ranks import Ranks

LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
COUNTS = ("windows", "ties", "touches", "differing", "rows", "blocks")


@dataclass(frozen=True)
class Job:
    """What to train. Of `epochs` and `steps` the one that ends first counts, without either one epoch;
    `plain` trains stock modules without a monitor; `size`: pixels a side, None for what suits model and data;
    `every`: of how many steps one is certified; `checkpoint`: a file to save all of it in after each
    `checkpoint_every` steps, and, with `resume`, to go on from if it is there;
    `precision`: of the forward pass, under autocast unless it is "fp32".
    """

    model: str = "resnet18"
    data: str = "photos"
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 128
    seed: int = 0
    log: Path | None = None
    strict: bool = False
    plain: bool = False
    certificates: Path | None = None
    only_failed: bool = False
    device: str = "cpu"
    size: int | None = None
    every: int = 1
    checkpoint: Path | None = None
    checkpoint_every: int = 100
    resume: bool = False
    workers: int = 0
    precision: Precision = "fp32"

    @property
    def pixels(self) -> int:
        """Pixels a side of an image."""
        small = self.model in models.FNN and self.data == "digits"
        return self.size or (8 if small else data.usual_size(self.data))


@dataclass(frozen=True)
class StepResult:
    """One step. `seconds`: wall clock of the whole step; `summary`: the monitor's record, None if plain and empty
    if the step was not drawn; `test_accuracy`: measured at the end of an epoch and of the run, else None.
    """

    step: int
    loss: float
    accuracy: float
    seconds: float
    summary: dict[str, Any] | None
    test_accuracy: float | None

    @property
    def verdict(self) -> str:
        """The step's verdict, "skipped" if it was not drawn, "plain" without a monitor."""
        return "plain" if self.summary is None else self.summary.get("verdict", "skipped")

    @property
    def analysis(self) -> float:
        """Seconds of the step that the monitor spent in its analysis, without waiting for the forward pass."""
        seconds = self.summary["seconds"] if self.summary else {}
        return float(seconds.get("analysis", 0.0)) - float(seconds.get("device", 0.0))


@dataclass
class LayerTotals:
    """Sums over the steps of one layer; `steps_differing`: steps with a window whose S_j and T_j differ."""

    counts: Counter[str] = field(default_factory=Counter)
    exemptions: Counter[str] = field(default_factory=Counter)
    steps_differing: int = 0

    def add(self, layer: dict[str, Any]) -> None:
        """Add one layer of one step's summary."""
        self.counts.update({name: layer[name] for name in COUNTS})
        self.exemptions.update(layer["exemptions"])
        self.steps_differing += layer["differing"] > 0

    def state(self) -> dict[str, Any]:
        """As plain numbers."""
        counts = {name: self.counts[name] for name in COUNTS}
        return {"counts": counts, "exemptions": dict(self.exemptions), "steps_differing": self.steps_differing}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> LayerTotals:
        """Of a :meth:`state`."""
        return cls(Counter(state["counts"]), Counter(state["exemptions"]), state["steps_differing"])


@dataclass
class Outcome:
    """A finished (or interrupted) run. `report`: the monitor's totals; `digest`: SHA-256 of the final state
    dict, for comparing two runs bit by bit; `resumed`: steps done before this process went on, of which there are
    totals but no `results`.
    """

    job: Job
    planned: int
    parameters: int
    resumed: int = 0
    results: list[StepResult] = field(default_factory=list)
    layers: dict[str, LayerTotals] = field(default_factory=dict)
    report: dict[str, Any] | None = None
    digest: str = ""
    interrupted: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The run as plain data for `--json`."""
        last = self.results[-1] if self.results else None
        tests = [r.test_accuracy for r in self.results if r.test_accuracy is not None]
        return {
            "job": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self.job).items()},
            "parameters": self.parameters,
            "steps": self.resumed + len(self.results),
            "steps_resumed": self.resumed,
            "steps_planned": self.planned,
            "interrupted": self.interrupted,
            "loss": last.loss if last else None,
            "accuracy": last.accuracy if last else None,
            "test_accuracy": tests[-1] if tests else None,
            "seconds": self.seconds(),
            "weights_sha256": self.digest,
            "report": self.report,
            "layers": {
                name: {**{k: totals.counts[k] for k in COUNTS}, "exemptions": dict(totals.exemptions)}
                | {"steps_differing": totals.steps_differing}
                for name, totals in self.layers.items()
            },
        }

    def seconds(self) -> dict[str, float]:
        """Wall clock: total of all steps, the median step, total and median share spent in the analysis."""
        if not self.results:
            return {}
        return {
            "steps": sum(r.seconds for r in self.results),
            "median_step": median(r.seconds for r in self.results),
            "analysis": sum(r.analysis for r in self.results),
            "median_analysis_share": median(r.analysis / r.seconds for r in self.results),
        }


def run(job: Job, on_step: Callable[[Outcome, StepResult], None], ranks: Ranks | None = None) -> Outcome:
    """Train, calling `on_step` for every step. An interrupt (Ctrl-C) ends the run after the current step.

    With several `ranks` each of them trains on its part of every batch; the first one writes files. A step is shown
    once the next one has been trained, so that training does not wait for its verdict.

    SGD with momentum 0.9, weight decay 1e-4, learning rate 0.05 falling to 0 along a cosine. In fp16 a GradScaler skips
    the steps in which a scaled gradient overflows.
    """
    ranks = ranks or Ranks(job.device)
    images = data.load(job.data, job.pixels, job.workers)
    loader = data.Loader(images, job.batch_size, job.seed)
    per_epoch = len(loader)
    planned = _planned(job, per_epoch)
    channels, size, _ = images.shape
    model: nn.Module = models.build(job.model, len(images.classes), channels, size, job.seed)
    model.to(ranks.device)
    outcome = Outcome(job, planned, sum(p.numel() for p in model.parameters()))
    if not job.plain:
        model = convert(model)
    parallel = ranks.parallel(model)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, planned)
    log = job.log if ranks.first else None
    monitor = None if job.plain else Monitor(parallel, log=log, strict=job.strict, every=job.every, seed=job.seed)
    scaler = torch.amp.GradScaler(job.device, enabled=job.precision == "fp16")
    training = Training(job, ranks, model, optimizer, schedule, scaler, monitor)
    trained: deque[tuple[Step | None, StepResult]] = deque()
    with monitor or nullcontext():
        done = _begin(training, outcome, partial(_rehearse, training, parallel, images.shape))
        loader.steps, loader.epoch, loader.start = planned - done, done // per_epoch, done % per_epoch
        try:
            for number, (x, y) in enumerate(loader if done < planned else (), done + 1):
                step, result = _step(
                    parallel, optimizer, scaler, monitor, ranks.part(x), ranks.part(y), number, job.precision
                )
                with warnings.catch_warnings():  # the scaler may have skipped the very first step
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                    schedule.step()
                loss, accuracy = ranks.mean(result.loss, result.accuracy)
                result = dataclasses.replace(result, loss=loss, accuracy=accuracy)
                if ranks.first and (number == planned or number % per_epoch == 0):
                    result = dataclasses.replace(result, test_accuracy=_accuracy(model, images))
                trained.append((step, result))
                save = job.checkpoint is not None and (number % job.checkpoint_every == 0 or number == planned)
                while len(trained) > (0 if save else 1):
                    _show(outcome, ranks, *trained.popleft(), on_step)
                if save:
                    _save(training, outcome, number)
        except KeyboardInterrupt:
            if ranks.size > 1:  # which may come to each rank at another step
                raise
            outcome.interrupted = True
        while trained:
            _show(outcome, ranks, *trained.popleft(), on_step)
    if monitor is not None:
        outcome.report = dataclasses.asdict(monitor.report())
    outcome.digest = digest(model)
    return outcome


def _planned(job: Job, per_epoch: int) -> int:
    """Steps in all."""
    by_epochs = per_epoch * (job.epochs or 1)
    if job.steps is None:
        return by_epochs
    return job.steps if job.epochs is None else min(job.steps, by_epochs)


def _begin(training: Training, outcome: Outcome, rehearse: Callable[[], None]) -> int:
    """Resume or make the first checkpoint, if there are any; tells how many steps are done."""
    checkpoint = training.job.checkpoint
    if checkpoint is None:
        return 0
    if everywhere(lambda: training.job.resume and checkpoint.exists())[0]:
        outcome.resumed, layers = training.load(rehearse)
        outcome.layers = {name: LayerTotals.restored(totals) for name, totals in layers.items()}
    else:
        _save(training, outcome, 0)
    return outcome.resumed


def _rehearse(training: Training, parallel: nn.Module, shape: tuple[int, int, int]) -> None:
    """A step on nothing but zeros."""
    job, ranks = training.job, training.ranks
    x, y = torch.zeros(job.batch_size, *shape), torch.zeros(job.batch_size, dtype=torch.int64)
    _step(parallel, training.optimizer, training.scaler, None, ranks.part(x), ranks.part(y), 0, job.precision)


def _save(training: Training, outcome: Outcome, step: int) -> None:
    training.save(step, {name: totals.state() for name, totals in outcome.layers.items()})


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    monitor: Monitor | None,
    x: Tensor,
    y: Tensor,
    number: int,
    precision: Precision,
) -> tuple[Step | None, StepResult]:
    """Train one step; its result still lacks the monitor's summary."""
    start = time.perf_counter()
    optimizer.zero_grad()
    with monitor.step() if monitor else nullcontext() as step:
        with torch.autocast(x.device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            output = model(x)
            loss = nn.functional.cross_entropy(output, y)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)
    scaler.update()
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)
    seconds = time.perf_counter() - start
    correct = (output.detach().argmax(1) == y).float().mean().item()
    return step, StepResult(number, loss.item(), correct, seconds, None, None)


def _show(
    outcome: Outcome,
    ranks: Ranks,
    step: Step | None,
    result: StepResult,
    on_step: Callable[[Outcome, StepResult], None],
) -> None:
    """Wait for a step's verdict, keep its certificate if asked to, and hand the result on."""
    job = outcome.job
    if step is not None:
        result = dataclasses.replace(result, summary=step.summary)
        failed = result.verdict not in (Verdict.CERTIFIED, "skipped")
        wanted = ranks.first and not step.skipped and (failed or not job.only_failed)
        if job.certificates is not None and wanted:
            step.certificate().save(job.certificates / f"step-{result.step:06d}.adcert")
    outcome.results.append(result)
    for layer in result.summary["layers"] if result.summary else ():
        outcome.layers.setdefault(layer["name"], LayerTotals()).add(layer)
    on_step(outcome, result)


def _accuracy(model: nn.Module, images: data.Images) -> float:
    """Share of right answers to the test images in eval mode; the model goes back to the mode it was in."""
    mode = model.training
    model.eval()
    right = count = 0
    with torch.no_grad():
        device = next(model.parameters()).device
        for x, y in images.test_batches(256):
            right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
            count += len(y)
    model.train(mode)
    return right / count if count else float("nan")


def digest(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of the state dict: equal iff two models agree bit by bit.

    Example:
        >>> digest(nn.ReLU()) == digest(nn.Identity())
        True
    """
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
