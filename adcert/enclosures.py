"""Functions of balls: float64 values of torch, with radii that hold the exact value.

torch's float64 functions are taken to be within :data:`ULPS` units of their result, those of a lower precision within
as many of theirs. Tests compare them with ball arithmetic of arbitrary precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .balls import SLACK, TINY, UNIT, Ball

ULPS = 16.0  # times 2^-53, or what it is in the precision of the computation
_SMALL = 1e-300  # nothing is claimed of numbers below it


def computed(t: Tensor) -> Ball:
    """The exact result of an elementary function of which ``t``, in its own precision, is the computed one."""
    kind = torch.finfo(t.dtype)
    value = t.to(torch.float64)
    units = 1.0 if kind.bits == 16 else ULPS  # 16 bits: computed in float32, then rounded
    # A float32 or shorter result may have been flushed to zero; nothing below the smallest normal number is known.
    return Ball(value, (value.abs() * (units * kind.eps) + 4 * kind.tiny) * SLACK)


def constant(value: float) -> Ball:
    """A number that is a float64 exactly."""
    return Ball(torch.full((), value, dtype=torch.float64))


def _rounded(value: Tensor, spread: Tensor | None) -> Ball:
    """A value of one of torch's functions; ``spread`` bounds what the argument's radius does to it."""
    radius = value.abs() * (ULPS * UNIT) + TINY
    if spread is not None:
        radius = radius + spread
    return Ball(value, torch.nan_to_num(radius * SLACK, nan=math.inf, posinf=math.inf))


def exp(a: Ball) -> Ball:
    """``e^a``; minus infinity gives an exact 0."""
    value = a.value.exp()
    spread = None if a.radius is None else _raised(value, a.value, a.radius)
    ball = _rounded(value, spread)
    assert ball.radius is not None
    gone = a.value == -math.inf
    return Ball(value, torch.where(gone, 0.0, ball.radius))


def sigmoid(a: Ball) -> Ball:
    """``1 / (1 + e^-a)``: its logarithm has slopes between 0 and 1, and so has that of its difference from 1."""
    value = a.value.sigmoid()
    if a.radius is None:
        return _rounded(value, None)
    return _rounded(value, _raised(torch.minimum(value, (-a.value).sigmoid()), -a.value.abs(), a.radius))


def _raised(value: Tensor, exponent: Tensor, radius: Tensor) -> Tensor:
    """What an error of its exponent adds to ``value <= e^exponent``, which may have been flushed to 0."""
    more = torch.where(value > _SMALL, value * radius.expm1(), (exponent + radius).exp())
    return more * (1 + 2 * ULPS * UNIT)


def _absolute(a: Tensor) -> Tensor:
    return torch.full_like(a, ULPS * UNIT).masked_fill(~(a.abs() < 1e6), math.inf)


def sine(a: Tensor) -> Ball:
    """``sin a`` of exact numbers that are not huge, with an absolute error."""
    return Ball(a.sin(), _absolute(a))


def cosine(a: Tensor) -> Ball:
    """``cos a`` of exact numbers that are not huge, with an absolute error."""
    return Ball(a.cos(), _absolute(a))


def logarithm(a: Ball) -> Ball:
    """``ln a``; the radius is infinite where a may be 0 or negative."""
    value = a.value.log()
    radius = torch.zeros_like(value) if a.radius is None else a.radius
    low = a.value - radius * SLACK
    spread = torch.where(low > _SMALL, radius / low.clamp(min=_SMALL), math.inf)
    return Ball(torch.where(low > 0, value, 0.0), (spread + value.abs() * (ULPS * UNIT) + UNIT) * SLACK)


def reciprocal(a: Ball) -> Ball:
    """``1 / a``, exact for a power of two; the radius is infinite where a may be 0."""
    value = a.value.reciprocal()
    mantissa, exponent = torch.frexp(a.value)
    if a.radius is None and bool(((mantissa.abs() == 0.5) & (exponent.abs() < 900)).all()):
        return Ball(value)
    radius = torch.zeros_like(value) if a.radius is None else a.radius
    size = a.value.abs()
    low = size - radius * SLACK
    spread = torch.where(low > _SMALL, radius / low.clamp(min=_SMALL) / size.clamp(min=_SMALL), math.inf)
    return Ball(torch.where(low > 0, value, 0.0), (spread + value.abs() * UNIT + TINY) * SLACK)


def inverse_root(a: Ball) -> Ball:
    """``a^(-1/2)``; the radius is infinite where a may be 0 or negative."""
    value = a.value.rsqrt()
    radius = torch.zeros_like(value) if a.radius is None else a.radius
    low = a.value - radius * SLACK
    slope = torch.where(low > _SMALL, 0.5 * low.clamp(min=_SMALL) ** -1.5, math.inf)
    return Ball(value, (radius * slope + value.abs() * 8 * UNIT) * SLACK)


def power(a: Ball, exponent: int) -> Ball:
    """``a^n`` for a small n >= 0, by multiplication: exact on small integers."""
    result = Ball(torch.ones_like(a.value))
    for _ in range(exponent):
        result = result * a
    return result
