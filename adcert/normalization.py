"""Normalisations with error radii: statistics recomputed in float64 from the saved input; derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .balls import Ball
from .enclosures import inverse_root
from .layers import kind_of
from .nodes import Node
from .transfer import host, pick

#: Batch normalisation's nodes, and where each keeps its eps: cuDNN's has other names for the same mathematics.
BATCH_NORM = {"NativeBatchNormBackward": "_saved_eps", "CudnnBatchNormBackward": "_saved_epsilon"}


def eps_of(node: Node) -> float:
    """The eps of a batch normalisation."""
    return float(getattr(node, BATCH_NORM[kind_of(node)]))


@dataclass(frozen=True, eq=False)
class Statistics:
    """``x`` [N, C, ...] float64 (exact); ``scale`` = (variance + eps)^(-1/2) and ``normalized`` (x - mean) * scale."""

    x: Tensor
    scale: Ball
    normalized: Ball
    count: int

    def channels(self, t: Tensor) -> Tensor:
        """A per-channel vector shaped for broadcasting against x without its batch dimension's index."""
        return t.reshape(1, -1, *[1] * (self.x.dim() - 2))


def statistics(node: Node, channels: Tensor | None = None) -> Statistics:
    """Mean and scale of a batch normalisation's node: of the batch in train mode, the running ones else.

    The batch's are functions of x, so they are recomputed from the saved x (the float32 ones the kernel saved are
    roundings); the radii bound the float64 rounding. ``channels``: int64 [U], only these.
    """
    x = host(node._saved_input) if channels is None else pick(node._saved_input, channels, 1)
    x = x.to(torch.float64)
    dims = (0, *range(2, x.dim()))
    count = math.prod(x.shape[d] for d in dims)

    def wide(t: Tensor) -> Tensor:
        return t.reshape(1, -1, *[1] * (x.dim() - 2))

    if node._saved_training:
        mean = Ball(x).sum(dims, keepdim=True).divided(count)
        centred = Ball(x) - mean
        variance = (centred * centred).sum(dims, keepdim=True).divided(count)
    else:
        centred = Ball(x) - Ball(wide(host(node._saved_running_mean).to(torch.float64)))
        variance = Ball(wide(host(node._saved_running_var).to(torch.float64)))
    scale = inverse_root(variance + Ball(torch.full((), eps_of(node), dtype=torch.float64)))
    return Statistics(x, scale, centred * scale, count)


def cancels(g: Ball, x: Tensor) -> Tensor:
    """bool [K]: in every channel the entries of row k sum to exactly 0 and sit on equal values of x.

    Then the mean and variance terms of the train-mode derivative, sum g and sum g * xhat, vanish exactly.
    """
    dims = (0, *range(2, x.dim()))
    shifted = tuple(d + 1 for d in dims)
    there = ~g.zero()
    big = torch.where(there, x, -math.inf).amax(shifted)
    small = torch.where(there, x, math.inf).amin(shifted)
    equal = ~(big > small)
    return (equal & g.sum(shifted).zero()).all(1)


def coupled(g: Ball, stats: Statistics, scale: Ball) -> tuple[Ball, Ball]:
    """Train-mode derivative of rows g [K, N, C, ...]: (with respect to x, with respect to gamma [K, C]).

    ``scale * (g - mean(g) - xhat mean(g xhat))`` with ``scale`` = gamma / sigma.
    """
    dims = (1, *range(3, g.value.dim()))
    along = (g * stats.normalized).sum(dims, keepdim=True)
    mean = g.sum(dims, keepdim=True).divided(stats.count)
    result = (g - mean - stats.normalized * along.divided(stats.count)) * scale
    return result, along.map(lambda t: t.reshape(t.shape[0], -1))


@dataclass(frozen=True, eq=False)
class Groups:
    """Statistics inside samples: ``x`` [U, groups, length] float64, ``scale`` [U, groups, 1], ``gamma`` or None."""

    x: Tensor
    scale: Ball
    normalized: Ball
    gamma: Tensor | None


def groups_of(node: Node, samples: Tensor) -> Groups:
    """The statistics of a layer or group normalisation at some samples, as functions of the recorded input.

    An input without a dimension beyond the normalised ones is one sample.
    """
    layer = kind_of(node) == "NativeLayerNormBackward"
    held = node._saved_input.detach()
    if layer and held.dim() == len(node._saved_normalized_shape):
        held = held[None]
    x = pick(held, samples).to(torch.float64)
    if layer:
        x = x.reshape(len(samples), -1, math.prod(node._saved_normalized_shape))
        eps = layer_eps(node)
    else:
        x = x.reshape(len(samples), int(node._saved_group), -1)
        eps = Ball(torch.full((), float(node._saved_eps), dtype=torch.float64))
    centred = Ball(x) - Ball(x).sum((2,), keepdim=True).divided(x.shape[2])
    variance = (centred * centred).sum((2,), keepdim=True).divided(x.shape[2])
    scale = inverse_root(variance + eps)
    weight = node._saved_weight
    gamma = None
    if weight is not None:
        gamma = host(weight).to(torch.float64).reshape(-1)
        if not layer:
            gamma = gamma[:, None].expand(-1, x.shape[1] * x.shape[2] // len(gamma)).reshape(x.shape[1], -1)
    return Groups(x, scale, centred * scale, gamma)


def layer_eps(node: Node) -> Ball:
    """The eps of a layer normalisation, which its node does not keep: an interval from the scales it does keep.

    The kernel's scale falls as eps rises. Where it comes out larger than what was recorded, eps was larger; where
    smaller, smaller. The rows of least variance tell most.
    """
    shape = tuple(node._saved_normalized_shape)
    length = math.prod(shape)
    x = node._saved_input.detach().reshape(-1, length)
    recorded = node._saved_result2.detach().reshape(-1)
    chosen = recorded.to(torch.float64).argsort(descending=True, stable=True)[:4]
    x, kept = x[chosen], recorded[chosen]

    weight = node._saved_weight
    weight = None if weight is None else weight.detach().reshape(-1)

    def scales(eps: float) -> Tensor:
        return torch.native_layer_norm(x, [length], weight, None, eps)[2].reshape(-1)

    guess = float((kept.to(torch.float64) ** -2 - x.to(torch.float64).var(1, correction=0)).clamp(min=0).median())
    top = 2 * guess + 1e-3
    while not bool((scales(top) < kept).any()):
        if not top < 1e30:
            raise ArithmeticError("a layer normalisation whose eps cannot be found")
        top *= 4
    low = _last(lambda eps: bool((scales(eps) > kept).any()), 0.0, top)[0]
    high = _last(lambda eps: not bool((scales(eps) < kept).any()), low, top)[1]
    middle = (low + high) / 2
    if not bool((scales(middle) == kept).all()):
        raise ArithmeticError("a layer normalisation whose statistics cannot be reproduced")
    tensor = torch.full((), middle, dtype=torch.float64)
    return Ball(tensor, torch.full((), (high - low) / 2 * (1 + 2.0**-20) + 1e-300, dtype=torch.float64))


def _last(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Neighbours around the last number where a predicate holds: it does at the first (or that is ``low``), not at
    the second (or that is ``high``).
    """
    for _ in range(150):
        middle = (low * high) ** 0.5 if low > 0 else high / 16
        if not low < middle < high:
            middle = (low + high) / 2
        if not low < middle < high or high < 1e-40:
            break
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high
