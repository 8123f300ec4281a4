"""Rules of the partial backward engine: the vector-Jacobian product of every supported operation, with error radii.

What the rules share is here, and the simplest of them; :mod:`adcert.rules` is the table of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .balls import Ball
from .layers import kind_of, shape_of
from .nodes import Node
from .rows import alpha_of
from .slices import Slices, from_dense, padded, reduced, reshaped
from .transfer import pick, through

if TYPE_CHECKING:
    from .backward import Pass

BUDGET = 256 << 20  # bytes a chunk of unfolded patches may take

Edge = tuple[Node, int]
Sink = str | Edge  # where the gradient of a weight goes: a leaf, or what the weight was computed from
Rule = Callable[["Pass", Node, Slices], None]
NumberedRule = Callable[["Pass", Node, int, Slices], None]


class Unsupported(Exception):
    """The partial backward pass met an operation without a registered error bound."""


# ---- what rules share ------------------------------------------------------------------------------------------


def saved(node: Node, name: str) -> Any:
    """What the node saved under this name, None where it has nothing of the kind."""
    return getattr(node, f"_saved_{name}", None)


def needed(node: Node, name: str) -> Tensor:
    """A tensor the node must have saved."""
    value = saved(node, name)
    if not isinstance(value, Tensor):
        raise Unsupported(f"{node.name()} without what it needs ({name})")
    return value.detach()


def rows_at(t: Tensor, sample: Tensor) -> Tensor:
    """The slices of a tensor at these samples, on the host; a scalar counts as one sample."""
    return pick(t.reshape(1) if t.dim() == 0 else t, sample)


def by_sample(g: Slices, compute: Callable[[Tensor], Ball]) -> Ball:
    """``compute`` of the distinct samples (int64 [U] -> [U, ...]), one entry for every slice of g."""
    samples, index = torch.unique(g.sample, return_inverse=True)
    return compute(samples).map(lambda t: t[index])


def send(walk: Pass, edge: Edge, g: Slices, data: Ball) -> None:
    """Data in place of g's, to an edge of the same first dimension."""
    if edge[0] is not None:
        walk.send(edge, Slices(g.row, g.sample, data, padded(shape_of(*edge))))


def send_dense(walk: Pass, edge: Edge, data: Ball) -> None:
    """[count, ...] to an edge."""
    if edge[0] is not None:
        shape = padded(shape_of(*edge))
        walk.send(edge, from_dense(data.map(lambda t: t.reshape(walk.count, *shape)), shape))


def send_reduced(walk: Pass, edge: Edge, g: Slices) -> None:
    """To an operand that was broadcast to g's shape."""
    if edge[0] is not None:
        walk.send(edge, reduced(walk.count, g, padded(shape_of(*edge))))


def add_rows(walk: Pass, sink: Sink, row: Tensor, data: Ball) -> None:
    """Sum per-slice gradients [M, *shape of the weight] into [count, numel], for the weight's leaf or edge."""
    flat = data.map(lambda t: t.reshape(len(row), -1))
    order = torch.argsort(row, stable=True)
    ranks = torch.arange(len(order)) - torch.searchsorted(row[order], row[order])
    total: Ball | None = None
    for rank in range(int(ranks.max()) + 1 if len(ranks) else 0):
        picked = order[ranks == rank]

        def fill(t: Tensor, picked: Tensor = picked) -> Tensor:
            full = torch.zeros(walk.count, t.shape[1], dtype=torch.float64)
            full[row[picked]] = t[picked]
            return full

        term = flat.map(fill)
        total = term if total is None else total + term
    if total is not None:
        deliver(walk, sink, total)


def deliver(walk: Pass, sink: Sink, total: Ball) -> None:
    """[count, ...] to a weight."""
    if isinstance(sink, str):
        walk.add_leaf(sink, total.map(lambda t: t.reshape(walk.count, -1)))
    else:
        send_dense(walk, sink, total)


