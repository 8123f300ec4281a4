"""Are the gradients of a step finite, and those of the other processes? On a device the worker waits for the answer."""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .transfer import Arrival, Batch, follow, in_use

_SAMPLED = 16  # entries of a tensor


@dataclass(frozen=True, eq=False)
class Gradients:
    """``problems``: what is known already; ``away``: names of gradients on a device, and their largest entries."""

    problems: list[str]
    away: list[tuple[list[str], Batch]]

    def late(self) -> list[str]:
        """The problem of the first gradient on a device that has one; waits for all of them."""
        sizes = [pair for names, batch in self.away for pair in zip(names, batch.wait(), strict=True)]
        return [_problem(name) for name, size in sizes if not math.isfinite(float(size))][:1]


class Examination:
    """Looks at gradients after every backward pass of a step, before anybody clips, unscales or frees them."""

    def __init__(self) -> None:
        self.found = Gradients([], [])
        self._seen: dict[str, tuple[weakref.ref[Tensor], int]] = {}

    def look(self, gradients: Iterable[tuple[str, Tensor | None]], streams: Iterable[torch.cuda.Stream]) -> None:
        """Named gradients, without waiting for a device; those that were looked at as they are, are not read again.

        ``streams``: of the step.
        """
        away: dict[str, Tensor] = {}
        for name, given in gradients:
            if given is None or self._known(name, given):
                continue
            grad = given.detach()
            grad = grad._values() if grad.is_sparse else grad
            if grad.is_cuda:
                if grad.numel():
                    away[name] = grad
            # the sum first: it reads the gradient once and seldom overflows
            elif not bool(torch.isfinite(grad.sum())) and not bool(torch.isfinite(grad).all()):
                self.found.problems[:] = self.found.problems or [_problem(name)]
        if away:
            follow(streams)
            self.found.away.append((list(away), Batch(_sizes(list(away.values())), patient=True)))

    def _known(self, name: str, grad: Tensor) -> bool:
        if grad.is_inference():  # without a version
            return False
        held, version = self._seen.get(name, (None, 0))
        known = held is not None and held() is grad and version == grad._version
        self._seen[name] = weakref.ref(grad), grad._version
        return known


@dataclass(frozen=True, eq=False)
class Sample:
    """What processes that average gradients have in common: ``text``, and the bits of ``entries``."""

    text: str
    entries: Arrival

    @classmethod
    def of(cls, leaves: Mapping[str, Tensor], streams: Iterable[torch.cuda.Stream]) -> Sample:
        """Entries of every parameter, and of every gradient its place in memory and a fingerprint.

        ``leaves``: by their names; ``streams``: of the step.
        """
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        text = repr([(name, _form(grads.get(name))) for name in leaves])
        follow(streams)
        groups: dict[torch.device, list[Tensor]] = {}
        for grad in grads.values():
            if grad.layout is torch.strided:
                groups.setdefault(grad.device, []).append(in_use(grad).resolve_conj().resolve_neg())
        prints = (ops.fingerprints(group) for group in groups.values())
        return cls(text, Arrival([*sampled(leaves.values()), *prints], patient=True))

    def digest(self) -> str:
        """sha256 of all that."""
        total = hashlib.sha256(self.text.encode())
        for t in self.entries.wait():
            total.update(t.view(torch.uint8).numpy().data)
        return total.hexdigest()


def sampled(tensors: Iterable[Tensor]) -> list[Tensor]:
    """A few entries of each, copied: a vector for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        if t.layout is torch.strided:
            groups.setdefault((t.device, t.dtype), []).append(_spread(t.detach()))
    return [torch.cat(group) for group in groups.values()]


def _form(grad: Tensor | None) -> tuple[object, ...] | None:
    if grad is None or grad.layout is not torch.strided:
        return None if grad is None else (grad.layout,)
    return grad.dtype, tuple(grad.shape), grad.stride()


def _spread(t: Tensor) -> Tensor:
    """Some entries: of a dense tensor spread over its memory, else the first ones."""
    count = min(_SAMPLED, t.numel())
    if count and (t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)):
        return t.as_strided((count,), (t.numel() // count,))
    return t.flatten()[:count]


def _sizes(grads: Sequence[Tensor]) -> list[Tensor]:
    """The largest entry of each, in absolute terms: it is finite iff all are, and nothing overflows."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, grad in enumerate(grads):
        groups.setdefault((grad.device, grad.dtype), []).append(place)
    found: dict[int, Tensor] = {}
    for places in groups.values():
        held = [in_use(grads[place]) for place in places]
        largest = [t.abs().amax() for t in held] if held[0].is_complex() else torch._foreach_norm(held, math.inf)
        found.update(zip(places, largest, strict=True))
    return [found[place] for place in range(len(grads))]


def _problem(name: str) -> str:
    return f"the gradient of {name} is not finite"
