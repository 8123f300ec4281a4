"""Rules of the partial backward engine: the vector-Jacobian product of every supported operation, with error radii."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import balls, normalization
from .balls import Ball
from .layers import kind_of, shape_of
from .records import Node
from .rows import MOVES
from .slices import Slices, from_dense, padded, reduced, reshaped, to_dense
from .transfer import host, pick, take, through

if TYPE_CHECKING:
    from .backward import Pass

BUDGET = 256 << 20  # bytes a chunk of unfolded patches may take


class Unsupported(Exception):
    """The partial backward pass met an operation without a registered error bound."""


def _reshape(walk: Pass, node: Node, g: Slices) -> None:
    edge = node.next_functions[0]
    walk.send(edge, reshaped(walk.count, g, padded(shape_of(*edge))))


def _moved(walk: Pass, node: Node, g: Slices) -> None:
    """Data movement and sums of copies: the node itself maps float64 gradients, row by row, without rounding."""
    _by_node(walk, node, g, rounds=False)


def _positive(walk: Pass, node: Node, g: Slices) -> None:
    """Linear maps with weights >= 0 (means, average pooling): the node itself, plus its own rounding."""
    _by_node(walk, node, g, rounds=True)


def _by_node(walk: Pass, node: Node, g: Slices, rounds: bool) -> None:
    dense = to_dense(walk.count, g)
    out = shape_of(node, 0)

    def apply(t: Tensor) -> list[Tensor | None]:
        try:
            return list(through(node, 0, t.reshape(out)))
        except RuntimeError as error:
            raise Unsupported(f"{node.name()}: {error}") from error

    values = [apply(row) for row in dense.value]
    totals = [apply(row) for row in dense.value.abs()] if rounds else None
    radii = None if dense.radius is None else [apply(row) for row in dense.radius]
    for slot, edge in enumerate(node.next_functions):
        if edge[0] is None or values[0][slot] is None:
            continue
        value = torch.stack([_double(row[slot]) for row in values])
        radius = None if radii is None else torch.stack([_double(row[slot]) for row in radii])
        if totals is not None:
            rounding = torch.stack([_double(row[slot]) for row in totals]) * balls.gamma(math.prod(padded(out)) + 8)
            radius = rounding if radius is None else radius + rounding
        shape = padded(shape_of(*edge))
        ball = Ball(value, None if radius is None else radius * balls.SLACK)
        walk.send(edge, from_dense(ball.map(lambda t, s=shape: t.reshape(walk.count, *s)), shape))  # type: ignore[misc]


def _double(t: Tensor | None) -> Tensor:
    if t is None or t.dtype != torch.float64:
        raise Unsupported("a node that does not keep float64 gradients")
    return t


def _cast(walk: Pass, node: Node, g: Slices) -> None:
    walk.send(node.next_functions[0], g)


def _sum_of(walk: Pass, node: Node, g: Slices) -> None:
    if node._saved_alpha != 1:
        raise Unsupported(f"{node.name()} with alpha {node._saved_alpha}")
    signs = {"AddBackward": (1, 1), "SubBackward": (1, -1), "RsubBackward": (-1, 1)}[kind_of(node)]
    for edge, sign in zip(node.next_functions, signs, strict=False):
        if edge[0] is not None:
            term = g if sign > 0 else Slices(g.row, g.sample, -g.data, g.shape)
            walk.send(edge, reduced(walk.count, term, padded(shape_of(*edge))))


def _neg(walk: Pass, node: Node, g: Slices) -> None:
    walk.send(node.next_functions[0], Slices(g.row, g.sample, -g.data, g.shape))


def _mul(walk: Pass, node: Node, g: Slices) -> None:
    for edge, factor in zip(node.next_functions, (node._saved_other, node._saved_self), strict=False):
        if edge[0] is None:
            continue
        if factor is None:
            raise Unsupported(f"{node.name()} without its saved factor")
        wide = pick(factor.expand(g.shape), g.sample).to(torch.float64)
        product = Slices(g.row, g.sample, g.data * Ball(wide), g.shape)
        walk.send(edge, reduced(walk.count, product, padded(shape_of(*edge))))


def _dropout(walk: Pass, node: Node, g: Slices) -> None:
    """A GPU's dropout, ``mask x / (1 - p)``: the radius covers any rounding of the factor to float32."""
    shape = shape_of(node, 0)
    slope = _double(through(node, 0, torch.ones(shape, dtype=torch.float64))[0]).reshape(padded(shape))[g.sample]
    exact = bool((slope == slope.to(torch.int64)).all())
    product = g.data * Ball(slope, None if exact else slope * 2.0**-22)
    walk.send(node.next_functions[0], Slices(g.row, g.sample, product, g.shape))


