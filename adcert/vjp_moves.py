"""Rules for operations whose output units are single input units, or sums and means of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import balls
from .balls import SLACK, UNIT, Ball
from .layers import kind_of, shape_of
from .movement import MOVES, PARTS, PERMUTATIONS, SOURCES, permutation, readers, signed, sources
from .nodes import Node
from .slices import Slices, padded, to_dense
from .vjp import Rule, Unsupported, needed, saved, send, send_dense

if TYPE_CHECKING:
    from .backward import Pass


# ---- every input unit goes to at most one output unit ----------------------------------------------------------


def moved(walk: Pass, node: Node, number: int, g: Slices) -> None:
    """Movements of data and sums: the node itself, asked with the numbers of its output units, tells where from."""
    try:
        tables = readers(node, number)
    except ValueError as error:
        raise Unsupported(str(error)) from error
    for edge, table in zip(node.next_functions, tables, strict=False):
        if edge[0] is not None and table is not None:
            _gather(walk, edge, g, table)


def _moved(walk: Pass, node: Node, g: Slices) -> None:
    moved(walk, node, 0, g)


def _permute(walk: Pass, node: Node, g: Slices) -> None:
    """The inverse permutation; slices stay slices where the first dimension stays first."""
    order = permutation(node)
    back = [order.index(d) for d in range(len(order))]
    edge = node.next_functions[0]
    if not order or order[0] == 0:
        send(walk, edge, g, g.data.map(lambda t: t.permute(back) if back else t))
    else:
        send_dense(walk, edge, to_dense(walk.count, g).map(lambda t: t.permute(0, *(1 + d for d in back))))


def _gather(walk: Pass, edge: tuple[Node, int], g: Slices, table: Tensor) -> None:
    """``table``: int64 [input units], the output unit each goes to, -1 for none."""

    def along(index: Tensor) -> Callable[[Tensor], Tensor]:
        known = index >= 0
        safe = index.clamp(min=0)
        if bool(known.all()):
            return lambda t: t.reshape(len(t), -1).index_select(1, index)
        return lambda t: torch.where(known, t.reshape(len(t), -1).index_select(1, safe), 0.0)

    shape = padded(shape_of(*edge))
    local = _local(table, shape[0], math.prod(g.shape[1:])) if shape[0] == g.shape[0] else None
    if local is not None:
        send(walk, edge, g, g.data.map(along(local)).map(lambda t: t.reshape(len(g.row), *shape[1:])))
    else:
        send_dense(walk, edge, to_dense(walk.count, g).map(along(table)))


def _local(table: Tensor, samples: int, inner: int) -> Tensor | None:
    """The table of one sample, if all samples have the same and none reads another."""
    rows = table.reshape(samples, -1)
    relative = torch.where(rows >= 0, rows - torch.arange(samples)[:, None] * inner, -1)
    if not bool((relative == relative[0]).all()):
        return None
    if bool(((rows >= 0) & ((relative < 0) | (relative >= inner))).any()):
        return None
    return relative[0]


# ---- every output unit is at most one input unit ---------------------------------------------------------------


def _scatter(walk: Pass, node: Node, g: Slices) -> None:
    """Copies: the gradients of all copies of a unit add up."""
    edge = node.next_functions[0]
    shape = padded(shape_of(*edge))
    try:
        table = sources(node)
    except ValueError as error:
        raise Unsupported(str(error)) from error
    inner = math.prod(shape[1:])
    local = _local(table, g.shape[0], inner) if shape[0] == g.shape[0] else None
    if local is not None:
        data = balls.scattered(g.data.map(lambda t: t.reshape(len(t), -1)), local, inner)
        send(walk, edge, g, data.map(lambda t: t.reshape(len(g.row), *shape[1:])))
    else:
        dense = to_dense(walk.count, g).map(lambda t: t.reshape(len(t), -1))
        send_dense(walk, edge, balls.scattered(dense, table, math.prod(shape)))


# ---- means and poolings ----------------------------------------------------------------------------------------


def _mean(walk: Pass, node: Node, g: Slices) -> None:
    """Every unit of a group gets the group's gradient over its size."""
    edge = node.next_functions[0]
    shape = shape_of(*edge)
    dims = saved(node, "dim")
    every = range(len(shape)) if not dims or not shape else [signed(d) % len(shape) for d in dims]
    kept = tuple(1 if d in every else size for d, size in enumerate(shape))
    table = torch.arange(math.prod(kept)).reshape(kept).expand(shape).reshape(-1)
    share = Slices(g.row, g.sample, g.data.divided(max(1, math.prod(shape) // max(1, math.prod(kept)))), g.shape)
    _gather(walk, edge, share, table)


def _adjoint(forward: Callable[[Tensor], Tensor], shape: tuple[int, ...], terms: int, g: Ball) -> Ball:
    """The transpose of a linear map, whose weights have one sign, that sums at most ``terms`` products either way."""

    def back(t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = torch.zeros(len(t), *shape, dtype=torch.float64, requires_grad=True)
            (found,) = torch.autograd.grad(forward(x), x, t)
        return found

    radius = back(g.value.abs()).abs() * balls.gamma(terms + 4)
    if g.radius is not None:
        radius = radius + back(g.radius).abs()
    return Ball(back(g.value), radius * SLACK)


def _divisor(node: Node) -> int | None:
    given = saved(node, "divisor_override")
    return None if given is None else signed(given)


def _avg_pool(walk: Pass, node: Node, g: Slices) -> None:
    edge = node.next_functions[0]
    kind = kind_of(node)
    adaptive, dims = "Adaptive" in kind, 3 if "3D" in kind else 2
    size = g.shape[-dims:]
    pool: Any
    if adaptive:
        adapt: Any = F.adaptive_avg_pool3d if dims == 3 else F.adaptive_avg_pool2d
        pool = lambda x: adapt(x, size)  # noqa: E731
    else:
        plain: Any = F.avg_pool3d if dims == 3 else F.avg_pool2d
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        options = [saved(node, name) for name in names[:-1]] + [_divisor(node)]
        pool = lambda x: plain(x, *options)  # noqa: E731
    shape = shape_of(*edge)
    if len(shape) == dims + 1:  # no batch dimension: slices are channels
        found = _adjoint(lambda x: pool(x[:, None])[:, 0], shape[1:], math.prod(shape[-dims:]), g.data)
    else:
        found = _adjoint(pool, shape[1:], math.prod(shape[-dims:]), g.data)
    send(walk, edge, g, found)


def _upsample(walk: Pass, node: Node, g: Slices) -> None:
    """Linear interpolation: one matrix for every axis."""
    edge = node.next_functions[0]
    shape = shape_of(*edge)
    dims = len(shape) - 2
    names = ("scales",) if dims == 1 else ("scales_d", "scales_h", "scales_w")[3 - dims :]
    data = g.data
    for axis in range(dims):
        old, new = shape[2 + axis], g.shape[2 + axis]
        matrix = _interpolation(old, new, saved(node, names[axis]), bool(node._saved_align_corners))
        turned = data.map(lambda t, a=axis: t.movedim(2 + a, -1))  # type: ignore[misc]
        data = balls.matmul(turned, matrix).map(lambda t, a=axis: t.movedim(-1, 2 + a))  # type: ignore[misc]
    send(walk, edge, g, data)


def _interpolation(old: int, new: int, scale: float | None, align: bool) -> Ball:
    """Weights [new, old] of linear interpolation, as fractions rounded once."""
    table = torch.zeros(new, old, dtype=torch.float64)
    exact = True
    for place in range(new):
        if align:
            where = Fraction(place * (old - 1), new - 1) if new > 1 else Fraction(0)
        else:
            step = Fraction(old, new) if not scale or scale <= 0 else 1 / Fraction(scale)
            where = max(Fraction(0), step * (place + Fraction(1, 2)) - Fraction(1, 2))
        low = min(int(where), old - 1)
        part = where - low if low + 1 < old else Fraction(0)
        for index, weight in ((low, 1 - part), (low + 1, part)):
            if weight:
                table[place, index] += float(weight)
                exact = exact and Fraction(float(weight)) == weight
    options: dict[str, Any] = dict(mode="linear", align_corners=align)
    size: dict[str, Any] = dict(size=new) if not scale or scale <= 0 else dict(scale_factor=scale)
    known = F.interpolate(torch.eye(old, dtype=torch.float64)[None], **size, **options)[0].T
    if known.shape != table.shape or not bool(((known - table).abs() < 1e-9 * max(old, new)).all()):
        raise Unsupported("an interpolation whose weights are not the expected ones")
    return Ball(table, None if exact else table * (2 * UNIT))


def _cumsum(walk: Pass, node: Node, g: Slices) -> None:
    edge = node.next_functions[0]
    dim = signed(node._saved_dim) % len(g.shape)
    dense = to_dense(walk.count, g).map(lambda t: t.movedim(1 + dim, -1))
    ones = torch.ones(g.shape[dim], g.shape[dim], dtype=torch.float64).tril()
    send_dense(walk, edge, balls.matmul(dense, Ball(ones)).map(lambda t: t.movedim(-1, 1 + dim)))


def _bag(walk: Pass, node: Node, g: Slices) -> None:
    """Sums and means of embeddings; a bag without entries is zero."""
    mode, edge = int(node._saved_mode), node.next_functions[0]
    indices, offsets = (needed(node, name).cpu() for name in ("indices", "offsets"))
    if mode not in (0, 1) or saved(node, "per_sample_weights") is not None or indices.dim() != 1:
        raise Unsupported(f"{node.name()} of an unknown form")
    bags = torch.searchsorted(offsets, torch.arange(len(indices)), right=True) - 1
    rows, width = shape_of(*edge)
    dense = to_dense(walk.count, g)
    if mode == 1:
        held = torch.bincount(bags, minlength=g.shape[0]).clamp(min=1).to(torch.float64)
        share = held.reciprocal()[:, None]
        dense = dense * Ball(share, share * UNIT)
    taken = dense.map(lambda t: t[:, bags].movedim(2, 1).flatten(0, 1))
    data = balls.scattered(taken, indices, rows).map(lambda t: t.reshape(walk.count, width, rows).movedim(1, 2))
    send_dense(walk, edge, data)


SUMS = "ScatterAdd Col2Im Sum Trace"
#: Nodes with several outputs.
NUMBERED = dict.fromkeys(PARTS, moved)
RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(PERMUTATIONS, _permute),
    **dict.fromkeys([f"{name}Backward" for name in SUMS.split()], _moved),
    **dict.fromkeys(SOURCES, _scatter),
    "MeanBackward": _mean,
    **dict.fromkeys(
        [f"{name}Backward" for name in ("AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D")], _avg_pool
    ),
    **dict.fromkeys(
        ["UpsampleLinear1DBackward", "UpsampleBilinear2DBackward", "UpsampleTrilinear3DBackward"], _upsample
    ),
    "CumsumBackward": _cumsum,
    "EmbeddingBagBackward": _bag,
}
