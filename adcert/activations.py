"""Kinked activations: one table of their kinks, one-sided derivatives and pieces; AD's proxies are measured.

An :class:`Activation` is an elementwise function rho that is continuous, analytic between finitely many kinks, and has
one-sided derivatives ``D-`` and ``D+`` at each. What autodiff multiplies by at a kink (the proxy) is not believed but
asked of the running torch, in the dtype and on the device at hand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from .balls import SLACK, Ball

Function = Callable[[Tensor], Tensor]
Derivative = Callable[[Tensor], Ball]  # of float64 values


@dataclass(frozen=True)
class Activation:
    """``rho``, with ``kinks`` ascending and ``slopes[k]`` that of the piece below the k-th kink (None: not constant).

    ``ends[k]``: (D-, D+) at the k-th kink. ``compute``: torch's function. ``derivative``: of the pieces whose slope is
    None, with a radius; None where each unit has a slope of its own (PReLU, RReLU), which its record then holds.
    ``given``: AD's proxies, where they are not torch's but the user's.
    """

    name: str
    arguments: tuple[float, ...]
    kinks: tuple[float, ...]
    slopes: tuple[float | None, ...]
    ends: tuple[tuple[float, float], ...]
    compute: Function = field(compare=False, repr=False)
    derivative: Derivative | None = field(default=None, compare=False, repr=False)
    given: tuple[float, ...] | None = None

    def proxies(self, x: Tensor) -> tuple[float, ...]:
        """AD's derivative at each kink, measured in the dtype and on the device of ``x``.

        >>> hardtanh(0.0, 6.0).proxies(torch.zeros(1))
        (0.0, 0.0)
        """
        return _measured(self, x.dtype, x.device)[0]

    def sides(self, x: Tensor) -> tuple[int, ...] | None:
        """Of each kink the side whose one-sided derivative is AD's proxy: -1, 1, or 0 for neither.

        None if AD's derivatives right below and above some kink are not D- and D+: then torch compares elsewhere in
        this dtype, and the table does not hold.

        >>> clamp(0.0, None).sides(torch.zeros(1)), magnitude().sides(torch.zeros(1))
        ((1,), (0,))
        """
        return _measured(self, x.dtype, x.device)[1]

    def code(self, x: Tensor) -> Tensor:
        """uint8, where each entry lies: 2 k in the piece below the k-th kink, 2 k + 1 at it. Compares in x's dtype."""
        place = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        for kink in self.kinks:
            place += (x >= kink).to(torch.uint8) + (x > kink).to(torch.uint8)
        return place

    def slope(self, code: Tensor, like: Tensor, x: Tensor | None = None, left: Tensor | None = None) -> Ball:
        """AD's derivative at units with places ``code``; ``left``: the units' own slopes, ``x``: their values.

        ``like`` has the dtype and the device of the step's tensor. A slope that its dtype rounds gets a radius.
        """
        table = [self.slopes[0]]
        proxies, sides = _measured(self, like.dtype, like.device)
        for k, (proxy, ends) in enumerate(zip(proxies, self.ends, strict=True)):
            side = 0 if sides is None else sides[k]  # a derivative of 1e-9 is measured as 0 in float16
            table += [ends[side > 0] if side else proxy, self.slopes[k + 1]]
        stored = [math.nan if s is None else _stored(s, like.dtype) for s in table]
        place = code.long()
        value = torch.tensor(stored, dtype=torch.float64)[place]
        radius = torch.where(value == value.round(), 0.0, value.abs() * _rounding(like.dtype))
        if left is not None:
            own = place < 2 * len(self.kinks)  # the proxy of a kink is the unit's own slope, too
            value, radius = torch.where(own, left.to(torch.float64), value), torch.where(own, 0.0, radius)
        elif self.derivative is not None and x is not None:
            found = self.derivative(x.to(torch.float64))
            assert found.radius is not None
            spread = found.radius + (0.0 if like.dtype == torch.float64 else found.value.abs() * _rounding(like.dtype))
            curved = torch.isnan(value)
            value, radius = torch.where(curved, found.value, value), torch.where(curved, spread, radius)
        return Ball(value, radius if bool((radius > 0).any()) else None)


