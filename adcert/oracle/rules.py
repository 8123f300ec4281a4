"""What torch's operations compute, as polynomials and moves: sums, products, layers, and everything that only copies.

A rule takes a Call and returns the nodes of its result; of several results in a list, None for indices. Moves and
linear maps are not written down but asked: the operation itself runs on numbers of nodes, or on unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .program import ONE, ZERO, Array, Graph, OracleError


@dataclass(frozen=True)
class Arg:
    """A tensor argument: its values, and its nodes (None for integers and booleans)."""

    tensor: Tensor
    nodes: Array | None


@dataclass
class Call:
    """One call of an operation: its arguments by the names of the schema, and torch's results."""

    graph: Graph
    func: Any
    name: str
    arguments: dict[str, Any]
    outputs: list[Tensor] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)  # the arguments that it changed, afterwards

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    def nodes(self, name: str) -> Array:
        """The nodes of a tensor or number."""
        return self.as_nodes(self.arguments[name])

    def as_nodes(self, value: Any) -> Array:
        if isinstance(value, Arg):
            if value.nodes is None:  # integers that take part in arithmetic are constants
                return self.graph.numbers(value.tensor.to(torch.float64).numpy())
            return value.nodes
        return np.array(self.graph.number(rounded(float(value), self.outputs[0].dtype)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.outputs[0].shape)


def rounded(value: float, dtype: torch.dtype) -> float:
    """A number as an operation on this type takes it: in double, or in single precision."""
    return value if dtype == torch.float64 else float(np.float32(value))


Rule = Callable[[Call], "Array | list[Array | None]"]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for these operations (and their in-place forms)."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def fraction(value: float) -> Fraction:
    """The small fraction that a computed coefficient stands for (1/9 of an average), or the float itself."""
    near = Fraction(value).limit_denominator(10_000)
    return near if abs(near - Fraction(value)) <= 2.0**-50 * abs(near) else Fraction(value)


# ---- moves: the operation itself, run on numbers of nodes --------------------------------------------

_SCALARS = {"constant_pad_nd": "value", "masked_fill": "value", "index_fill": "value", "fill": "value"}


@rule(
    "clone contiguous cat stack index index_select gather take embedding constant_pad_nd reflection_pad1d "
    "reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d flip roll repeat tril "
    "triu where masked_fill masked_select im2col pixel_shuffle pixel_unshuffle channel_shuffle slice_scatter "
    "select_scatter diagonal_scatter index_fill diag_embed upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "lift_fresh alias view_copy expand_copy permute_copy t_copy split_copy unbind_copy repeat_interleave rot90 "
    "scatter take_along_dim _unsafe_index _unsafe_view expand as_strided index_copy masked_scatter split "
    "split_with_sizes unbind view reshape unsafe_split unsafe_split_with_sizes "
    "unsafe_chunk _reshape_copy _reshape_alias fill index_put"
)
def move(call: Call) -> Array | list[Array | None]:
    scalar = _SCALARS.get(call.name.rstrip("_"))
    if call.get("reduce") is not None or call.get("accumulate"):
        raise OracleError(f"the oracle does not know {call.func} with a reduction")

    def numbered(x: Any) -> Any:
        if isinstance(x, Arg):
            return x.tensor if x.nodes is None else torch.tensor(np.ascontiguousarray(x.nodes), dtype=torch.float64)
        return x

    arguments = dict(call.arguments)
    if scalar is not None and not isinstance(arguments[scalar], Arg):
        arguments[scalar] = float(call.graph.number(float(arguments[scalar])))
    if call.name.startswith("scatter") and not isinstance(arguments.get("src"), Arg):
        arguments["value"] = float(call.graph.number(float(arguments["value"])))
    result = call.func(**{name: tree_map(numbered, value) for name, value in arguments.items()})
    if isinstance(result, Tensor):
        return _as_nodes(result)
    return [_as_nodes(x) for x in result]


def _as_nodes(x: Tensor) -> Array:
    return np.asarray(x.detach().numpy(), dtype=np.int64)


@rule("copy")
def copy(call: Call) -> Array:
    return np.broadcast_to(call.nodes("src"), call.shape)


@rule("_to_copy to")
def cast(call: Call) -> Array | list[Array | None]:
    return call.nodes("self") if call.outputs[0].is_floating_point() else [None]


# ---- sums and products -------------------------------------------------------------------------------


def _scaled(call: Call, nodes: Array, factor: Any) -> Array:
    return nodes if factor == 1 else call.graph.scale(nodes, rounded(float(factor), call.outputs[0].dtype))


@rule("add")
def add(call: Call) -> Array:
    return call.graph.add(call.nodes("self"), _scaled(call, call.nodes("other"), call["alpha"]))


@rule("sub")
def sub(call: Call) -> Array:
    return call.graph.sub(call.nodes("self"), _scaled(call, call.nodes("other"), call["alpha"]))


@rule("rsub")
def rsub(call: Call) -> Array:
    return call.graph.sub(call.nodes("other"), _scaled(call, call.nodes("self"), call["alpha"]))


@rule("mul")
def mul(call: Call) -> Array:
    return call.graph.mul(call.nodes("self"), call.nodes("other"))


@rule("neg")
def neg(call: Call) -> Array:
    return call.graph.scale(call.nodes("self"), -1)


@rule("positive")
def positive(call: Call) -> Array:
    return call.nodes("self")


@rule("square")
def square(call: Call) -> Array:
    return call.graph.mul(call.nodes("self"), call.nodes("self"))


def inverted(graph: Graph, nodes: Array) -> Array | None:
    """Reciprocals of constants; None if one is not constant."""
    if not graph.constant[nodes].all():
        return None
    return np.array([graph.number(1 / graph.value(n)) for n in nodes.ravel()]).reshape(nodes.shape)


@rule("addcmul")
def addcmul(call: Call) -> Array:
    product = call.graph.mul(call.nodes("tensor1"), call.nodes("tensor2"))
    return call.graph.add(call.nodes("self"), _scaled(call, product, call["value"]))


@rule("lerp")
def lerp(call: Call) -> Array:
    graph, start = call.graph, call.nodes("self")
    return graph.add(start, graph.mul(call.nodes("weight"), graph.sub(call.nodes("end"), start)))


def power(graph: Graph, nodes: Array, exponent: int) -> Array:
    result = np.full(nodes.shape, ONE)
    for _ in range(exponent):
        result = graph.mul(result, nodes)
    return result


def rows(nodes: Array, dims: Any, keep: bool = False) -> tuple[Array, tuple[int, ...]]:
    """The nodes with the reduced dimensions in the last one, [..., K], and the shape of the result."""
    every = nodes.ndim
    chosen = [dims] if isinstance(dims, int) else list(dims or [])
    chosen = sorted({d % every for d in chosen}) if chosen else list(range(every))
    kept = [d for d in range(every) if d not in chosen]
    count = int(np.prod([nodes.shape[d] for d in chosen], dtype=np.int64)) if chosen else 1
    table = nodes.transpose(kept + chosen).reshape([nodes.shape[d] for d in kept] + [count])
    shape = tuple(1 if d in chosen else n for d, n in enumerate(nodes.shape)) if keep else table.shape[:-1]
    return table, shape


@rule("sum")
def total(call: Call) -> Array:
    table, shape = rows(call.nodes("self"), call.get("dim"), call.get("keepdim", False))
    return call.graph.total(table).reshape(shape)


def mean_of(graph: Graph, table: Array) -> Array:
    return graph.scale(graph.total(table), Fraction(1, table.shape[-1]))


@rule("mean")
def mean(call: Call) -> Array:
    table, shape = rows(call.nodes("self"), call.get("dim"), call.get("keepdim", False))
    return mean_of(call.graph, table).reshape(shape)


def variance_of(graph: Graph, table: Array, correction: float) -> Array:
    centred = graph.sub(table, mean_of(graph, table)[..., None])
    return graph.scale(graph.poly(centred, centred), 1 / Fraction(table.shape[-1] - correction))


@rule("var")
def variance(call: Call) -> Array:
    table, shape = rows(call.nodes("self"), call.get("dim"), call.get("keepdim", False))
    return variance_of(call.graph, table, _correction(call)).reshape(shape)


def _correction(call: Call) -> float:
    if "unbiased" in call.arguments:
        return float(call["unbiased"])
    return 1.0 if call.get("correction") is None else float(call["correction"])


@rule("prod")
def product(call: Call) -> Array:
    dim = call.get("dim")
    table, shape = rows(call.nodes("self"), dim, call.get("keepdim", False))
    result = np.full(table.shape[:-1], ONE)
    for k in range(table.shape[-1]):
        result = call.graph.mul(result, table[..., k])
    return result.reshape(shape)


@rule("cumsum")
def cumsum(call: Call) -> Array:
    nodes = np.moveaxis(call.nodes("self"), call["dim"], -1)
    length = nodes.shape[-1]
    table = np.where(np.tri(length, dtype=bool), nodes[..., None, :], ZERO)
    return np.moveaxis(call.graph.total(table), -1, call["dim"])


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
    left = _scaled(call, left, call["alpha"])
    bias = _scaled(call, call.nodes("self"), call["beta"])
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
    source = np.moveaxis(_scaled(call, call.nodes("source"), call["alpha"]), dim, 0)
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
