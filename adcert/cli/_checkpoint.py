"""Checkpoints of `adcert train`: a job that was killed goes on to the same weights and the same totals, bit by bit."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import AdcertError
from ..monitor import Monitor

if TYPE_CHECKING:
    from ._loop import Job

FORMAT = "adcert train"
VERSION = 1
# What a resumed job may do in another way: it changes no weight and no total.
FREE = frozenset({"log", "certificates", "only_failed", "checkpoint", "checkpoint_every", "resume", "workers"})
PARTS = ("format", "version", "job", "step", "model", "optimizer", "schedule", "scaler", "monitor", "layers", "random")


@dataclass(frozen=True)
class Training:
    """All that changes while a job trains, and `layers`, the totals that are shown."""

    job: Job
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    monitor: Monitor | None

    def save(self, step: int, layers: dict[str, Any]) -> None:
        """Replace the checkpoint by one of this step: at any moment the file is the old one or the new one, whole."""
        path = self.job.checkpoint
        assert path is not None
        content = {
            "format": FORMAT,
            "version": VERSION,
            "job": _options(self.job),
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
            "layers": layers,
            "random": _random_state(self.job.device),
        }
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

    def load(self) -> tuple[int, dict[str, Any]]:
        """Put everything where it was; gives the step and the layers' totals."""
        path = self.job.checkpoint
        assert path is not None
        found = _read(path)
        _compare(path, found["job"], _options(self.job))
        try:
            self.model.load_state_dict(found["model"])
            self.optimizer.load_state_dict(found["optimizer"])
            self.schedule.load_state_dict(found["schedule"])
            self.scaler.load_state_dict(found["scaler"])
            _set_random_state(self.job.device, found["random"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdcertError(f"the checkpoint {path} does not fit the job: {error}") from error
        if self.monitor is not None:
            self.monitor.load_state_dict(found["monitor"])
        return found["step"], found["layers"]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdcertError(f"cannot read the checkpoint {path}: {first}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or set(found) != set(PARTS):
        raise AdcertError(f"{path} is no checkpoint of adcert train")
    if found["version"] != VERSION:
        raise AdcertError(f"the checkpoint {path} has version {found['version']!r}, this adcert reads {VERSION}")
    return found


def _options(job: Job) -> dict[str, Any]:
    """What decides the weights and the totals."""
    fields = (field.name for field in dataclasses.fields(job) if field.name not in FREE)
    return {name: str(value) if isinstance(value := getattr(job, name), Path) else value for name in fields}


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
