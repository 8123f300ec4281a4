"""Rules for normalisations of all kinds, of activations and of weights, and for variances."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import balls, normalization
from .balls import Ball
from .enclosures import inverse_root
from .layers import kind_of, shape_of
from .movement import signed
from .nodes import Node
from .normalization import groups_of
from .slices import Slices, from_dense, padded, to_dense
from .transfer import host, take
from .vjp import NumberedRule, Rule, Sink, Unsupported, add_rows, needed, saved, send, send_dense
from .vjp_products import unfolded

if TYPE_CHECKING:
    from .backward import Pass


def _batch_norm(walk: Pass, node: Node, g: Slices) -> None:
    """``y = gamma (x - mean) / sigma + beta``; in train mode mean and sigma are functions of x and couple samples."""
    if node._saved_training and walk.local and _one_channel(walk, node, g):
        return
    gamma, beta = walk.sink(node.next_functions[1]), walk.sink(node.next_functions[2])
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
    if conv is None or conv in walk.graph.record_of or conv in walk.graph.dropped:
        return False
    if kind_of(conv) != "ConvolutionBackward" or len(g.shape) != 4:
        return False
    above, weight = conv.next_functions[0][0], walk.graph.leaf(conv.next_functions[1][0])
    sinks = [walk.sink(edge) for edge in (node.next_functions[1], node.next_functions[2], conv.next_functions[2])]
    if conv._saved_groups != 1 or conv._saved_transposed or weight is None:
        return False
    if not all(sink is None or isinstance(sink, str) for sink in sinks):
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

    def spread(rows: Ball, leaf: Sink | None) -> None:
        """Put [count, n] entries into their channel's group of a leaf."""
        if not isinstance(leaf, str):
            return
        shape = tuple(walk.graph.leaves.tensor(leaf).shape)

        def fill(t: Tensor) -> Tensor:
            full = torch.zeros(walk.count, shape[0], t.shape[1], dtype=torch.float64)
            full[torch.arange(walk.count), channel] = t
            return full.flatten(1)

        walk.add_leaf(leaf, rows.map(fill))

    spread(along.map(lambda t: t.reshape(walk.count, 1)), sinks[0])
    spread(dense.sum((1, 2, 3, 4)).map(lambda t: t.reshape(walk.count, 1)), sinks[1])
    spread(result.sum((1, 2, 3, 4)).map(lambda t: t.reshape(walk.count, 1)), sinks[2])
    z = host(conv._saved_input)
    columns = unfolded(conv, z, tuple(walk.graph.leaves.tensor(weight).shape))  # [N, C * k * k, L]
    flat = result.map(lambda t: t.reshape(walk.count, len(z), -1).movedim(0, 2))  # [N, L, count]

    def apply(t: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(w, t).sum(0).T

    spread(balls.linear(apply, flat, columns, len(z) * columns.shape[2], z), weight)
    return True


# ---- normalisation within a sample -----------------------------------------------------------------------------


def _group_norm(walk: Pass, node: Node, g: Slices) -> None:
    """Layer and group normalisation: statistics of groups inside a sample, recomputed from the recorded input."""
    layer = kind_of(node) == "NativeLayerNormBackward"
    if layer and len(node._saved_normalized_shape) == len(g.shape):  # nothing is left to tell samples apart
        one = (1, *g.shape)
        g = from_dense(to_dense(walk.count, g).map(lambda t: t[:, None]), one)
    samples, index = torch.unique(g.sample, return_inverse=True)
    try:
        stats = groups_of(node, samples)
    except ArithmeticError as error:
        raise Unsupported(f"{node.name()}: {error}") from error
    x, scale, normalized = stats.x[index], stats.scale.map(lambda t: t[index]), stats.normalized.map(lambda t: t[index])
    flat = g.data.map(lambda t: t.reshape(x.shape))  # [M, groups, length]
    weighted = flat if stats.gamma is None else flat * Ball(stats.gamma)
    mean = weighted.sum((2,), keepdim=True).divided(x.shape[2])
    along = _along(weighted, x, normalized).divided(x.shape[2])
    result = (weighted - mean - normalized * along) * scale
    edge = node.next_functions[0]
    if edge[0] is not None and layer and g.shape[0] == 1 and g.shape[1:] == padded(shape_of(*edge)):
        send_dense(walk, edge, to_dense(walk.count, Slices(g.row, g.sample, result, (1, *x.shape[1:]))))
    else:
        send(walk, edge, g, result.map(lambda t: t.reshape(g.data.value.shape)))
    _affine(walk, node, g.row, flat, x, normalized, layer)


def _affine(walk: Pass, node: Node, row: Tensor, flat: Ball, x: Tensor, normalized: Ball, layer: bool) -> None:
    """Gradients of gamma and beta, [M, ...] for every slice: gamma's entry belongs to a place or to a channel."""
    gamma, beta = walk.sink(node.next_functions[1]), walk.sink(node.next_functions[2])
    if gamma is None and beta is None:
        return
    count = len(row)
    entries = x.shape[2] if layer else int(node._saved_C)

    def apart(t: Tensor) -> Tensor:  # [M, entries, what they add up]
        return t.transpose(1, 2) if layer else t.reshape(count, entries, -1)

    if beta is not None:
        add_rows(walk, beta, row, flat.map(apart).sum((2,)))
    if gamma is not None and layer:  # an entry adds up over groups, each with statistics of its own
        add_rows(walk, gamma, row, (flat * normalized).map(apart).sum((2,)))
    elif gamma is not None:
        found = _along(flat.map(apart), apart(x), normalized.map(apart))
        add_rows(walk, gamma, row, found.map(lambda t: t[:, :, 0]))


def _along(g: Ball, x: Tensor, normalized: Ball) -> Ball:
    """``sum g xhat`` over the last dimension: exactly 0 where the entries of g cancel and sit on equal values of x.

    Within one group equal values of x are equal values of xhat.
    """
    there = ~g.zero()
    big = torch.where(there, x, -math.inf).amax(2, keepdim=True)
    small = torch.where(there, x, math.inf).amin(2, keepdim=True)
    cancels = ~(big > small) & g.sum((2,), keepdim=True).zero()
    return (g * normalized).sum((2,), keepdim=True).where(~cancels)


# ---- norms and variances ---------------------------------------------------------------------------------------


def _centred(x: Tensor, dims: tuple[int, ...]) -> Ball:
    return Ball(x) - Ball(x).sum(dims, keepdim=True).divided(math.prod(x.shape[d] for d in dims))


def _dims(node: Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions a reduction goes over, all if it names none."""
    dims = saved(node, "dim")
    every = range(len(shape))
    return tuple(every) if not dims else tuple(sorted({signed(d) % len(shape) for d in dims}))


def _widened(node: Node, g: Ball, shape: tuple[int, ...], dims: tuple[int, ...]) -> Ball:
    """[count, ...] of a reduction's output with the dimensions it removed put back as ones."""
    kept = [1 if d in dims else size for d, size in enumerate(shape)]
    return g.map(lambda t: t.reshape(len(t), *kept))


def _variance(walk: Pass, node: Node, number: int, g: Slices) -> None:
    """``sum (x - mean)^2 / (n - c)``, its root, and the mean that may come along as a second output."""
    edge = node.next_functions[0]
    x = host(needed(node, "self")).to(torch.float64)
    shape = tuple(x.shape)
    if not shape:
        raise Unsupported(f"{node.name()} of a scalar")
    dims = _dims(node, shape)
    count = math.prod(shape[d] for d in dims)
    dense = _widened(node, to_dense(walk.count, g), shape, dims)
    if number == 1:
        wide = dense.divided(count).map(lambda t: t.expand(len(t), *shape))
        send_dense(walk, edge, wide)
        return
    free = count - (1 if node._saved_correction is None else node._saved_correction)
    if free <= 0 or float(free) != int(free):
        raise Unsupported(f"{node.name()} with {node._saved_correction} degrees of freedom taken off")
    centred = _centred(x, dims)
    slope = centred.divided(int(free))
    if kind_of(node).startswith("Std"):
        variance = (centred * centred).sum(dims, keepdim=True).divided(int(free))
        slope = slope * inverse_root(variance)
    else:
        slope = slope + slope
    send_dense(walk, edge, dense * slope.map(lambda t: t[None]))


def _vector_norm(walk: Pass, node: Node, g: Slices) -> None:
    """The Euclidean norm, away from 0: ``x / |x|``."""
    order = saved(node, "ord")
    order = saved(node, "p") if order is None else order
    if order is not None and float(order) != 2.0:
        raise Unsupported(f"{node.name()} of order {order}")
    x = host(needed(node, "self")).to(torch.float64)
    shape = padded(tuple(x.shape))
    x = x.reshape(shape)
    dims = _dims(node, shape)
    dense = _widened(node, to_dense(walk.count, g), shape, dims)
    slope = Ball(x) * inverse_root((Ball(x) * Ball(x)).sum(dims, keepdim=True))
    send_dense(walk, node.next_functions[0], dense * slope.map(lambda t: t[None]))


def _weight_norm(walk: Pass, node: Node, g: Slices) -> None:
    """``w = s v / |v|``, with the norm over all dimensions but one."""
    v, s = (host(needed(node, name)).to(torch.float64) for name in ("v", "g"))
    dim = signed(node._saved_dim)
    dims = tuple(d for d in range(v.dim()) if d != dim % v.dim()) if dim != -1 else tuple(range(v.dim()))
    inverse = inverse_root((Ball(v) * Ball(v)).sum(dims, keepdim=True))
    unit = Ball(v) * inverse
    dense = to_dense(walk.count, g)
    wide = unit.map(lambda t: t[None])
    along = (dense * wide).sum(tuple(d + 1 for d in dims), keepdim=True)
    first, second = node.next_functions
    if first[0] is not None:
        factor = (Ball(s.reshape(inverse.value.shape)) * inverse).map(lambda t: t[None])
        send_dense(walk, first, (dense - wide * along) * factor)
    if second[0] is not None:
        send_dense(walk, second, along)


RULES: dict[str, Rule] = {
    **dict.fromkeys(normalization.BATCH_NORM, _batch_norm),
    "NativeLayerNormBackward": _group_norm,
    "NativeGroupNormBackward": _group_norm,
    "LinalgVectorNormBackward": _vector_norm,
    "NormBackward": _vector_norm,
    "WeightNormInterfaceBackward": _weight_norm,
}
NUMBERED: dict[str, NumberedRule] = dict.fromkeys(
    [f"{name}Backward" for name in ("Var", "Std", "VarMean", "StdMean")], _variance
)
