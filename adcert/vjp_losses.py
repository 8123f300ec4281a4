"""Rules for losses: from the gradient of a number, or of one number a sample, to the predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .balls import Ball
from .enclosures import constant, reciprocal
from .layers import shape_of
from .nodes import Node
from .slices import Slices, from_dense, padded, to_dense
from .transfer import pick
from .vjp import Rule, Unsupported, needed, saved, send_dense, send_reduced, times

if TYPE_CHECKING:
    from .backward import Pass

_NONE, _MEAN, _SUM = range(3)  # ATen's numbers of a reduction


def _spread(walk: Pass, g: Slices, shape: tuple[int, ...], reduction: int) -> Slices:
    """The gradient at every unit of an unreduced loss of this shape, before a mean is divided by their number."""
    if reduction == _NONE:
        return g
    dense = to_dense(walk.count, g).map(lambda t: t.reshape(walk.count, *[1] * len(padded(shape))))
    return from_dense(dense.map(lambda t: t.expand(walk.count, *padded(shape)).contiguous()), padded(shape))


def _mse(walk: Pass, node: Node, g: Slices) -> None:
    """``(x - t)^2``."""
    reduction = int(node._saved_reduction)
    x, target = (needed(node, name) for name in ("self", "target"))
    both = torch.broadcast_tensors(x, target)  # type: ignore[no-untyped-call]
    spread = _spread(walk, g, tuple(both[0].shape), reduction)
    a, b = (Ball(pick(t.reshape(spread.shape), spread.sample).to(torch.float64)) for t in both)
    found = times(spread, (a - b) * constant(2.0))
    if reduction == _MEAN:
        found = Slices(found.row, found.sample, found.data.divided(max(1, both[0].numel())), found.shape)
    first, second = node.next_functions
    send_reduced(walk, first, found)
    if second[0] is not None:
        send_reduced(walk, second, Slices(found.row, found.sample, -found.data, found.shape))


def _nll(walk: Pass, node: Node, g: Slices) -> None:
    """Minus the entry of the target class, weighted; a mean is over the weights."""
    reduction, edge = int(node._saved_reduction), node.next_functions[0]
    shape = shape_of(*edge)
    if len(shape) != 2:
        raise Unsupported(f"{node.name()} of one sample")
    target = needed(node, "target").cpu()
    kept = target != node._saved_ignore_index
    known = torch.where(kept, target, 0)
    weight = saved(node, "weight")
    share = torch.ones(len(target), dtype=torch.float64)
    if weight is not None:
        share = weight.detach().cpu().to(torch.float64)[known]
    factor = Ball(-share * kept)
    if reduction == _MEAN:
        if weight is None and int(kept.sum()) > 0:
            factor = factor.divided(int(kept.sum()))
        else:
            factor = factor * reciprocal(Ball(share * kept).sum((0,)))
    spread = _spread(walk, g, (len(target),), reduction)
    dense = to_dense(walk.count, spread) * factor

    def place(t: torch.Tensor) -> torch.Tensor:
        full = torch.zeros(walk.count, *shape, dtype=torch.float64)
        full[:, torch.arange(len(target)), known] = t
        return full

    send_dense(walk, edge, dense.map(place))


RULES: dict[str, Rule] = {"MseLossBackward": _mse, "NllLossBackward": _nll}
