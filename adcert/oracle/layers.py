"""Matrix products, convolutions, averages, normalisation with constant statistics, dropout and losses."""

from __future__ import annotations

from fractions import Fraction
from math import isqrt

import numpy as np
import torch
from torch.utils._pytree import tree_map

from .program import ONE, ZERO, Array, Graph
from .rules import Arg, Call, fraction, rows, rule, scaled

# ---- matrices ------------------------------------------------------------------------------------------


def matmul(graph: Graph, left: Array, right: Array, bias: Array | None = None) -> Array:
    """[..., n, K] times [..., K, m] (plus a bias that broadcasts)."""
    a, b = left[..., :, None, :], np.swapaxes(right, -1, -2)[..., None, :, :]
    a, b = np.broadcast_arrays(a, b)
    if bias is not None:
        offset = np.broadcast_to(bias, a.shape[:-1])[..., None]
        a, b = np.concatenate([a, offset], axis=-1), np.concatenate([b, np.full_like(offset, ONE)], axis=-1)
    return graph.poly(a, b)


@rule("mm bmm")
def mm(call: Call) -> Array:
    return matmul(call.graph, call.nodes("self"), call.nodes("mat2"))


@rule("matmul")
def matmul_rule(call: Call) -> Array:
    return matmul(call.graph, call.nodes("self"), call.nodes("other"))


@rule("mv")
def mv(call: Call) -> Array:
    return matmul(call.graph, call.nodes("self"), call.nodes("vec")[:, None])[:, 0]


@rule("dot vdot")
def dot(call: Call) -> Array:
    return call.graph.poly(call.nodes("self"), call.nodes(next(n for n in ("tensor", "other") if n in call.arguments)))


@rule("addmm baddbmm addmv")
def addmm(call: Call) -> Array:
    vector = "vec" in call.arguments
    left = call.nodes(_present(call, "mat1", "batch1", "mat"))
    right = call.nodes(_present(call, "mat2", "batch2", "vec"))
    left = scaled(call, left, call["alpha"])
    bias = scaled(call, call.nodes("self"), call["beta"])
    if vector:
        return matmul(call.graph, left, right[:, None], bias[:, None])[:, 0]
    return matmul(call.graph, left, right, bias)


def _present(call: Call, *names: str) -> str:
    return next(name for name in names if name in call.arguments)


@rule("_trilinear")
def trilinear(call: Call) -> Array:
    """Sums over some dimensions of the products of three tensors, with dimensions put in."""
    parts = [np.expand_dims(call.nodes(f"i{k}"), tuple(call[f"expand{k}"])) for k in (1, 2, 3)]
    graph = call.graph
    table, _ = rows(graph.mul(graph.mul(parts[0], parts[1]), parts[2]), call["sumdim"])
    return graph.total(table).reshape(call.shape)


@rule("index_add")
def index_add(call: Call) -> Array:
    graph, dim = call.graph, call["dim"]
    result = np.moveaxis(call.nodes("self").copy(), dim, 0)
    source = np.moveaxis(scaled(call, call.nodes("source"), call["alpha"]), dim, 0)
    for place, part in zip(call["index"].tensor.reshape(-1).tolist(), source, strict=True):
        result[place] = graph.add(result[place], part)
    return np.moveaxis(result, 0, dim)


@rule("linear")
def linear(call: Call) -> Array:
    bias = None if call["bias"] is None else call.nodes("bias")
    return matmul(call.graph, np.atleast_2d(call.nodes("input")), call.nodes("weight").T, bias).reshape(call.shape)


