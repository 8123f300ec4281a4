"""Rules for kinked operations that nobody recorded: their derivative where no kink is touched (see ``guards``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .balls import UNIT, Ball
from .guards import KINKS
from .layers import kind_of
from .movement import signed
from .nodes import Node
from .slices import Slices, to_dense
from .transfer import host
from .vjp import Rule, Unsupported, needed, rows_at, saved, send, send_dense, send_reduced, times, wide

if TYPE_CHECKING:
    from .backward import Pass


def untouched(node: Node) -> None:
    """Raises Unsupported where a kink is touched: the derivative is a choice there, and no record tells whose."""
    if not bool(KINKS[kind_of(node)](node)):
        raise Unsupported(f"{node.name()} at a kink that was not recorded")


def _elementwise(walk: Pass, node: Node, g: Slices) -> None:
    untouched(node)
    x = rows_at(needed(node, "self"), g.sample).to(torch.float64)
    send(walk, node.next_functions[0], g, g.data * SLOPES[kind_of(node)](node, x))


def _mask(mask: Tensor) -> Ball:
    return Ball(mask.to(torch.float64))


def _sides(negative: float, x: Tensor) -> Tensor:
    """1 on the positive side, a number on the other."""
    return torch.where(x > 0, torch.ones_like(x), negative)


def _hardsigmoid(node: Node, x: Tensor) -> Ball:
    value = _mask(x.abs() < 3).value / 6
    return Ball(value, value * UNIT)


def _hardswish(node: Node, x: Tensor) -> Ball:
    inside = _mask(x.abs() < 3).value
    return Ball(torch.where(x.abs() < 3, (2 * x + 3) / 6, _mask(x > 0).value), inside * (16 * UNIT))


SLOPES: dict[str, Callable[[Node, Tensor], Ball]] = {
    "AbsBackward": lambda node, x: Ball(x.sign()),
    "LeakyReluBackward": lambda node, x: Ball(_sides(float(node._saved_negative_slope), x)),
    "HardtanhBackward": lambda node, x: _mask((x > node._saved_min_val) & (x < node._saved_max_val)),
    "HardsigmoidBackward": _hardsigmoid,
    "HardswishBackward": _hardswish,
    "HardshrinkBackward": lambda node, x: _mask(x.abs() > node._saved_lambd),
    "SoftshrinkBackward": lambda node, x: _mask(x.abs() > node._saved_lambd),
    "ThresholdBackward": lambda node, x: _mask(x > node._saved_threshold),
}


def _rrelu(walk: Pass, node: Node, g: Slices) -> None:
    untouched(node)
    x = rows_at(needed(node, "self"), g.sample).to(torch.float64)
    if node._saved_training:
        slope = Ball(rows_at(needed(node, "noise"), g.sample).to(torch.float64))
    else:
        middle = (float(node._saved_lower) + float(node._saved_upper)) / 2
        slope = Ball(_sides(middle, x), _mask(x <= 0).value * (4 * UNIT * abs(middle)))
    send(walk, node.next_functions[0], g, g.data * slope)


def _prelu(walk: Pass, node: Node, g: Slices) -> None:
    """Both the input and the slope are operands."""
    untouched(node)
    x, slope = wide(walk, node, "self", g).value, wide(walk, node, "weight", g).value
    send_reduced(walk, node.next_functions[0], times(g, Ball(torch.where(x > 0, 1.0, slope))))
    send_reduced(walk, node.next_functions[1], times(g, Ball(torch.where(x > 0, 0.0, x))))


def _clamp(walk: Pass, node: Node, g: Slices) -> None:
    untouched(node)
    x = wide(walk, node, "self", g).value
    low, high = (None if saved(node, name) is None else wide(walk, node, name, g).value for name in ("min", "max"))
    above = torch.ones_like(x, dtype=torch.bool) if low is None else x > low
    below = torch.ones_like(x, dtype=torch.bool) if high is None else x < high
    masks = [above & below, ~above if high is None or low is None else ~above & (low < high)]
    masks.append(~below if low is None or high is None else (~below | (low > high)))
    if low is not None and high is not None:
        masks[0] &= low < high  # torch: the upper bound wins
    edges = list(node.next_functions)
    order = {1: (0,), 3: (0, 1, 2)}.get(len(edges), (0, 1 if saved(node, "max") is None else 2))
    for edge, which in zip(edges, order, strict=True):
        send_reduced(walk, edge, times(g, _mask(masks[which])))


def _larger(walk: Pass, node: Node, g: Slices) -> None:
    untouched(node)
    x, y = wide(walk, node, "self", g).value, wide(walk, node, "other", g).value
    first = x > y if kind_of(node) in ("MaximumBackward", "FmaxBackward") else x < y
    for edge, mask in zip(node.next_functions, (first, ~first), strict=True):
        send_reduced(walk, edge, times(g, _mask(mask)))


def _extreme(walk: Pass, node: Node, g: Slices) -> None:
    untouched(node)
    x, result = host(needed(node, "self")), host(needed(node, "result"))
    dims = saved(node, "dim")
    dims = [signed(d) % x.dim() for d in dims] if dims else list(range(x.dim()))
    kept = [1 if d in dims else size for d, size in enumerate(x.shape)]
    dense = to_dense(walk.count, g).map(lambda t: t.reshape(walk.count, *kept))
    send_dense(walk, node.next_functions[0], dense * _mask(x == result.reshape(kept)))


RULES: dict[str, Rule] = {
    **dict.fromkeys(SLOPES, _elementwise),
    "RreluWithNoiseBackward": _rrelu,
    "PreluKernelBackward": _prelu,
    **dict.fromkeys(["ClampBackward", "ClampMinBackward", "ClampMaxBackward"], _clamp),
    **dict.fromkeys([f"{name}Backward" for name in ("Maximum", "Minimum", "Fmax", "Fmin")], _larger),
    "AmaxBackward": _extreme,
    "AminBackward": _extreme,
}
