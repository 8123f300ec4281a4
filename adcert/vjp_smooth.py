"""Rules for smooth elementwise operations: one table of derivatives, computed in float64 from what nodes saved.

Where a node saved its input, the derivative is that of the exact function there; where it saved its result, the result
is a rounding, and the radius says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import enclosures
from .balls import Ball
from .enclosures import computed, constant, reciprocal
from .layers import kind_of
from .movement import signed
from .nodes import Node
from .slices import Slices, from_dense, to_dense
from .transfer import pick
from .vjp import Rule, Unsupported, by_sample, needed, rows_at, saved, send, send_dense, send_reduced, times, wide

if TYPE_CHECKING:
    from .backward import Pass

Slope = Callable[[Node, Callable[[str], Tensor]], Ball]  # (node, saved tensor by name) -> derivative

_LN2 = enclosures.logarithm(constant(2.0))
_HALF_ROOT = enclosures.inverse_root(constant(2.0))  # 2^(-1/2)
# (2 pi)^(-1/2), of a float64 that is within 1e-15 of 2 pi
_DENSITY = enclosures.inverse_root(Ball(constant(2 * math.pi).value, constant(1e-15).value))


def elementwise(walk: Pass, node: Node, g: Slices) -> None:
    """The gradient times the derivative at every unit."""
    derivative = DERIVATIVES[kind_of(node)]

    def slope(samples: Tensor) -> Ball:
        return derivative(node, lambda name: rows_at(needed(node, name), samples))

    send(walk, node.next_functions[0], g, g.data * by_sample(g, slope))


def _input(at: Callable[[str], Tensor]) -> Ball:
    return Ball(at("self").to(torch.float64))


def _result(at: Callable[[str], Tensor]) -> Ball:
    return computed(at("result"))


def _one_minus(a: Ball) -> Ball:
    return constant(1.0) - a


def _sigmoid_slope(x: Ball) -> Ball:
    return enclosures.sigmoid(x) * enclosures.sigmoid(-x)


def _silu(node: Node, at: Callable[[str], Tensor]) -> Ball:
    x = _input(at)
    return enclosures.sigmoid(x) * (constant(1.0) + x * enclosures.sigmoid(-x))


def _normal(x: Ball) -> tuple[Ball, Ball]:
    """(distribution function, density) of the normal distribution at exact numbers, with absolute errors."""
    value = x.value
    below = torch.special.ndtr(value)
    error = torch.full_like(value, 64 * 2.0**-53)  # the argument's rounding moves the value by less than 2^-53
    density = enclosures.exp(-(x * x) * constant(0.5)) * _DENSITY
    return Ball(below, error), density


def _gelu(node: Node, at: Callable[[str], Tensor]) -> Ball:
    x = _input(at)
    if node._saved_approximate == "none":
        below, density = _normal(x)
        return below + x * density
    # x (1 + tanh u) / 2 = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
    root = constant(2.0) * _DENSITY  # sqrt(2 / pi) = 2 / sqrt(2 pi)
    cubic = constant(0.044715)
    u = constant(2.0) * root * (x + cubic * x * x * x)
    slope = constant(2.0) * root * (constant(1.0) + constant(3.0) * cubic * x * x)
    return enclosures.sigmoid(u) + x * _sigmoid_slope(u) * slope


def _mish(node: Node, at: Callable[[str], Tensor]) -> Ball:
    """``x t`` with ``t = tanh(ln(1 + e^x))``: of e^-|x| alone, so that nothing overflows."""
    x = _input(at)
    e = enclosures.exp(-Ball(x.value.abs()))
    one, two = constant(1.0), constant(2.0)
    positive = x.value > 0
    above = (one + two * e) * reciprocal(one + two * e + two * e * e)
    below = (e * e + two * e) * reciprocal(e * e + two * e + two)
    t = Ball(torch.where(positive, above.value, below.value), _chosen(positive, above, below))
    return t + x * enclosures.sigmoid(x) * (one - t * t)


def _chosen(mask: Tensor, a: Ball, b: Ball) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    return torch.where(mask, zero if a.radius is None else a.radius, zero if b.radius is None else b.radius)


def _softplus(node: Node, at: Callable[[str], Tensor]) -> Ball:
    """The sigmoid of beta x; 1 where torch takes x itself, either of them around that threshold."""
    threshold = float(node._saved_threshold)
    argument = _input(at) * constant(float(node._saved_beta))
    s = enclosures.sigmoid(argument)
    assert s.radius is not None
    linear, near = argument.value > threshold, (argument.value - threshold).abs() <= 0.02 * abs(threshold)
    radius = torch.where(linear, 0.0, s.radius) + torch.where(near, 1.01 * (1 - s.value).abs(), 0.0)
    return Ball(torch.where(linear, 1.0, s.value), radius)


def _elu(node: Node, at: Callable[[str], Tensor]) -> Ball:
    celu = kind_of(node) == "CeluBackward"
    if celu and not isinstance(saved(node, "self"), Tensor):  # in place: e^(x / alpha) = result / alpha + 1 below 0
        result = _result(at)
        below = result * reciprocal(constant(float(node._saved_alpha))) + constant(1.0)
        return Ball(torch.where(result.value > 0, 1.0, below.value), _chosen(result.value > 0, constant(1.0), below))
    x = _input(at)
    inner = reciprocal(constant(float(node._saved_alpha))) if celu else constant(float(node._saved_input_scale))
    scale = 1.0 if celu else float(node._saved_scale)
    below = enclosures.exp(x * inner)
    if not celu:
        below = below * (constant(float(node._saved_alpha)) * constant(scale) * inner)
    positive = x.value > 0
    value = torch.where(positive, scale, below.value)
    return Ball(value, torch.where(positive, 0.0, torch.zeros(()).double() if below.radius is None else below.radius))


def _power(node: Node, at: Callable[[str], Tensor]) -> Ball:
    """``n x^(n-1)`` for a number n."""
    return power_slope(_input(at), float(node._saved_exponent))


def power_slope(x: Ball, n: float) -> Ball:
    """The derivative of ``x^n`` at exact numbers."""
    if n == 0:
        return Ball(torch.zeros_like(x.value))
    if n == int(n) and abs(n) <= 16:
        power = enclosures.power(x, int(abs(n - 1)))
        return constant(n) * (power if n >= 1 else reciprocal(power))
    value = x.value ** (n - 1)
    size = x.value.abs().log().abs() + abs(n) + 2  # the rounding of n - 1 counts as often as the logarithm
    return constant(n) * Ball(value, value.abs() * size * (2 * enclosures.ULPS * 2.0**-53) + 1e-290)


def _square(a: Ball) -> Ball:
    return a * a


DERIVATIVES: dict[str, Slope] = {
    "TanhBackward": lambda node, at: _one_minus(_square(_result(at))),
    "SigmoidBackward": lambda node, at: _result(at) * _one_minus(_result(at)),
    "ExpBackward": lambda node, at: _result(at),
    "Expm1Backward": lambda node, at: _result(at) + constant(1.0),
    "Exp2Backward": lambda node, at: _result(at) * _LN2,
    "SqrtBackward": lambda node, at: reciprocal(_result(at)) * constant(0.5),
    "RsqrtBackward": lambda node, at: enclosures.power(_result(at), 3) * constant(-0.5),
    "ReciprocalBackward": lambda node, at: -_square(_result(at)),
    "TanBackward": lambda node, at: _square(_result(at)) + constant(1.0),
    "LogBackward": lambda node, at: reciprocal(_input(at)),
    "Log1PBackward": lambda node, at: reciprocal(_input(at) + constant(1.0)),
    "Log2Backward": lambda node, at: reciprocal(_input(at) * _LN2),
    "Log10Backward": lambda node, at: reciprocal(_input(at) * enclosures.logarithm(constant(10.0))),
    "SinBackward": lambda node, at: enclosures.cosine(at("self").to(torch.float64)),
    "CosBackward": lambda node, at: -enclosures.sine(at("self").to(torch.float64)),
    "AtanBackward": lambda node, at: reciprocal(_square(_input(at)) + constant(1.0)),
    "ErfBackward": lambda node, at: enclosures.exp(-_square(_input(at))) * constant(2.0) * _HALF_ROOT * _two_density(),
    "ErfcBackward": lambda node, at: (
        enclosures.exp(-_square(_input(at))) * constant(-2.0) * _HALF_ROOT * _two_density()
    ),
    "SinhBackward": lambda node, at: (enclosures.exp(_input(at)) + enclosures.exp(-_input(at))) * constant(0.5),
    "CoshBackward": lambda node, at: (enclosures.exp(_input(at)) - enclosures.exp(-_input(at))) * constant(0.5),
    "LogSigmoidBackward": lambda node, at: enclosures.sigmoid(-_input(at)),
    "SiluBackward": _silu,
    "GeluBackward": _gelu,
    "MishBackward": _mish,
    "SoftplusBackward": _softplus,
    "EluBackward": _elu,
    "CeluBackward": _elu,
}


def _two_density() -> Ball:
    """``1/sqrt(pi) = 2^(1/2) / sqrt(2 pi)``, as twice 2^(-1/2) of it."""
    return constant(2.0) * _DENSITY


# ---- two operands ----------------------------------------------------------------------------------------------


def _pow(walk: Pass, node: Node, g: Slices) -> None:
    exponent = saved(node, "exponent")
    if isinstance(exponent, (int, float)) and isinstance(saved(node, "self"), Tensor):
        slope = by_sample(g, lambda s: _power(node, lambda name: rows_at(needed(node, name), s)))
        send(walk, node.next_functions[0], g, g.data * slope)
        return
    base, power = wide(walk, node, "self", g), wide(walk, node, "exponent", g)
    edges = list(node.next_functions)
    both = isinstance(saved(node, "self"), Tensor) and len(edges) == 2
    value = base.value**power.value
    error = (2 * enclosures.ULPS * 2.0**-53) * (1 + power.value.abs()) * value.abs() + 1e-290
    result = Ball(value, torch.where(base.value > 0, error, math.inf))
    if both and edges[0][0] is not None:
        send_reduced(walk, edges[0], times(g, power * result * reciprocal(base)))
    if edges[-1][0] is not None:
        send_reduced(walk, edges[-1], times(g, result * enclosures.logarithm(base)))


def _div(walk: Pass, node: Node, g: Slices) -> None:
    if saved(node, "rounding_mode") is not None:
        raise Unsupported(f"{node.name()} with a rounding mode")
    inverse = reciprocal(wide(walk, node, "other", g))
    share = times(g, inverse)
    send_reduced(walk, node.next_functions[0], share)
    if len(node.next_functions) > 1 and node.next_functions[1][0] is not None:
        factor = wide(walk, node, "self", g) * inverse
        send_reduced(walk, node.next_functions[1], times(share, -factor))


def _addcdiv(walk: Pass, node: Node, g: Slices) -> None:
    """``a + value b / c``."""
    first, second, third = node.next_functions
    send_reduced(walk, first, g)
    inverse = reciprocal(wide(walk, node, "tensor2", g))
    share = times(times(g, constant(float(node._saved_value))), inverse)
    send_reduced(walk, second, share)
    if third[0] is not None:
        send_reduced(walk, third, times(share, -(wide(walk, node, "tensor1", g) * inverse)))


def _lerp(walk: Pass, node: Node, g: Slices) -> None:
    """``a + w (b - a)``."""
    weight = wide(walk, node, "weight", g)
    first, second, *third = node.next_functions
    send_reduced(walk, first, times(g, constant(1.0) - weight))
    send_reduced(walk, second, times(g, weight))
    if third and third[0][0] is not None:
        send_reduced(walk, third[0], times(g, wide(walk, node, "end", g) - wide(walk, node, "self", g)))


def _glu(walk: Pass, node: Node, g: Slices) -> None:
    """``a sigmoid(b)`` of the two halves of the input."""
    x = needed(node, "self")
    dim = signed(node._saved_dim) % x.dim()
    data, edge = to_dense(walk.count, g), node.next_functions[0]
    a, b = (Ball(t.to(torch.float64)[None]) for t in pick(x, torch.arange(len(x))).chunk(2, dim))
    s = enclosures.sigmoid(b)
    first, second = data * s, data * (a * _sigmoid_slope(b))
    radii = [torch.zeros_like(t.value) if t.radius is None else t.radius for t in (first, second)]
    both = Ball(torch.cat([first.value, second.value], 1 + dim), torch.cat(radii, 1 + dim))
    send_dense(walk, edge, both)


def _logsumexp(walk: Pass, node: Node, g: Slices) -> None:
    """Softmax of the input, times the gradient."""
    x = needed(node, "self")
    dims = sorted({signed(d) % x.dim() for d in node._saved_dim})
    x = pick(x, torch.arange(len(x))).to(torch.float64)
    e = enclosures.exp(Ball(x) - Ball(x.amax(dims, keepdim=True)))
    p = e * reciprocal(e.sum(tuple(dims), keepdim=True))
    kept = [1 if d in dims else size for d, size in enumerate(x.shape)]
    dense = to_dense(walk.count, g).map(lambda t: t.reshape(len(t), *kept))
    found = dense * p.map(lambda t: t[None])
    walk.send(node.next_functions[0], from_dense(found, tuple(x.shape)))


RULES: dict[str, Rule] = {
    **dict.fromkeys(DERIVATIVES, elementwise),
    "PowBackward": _pow,
    "DivBackward": _div,
    "AddcdivBackward": _addcdiv,
    "LerpBackward": _lerp,
    "GluBackward": _glu,
    "LogsumexpBackward": _logsumexp,
}