def _convolution(walk: Pass, node: Node, g: Slices) -> None:
    if node._saved_transposed or len(g.shape) not in (3, 4, 5):
        raise Unsupported(f"{node.name()} (transposed)")
    weight, bias = walk.weight(node.next_functions[1], node), walk.weight(node.next_functions[2], node)
    spatial = tuple(range(2, len(g.shape)))
    if bias is not None:
        add_rows(walk, bias, g.row, g.data.sum(spatial))
    if weight is not None:
        _conv_weight(walk, node, g, weight)
    edge = node.next_functions[0]
    if edge[0] is not None:
        shape = shape_of(*edge)
        kernel = host(node._saved_weight).to(torch.float64)
        options = dict(
            stride=list(node._saved_stride),
            padding=list(node._saved_padding),
            dilation=list(node._saved_dilation),
            groups=node._saved_groups,
        )
        back: Any = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[len(g.shape)]
        base = [
            (o - 1) * s - 2 * p + d * (k - 1) + 1
            for o, s, p, d, k in zip(
                g.shape[2:], options["stride"], options["padding"], options["dilation"], kernel.shape[2:], strict=True
            )
        ]
        extra = [size - b for size, b in zip(shape[2:], base, strict=True)]

        def apply(t: Tensor, w: Tensor) -> Tensor:
            result: Tensor = back(t, w, output_padding=extra, **options)
            return result

        terms = kernel.shape[0] // node._saved_groups * math.prod(kernel.shape[2:])
        walk.send(edge, Slices(g.row, g.sample, balls.linear(apply, g.data, kernel, terms), shape))


