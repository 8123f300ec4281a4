"""Smooth operations that are no polynomials, down to functions of one number, whose slopes are floats.

Normalisation, softmax and attention are polynomials of sums, products and a few such functions (exp, log, 1/x,
1/sqrt(x)), so that what two of them have in common stays visible. A program that has them is not exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .kinks import modulus
from .layers import affine, batch_norm_eval, matmul, reduced, square_of
from .program import MAX, ONE, ZERO, Array, Graph, OracleError
from .rules import Call, Rule, inverted, mean_of, power, rows, rule, variance_of

Scalar = Callable[[Any], Any]  # on float64 tensors

_HALF_LINE = math.sqrt(2.0)


def _phi(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x / _HALF_LINE))


# name -> the function and its derivative
_FUNCTIONS: dict[str, tuple[Scalar, Scalar]] = {
    "exp": (torch.exp, torch.exp),
    "expm1": (torch.expm1, torch.exp),
    "log": (torch.log, torch.reciprocal),
    "log1p": (torch.log1p, lambda x: 1 / (1 + x)),
    "log2": (torch.log2, lambda x: 1 / (x * math.log(2))),
    "sqrt": (torch.sqrt, lambda x: 0.5 / torch.sqrt(x)),
    "rsqrt": (torch.rsqrt, lambda x: -0.5 * x**-1.5),
    "reciprocal": (torch.reciprocal, lambda x: -1 / x**2),
    "sigmoid": (torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
    "erf": (torch.erf, lambda x: 2 / math.sqrt(math.pi) * torch.exp(-(x**2))),
    "sin": (torch.sin, torch.cos),
    "cos": (torch.cos, lambda x: -torch.sin(x)),
    "atan": (torch.atan, lambda x: 1 / (1 + x**2)),
    "log_sigmoid": (torch.nn.functional.logsigmoid, lambda x: torch.sigmoid(-x)),
    "normal": (_phi, lambda x: torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)),
}


def apply(graph: Graph, nodes: Array, name: str, pair: tuple[Scalar, Scalar] | None = None) -> Array:
    """A function of one number, entry by entry."""
    function, slope = _FUNCTIONS[name] if pair is None else pair
    x = torch.tensor(graph.values[nodes], dtype=torch.float64)
    return graph.smooth(nodes, function(x).numpy(), slope(x).numpy(), name)


def _scalar(name: str) -> Rule:
    return lambda call: apply(call.graph, call.nodes("self"), name)


for _name in ("exp", "expm1", "log", "log1p", "log2", "sqrt", "rsqrt", "reciprocal", "sigmoid", "tanh", "erf", "sin"):
    rule(_name)(_scalar(_name))
rule("cos")(_scalar("cos"))
rule("atan")(_scalar("atan"))


@rule("log_sigmoid_forward")
def log_sigmoid(call: Call) -> list[Array | None]:
    return [apply(call.graph, call.nodes("self"), "log_sigmoid"), None]


@rule("silu")
def silu(call: Call) -> Array:
    return call.graph.mul(call.nodes("self"), apply(call.graph, call.nodes("self"), "sigmoid"))


@rule("glu")
def glu(call: Call) -> Array:
    first, gate = np.split(call.nodes("self"), 2, axis=call["dim"])
    return call.graph.mul(first, apply(call.graph, gate, "sigmoid"))


@rule("gelu")
def gelu(call: Call) -> Array:
    graph, x = call.graph, call.nodes("self")
    if call["approximate"] == "none":
        return graph.mul(x, apply(graph, x, "normal"))
    inner = graph.scale(graph.add(x, graph.scale(power(graph, x, 3), 0.044715)), math.sqrt(2 / math.pi))
    return graph.mul(x, graph.scale(graph.add(apply(graph, inner, "tanh"), np.array(ONE)), 0.5))


@rule("softplus")
def softplus(call: Call) -> Array:
    beta, limit = float(call["beta"]), float(call["threshold"])
    pair = (
        lambda x: torch.nn.functional.softplus(x, beta, limit),
        lambda x: torch.where(x * beta > limit, 1.0, torch.sigmoid(x * beta)),
    )
    return apply(call.graph, call.nodes("self"), f"softplus {beta} {limit}", pair)


@rule("mish")
def mish(call: Call) -> Array:
    plus = (torch.nn.functional.softplus, torch.sigmoid)
    inner = apply(call.graph, call.nodes("self"), "softplus 1.0 20.0", plus)
    return call.graph.mul(call.nodes("self"), apply(call.graph, inner, "tanh"))


@rule("elu celu")
def elu(call: Call) -> Array:
    """scale x above 0, scale alpha (exp(c x) - 1) below: smooth at 0 iff alpha c = 1."""
    graph, x, alpha = call.graph, call.nodes("self"), float(call["alpha"])
    scale = float(call.get("scale", 1.0))
    inner = 1 / alpha if call.name.startswith("celu") else float(call["input_scale"])
    if alpha * inner == 1.0 or call.name.startswith("celu"):
        pair = (
            lambda v: scale * torch.where(v > 0, v, alpha * torch.expm1(v.clamp(max=0) * inner)),
            lambda v: scale * torch.exp(v.clamp(max=0) * inner),
        )
        return apply(graph, x, f"elu {alpha} {scale} {inner}", pair)
    below = apply(graph, graph.scale(graph.minimum(x, ZERO), inner), "expm1")
    return graph.add(graph.scale(graph.maximum(x, ZERO), scale), graph.scale(below, scale * alpha))


# ---- quotients, powers, norms --------------------------------------------------------------------------


def reciprocal(graph: Graph, nodes: Array) -> Array:
    found = None if (graph.values[nodes] == 0).any() else inverted(graph, nodes)
    return apply(graph, nodes, "reciprocal") if found is None else found


@rule("div true_divide divide")
def div(call: Call) -> Array:
    if call.get("rounding_mode") is not None:
        raise OracleError("the oracle does not know division with rounding")
    return call.graph.mul(call.nodes("self"), reciprocal(call.graph, call.nodes("other")))


@rule("addcdiv")
def addcdiv(call: Call) -> Array:
    graph = call.graph
    quotient = graph.mul(call.nodes("tensor1"), reciprocal(graph, call.nodes("tensor2")))
    return graph.add(call.nodes("self"), graph.scale(quotient, float(call["value"])))


@rule("pow")
def pow_rule(call: Call) -> Array:
    graph, base, exponent = call.graph, call["self"], call["exponent"]
    if not isinstance(exponent, int | float):
        raise OracleError(f"the oracle does not know {call.func}")
    nodes = call.as_nodes(base)
    if float(exponent).is_integer() and abs(exponent) <= 16:
        result = power(graph, nodes, abs(int(exponent)))
        return result if exponent >= 0 else reciprocal(graph, result)
    if (graph.values[nodes] <= 0).any():
        raise OracleError(f"the oracle does not know the power {exponent} of a number that is not positive")
    return apply(graph, nodes, f"pow {exponent}", (lambda x: x**exponent, lambda x: exponent * x ** (exponent - 1)))


@rule("std")
def std(call: Call) -> Array:
    table, shape = rows(call.nodes("self"), call.get("dim"), call.get("keepdim", False))
    correction = float(call["unbiased"]) if "unbiased" in call.arguments else call.get("correction")
    variance = variance_of(call.graph, table, 1.0 if correction is None else float(correction))
    return apply(call.graph, variance, "sqrt").reshape(shape)


@rule("linalg_vector_norm norm")
def norm(call: Call) -> Array:
    graph = call.graph
    order = call.get("ord", call.get("p", 2))
    table, shape = rows(call.nodes("self"), call.get("dim"), call.get("keepdim", False))
    match 2.0 if order is None else float(order):
        case 1.0:
            result = graph.total(modulus(graph, table))
        case 2.0:
            result = apply(graph, graph.poly(table, table), "sqrt")
        case math.inf:
            result = graph.select(modulus(graph, table), MAX)
        case _:
            raise OracleError(f"the oracle does not know the norm of order {order}")
    return result.reshape(shape)


# ---- softmax and attention -----------------------------------------------------------------------------


def exponentials(graph: Graph, table: Array) -> tuple[Array, Array, Array]:
    """x less its largest value (a constant), exp of that, and the sums of these over the last dimension."""
    top = graph.numbers(graph.values[table].max(axis=-1, keepdims=True))
    shifted = graph.sub(table, top)
    weights = apply(graph, shifted, "exp")
    return shifted, weights, graph.total(weights)


def softmax_of(graph: Graph, table: Array) -> Array:
    _, weights, total = exponentials(graph, table)
    return graph.mul(weights, apply(graph, total, "reciprocal")[..., None])


@rule("_softmax _safe_softmax softmax")
def softmax(call: Call) -> Array:
    table = np.moveaxis(call.nodes("self"), call["dim"], -1)
    return np.moveaxis(softmax_of(call.graph, table), -1, call["dim"])


@rule("_log_softmax log_softmax")
def log_softmax(call: Call) -> Array:
    graph, table = call.graph, np.moveaxis(call.nodes("self"), call["dim"], -1)
    shifted, _, total = exponentials(graph, table)
    return np.moveaxis(graph.sub(shifted, apply(graph, total, "log")[..., None]), -1, call["dim"])


@rule("logsumexp")
def logsumexp(call: Call) -> Array:
    graph = call.graph
    table, shape = rows(call.nodes("self"), call["dim"], call["keepdim"])
    _, _, total = exponentials(graph, table)
    top = graph.numbers(graph.values[table].max(axis=-1))
    return graph.add(apply(graph, total, "log"), top).reshape(shape)


@rule("_scaled_dot_product_flash_attention_for_cpu")
def attention(call: Call) -> list[Array | None]:
    graph, query = call.graph, call.nodes("query")
    if call["dropout_p"]:
        raise OracleError("the oracle does not see the mask of dropout within attention")
    scale = 1 / math.sqrt(query.shape[-1]) if call["scale"] is None else float(call["scale"])
    scores = graph.scale(matmul(graph, query, np.swapaxes(call.nodes("key"), -1, -2)), scale)
    value = call.nodes("value")
    allowed = np.ones(scores.shape[-2:], dtype=bool)
    if call["is_causal"]:
        allowed = np.tri(*scores.shape[-2:], dtype=bool)
    if call["attn_mask"] is not None:
        mask = call["attn_mask"].tensor
        if mask.is_floating_point():
            scores = graph.add(scores, call.nodes("attn_mask"))
        else:
            allowed = allowed & mask.numpy()
    return [matmul(graph, _masked_softmax(graph, scores, np.broadcast_to(allowed, scores.shape)), value), None]


def _masked_softmax(graph: Graph, scores: Array, allowed: Array) -> Array:
    if allowed.all():
        return softmax_of(graph, scores)
    top = graph.numbers(np.where(allowed, graph.values[scores], -np.inf).max(axis=-1, keepdims=True))
    weights = np.where(allowed, apply(graph, graph.sub(scores, top), "exp"), ZERO)
    return graph.mul(weights, apply(graph, graph.total(weights), "reciprocal")[..., None])


# ---- normalisation ---------------------------------------------------------------------------------------


def normalised(graph: Graph, table: Array, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) over the last dimension."""
    centred = graph.sub(table, mean_of(graph, table)[..., None])
    variance = variance_of(graph, table, 0.0)
    factor = apply(graph, graph.add(variance, np.array(graph.number(eps))), "rsqrt")
    return graph.mul(centred, factor[..., None])