def _double(t: Tensor | None) -> Tensor:
    if t is None or t.dtype != torch.float64:
        raise Unsupported("a node that does not keep float64 gradients")
    return t


# ---- sums, products, views -------------------------------------------------------------------------------------


def _reshape(walk: Pass, node: Node, g: Slices) -> None:
    edge = node.next_functions[0]
    walk.send(edge, reshaped(walk.count, g, padded(shape_of(*edge))))


def _cast(walk: Pass, node: Node, g: Slices) -> None:
    walk.send(node.next_functions[0], g)


def times(g: Slices, factor: Ball) -> Slices:
    """A factor [M, ...] that broadcasts against g's data."""
    return Slices(g.row, g.sample, g.data * factor, g.shape)


def scaled(g: Slices, factor: float) -> Slices:
    """A number that is a float64 exactly."""
    if factor == 1.0:
        return g
    if factor == -1.0:
        return Slices(g.row, g.sample, -g.data, g.shape)
    return times(g, Ball(torch.full((), factor, dtype=torch.float64)))


def _sum_of(walk: Pass, node: Node, g: Slices) -> None:
    alpha = alpha_of(node)
    factors = {"AddBackward": (1.0, alpha), "SubBackward": (1.0, -alpha), "RsubBackward": (-alpha, 1.0)}[kind_of(node)]
    for edge, factor in zip(node.next_functions, factors, strict=False):
        send_reduced(walk, edge, scaled(g, factor))


def _neg(walk: Pass, node: Node, g: Slices) -> None:
    walk.send(node.next_functions[0], scaled(g, -1.0))


def wide(walk: Pass, node: Node, name: str, g: Slices) -> Ball:
    """A saved operand that was broadcast to the output's shape, or a number, at the samples of g."""
    factor = saved(node, name)
    if isinstance(factor, (int, float)):
        return Ball(torch.full((), float(factor), dtype=torch.float64))
    if not isinstance(factor, Tensor):
        raise Unsupported(f"{node.name()} without its saved factor")
    return Ball(pick(factor.detach().expand(g.shape), g.sample).to(torch.float64))


def _mul(walk: Pass, node: Node, g: Slices) -> None:
    for edge, name in zip(node.next_functions, ("other", "self"), strict=False):
        if edge[0] is not None:
            send_reduced(walk, edge, times(g, wide(walk, node, name, g)))


def _dropout(walk: Pass, node: Node, g: Slices) -> None:
    """A GPU's dropout, ``mask x / (1 - p)``: the radius covers any rounding of the factor to float32."""
    shape = shape_of(node, 0)
    slope = _double(through(node, 0, torch.ones(shape, dtype=torch.float64))[0]).reshape(padded(shape))[g.sample]
    exact = bool((slope == slope.to(torch.int64)).all())
    product = g.data * Ball(slope, None if exact else slope * 2.0**-22)
    walk.send(node.next_functions[0], Slices(g.row, g.sample, product, g.shape))


def _masked(walk: Pass, node: Node, g: Slices) -> None:
    """``where`` and ``masked_fill``: each operand gets what was taken from it."""
    fill = kind_of(node) == "MaskedFillBackward"
    mask = needed(node, "mask" if fill else "condition").expand(g.shape)
    chosen = rows_at(mask, g.sample)
    for edge, keep in zip(node.next_functions, (~chosen, chosen) if fill else (chosen, ~chosen), strict=False):
        send_reduced(walk, edge, Slices(g.row, g.sample, g.data.where(keep), g.shape))


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ["ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "SqueezeBackward", "UnsqueezeBackward"], _reshape
    ),
    **dict.fromkeys(["CloneBackward", "AliasBackward", "ToCopyBackward"], _cast),
    **dict.fromkeys(["AddBackward", "SubBackward", "RsubBackward"], _sum_of),
    "NegBackward": _neg,
    "MulBackward": _mul,
    "NativeDropoutBackward": _dropout,
    "WhereBackward": _masked,
    "MaskedFillBackward": _masked,
}
