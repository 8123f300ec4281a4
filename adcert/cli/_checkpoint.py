"""Checkpoints of `adcert train`: a job that was killed goes on to the same weights and the same totals, bit by bit.

Under torchrun the first rank writes the file and every rank reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..distributed import everywhere
from ..errors import AdcertError
from ..monitor import Monitor
from ._ranks import Ranks

if TYPE_CHECKING:
    from ._loop import Job

FORMAT = "adcert train"
VERSION = 2
# What a resumed job may do in another way: it changes no weight and no total.
FREE = frozenset({"log", "certificates", "only_failed", "checkpoint", "checkpoint_every", "resume", "workers"})
PARTS = ("format", "version", "job", "step", "model", "optimizer", "schedule", "scaler", "layers", "ranks")


@dataclass(frozen=True)
class Training:
    """All that changes while a job trains. The ranks save and load together; `layers` are the totals that are shown."""

    job: Job
    ranks: Ranks
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    monitor: Monitor | None

    def save(self, step: int, layers: dict[str, Any]) -> None:
        """Replace the checkpoint by one of this step: at any moment the file is the old one or the new one, whole."""
        everybody = everywhere(self._own)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "job": self._options(),
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "layers": layers,
            "ranks": everybody,
        }
        everywhere(lambda: _write(self.path, content) if self.ranks.first else None)

    def load(self, rehearse: Callable[[], None]) -> tuple[int, dict[str, Any]]:
        """Put everything where it was; gives the step and the layers' totals.

        `rehearse` trains a step, of which nothing is left: DistributedDataParallel lays the gradients out anew after
        its first one, and the order in which more than two ranks are added up depends on the place.
        """
        found: dict[str, Any] = {}

        def read() -> tuple[int, str]:
            found.update(_read(self.path))
            _compare(self.path, found["job"], self._options())
            return int(found["step"]), hashlib.sha256(self.path.read_bytes()).hexdigest() if self.ranks.size > 1 else ""

        everybody = everywhere(read)
        if len(set(everybody)) > 1:
            steps = [step for step, _ in everybody]
            raise AdcertError(
                f"the ranks have read files {self.path} that differ, of steps {steps}: it has to be on a disk that all "
                "of them share"
            )
        if self.ranks.size > 1 and found["step"]:
            rehearse()
        everywhere(lambda: self._restore(found))
        return found["step"], found["layers"]

    @property
    def path(self) -> Path:
        """The job's file."""
        assert self.job.checkpoint is not None
        return self.job.checkpoint

    def _own(self) -> dict[str, Any]:
        """What is not the same on every rank."""
        monitor = None if self.monitor is None else self.monitor.state_dict()
        return {"monitor": monitor, "random": _random_state(self.job.device)}

    def _restore(self, found: Mapping[str, Any]) -> None:
        try:
            own = found["ranks"][self.ranks.rank]
            self.model.load_state_dict(found["model"])
            self.optimizer.load_state_dict(found["optimizer"])
            self.schedule.load_state_dict(found["schedule"])
            self.scaler.load_state_dict(found["scaler"])
            _set_random_state(self.job.device, own["random"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise AdcertError(f"the checkpoint {self.path} does not fit the job: {error}") from error
        if self.monitor is not None:
            self.monitor.load_state_dict(own["monitor"])

    def _options(self) -> dict[str, Any]:
        """What decides the weights and the totals."""
        job, names = self.job, (field.name for field in dataclasses.fields(self.job) if field.name not in FREE)
        options = {name: str(value) if isinstance(value := getattr(job, name), Path) else value for name in names}
        return {**options, "ranks": self.ranks.size}


def _write(path: Path, content: dict[str, Any]) -> None:
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        _sync_folder(path)
    except OSError as error:
        raise AdcertError(f"cannot write the checkpoint {path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch stumble over
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdcertError(f"cannot read the checkpoint {path}: {first}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise AdcertError(f"{path} is no checkpoint of adcert train")
    if found.get("version") != VERSION:
        raise AdcertError(f"the checkpoint {path} has version {found.get('version')!r}, this adcert reads {VERSION}")
    if set(found) != set(PARTS):
        raise AdcertError(f"{path} is no checkpoint of adcert train")
    return found


def _compare(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    if names:
        text = ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)
        raise AdcertError(f"the checkpoint {path} is of another job: {text}; resume with the options it began with")


def _random_state(device: str) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(device: str, state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if device == "cuda":
        torch.cuda.set_rng_state(state["cuda"])


def _sync_folder(path: Path) -> None:
    """The new name is on disk, too."""
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