@rule("native_batch_norm cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training")
def batch_norm(call: Call) -> list[Array | None]:
    if not call.get("training", call.get("running_var") is None):
        return [batch_norm_eval(call), None, None]
    nodes = call.nodes("input")
    table = np.moveaxis(nodes, 1, 0)  # [C, N, ...]
    normal = normalised(call.graph, table.reshape(len(table), -1), float(call["eps"])).reshape(table.shape)
    return [affine(call, np.moveaxis(normal, 0, 1)), None, None]


@rule("native_layer_norm")
def layer_norm(call: Call) -> list[Array | None]:
    graph, nodes = call.graph, call.nodes("input")
    kept = nodes.ndim - len(call["normalized_shape"])
    table = nodes.reshape(*nodes.shape[:kept], -1)
    result = normalised(graph, table, float(call["eps"])).reshape(nodes.shape)
    if call["weight"] is not None:
        result = graph.mul(result, call.nodes("weight"))
    if call["bias"] is not None:
        result = graph.add(result, call.nodes("bias"))
    return [result, None, None]


@rule("native_group_norm")
def group_norm(call: Call) -> list[Array | None]:
    nodes = call.nodes("input")
    table = nodes.reshape(nodes.shape[0], call["group"], -1)
    normal = normalised(call.graph, table, float(call["eps"])).reshape(nodes.shape)
    return [affine(call, normal), None, None]


