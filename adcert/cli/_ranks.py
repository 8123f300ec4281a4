"""The processes of one training job: this one alone, or those that torchrun started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import AdcertError


@dataclass(frozen=True)
class Ranks:
    """``rank`` of ``size`` processes, each with its part of every batch; ``device``: where this one trains."""

    device: str
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Does this process speak for all?"""
        return self.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over the ranks if there are several."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, [self.device] if self.device.startswith("cuda") else None)

    def part(self, batch: Tensor) -> Tensor:
        """This rank's samples of a batch that all of them have."""
        if len(batch) % self.size:
            raise AdcertError(f"--batch-size {len(batch)} cannot be cut into equal parts for {self.size} ranks")
        return batch.tensor_split(self.size)[self.rank].to(self.device)

    def mean(self, *values: float) -> list[float]:
        """Means over the ranks."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [value / self.size for value in total.tolist()]


@contextmanager
def launched(device: str) -> Iterator[Ranks]:
    """The ranks torchrun started, over gloo or, on GPUs, NCCL; else this process alone."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Ranks(device)
        return
    if device == "cuda":
        device = f"cuda:{dist.get_node_local_rank()}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Ranks(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
