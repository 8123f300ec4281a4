"""Devices the tests of the pipeline run on: the host, an emulated GPU, a real one where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adcert.certificate import Block, Certificate

REAL = torch.version.cuda is not None
if not REAL:
    from emulation import runtime
    from emulation.device import Device, emulated_cuda

    runtime.load()  # before the first backward pass of the process

T = TypeVar("T", Tensor, nn.Module)


@dataclass(frozen=True, eq=False)
class Place:
    """A device. ``emulation``: what it is made of, if it is not real."""

    name: str
    emulation: Device | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.name == "cpu" else "cuda"

    def to(self, what: T) -> T:
        return what.to(self.device)

    def waits(self) -> int:
        """How often the host has waited for the device so far; 0 where nobody counts."""
        return len(self.emulation.waits) if self.emulation else 0

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """Here a wait for the device is an error."""
        if self.name == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with self.emulation.no_waits() if self.emulation else nullcontext():
                yield
        finally:
            if self.name == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@contextmanager
def opened(name: str) -> Iterator[Place]:
    """The device of this name; skips the test where it cannot be had.

    "emulated" has the CPU's kernels, in disguise, "kernels" the CUDA sources compiled for the CPU.
    """
    if name in ("emulated", "kernels"):
        if REAL:
            pytest.skip("this torch has CUDA of its own: nothing to emulate")
        with emulated_cuda(kernels="emulated" if name == "kernels" else "cpu") as emulation:
            yield Place(name, emulation)
        return
    if name == "cuda" and not (REAL and torch.cuda.is_available()):
        pytest.skip("no CUDA device")
    yield Place(name)


def content(certificate: Certificate) -> dict[str, object]:
    """All that a certificate says but its directions (each verified), proofs and times."""
    certificate.verify()
    fields = ("verdict", "reasons", "layers", "system", "claim", "shapes", "scales", "assumptions", "fingerprints")
    found: dict[str, object] = {field: getattr(certificate, field) for field in fields}
    return found | {"blocks": [_block(block) for block in certificate.blocks]}


def _block(block: Block) -> tuple[object, ...]:
    columns = [(column.parameter, column.indices.tolist()) for column in block.columns]
    matrices = [None if m is None else np.asarray(m).tolist() for m in (block.rows, block.minus, block.radius)]
    return block.layer, block.rank, block.rules, block.nonempty, columns, *matrices