# ---- losses ------------------------------------------------------------------------------------------------


@rule("binary_cross_entropy")
def binary_cross_entropy(call: Call) -> Array:
    graph, p, y = call.graph, call.nodes("self"), call.nodes("target")
    one = np.array(ONE)
    if (graph.values[p] <= 0).any() or (graph.values[p] >= 1).any():
        raise OracleError("binary_cross_entropy is clamped where its input is 0 or 1")
    yes = graph.mul(y, apply(graph, p, "log"))
    no = graph.mul(graph.sub(one, y), apply(graph, graph.sub(one, p), "log"))
    values = graph.scale(graph.add(yes, no), -1)
    if call["weight"] is not None:
        values = graph.mul(values, call.nodes("weight"))
    return reduced(call, values)


@rule("binary_cross_entropy_with_logits")
def with_logits(call: Call) -> Array:
    graph, x, y = call.graph, call.nodes("self"), call.nodes("target")
    if call["pos_weight"] is not None:
        raise OracleError("the oracle does not know pos_weight")
    values = graph.sub(graph.mul(graph.sub(np.array(ONE), y), x), apply(graph, x, "log_sigmoid"))
    if call["weight"] is not None:
        values = graph.mul(values, call.nodes("weight"))
    return reduced(call, values)


@rule("smooth_l1_loss huber_loss")
def smooth_l1(call: Call) -> Array:
    """Quadratic near 0, linear beyond: continuously differentiable."""
    graph, x = call.graph, call.graph.sub(call.nodes("self"), call.nodes("target"))
    width = float(call.get("beta", call.get("delta")))
    factor = 1 / width if "beta" in call.arguments else 1.0
    if width == 0:
        return reduced(call, modulus(graph, x))
    inside = np.abs(graph.values[x]) < width
    square = graph.scale(square_of(graph, x), 0.5 * factor)
    pair = (lambda v: factor * width * (v.abs() - width / 2), lambda v: factor * width * torch.sign(v))
    beyond = np.where(inside, ZERO, apply(graph, np.where(inside, graph.number(2 * width), x), f"huber {width}", pair))
    return reduced(call, np.where(inside, square, beyond))
