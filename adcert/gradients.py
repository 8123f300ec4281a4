"""Are the gradients of a step finite? Asked at its end; on a device the answer comes when the worker needs it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .transfer import Batch, follow, in_use


@dataclass(frozen=True, eq=False)
class Gradients:
    """``problems``: what is known already; ``names``, ``sizes``: gradients on a device, and their largest entries."""

    problems: list[str]
    names: list[str]
    sizes: Batch

    def late(self) -> list[str]:
        """The problem of the first gradient on a device that has one; waits for all of them."""
        sizes = zip(self.names, self.sizes.wait(), strict=True)
        return [_problem(name) for name, size in sizes if not math.isfinite(float(size))][:1]


def examine(leaves: Iterable[tuple[str, Tensor]], streams: Iterable[torch.cuda.Stream]) -> Gradients:
    """Look at the gradients of named leaves, without waiting for a device. ``streams``: of the step."""
    problems: list[str] = []
    away: dict[str, Tensor] = {}
    for name, leaf in leaves:
        if leaf.grad is None:
            continue
        grad = leaf.grad._values() if leaf.grad.is_sparse else leaf.grad
        if grad.is_cuda:
            if grad.numel():
                away[name] = grad
        # the sum first: it reads the gradient once and seldom overflows
        elif not problems and not bool(torch.isfinite(grad.sum())) and not bool(torch.isfinite(grad).all()):
            problems.append(_problem(name))
    if away:
        follow(streams)
    return Gradients(problems, list(away), Batch(_sizes(list(away.values())), patient=True))


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