def _conv_weight(walk: Pass, node: Node, g: Slices, leaf: str) -> None:
    """Per slice: (output gradient) x (unfolded input)^T, then summed over the slices of a row."""
    if len(g.shape) != 4:
        raise Unsupported(f"{node.name()} in {len(g.shape) - 2} dimensions")
    shape = tuple(walk.graph.leaves.tensor(leaf).shape)
    groups = node._saved_groups
    samples, index = torch.unique(g.sample, return_inverse=True)
    x = pick(node._saved_input, samples)
    columns = unfolded(node, x, shape)
    columns = columns.reshape(len(samples), groups, -1, columns.shape[-1])
    step = max(1, BUDGET // (64 * max(1, columns[0].numel())))

    def apply(t: Tensor, w: Tensor) -> Tensor:
        out = t.reshape(len(t), groups, shape[0] // groups, -1)
        return (out @ w.transpose(2, 3)).reshape(len(t), *shape)

    for start in range(0, len(g.row), step):
        part = slice(start, start + step)
        data = g.data.map(lambda t, p=part: t[p])  # type: ignore[misc]
        add_rows(walk, leaf, g.row[part], balls.linear(apply, data, columns[index[part]], columns.shape[-1]))


def unfolded(node: Node, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Patches of x in float64, [N, C * k * k, L], for a weight of this shape."""
    geometry = tuple(node._saved_dilation), tuple(node._saved_padding), tuple(node._saved_stride)
    return F.unfold(x.to(torch.float64), shape[2:], *geometry)


def add_rows(walk: Pass, leaf: str, row: Tensor, data: Ball) -> None:
    """Sum per-slice gradients [M, *leaf shape] into the leaf's [count, numel]."""
    flat = data.map(lambda t: t.reshape(len(row), -1))
    order = torch.argsort(row, stable=True)
    ranks = torch.arange(len(order)) - torch.searchsorted(row[order], row[order])
    for rank in range(int(ranks.max()) + 1 if len(ranks) else 0):
        picked = order[ranks == rank]

        def fill(t: Tensor, picked: Tensor = picked) -> Tensor:
            full = torch.zeros(walk.count, t.shape[1], dtype=torch.float64)
            full[row[picked]] = t[picked]
            return full

        walk.add_leaf(leaf, flat.map(fill))


def _linear(walk: Pass, node: Node, g: Slices) -> None:
    biased = kind_of(node) == "AddmmBackward"
    if biased and (node._saved_alpha != 1 or node._saved_beta != 1):
        raise Unsupported(f"{node.name()} with alpha or beta")
    if biased and node.next_functions[0][0] is not None:
        shape = padded(shape_of(*node.next_functions[0]))
        walk.send(node.next_functions[0], reduced(walk.count, g, shape))
    x_edge, w_edge = node.next_functions[biased], node.next_functions[1 + biased]
    if w_edge[0] is not None:
        if kind_of(w_edge[0]) != "TBackward":
            raise Unsupported(f"{node.name()} with a computed weight ({w_edge[0].name()})")
        leaf = walk.weight(w_edge[0].next_functions[0], node)
        assert leaf is not None
        x = pick(node._saved_mat1 if biased else node._saved_self, g.sample).to(torch.float64)

        def outer(t: Tensor, w: Tensor) -> Tensor:
            return t[:, :, None] * w[:, None, :]

        add_rows(walk, leaf, g.row, balls.linear(outer, g.data, x, 1))
    if x_edge[0] is not None:
        weight = host(node._saved_mat2).to(torch.float64)

        def apply(t: Tensor, w: Tensor) -> Tensor:
            return t @ w.T

        data = balls.linear(apply, g.data, weight, weight.shape[1])
        walk.send(x_edge, Slices(g.row, g.sample, data, shape_of(*x_edge)))


def _batch_norm(walk: Pass, node: Node, g: Slices) -> None:
    """``y = gamma (x - mean) / sigma + beta``; in train mode mean and sigma are functions of x and couple samples."""
    if node._saved_training and walk.local and _one_channel(walk, node, g):
        return
    gamma, beta = walk.weight(node.next_functions[1], node), walk.weight(node.next_functions[2], node)
    dims = tuple(range(2, len(g.shape)))
    if beta is not None:
        add_rows(walk, beta, g.row, g.data.sum(dims))
    stats = normalization.statistics(node)
    scale = stats.scale
    if node._saved_weight is not None:
        scale = scale * Ball(stats.channels(host(node._saved_weight).to(torch.float64)))
    if not node._saved_training:
        if gamma is not None:
            product = g.data * stats.normalized.map(lambda t: t[g.sample])
            add_rows(walk, gamma, g.row, product.sum(dims))
        walk.send(node.next_functions[0], Slices(g.row, g.sample, g.data * scale, g.shape))
        return
    dense = to_dense(walk.count, g)
    easy = normalization.cancels(dense, stats.x)
    keep = easy[g.row]
    plain = (g.data * scale).map(lambda t: t[keep])
    walk.send(node.next_functions[0], Slices(g.row[keep], g.sample[keep], plain, g.shape))
    hard = torch.nonzero(~easy).flatten()
    if len(hard):
        part, along = normalization.coupled(dense.map(lambda t: t[hard]), stats, scale)
        stack = from_dense(part, g.shape)
        walk.send(node.next_functions[0], Slices(hard[stack.row], stack.sample, stack.data, g.shape))
        if gamma is not None:
            add_rows(walk, gamma, hard, along)


def _one_channel(walk: Pass, node: Node, g: Slices) -> bool:
    """Train-mode normalisation right above a convolution, every row in one channel: only that channel is computed.

    What ties of rounded normalised values need, without the cost of a pass over all channels. False, with nothing
    done, where the pattern is another.
    """
    conv = node.next_functions[0][0]
    if conv is None or conv in walk.graph.record_of or kind_of(conv) != "ConvolutionBackward" or len(g.shape) != 4:
        return False
    above, weight = conv.next_functions[0][0], walk.graph.leaf(conv.next_functions[1][0])
    if conv._saved_groups != 1 or conv._saved_transposed or weight is None:
        return False
    if above is not None and above not in walk.graph.record_of:
        return False
    there = ~g.data.zero().flatten(2).all(2)  # [M, C]
    channel = torch.zeros(walk.count, dtype=torch.int64)
    channel[g.row] = there.to(torch.int64).argmax(1)
    if not bool((there.sum(1) == 1).all()) or not bool(there[torch.arange(len(g.row)), channel[g.row]].all()):
        return False
    used, place = torch.unique(channel, return_inverse=True)
    stats = normalization.statistics(node, used)
    own = g.data.map(lambda t: t[torch.arange(len(g.row)), channel[g.row]][:, None])
    dense = to_dense(walk.count, Slices(g.row, g.sample, own, (g.shape[0], 1, *g.shape[2:])))
    mine = normalization.Statistics(
        stats.x[:, place].movedim(1, 0)[:, :, None],
        stats.scale.map(lambda t: t[0, place][:, None, None]),
        stats.normalized.map(lambda t: t[:, place].movedim(1, 0)[:, :, None]),
        stats.count,
    )
    scale = mine.scale
    if node._saved_weight is not None:
        factor = take(node._saved_weight.detach(), channel).to(torch.float64).reshape(-1, 1, 1, 1, 1)
        scale = scale * Ball(factor)
    result, along = normalization.coupled(dense, mine, scale)

    def spread(rows: Ball, leaf: str) -> None:
        """Put [count, n] entries into their channel's group of a leaf."""
        shape = tuple(walk.graph.leaves.tensor(leaf).shape)

        def fill(t: Tensor) -> Tensor:
            full = torch.zeros(walk.count, shape[0], t.shape[1], dtype=torch.float64)
            full[torch.arange(walk.count), channel] = t
            return full.flatten(1)

        walk.add_leaf(leaf, rows.map(fill))

    for edge, rows in ((node.next_functions[1], along), (node.next_functions[2], dense.sum((1, 2, 3, 4)))):
        leaf = walk.weight(edge, node)
        if leaf is not None:
            spread(rows.map(lambda t: t.reshape(walk.count, 1)), leaf)
    bias = walk.weight(conv.next_functions[2], conv)
    if bias is not None:
        spread(result.sum((1, 2, 3, 4)).map(lambda t: t[:, None]), bias)
    z = host(conv._saved_input)
    columns = unfolded(conv, z, tuple(walk.graph.leaves.tensor(weight).shape))  # [N, C * k * k, L]
    flat = result.map(lambda t: t.reshape(walk.count, len(z), -1).movedim(0, 2))  # [N, L, count]

    def apply(t: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(w, t).sum(0).T

    spread(balls.linear(apply, flat, columns, len(z) * columns.shape[2], z), weight)
    return True


_Rule = Callable[["Pass", Node, Slices], None]
RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ["ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "SqueezeBackward", "UnsqueezeBackward"], _reshape
    ),
    **dict.fromkeys(["CloneBackward", "AliasBackward", "ToCopyBackward"], _cast),
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(
        ["ExpandBackward", "MeanBackward", "SumBackward", "AvgPool2DBackward", "AdaptiveAvgPool2DBackward"], _positive
    ),
    **dict.fromkeys(["AddBackward", "SubBackward", "RsubBackward"], _sum_of),
    "NegBackward": _neg,
    "MulBackward": _mul,
    "NativeDropoutBackward": _dropout,
    "ConvolutionBackward": _convolution,
    "AddmmBackward": _linear,
    "MmBackward": _linear,
    **dict.fromkeys(normalization.BATCH_NORM, _batch_norm),
}