@rule("convolution")
def convolution(call: Call) -> Array:
    """Any convolution: which input meets a weight is found by running it with that weight alone equal to 1."""
    weight, source = call.nodes("weight").ravel(), call["input"]
    numbers = torch.arange(1, source.tensor.numel() + 1, dtype=torch.float64).reshape(source.tensor.shape)
    nodes = np.append(ZERO, call.nodes("input").ravel())
    settings = [call[n] for n in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")]
    left, right = [], []
    unit = torch.zeros(call["weight"].tensor.numel(), dtype=torch.float64)
    for k in np.flatnonzero(weight != ZERO):
        unit[k] = 1.0
        met = torch.ops.aten.convolution.default(numbers, unit.view(call["weight"].tensor.shape), None, *settings)
        unit[k] = 0.0
        place = np.rint(met.numpy()).astype(np.int64)
        left.append(nodes[place])
        right.append(np.where(place > 0, weight[k], ZERO))
    if call["bias"] is not None:
        bias = call.nodes("bias").reshape(-1, *[1] * (len(call.shape) - 2))
        left.append(np.broadcast_to(bias, call.shape))
        right.append(np.full(call.shape, ONE))
    if not left:
        return np.full(call.shape, ZERO)
    return call.graph.poly(*_packed(np.stack(left, axis=-1), np.stack(right, axis=-1)))


def _packed(left: Array, right: Array) -> tuple[Array, Array]:
    """The terms that are not zero first, and no more places than needed."""
    dead = (left == ZERO) | (right == ZERO)
    order = np.argsort(dead, axis=-1, kind="stable")
    width = max(int((~dead).sum(axis=-1).max(initial=0)), 1)
    order = order[..., :width]
    return tuple(np.take_along_axis(np.where(dead, ZERO, x), order, axis=-1) for x in (left, right))  # type: ignore[return-value]


# ---- linear maps without parameters: the operation itself, run on unit vectors --------------------------


@rule(
    "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool2d upsample_bilinear2d "
    "upsample_linear1d upsample_trilinear3d upsample_bicubic2d col2im trace"
)
def linear_map(call: Call) -> Array:
    key = next(n for n in ("self", "input") if n in call.arguments)
    source = call.nodes(key)
    columns = []
    unit = torch.zeros(source.size, dtype=torch.float64)
    rest = {n: tree_map(lambda x: x.tensor if isinstance(x, Arg) else x, v) for n, v in call.arguments.items()}
    for k in range(source.size):
        unit[k] = 1.0
        columns.append(call.func(**{**rest, key: unit.view(source.shape)}).numpy().copy())
        unit[k] = 0.0
    matrix = np.stack(columns, axis=-1)  # [..., N]
    distinct, inverse = np.unique(matrix, return_inverse=True)
    factors = np.array([call.graph.number(fraction(float(x))) for x in distinct])[inverse].reshape(matrix.shape)
    return call.graph.poly(*_packed(np.broadcast_to(source.ravel(), matrix.shape), factors))


# ---- normalisation with constant statistics, dropout, losses -------------------------------------------


def inverse_root(value: Fraction) -> tuple[Fraction, bool]:
    """1 / sqrt(value), and whether it is exact: a rational if the value is a square of one."""
    top, bottom = isqrt(value.numerator), isqrt(value.denominator)
    if top * top == value.numerator and bottom * bottom == value.denominator:
        return Fraction(bottom, top), True
    scaled = isqrt((value.denominator << 240) // value.numerator)  # floor(2^120 / sqrt(value))
    return Fraction(scaled, 1 << 120), False


def per_channel(nodes: Array, rank: int) -> Array:
    return nodes.reshape(1, -1, *[1] * (rank - 2))


def affine(call: Call, normal: Array, weight: str = "weight", bias: str = "bias") -> Array:
    rank = normal.ndim
    if call.get(weight) is not None:
        normal = call.graph.mul(normal, per_channel(call.nodes(weight), rank))
    if call.get(bias) is not None:
        normal = call.graph.add(normal, per_channel(call.nodes(bias), rank))
    return normal


def batch_norm_eval(call: Call) -> Array:
    graph, nodes = call.graph, call.nodes("input")
    factors = []
    for variance in call.nodes("running_var").ravel():
        factor, exact = inverse_root(graph.value(variance) + Fraction(float(call["eps"])))
        graph.exact &= exact
        factors.append(graph.number(factor))
    centred = graph.sub(nodes, per_channel(call.nodes("running_mean"), nodes.ndim))
    scale = per_channel(np.array(factors), nodes.ndim)
    if call.get("weight") is not None:
        scale = graph.mul(scale, per_channel(call.nodes("weight"), nodes.ndim))
    normal = graph.mul(centred, np.broadcast_to(scale, centred.shape))
    return affine(call, normal, weight="none")


@rule("native_dropout")
def native_dropout(call: Call) -> list[Array | None]:
    mask = call.outputs[1].to(torch.float64).numpy() / (1.0 - float(call["p"]))
    return [call.graph.mul(call.nodes("input"), call.graph.numbers(mask)), None]


def reduced(call: Call, values: Array) -> Array:
    """The reduction argument of a loss: 0 none, 1 mean, 2 sum."""
    if call["reduction"] == 0:
        return values
    result = call.graph.total(values.ravel())
    return result if call["reduction"] == 2 else call.graph.scale(result, Fraction(1, values.size))


@rule("mse_loss")
def mse_loss(call: Call) -> Array:
    return reduced(call, square_of(call.graph, call.graph.sub(call.nodes("self"), call.nodes("target"))))


def square_of(graph: Graph, nodes: Array) -> Array:
    return graph.mul(nodes, nodes)


@rule("nll_loss_forward nll_loss2d_forward")
def nll_loss(call: Call) -> list[Array | None]:
    """Minus the chosen entries; a constant target, with class weights."""
    graph = call.graph
    scores, target = call.nodes("self"), call["target"].tensor
    target = target.reshape(-1) if scores.ndim == 1 else target
    scores = scores[None] if scores.ndim == 1 else scores
    chosen = target != call["ignore_index"]
    index = torch.where(chosen, target, 0).unsqueeze(1).numpy()
    picked = np.take_along_axis(scores, index, axis=1)[:, 0]
    weight = torch.ones(scores.shape[1], dtype=torch.float64) if call["weight"] is None else call["weight"].tensor
    weight = torch.where(chosen, weight[torch.where(chosen, target, 0)].to(torch.float64), 0.0)
    values = graph.mul(picked, graph.numbers(-weight.numpy()))
    if call["reduction"] == 0:
        return [values.reshape(call.shape), None]
    result = graph.total(values.ravel())
    if call["reduction"] == 1:
        result = graph.scale(result, 1 / Fraction(float(weight.sum())))
    return [result, graph.numbers(np.array(float(weight.sum())))]
