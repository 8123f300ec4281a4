"""What is looked at in the gradients of a step: are they finite, and are they those of the other processes?

On a device the answers come when the worker needs them.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .transfer import Arrival, follow, in_use

_SAMPLED = 16  # entries of a tensor


@dataclass(frozen=True, eq=False)
class Gradients:
    """``problems``: what is known already; ``away``: names of gradients on a device, and their fingerprints."""

    problems: list[str]
    away: list[tuple[list[str], Arrival]]

    def late(self) -> list[str]:
        """The problem of the first gradient on a device that has one; waits for all of them."""
        return [_problem(name) for names, prints in self.away for name in _not_finite(names, prints)][:1]


@dataclass(frozen=True, eq=False)
class Sample:
    """What processes that average gradients have in common.

    ``entries``: some of every parameter; ``prints``: fingerprints of gradients, and which rows of them.
    """

    entries: Arrival
    prints: tuple[tuple[Arrival, list[int]], ...] = ()

    def digest(self) -> str:
        """sha256 of all that."""
        total = hashlib.sha256()
        rows = [arrival.wait()[0][rows] for arrival, rows in self.prints]
        for t in (*self.entries.wait(), *rows):
            total.update(t.view(torch.uint8).numpy().data)
        return total.hexdigest()


class Examination:
    """Looks at gradients after every backward pass of a step, before anybody clips, unscales or frees them."""

    def __init__(self) -> None:
        self.found = Gradients([], [])
        self._seen: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._prints: dict[str, tuple[Arrival, int]] = {}  # the latest of each gradient

    def look(self, gradients: Iterable[tuple[str, Tensor | None]], streams: Iterable[torch.cuda.Stream]) -> None:
        """Named gradients, without waiting for a device; those that were looked at as they are, are not read again.

        ``streams``: of the step.
        """
        groups: dict[torch.device, dict[str, Tensor]] = {}
        for name, given in gradients:
            if given is not None and not self._known(name, given):
                grad = given.detach()
                grad = grad._values() if grad.is_sparse else grad
                grad = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
                groups.setdefault(grad.device, {})[name] = grad
        if any(device.type == "cuda" for device in groups):
            follow(streams)
        for device, group in groups.items():
            names = list(group)
            prints = Arrival([ops.fingerprints([in_use(grad) for grad in group.values()])], patient=True)
            self._prints.update((name, (prints, row)) for row, name in enumerate(names))
            if device.type == "cuda":
                self.found.away.append((names, prints))
            elif not self.found.problems:
                self.found.problems.extend(_problem(name) for name in _not_finite(names, prints)[:1])

    def sample(self, leaves: Mapping[str, Tensor], streams: Iterable[torch.cuda.Stream]) -> Sample:
        """Of these parameters, by their names, and of their gradients, which have been looked at."""
        rows: dict[Arrival, list[int]] = {}
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                prints, row = self._prints[name]
                rows.setdefault(prints, []).append(row)
        follow(streams)
        return Sample(Arrival(sampled(leaves.values()), patient=True), tuple(rows.items()))

    def _known(self, name: str, grad: Tensor) -> bool:
        if grad.is_inference():  # without a version
            return False
        held, version = self._seen.get(name, (None, 0))
        known = held is not None and held() is grad and version == grad._version
        self._seen[name] = weakref.ref(grad), grad._version
        return known


def sampled(tensors: Iterable[Tensor]) -> list[Tensor]:
    """A few entries of each, copied: a vector for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        if t.layout is torch.strided:
            groups.setdefault((t.device, t.dtype), []).append(_spread(t.detach()))
    return [torch.cat(group) for group in groups.values()]


def _spread(t: Tensor) -> Tensor:
    """Some entries: of a dense tensor spread over its memory, else the first ones."""
    count = min(_SAMPLED, t.numel())
    if count and (t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)):
        return t.as_strided((count,), (t.numel() // count,))
    return t.flatten()[:count]


def _not_finite(names: list[str], prints: Arrival) -> list[str]:
    return [names[row] for row in prints.wait()[0][:, 0].nonzero().flatten().tolist()]


def _problem(name: str) -> str:
    return f"the gradient of {name} is not finite"
