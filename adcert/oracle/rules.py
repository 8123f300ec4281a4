"""What torch's operations compute, as polynomials and moves: sums, products, and everything that only copies.

A rule takes a Call and returns the nodes of its result; of several results in a list, None for indices. Moves and
linear maps are not written down but asked: the operation itself runs on numbers of nodes, or on unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
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


def scaled(call: Call, nodes: Array, factor: Any) -> Array:
    return nodes if factor == 1 else call.graph.scale(nodes, rounded(float(factor), call.outputs[0].dtype))


@rule("add")
def add(call: Call) -> Array:
    return call.graph.add(call.nodes("self"), scaled(call, call.nodes("other"), call["alpha"]))


@rule("sub")
def sub(call: Call) -> Array:
    return call.graph.sub(call.nodes("self"), scaled(call, call.nodes("other"), call["alpha"]))


@rule("rsub")
def rsub(call: Call) -> Array:
    return call.graph.sub(call.nodes("other"), scaled(call, call.nodes("self"), call["alpha"]))


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
    return call.graph.add(call.nodes("self"), scaled(call, product, call["value"]))


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