def _side(proxy: float, below: float, above: float, unit: float) -> int:
    """0 too where the two derivatives can hardly be told apart."""
    close = unit * max(abs(below), abs(above))
    if abs(below - above) <= 4 * close:
        return 0
    return -1 if abs(proxy - below) <= close else 1 if abs(proxy - above) <= close else 0


def _stored(slope: float, dtype: torch.dtype) -> float:
    """A slope as the kernels multiply by it: of float32 and below they hold a float32."""
    return slope if dtype == torch.float64 else float(torch.tensor(slope, dtype=torch.float32))


def _rounding(dtype: torch.dtype) -> float:
    """Relative distance of a slope that is no integer from what some kernel may have made of it."""
    return {torch.float64: 2.0**-51, torch.float32: 2.0**-22}.get(dtype, 2.0**-7)


@functools.lru_cache(maxsize=1024)
def _measured(
    rho: Activation, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[float, ...], tuple[int, ...] | None]:
    """AD's derivatives at the kinks, and which side's they are; the neighbouring numbers are asked, too."""
    at = torch.tensor(rho.kinks, dtype=torch.float64).to(dtype)
    infinity = torch.tensor(math.inf, dtype=dtype)
    points = torch.stack([torch.nextafter(at, -infinity), at, torch.nextafter(at, infinity)]).to(device)
    alone = saved_tensors_hooks(lambda t: t, lambda t: t)  # a checkpoint counts what is saved
    with torch.enable_grad(), torch.inference_mode(False), torch._C.DisableTorchFunction(), alone:
        points.requires_grad_()
        (found,) = torch.autograd.grad(rho.compute(points).sum(), points)
    below, proxies, above = found.to("cpu", torch.float64).tolist()
    proxies = proxies if rho.given is None else list(rho.given)
    unit = max(2.0**-22, 8 * torch.finfo(dtype).eps)  # even in float64 some kernels hold a slope as a float32
    near = all(
        abs(b - low) <= 4 * unit and abs(a - high) <= 4 * unit
        for b, a, (low, high) in zip(below, above, rho.ends, strict=True)
    )
    told = zip(proxies, rho.ends, strict=True)
    if rho.given is None:
        sides = tuple(_side(proxy, *ends, unit) for proxy, ends in told)
    else:  # a number, not a measurement: 0.05 is no side of a ReLU, though bfloat16 hardly tells it from 0
        sides = tuple(-1 if proxy == low else int(proxy == high) for proxy, (low, high) in told)
    return tuple(proxies), sides if near else None


def relu() -> Activation:
    """``max(x, 0)``."""
    return Activation("relu", (), (0.0,), (0.0, 1.0), ((0.0, 1.0),), torch.relu)


def hardtanh(low: float, high: float) -> Activation:
    """``min(max(x, low), high)``; ReLU6 is ``hardtanh(0, 6)``."""
    ends = ((0.0, 1.0), (1.0, 0.0))
    compute = functools.partial(F.hardtanh, min_val=low, max_val=high)
    return Activation("hardtanh", (low, high), (low, high), (0.0, 1.0, 0.0), ends, compute)


def clamp(low: float | None, high: float | None) -> Activation:
    """``torch.clamp``: the function of :func:`hardtanh`, but other proxies; None: no bound."""
    kinks = tuple(bound for bound in (low, high) if bound is not None)
    ends = ((0.0, 1.0),) * (low is not None) + ((1.0, 0.0),) * (high is not None)
    slopes = (0.0,) * (low is not None) + (1.0,) + (0.0,) * (high is not None)
    arguments = (-math.inf if low is None else low, math.inf if high is None else high)
    return Activation("clamp", arguments, kinks, slopes, ends, functools.partial(torch.clamp, min=low, max=high))


