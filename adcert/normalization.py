"""Batch normalisation with error radii: statistics recomputed in float64 from the saved input; derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import balls
from .balls import Ball
from .layers import kind_of
from .records import Node
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
        mean = _divided(Ball(x).sum(dims, keepdim=True), count)
        centred = Ball(x) - mean
        variance = _divided((centred * centred).sum(dims, keepdim=True), count)
    else:
        centred = Ball(x) - Ball(wide(host(node._saved_running_mean).to(torch.float64)))
        variance = Ball(wide(host(node._saved_running_var).to(torch.float64)))
    scale = _inverse_root(variance + Ball(torch.full((), eps_of(node), dtype=torch.float64)))
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
    mean = _divided(g.sum(dims, keepdim=True), stats.count)
    result = (g - mean - stats.normalized * _divided(along, stats.count)) * scale
    return result, along.map(lambda t: t.reshape(t.shape[0], -1))


def _divided(a: Ball, count: int) -> Ball:
    value = a.value / count
    rounding = value.abs() * balls.UNIT
    return Ball(value, (rounding if a.radius is None else a.radius / count + rounding) * balls.SLACK)


def _inverse_root(a: Ball) -> Ball:
    """a^(-1/2); the radius is infinite where a may be 0 or negative."""
    value = a.value.rsqrt()
    radius = torch.zeros_like(value) if a.radius is None else a.radius
    low = a.value - radius * balls.SLACK
    slope = torch.where(low > 0, 0.5 * low.clamp(min=1e-300) ** -1.5, math.inf)
    return Ball(value, (radius * slope + value.abs() * 8 * balls.UNIT) * balls.SLACK)
