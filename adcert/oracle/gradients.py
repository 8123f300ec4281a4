"""Gradients as users have them, and as flat exact numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .program import Array
from .trace import Parameters, trainable

Closure = Callable[[], Tensor]
Gradient = Mapping[str, Any] | Sequence[Any] | Tensor | Array


def flatten(g: Gradient, slices: dict[str, slice]) -> list[Fraction]:
    """g as exact numbers in the order of the parameters; a missing or None gradient is 0."""
    width = max((s.stop for s in slices.values()), default=0)
    if isinstance(g, Mapping):
        unknown = set(g) - set(slices)
        if unknown:
            raise KeyError(f"no parameter named {sorted(unknown)}")
        parts = [g.get(name) for name in slices]
    elif isinstance(g, Tensor | np.ndarray) or not any(isinstance(x, Tensor) or x is None for x in g):
        flat = g.detach().flatten().tolist() if isinstance(g, Tensor) else np.asarray(g, dtype=object).ravel().tolist()
        if len(flat) != width:
            raise ValueError(f"the gradient has {len(flat)} entries, the parameters have {width}")
        return [_exactly(x) for x in flat]
    else:
        parts = list(g)
        if len(parts) != len(slices):
            raise ValueError(f"{len(parts)} gradients for {len(slices)} parameters")
    numbers: list[Fraction] = []
    for part, (name, entries) in zip(parts, slices.items(), strict=True):
        count = entries.stop - entries.start
        values = [0] * count if part is None else torch.as_tensor(part).detach().flatten().tolist()
        if len(values) != count:
            raise ValueError(f"the gradient of {name} has {len(values)} entries, not {count}")
        numbers += map(_exactly, values)
    return numbers


def _exactly(x: Any) -> Fraction:
    try:
        return Fraction(x) if isinstance(x, int | float | Fraction) else Fraction(float(x))
    except (ValueError, OverflowError):
        raise ValueError("the gradient is not finite") from None


def ad_gradient(closure: Closure, parameters: Parameters) -> dict[str, Tensor]:
    """PyTorch's gradient of the closure with respect to the trainable parameters, by name.

    >>> w = torch.zeros(1, requires_grad=True)
    >>> ad_gradient(lambda: w.abs().sum(), {"w": w})
    {'w': tensor([0.])}
    """
    named = trainable(parameters)
    with torch.enable_grad():
        loss = closure()
        if not loss.requires_grad:
            return {name: torch.zeros_like(p) for name, p in named.items()}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    pairs = zip(named.items(), found, strict=True)
    return {name: (torch.zeros_like(p) if g is None else g).detach() for (name, p), g in pairs}