def magnitude() -> Activation:
    """``abs``."""
    return Activation("abs", (), (0.0,), (-1.0, 1.0), ((-1.0, 1.0),), torch.abs)


def leaky_relu(slope: float) -> Activation:
    """``x`` above 0, ``slope x`` below."""
    compute = functools.partial(F.leaky_relu, negative_slope=slope)
    return Activation("leaky_relu", (slope,), (0.0,), (slope, 1.0), ((slope, 1.0),), compute)


def prelu() -> Activation:
    """``x`` above 0, ``a x`` below; the slope ``a`` of each channel is a parameter, and the record holds it."""
    return Activation("prelu", (), (0.0,), (None, 1.0), ((0.25, 1.0),), _fixed_prelu)


def rrelu() -> Activation:
    """PReLU with a slope drawn for each unit; in the step it is a constant."""
    return Activation("rrelu", (), (0.0,), (None, 1.0), ((0.25, 1.0),), _fixed_rrelu)


def hardsigmoid() -> Activation:
    """``min(max(x + 3, 0), 6) / 6``."""
    ends = ((0.0, 1 / 6), (1 / 6, 0.0))
    return Activation("hardsigmoid", (), (-3.0, 3.0), (0.0, 1 / 6, 0.0), ends, F.hardsigmoid)


def hardswish() -> Activation:
    """``x hardsigmoid(x)``: a parabola between its kinks -3 and 3."""
    ends = ((0.0, -0.5), (1.5, 1.0))
    slopes = (0.0, None, 1.0)
    return Activation("hardswish", (), (-3.0, 3.0), slopes, ends, F.hardswish, _hardswish_slope)


def softshrink(bound: float) -> Activation:
    """``x`` moved towards 0 by ``bound``, 0 in between."""
    ends = ((1.0, 0.0), (0.0, 1.0))
    compute = functools.partial(F.softshrink, lambd=bound)
    return Activation("softshrink", (bound,), (-bound, bound), (1.0, 0.0, 1.0), ends, compute)


def threshold(at: float) -> Activation:
    """``x`` above ``at``, the constant ``at`` below: ``threshold(x, at, at)``, which is continuous."""
    compute = functools.partial(F.threshold, threshold=at, value=at)
    return Activation("threshold", (at,), (at,), (0.0, 1.0), ((0.0, 1.0),), compute)


def elu(alpha: float, scale: float = 1.0) -> Activation:
    """``scale x`` above 0, ``scale alpha (e^x - 1)`` below; a kink unless alpha is 1. SELU is one of them."""
    below = alpha * scale
    compute = functools.partial(torch.ops.aten.elu.default, alpha=alpha, scale=scale)
    slopes = (None, scale)
    return Activation(
        "elu", (alpha, scale), (0.0,), slopes, ((below, scale),), compute, functools.partial(_elu_slope, below)
    )


SELU = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946  # alpha and scale, as torch has them


def _hardswish_slope(x: Tensor) -> Ball:
    value = x / 3 + 0.5
    return Ball(value, (x.abs() + 1) * 2.0**-50 * SLACK)


def _elu_slope(below: float, x: Tensor) -> Ball:
    value = below * torch.exp(x.clamp(max=0))
    return Ball(value, value.abs() * 2.0**-48 * SLACK + 1e-300)


def _fixed_prelu(x: Tensor) -> Tensor:
    return F.prelu(x, torch.full((1,), 0.25, dtype=x.dtype, device=x.device))


def _fixed_rrelu(x: Tensor) -> Tensor:
    """Its random numbers come from a generator of its own."""
    generator = torch.Generator(x.device)
    found: Tensor = torch.ops.aten.rrelu(x, 0.25, 0.25, True, generator)
    return found
