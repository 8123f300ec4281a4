"""The monitor of a trainer that may run several processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..distributed import everywhere
from ..errors import AdcertError
from ..monitor import Monitor


@dataclass(frozen=True)
class Ranks:
    """The ``size`` processes of a trainer. ``first``: this one writes the log; ``strategy``: its name, for errors."""

    size: int
    first: bool
    strategy: str

    def begin(
        self, model: torch.nn.Module, wrapped: Any, options: Mapping[str, Any], saved: Mapping[str, Any] | None
    ) -> Monitor:
        """A monitor that has been entered, of the global batch if there are several ranks: all of them call this.

        Args:
            model: what is trained.
            wrapped: what the trainer calls, a DistributedDataParallel of the model where there are several ranks.
            options: of the monitor.
            saved: the state of the first rank's monitor to go on from, if any. What it holds beside the log is the same
                on every rank.

        Raises:
            AdcertError: if it is not sure that the gradients of all ranks are averaged; on every rank, if one of them
                cannot go on from ``saved`` or write the log.
        """
        if self.size > 1:
            model = self._averaging(model, wrapped)
            if options.get("group") is not None:
                raise AdcertError(
                    f"the {self.size} processes certify the global batch, over all of them: leave group= out, "
                    "or use adcert.Monitor in a loop of your own"
                )
        made: list[Monitor] = []

        def begin() -> None:
            monitor = Monitor(model, **(options if self.first else {**options, "log": None}))
            if saved:
                monitor.load_state_dict(saved)
            made.append(monitor.__enter__())

        if self.size == 1:
            begin()
            return made[0]
        if len(set(everywhere(lambda: bool(saved)))) > 1:
            raise AdcertError("some processes have a state to go on from and others do not: load one checkpoint")
        everywhere(begin)
        return made[0]

    def _averaging(self, model: torch.nn.Module, wrapped: Any) -> DistributedDataParallel:
        """The DistributedDataParallel of the model; parameters have the names that they have in the model."""
        found = [each for each in wrapped.modules() if isinstance(each, DistributedDataParallel)]
        if len(found) != 1 or found[0].module is not model:
            raise AdcertError(
                f"the callback certifies {self.size} processes if one DistributedDataParallel averages all gradients "
                f"of the model, with {self.strategy} it does not see one: train with DistributedDataParallel, or use "
                "adcert.Monitor in a loop of your own (which knows fully_shard, too)"
            )
        if dist.get_world_size(found[0].process_group) != self.size:
            raise AdcertError(
                f"DistributedDataParallel averages over {dist.get_world_size(found[0].process_group)} of the "
                f"{self.size} processes: use adcert.Monitor in a loop of your own"
            )
        return found[0]
