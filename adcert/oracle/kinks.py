"""What torch's kinked operations compute, as maxima, minima and products: activations, pooling, selection, sorting."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from .layers import reduced
from .program import MAX, MIN, ZERO, Array, Graph, OracleError
from .rules import Call, Rule, rows, rule

# ---- activations -------------------------------------------------------------------------------------


def clip(graph: Graph, nodes: Array, low: Any, high: Any) -> Array:
    """min(max(x, low), high); a bound may be None, a number or nodes."""
    for bound, pick in ((low, graph.maximum), (high, graph.minimum)):
        if bound is not None:
            nodes = pick(nodes, bound if isinstance(bound, np.ndarray) else graph.number(bound))
    return nodes


def leaky(graph: Graph, nodes: Array, slope: Array) -> Array:
    """max(x, 0) + slope min(x, 0), also for a slope that is a parameter."""
    positive = graph.maximum(nodes, ZERO)
    negative = graph.minimum(nodes, ZERO)
    slope = np.broadcast_to(slope, nodes.shape)
    return graph.add(positive, graph.mul(slope, negative))


def bent(graph: Graph, nodes: Array, slope: Fraction) -> Array:
    """x above 0 and slope x below: the larger of the two, or the smaller if the slope is above 1."""
    return graph.select(np.stack([nodes, graph.scale(nodes, slope)], axis=-1), MAX if slope <= 1 else MIN)


@rule("relu")
def relu(call: Call) -> Array:
    return call.graph.maximum(call.nodes("self"), ZERO)


@rule("leaky_relu")
def leaky_relu(call: Call) -> Array:
    return bent(call.graph, call.nodes("self"), Fraction(float(call["negative_slope"])))


@rule("_prelu_kernel prelu")
def prelu(call: Call) -> Array:
    return leaky(call.graph, call.nodes("self"), call.nodes("weight"))


@rule("rrelu_with_noise rrelu_with_noise_functional")
def rrelu(call: Call) -> Array | list[Array | None]:
    """Outside training the slope is the mean of both bounds; in training that which was drawn for x <= 0."""
    graph, nodes = call.graph, call.nodes("self")
    if not call["training"]:
        slope = (Fraction(float(call["lower"])) + Fraction(float(call["upper"]))) / 2
        return bent(graph, nodes, slope)
    drawn = call.written[0].to(torch.float64).numpy()
    return leaky(graph, nodes, graph.numbers(np.where(graph.values[nodes] <= 0, drawn, 0.0)))


@rule("hardtanh")
def hardtanh(call: Call) -> Array:
    return clip(call.graph, call.nodes("self"), float(call["min_val"]), float(call["max_val"]))


@rule("relu6")
def relu6(call: Call) -> Array:
    return clip(call.graph, call.nodes("self"), 0.0, 6.0)


def sixth(graph: Graph, nodes: Array) -> Array:
    """min(max(x + 3, 0), 6) / 6."""
    shifted = graph.add(nodes, np.full(nodes.shape, graph.number(3)))
    return graph.scale(clip(graph, shifted, 0.0, 6.0), Fraction(1, 6))


@rule("hardsigmoid")
def hardsigmoid(call: Call) -> Array:
    call.graph.eps = max(call.graph.eps, 2.0**-24)  # torch's backward multiplies by a sixth in single precision
    return sixth(call.graph, call.nodes("self"))


@rule("hardswish")
def hardswish(call: Call) -> Array:
    return call.graph.mul(call.nodes("self"), sixth(call.graph, call.nodes("self")))


@rule("softshrink")
def softshrink(call: Call) -> Array:
    graph, nodes, width = call.graph, call.nodes("self"), float(call["lambd"])
    above = graph.sub(nodes, np.full(nodes.shape, graph.number(width)))
    below = graph.add(nodes, np.full(nodes.shape, graph.number(width)))
    return graph.add(graph.maximum(above, ZERO), graph.minimum(below, ZERO))


@rule("hardshrink")
def hardshrink(call: Call) -> Array:
    nodes, width = call.nodes("self"), float(call["lambd"])
    values = call.graph.values[nodes]
    if width and (np.abs(values) == width).any():
        raise OracleError("hardshrink is not continuous where its input is lambda")
    return np.where(np.abs(values) > width, nodes, ZERO) if width else nodes


@rule("threshold")
def threshold(call: Call) -> Array:
    graph, nodes = call.graph, call.nodes("self")
    limit, value = float(call["threshold"]), float(call["value"])
    if limit == value:
        return graph.maximum(nodes, graph.number(limit))
    values = graph.values[nodes]
    if (values == limit).any():
        raise OracleError("threshold is not continuous where its input is the threshold")
    return np.where(values > limit, nodes, graph.number(value))


@rule("sign sgn")
def sign(call: Call) -> Array:
    nodes = call.nodes("self")
    values = call.graph.values[nodes]
    if (values == 0).any():
        raise OracleError("sign is not continuous at 0")
    return call.graph.numbers(np.sign(values))


@rule("abs")
def absolute(call: Call) -> Array:
    return modulus(call.graph, call.nodes("self"))


def modulus(graph: Graph, nodes: Array) -> Array:
    return graph.maximum(nodes, graph.scale(nodes, -1))


@rule("l1_loss")
def l1_loss(call: Call) -> Array:
    return reduced(call, modulus(call.graph, call.graph.sub(call.nodes("self"), call.nodes("target"))))


@rule("clamp clip clamp_min clamp_max")
def clamp(call: Call) -> Array:
    """The upper bound wins where it is below the lower one."""
    bounds = []
    for name in ("min", "max"):
        value = call.get(name)
        bounds.append(call.nodes(name) if value is not None else None)
    return clip(call.graph, call.nodes("self"), *bounds)


@rule("maximum fmax")
def maximum(call: Call) -> Array:
    return call.graph.maximum(call.nodes("self"), call.nodes("other"))


@rule("minimum fmin")
def minimum(call: Call) -> Array:
    return call.graph.minimum(call.nodes("self"), call.nodes("other"))


# ---- selection along dimensions ------------------------------------------------------------------------


def _extreme(rank: int) -> Rule:
    def reduce(call: Call) -> Array | list[Array | None]:
        if "other" in call.arguments:
            return call.graph.select(np.stack(np.broadcast_arrays(call.nodes("self"), call.nodes("other")), -1), rank)
        table, shape = rows(call.nodes("self"), call.get("dim"), call.get("keepdim", False))
        nodes = call.graph.select(table, rank).reshape(shape)
        return nodes if len(call.outputs) == 1 else [nodes, None]

    return reduce


rule("max amax")(_extreme(MAX))
rule("min amin")(_extreme(MIN))


@rule("aminmax")
def aminmax(call: Call) -> list[Array | None]:
    nodes = call.nodes("self")
    table, shape = rows(nodes, call.get("dim"), call.get("keepdim", False))
    return [call.graph.select(table, rank).reshape(shape) for rank in (MIN, MAX)]


@rule("median kthvalue")
def median(call: Call) -> Array | list[Array | None]:
    """The lower of two middle values."""
    table, shape = rows(call.nodes("self"), call.get("dim"), call.get("keepdim", False))
    rank = call["k"] - 1 if "k" in call.arguments else (table.shape[-1] - 1) // 2
    nodes = call.graph.select(table, rank).reshape(shape)
    return nodes if len(call.outputs) == 1 else [nodes, None]


def ordered(graph: Graph, table: Array, descending: bool, count: int) -> Array:
    """The first ``count`` of the sorted last dimension."""
    width = table.shape[-1]
    ranks = range(width)[::-1] if descending else range(width)
    return np.stack([graph.select(table, rank) for rank in itertools.islice(ranks, count)], axis=-1)


@rule("sort")
def sort(call: Call) -> list[Array | None]:
    table = np.moveaxis(call.nodes("self"), call["dim"], -1)
    nodes = ordered(call.graph, table, bool(call["descending"]), table.shape[-1])
    return [np.moveaxis(nodes, -1, call["dim"]), None]


@rule("topk")
def topk(call: Call) -> list[Array | None]:
    """In descending order of values (for the k largest); an unsorted result has an order of its own: refused."""
    table = np.moveaxis(call.nodes("self"), call["dim"], -1)
    nodes = ordered(call.graph, table, bool(call["largest"]), call["k"])
    if not call["sorted"] and call["k"] > 1:
        raise OracleError("the oracle does not know topk with sorted=False")
    return [np.moveaxis(nodes, -1, call["dim"]), None]


def _cumulative(rank: int) -> Rule:
    def reduce(call: Call) -> list[Array | None]:
        table = np.moveaxis(call.nodes("self"), call["dim"], -1)
        prefixes = np.where(np.tri(table.shape[-1], dtype=bool), table[..., None, :], table[..., :1, None])
        return [np.moveaxis(call.graph.select(prefixes, rank), -1, call["dim"]), None]

    return reduce


rule("cummax")(_cumulative(MAX))
rule("cummin")(_cumulative(MIN))


# ---- pooling ---------------------------------------------------------------------------------------------


def _spread(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(x) for x in (values * count if len(values) == 1 else values)]


def pooled(call: Call, nodes: Array, places: Sequence[Sequence[Sequence[int]]]) -> list[Array | None]:
    """Maxima over boxes: ``places[a][o]`` are the positions along the a-th spatial dimension of output o."""
    spatial = nodes.shape[-len(places) :]
    flat = nodes.reshape(-1, *spatial)
    width = int(np.prod([max(map(len, axis)) for axis in places]))
    boxes = []
    for window in itertools.product(*places):
        box = flat[np.ix_(range(len(flat)), *map(list, window))].reshape(len(flat), -1)
        boxes.append(np.concatenate([box, np.repeat(box[:, :1], width - box.shape[1], axis=1)], axis=1))
    members = np.stack(boxes, axis=1)  # [maps, outputs, W]
    return [call.graph.select(members, MAX).reshape(call.shape), None]


@rule("max_pool2d_with_indices max_pool3d_with_indices max_pool1d_with_indices max_pool1d max_pool2d max_pool3d")
def max_pool(call: Call) -> list[Array | None]:
    nodes = call.nodes("self")
    kernel = call["kernel_size"]
    count = int(next(c for c in call.func._schema.name if c.isdigit()))
    kernel = _spread(kernel, count)
    stride = _spread(call["stride"], count) if call["stride"] else kernel
    padding, dilation = _spread(call["padding"], count), _spread(call["dilation"], count)
    places = []
    for a in range(count):
        size = nodes.shape[a - count]
        starts = [o * stride[a] - padding[a] for o in range(call.shape[a - count])]
        windows = [[s + k * dilation[a] for k in range(kernel[a])] for s in starts]
        places.append([[p for p in window if 0 <= p < size] for window in windows])
    return pooled(call, nodes, places)


@rule("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d")
def adaptive_max_pool(call: Call) -> list[Array | None]:
    nodes, count = call.nodes("self"), len(_spread(call["output_size"], 1))
    count = int(next(c for c in call.func._schema.name if c.isdigit()))
    places = []
    for a in range(count):
        size, outputs = nodes.shape[a - count], call.shape[a - count]
        places.append([range(o * size // outputs, -(-(o + 1) * size // outputs)) for o in range(outputs)])
    return pooled(call, nodes, places)


@rule("fractional_max_pool2d fractional_max_pool3d")
def fractional_max_pool(call: Call) -> list[Array | None]:
    """Graham (2014): each map has windows of its own, made of its random samples in their precision."""
    nodes = call.nodes("self")
    count = int(next(c for c in call.func._schema.name if c.isdigit()))
    kernel, outputs = _spread(call["kernel_size"], count), _spread(call["output_size"], count)
    spatial = nodes.shape[-count:]
    flat = nodes.reshape(-1, *spatial)
    samples = call["random_samples"].tensor.reshape(-1, count)
    found = []
    for image, sample in zip(flat, samples, strict=True):
        order = (1, 0) if count == 2 else (0, 1, 2)  # torch takes the width's sample first in two dimensions
        starts = [
            _starts(float(sample[order[a]]), spatial[a], outputs[a], kernel[a], sample.dtype) for a in range(count)
        ]
        for window in itertools.product(*starts):
            box = tuple(slice(s, s + k) for s, k in zip(window, kernel, strict=True))
            found.append(image[box].ravel())
    return [call.graph.select(np.stack(found), MAX).reshape(call.shape), None]


def _starts(sample: float, size: int, outputs: int, kernel: int, dtype: torch.dtype) -> list[int]:
    real = np.float32 if dtype == torch.float32 else np.float64
    if outputs == 1:
        return [size - kernel]
    alpha = real(size - kernel) / real(outputs - 1)
    shift = int(real(sample) * alpha)
    return [int((real(o) + real(sample)) * alpha) - shift for o in range(outputs - 1)] + [size - kernel]
