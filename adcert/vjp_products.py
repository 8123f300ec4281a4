"""Rules for convolutions and products of matrices, whose weights are leaves or computed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import balls
from .balls import Ball
from .layers import kind_of, shape_of, spacing
from .nodes import Node
from .slices import Slices, to_dense
from .transfer import host, pick
from .vjp import (
    BUDGET,
    Rule,
    Sink,
    Unsupported,
    add_rows,
    deliver,
    needed,
    scaled,
    send,
    send_dense,
    send_reduced,
    times,
)

if TYPE_CHECKING:
    from .backward import Pass

_CONVOLUTION: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


# ---- convolutions ----------------------------------------------------------------------------------------------


def _convolution(walk: Pass, node: Node, g: Slices) -> None:
    if len(g.shape) not in (3, 4, 5):
        raise Unsupported(f"{node.name()} in {len(g.shape) - 2} dimensions")
    weight, bias = walk.sink(node.next_functions[1]), walk.sink(node.next_functions[2])
    if bias is not None:
        add_rows(walk, bias, g.row, g.data.sum(tuple(range(2, len(g.shape)))))
    if weight is not None:
        _conv_weight(walk, node, g, weight)
    edge = node.next_functions[0]
    if edge[0] is not None:
        send(walk, edge, g, _conv_input(node, g, shape_of(*edge)))


def _conv_input(node: Node, g: Slices, shape: tuple[int, ...]) -> Ball:
    kernel = host(node._saved_weight).to(torch.float64)
    dims = len(shape) - 2
    taps, groups = math.prod(kernel.shape[2:]), node._saved_groups
    stride, padding, dilation = spacing(node)
    options: dict[str, Any] = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    if node._saved_transposed:
        whole = tuple(slice(0, size) for size in shape[2:])  # output_padding reaches where no input unit does

        def back(t: Tensor, w: Tensor) -> Tensor:
            result: Tensor = _CONVOLUTION[dims](t, w, **options)
            return result[(slice(None), slice(None), *whole)]

        return balls.linear(back, g.data, kernel, kernel.shape[1] * taps)
    geometry = zip(g.shape[2:], stride, padding, dilation, kernel.shape[2:], strict=True)
    base = [(o - 1) * s - 2 * p + d * (k - 1) + 1 for o, s, p, d, k in geometry]
    extra = [size - b for size, b in zip(shape[2:], base, strict=True)]

    def apply(t: Tensor, w: Tensor) -> Tensor:
        result: Tensor = _TRANSPOSED[dims](t, w, output_padding=extra, **options)
        return result

    return balls.linear(apply, g.data, kernel, kernel.shape[0] // groups * taps)


def _conv_weight(walk: Pass, node: Node, g: Slices, sink: Sink) -> None:
    """Per slice: (output gradient) x (unfolded input)^T, then summed over the slices of a row.

    A transposed convolution has the roles exchanged: (input) x (unfolded output gradient)^T.
    """
    shape = shape_of(*node.next_functions[1])
    groups, transposed = node._saved_groups, bool(node._saved_transposed)
    samples, index = torch.unique(g.sample, return_inverse=True)
    x = pick(node._saved_input, samples).to(torch.float64)
    fixed = x if transposed else unfolded(node, x, shape)
    fixed = fixed.reshape(len(samples), groups, -1, math.prod(x.shape[2:] if transposed else g.shape[2:]))
    size = max(fixed[0].numel(), math.prod(g.shape[1:]) * (math.prod(shape[2:]) if transposed else 1))
    step = max(1, BUDGET // (64 * max(1, size)))

    def apply(t: Tensor, w: Tensor) -> Tensor:
        if transposed:
            t = unfolded(node, t, shape, tuple(x.shape[2:]))
        t = t.reshape(len(t), groups, -1, w.shape[3])
        out = w @ t.transpose(2, 3) if transposed else t @ w.transpose(2, 3)
        return out.reshape(len(t), *shape)

    for start in range(0, len(g.row), step):
        part = slice(start, start + step)
        data = g.data.map(lambda t, p=part: t[p])  # type: ignore[misc]
        add_rows(walk, sink, g.row[part], balls.linear(apply, data, fixed[index[part]], fixed.shape[-1]))


def unfolded(node: Node, x: Tensor, shape: tuple[int, ...], most: tuple[int, ...] | None = None) -> Tensor:
    """Patches of x in float64, [N, C * taps, L], for a weight of this shape, in any number of dimensions.

    ``most``: at most so many places along every dimension.
    """
    stride, padding, dilation = spacing(node)
    x = F.pad(x.to(torch.float64), [p for size in reversed(padding) for p in (size, size)])
    taps = shape[2:]
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, taps, strict=True)]
    places = [(size - span) // s + 1 for size, span, s in zip(x.shape[2:], spans, stride, strict=True)]
    if most is not None:  # the output padding of a transposed convolution may make room for more than there are
        places = [min(place, size) for place, size in zip(places, most, strict=True)]
    steps = x.stride()
    inner = [steps[2 + i] * d for i, d in enumerate(dilation)]
    outer = [steps[2 + i] * s for i, s in enumerate(stride)]
    view = x.as_strided((*x.shape[:2], *taps, *places), (*steps[:2], *inner, *outer))
    return view.reshape(len(x), x.shape[1] * math.prod(taps), math.prod(places))


# ---- products of matrices --------------------------------------------------------------------------------------


def _linear(walk: Pass, node: Node, g: Slices) -> None:
    """``beta c + alpha x w`` with w [K, O], or without c; most weights are the transpose of a leaf."""
    biased = kind_of(node) == "AddmmBackward"
    if biased:
        send_reduced(walk, node.next_functions[0], scaled(g, float(node._saved_beta)))
        g = scaled(g, float(node._saved_alpha))
    x_edge, w_edge = node.next_functions[biased], node.next_functions[1 + biased]
    if w_edge[0] is not None:
        x = needed(node, "mat1" if biased else "self")
        above = w_edge[0].next_functions[0] if kind_of(w_edge[0]) == "TBackward" else None
        if above is not None and w_edge[0] not in walk.graph.record_of:
            sink = walk.sink(above)
            if sink is not None:
                outer(walk, sink, g, x, turned=True)
        else:
            outer(walk, w_edge, g, x, turned=False)
    if x_edge[0] is not None:
        weight = host(node._saved_mat2).to(torch.float64)
        send(walk, x_edge, g, balls.linear(lambda t, w: t @ w.T, g.data, weight, weight.shape[1]))


def outer(walk: Pass, sink: Sink, g: Slices, x: Tensor, turned: bool) -> None:
    """Per row ``x^T g`` [K, O] (or its transpose) of g [N, O] and x [N, K], over the samples the row involves."""
    rows, row, counts = torch.unique(g.row, return_inverse=True, return_counts=True)
    order = torch.argsort(row, stable=True)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(order)) - first[row[order]]
    features = x.shape[1]
    size = int(counts.max()) * (features + g.shape[1]) + features * g.shape[1]
    step = max(1, BUDGET // (64 * max(1, size)))
    parts: list[Ball] = []

    def product(t: Tensor, w: Tensor) -> Tensor:
        return t.transpose(1, 2) @ w if turned else w.transpose(1, 2) @ t

    for start in range(0, len(rows), step):
        inside = torch.nonzero((row[order] >= start) & (row[order] < start + step)).flatten()
        chosen = order[inside]
        at, depth = (row[chosen] - start, rank[inside]), int(counts[start : start + step].max())

        def stack(t: Tensor, at: tuple[Tensor, Tensor] = at, depth: int = depth, start: int = start) -> Tensor:
            full = torch.zeros(len(rows[start : start + step]), depth, t.shape[1], dtype=torch.float64)
            full[at] = t
            return full

        data = g.data.map(lambda t, c=chosen: t[c]).map(stack)  # type: ignore[misc]
        fixed = stack(pick(x, g.sample[chosen]).to(torch.float64))
        parts.append(balls.linear(product, data, fixed, depth))
    deliver(walk, sink, _placed(walk.count, rows, parts))


def _placed(count: int, rows: Tensor, parts: list[Ball]) -> Ball:
    """[count, ...]: the entries of ``parts``, one after the other, in these distinct rows."""
    exact = all(part.radius is None for part in parts)
    shape = parts[0].value.shape[1:]
    value = torch.zeros(count, *shape, dtype=torch.float64)
    radius = None if exact else torch.zeros_like(value)
    start = 0
    for part in parts:
        here = rows[start : start + len(part.value)]
        value[here] = part.value
        if radius is not None and part.radius is not None:
            radius[here] = part.radius
        start += len(part.value)
    return Ball(value, radius)


def _batched(walk: Pass, node: Node, g: Slices) -> None:
    """``beta c + alpha a b`` of stacks of matrices: samples are independent."""
    added = kind_of(node) == "BaddbmmBackward"
    names = ("batch1", "batch2") if added else ("self", "mat2")
    if added:
        send_reduced(walk, node.next_functions[0], scaled(g, float(node._saved_beta)))
        g = scaled(g, float(node._saved_alpha))
    first, second = node.next_functions[added:]
    for edge, name, left in ((first, names[1], False), (second, names[0], True)):
        if edge[0] is None:
            continue
        other = pick(needed(node, name), g.sample).to(torch.float64)
        if left:
            data = balls.linear(lambda t, w: w.transpose(1, 2) @ t, g.data, other, other.shape[1])
        else:
            data = balls.linear(lambda t, w: t @ w.transpose(1, 2), g.data, other, other.shape[2])
        send(walk, edge, g, data)


def _sum_of_products(walk: Pass, node: Node, g: Slices) -> None:
    """``beta c + alpha sum_b a_b b_b``: every pair of the stack sees the same gradient."""
    send_reduced(walk, node.next_functions[0], scaled(g, float(node._saved_beta)))
    dense = to_dense(walk.count, scaled(g, float(node._saved_alpha)))
    a, b = (host(needed(node, name)).to(torch.float64) for name in ("batch1", "batch2"))
    wide = dense.map(lambda t: t[:, None])
    if node.next_functions[1][0] is not None:
        found = balls.linear(lambda t, w: t @ w.transpose(1, 2), wide, b, b.shape[2])
        send_dense(walk, node.next_functions[1], found)
    if node.next_functions[2][0] is not None:
        found = balls.linear(lambda t, w: w.transpose(1, 2) @ t, wide, a, a.shape[1])
        send_dense(walk, node.next_functions[2], found)


def _matrix_vector(walk: Pass, node: Node, g: Slices) -> None:
    """``beta c + alpha A v``."""
    added = kind_of(node) == "AddmvBackward"
    matrix, vector = ("mat", "vec") if added else ("self", "vec")
    if added:
        send_reduced(walk, node.next_functions[0], scaled(g, float(node._saved_beta)))
        g = scaled(g, float(node._saved_alpha))
    first, second = node.next_functions[added:]
    if first[0] is not None:
        v = host(needed(node, vector)).to(torch.float64)
        send(walk, first, g, balls.linear(lambda t, w: t[:, None] * w, g.data, v, 1))
    if second[0] is not None:
        a = host(needed(node, matrix)).to(torch.float64)
        dense = to_dense(walk.count, g)
        send_dense(walk, second, balls.linear(torch.matmul, dense, a, a.shape[0]))


def _dot(walk: Pass, node: Node, g: Slices) -> None:
    """The product of two vectors; g is a number for every row."""
    names = ("other", "self") if kind_of(node) == "VdotBackward" else ("tensor", "self")
    for edge, name in zip(node.next_functions, names, strict=True):
        if edge[0] is not None:
            other = host(needed(node, name)).to(torch.float64)
            dense = to_dense(walk.count, g).map(lambda t: t.reshape(-1, 1))
            send_dense(walk, edge, balls.linear(lambda t, w: t * w, dense, other, 1))


def _outer_product(walk: Pass, node: Node, g: Slices) -> None:
    """``beta c + alpha u v^T``."""
    send_reduced(walk, node.next_functions[0], scaled(g, float(node._saved_beta)))
    dense = to_dense(walk.count, scaled(g, float(node._saved_alpha)))
    for edge, name, dim in ((node.next_functions[1], "vec2", 2), (node.next_functions[2], "vec1", 1)):
        if edge[0] is not None:
            other = host(needed(node, name)).to(torch.float64)
            turned = dense if dim == 2 else dense.map(lambda t: t.transpose(1, 2))
            send_dense(walk, edge, balls.linear(torch.matmul, turned, other, len(other)))


def _triple(walk: Pass, node: Node, g: Slices) -> None:
    """``a + value b c``."""
    send_reduced(walk, node.next_functions[0], g)
    value = scaled(g, float(node._saved_value))
    for edge, name in ((node.next_functions[1], "tensor2"), (node.next_functions[2], "tensor1")):
        if edge[0] is not None:
            other = pick(needed(node, name).expand(g.shape), g.sample).to(torch.float64)
            send_reduced(walk, edge, times(value, Ball(other)))


RULES: dict[str, Rule] = {
    "ConvolutionBackward": _convolution,
    "AddmmBackward": _linear,
    "MmBackward": _linear,
    "BmmBackward": _batched,
    "BaddbmmBackward": _batched,
    "AddbmmBackward": _sum_of_products,
    "MvBackward": _matrix_vector,
    "AddmvBackward": _matrix_vector,
    "DotBackward": _dot,
    "VdotBackward": _dot,
    "AddrBackward": _outer_product,
    "AddcmulBackward": _triple,
}
