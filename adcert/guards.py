"""Nodes that are smooth where they stand: the saved values keep away from the singular points and kinks.

The points are those of the recorded values: a kink is touched if and only if the values compare equal, so where none
is, the operation is analytic (or has a continuous derivative, which suffices) around them. NaN counts as touching.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layers import shape_of
from .movement import readers, signed, sources
from .nodes import Node
from .transfer import through

Answer = bool | Tensor  # of a device: a flag that nobody has waited for yet


def _told(flag: Tensor) -> Answer:
    return flag if flag.is_cuda else bool(flag)


def _saved(node: Node, name: str) -> Any:
    return getattr(node, f"_saved_{name}", None)


def _positive(name: str) -> Callable[[Node], Answer]:
    def smooth(node: Node) -> Answer:
        value = _saved(node, name)
        return value is not None and _told((torch.as_tensor(value) > 0).all())

    return smooth


def _inside(low: float, high: float) -> Callable[[Node], Answer]:
    def smooth(node: Node) -> Answer:
        x = _saved(node, "self")
        return x is not None and _told(((x > low) & (x < high)).all())

    return smooth


def _finite(name: str) -> Callable[[Node], Answer]:
    """Also for functions that make an ordinary number of an infinite one: an overflow is to be seen, not swallowed."""

    def smooth(node: Node) -> Answer:
        value = _saved(node, name)
        return value is not None and finite(torch.as_tensor(value))

    return smooth


def _finite_input(node: Node) -> Answer:
    """Of a function that has a limit at infinity; in place it keeps its result, and :mod:`adcert.followed` looked."""
    return _finite("self" if _saved(node, "self") is not None else "result")(node)


def finite(x: Tensor) -> Answer:
    """No entry is NaN or infinite; the sum tells it in most cases, in one quick pass."""
    if not x.is_cuda and bool(torch.isfinite(x.detach().sum())):
        return True
    return _told(torch.isfinite(x).all())


# ---- away from singular points ---------------------------------------------------------------------------------


def _division(node: Node) -> Answer:
    other = node._saved_other
    rounded = _saved(node, "rounding_mode") is not None
    return not rounded and (other is None or _divisor(torch.as_tensor(other)))


def _divisor(x: Tensor | None) -> Answer:
    """Neither 0 nor infinite: what is divided by an overflow is 0, and so is its derivative."""
    return x is not None and _told(((x != 0) & torch.isfinite(x)).all())


def _between_0_and_infinity(x: Tensor) -> Answer:
    return _told(((x > 0) & (x < math.inf)).all())


def _quotient(node: Node) -> Answer:
    return _divisor(_saved(node, "tensor2"))


def _power(node: Node) -> Answer:
    exponent = node._saved_exponent
    if isinstance(exponent, (int, float)) and float(exponent).is_integer():
        return exponent >= 0 or _divisor(_saved(node, "self"))
    x = _saved(node, "self")
    return x is not None and _between_0_and_infinity(torch.as_tensor(x))


def _plain_embedding(node: Node) -> Answer:
    """padding_idx, where it occurs, and scale_grad_by_freq change the gradient without changing the function."""
    if node._saved_scale_grad_by_freq:
        return False
    padding = int(node._saved_padding_idx)
    return padding in (-1, (1 << 64) - 1) or _told((node._saved_indices != padding).all())


def _sum_of_embeddings(node: Node) -> Answer:
    """A bag leaves its padding out, which changes the function as well, but means would have to know."""
    padding = int(node._saved_padding_idx)
    return int(node._saved_mode) in (0, 1) and padding in (-1, (1 << 64) - 1) and _plain_embedding(node)


def _euclidean(node: Node) -> Answer:
    order = _saved(node, "ord")
    order = _saved(node, "p") if order is None else order
    return (order is None or float(order) == 2.0) and _positive("result")(node)


def _softplus(node: Node) -> Answer:
    """torch takes x itself from a threshold on: a jump."""
    x, threshold = _saved(node, "self"), float(node._saved_threshold)
    if x is None:
        return False
    far = (x.to(torch.float64) * float(node._saved_beta) - threshold).abs() > 0.02 * abs(threshold)
    return _told((far & torch.isfinite(x)).all())


def _elu(node: Node) -> Answer:
    """Its derivative is continuous if both sides have the same slope at 0."""
    if float(node._saved_alpha) * float(node._saved_input_scale) == 1.0:
        return _finite_input(node)
    return clear(_saved(node, "self"), 0.0)


def _probability(node: Node) -> Answer:
    """Away from where torch bounds the logarithm, or its derivative."""
    x = _saved(node, "self")
    return x is not None and _told(((x > 1e-30) & (x.to(torch.float64) * (1 - x.to(torch.float64)) > 1e-11)).all())


def moves_only(node: Node) -> bool:
    """A write into a tensor whose backward hands every gradient to one place at most."""
    if _saved(node, "accumulate"):
        return True
    claimed = torch.zeros(0, dtype=torch.int64)
    try:
        for table in readers(node, 0):
            if table is not None:
                claimed = torch.cat([claimed, table[table >= 0]])
    except ValueError:
        return False
    return len(claimed) == len(torch.unique(claimed))


def _within(node: Node) -> bool:
    """A view by strides reads its input alone: beside it in memory may be more, of which autograd does not know."""
    shape = shape_of(node, 0)
    found = through(node, 0, torch.ones(shape, dtype=torch.float64))[0]
    return found is not None and abs(float(found.sum()) - math.prod(shape)) < 0.5


def _nearest(node: Node) -> bool:
    """The backward kernel finds the same places as the forward one."""
    try:
        table = sources(node)
    except ValueError:
        return False
    size = table.numel()
    marks = torch.arange(size, dtype=torch.float64) % 61 - 30
    found = through(node, 0, marks.reshape(tuple(node._input_metadata[0].shape)))[0]
    assert found is not None
    return torch.equal(found.reshape(-1).double(), torch.zeros(found.numel()).double().index_add_(0, table, marks))


# ---- kinks nobody recorded: none may be touched ----------------------------------------------------------------


def clear(x: Tensor | None, *points: float) -> Answer:
    """No entry equals a point, in whatever precision the kernel took the point."""
    if x is None:
        return False
    good = torch.ones((), dtype=torch.bool, device=x.device)
    for point in points:
        rounded = [float(torch.tensor(point, dtype=dtype)) for dtype in (x.dtype, torch.float32)]
        low, high = min(point, *rounded), max(point, *rounded)
        wide = x if low == high else x.to(torch.float64)
        good = good & ((wide < low) | (wide > high)).all()
    return _told(good)


def _apart(x: Any, y: Any) -> Answer:
    if not isinstance(x, Tensor) or y is None:
        return isinstance(x, Tensor)
    return _told(((x < y) | (x > y)).all())


def _at(*points: float) -> Callable[[Node], Answer]:
    return lambda node: clear(_saved(node, "self"), *points)


def _clamp(node: Node) -> Answer:
    x, bounds = _saved(node, "self"), [_saved(node, name) for name in ("min", "max")]
    answer: Answer = isinstance(x, Tensor)
    for bound in bounds:
        if bound is not None:
            one = _apart(x, bound) if isinstance(bound, Tensor) else clear(x, float(bound))
            answer = answer & one
    if all(isinstance(bound, Tensor) for bound in bounds):
        answer = answer & _apart(bounds[0], bounds[1])
    return answer


def _shrink(node: Node) -> Answer:
    point = float(node._saved_lambd)
    return clear(_saved(node, "self"), -point, point)


def _hardtanh(node: Node) -> Answer:
    return clear(_saved(node, "self"), float(node._saved_min_val), float(node._saved_max_val))


def _one_extreme(node: Node) -> Answer:
    """Exactly one entry of every group attains the result."""
    x, result = _saved(node, "self"), _saved(node, "result")
    if x is None or result is None or x.dim() == 0:
        return x is not None
    dims = _saved(node, "dim")
    dims = [signed(d) % x.dim() for d in dims] if dims else list(range(x.dim()))
    if not _saved(node, "keepdim"):
        for dim in sorted(dims):
            result = result.unsqueeze(dim)
    return _told(((x == result).sum(dims) == 1).all())


def _mean_of_all(node: Node) -> Answer:
    """ATen divides the gradient of a mean by the number of predictions, also where the targets are more of them."""
    x, target = _saved(node, "self"), _saved(node, "target")
    if x is None or target is None:
        return False
    whole = torch.broadcast_shapes(x.shape, target.shape)  # type: ignore[no-untyped-call]
    return int(node._saved_reduction) != 1 or math.prod(whole) == x.numel()


#: The safety net: kinked operations that ran out of the records' sight.
KINKS: dict[str, Callable[[Node], Answer]] = {
    "AbsBackward": _at(0.0),
    "ClampBackward": _clamp,
    "ClampMinBackward": _clamp,
    "ClampMaxBackward": _clamp,
    "LeakyReluBackward": _at(0.0),
    "RreluWithNoiseBackward": _at(0.0),
    "PreluKernelBackward": _at(0.0),
    "HardtanhBackward": _hardtanh,
    "HardsigmoidBackward": _at(-3.0, 3.0),
    "HardswishBackward": _at(-3.0, 3.0),
    "HardshrinkBackward": _shrink,
    "SoftshrinkBackward": _shrink,
    "ThresholdBackward": lambda node: clear(_saved(node, "self"), float(node._saved_threshold)),
    **dict.fromkeys(
        [f"{name}Backward" for name in ("Maximum", "Minimum", "Fmax", "Fmin")],
        lambda node: _apart(_saved(node, "self"), _saved(node, "other")),
    ),
    "AmaxBackward": _one_extreme,
    "AminBackward": _one_extreme,
}
GUARDED: dict[str, Callable[[Node], Answer]] = {
    "DivBackward": _division,
    "AddcdivBackward": _quotient,
    "EmbeddingBackward": _plain_embedding,
    "EmbeddingBagBackward": _sum_of_embeddings,
    "SqrtBackward": _positive("result"),
    "RsqrtBackward": _positive("result"),
    "LogBackward": _positive("self"),
    "Log2Backward": _positive("self"),
    "Log10Backward": _positive("self"),
    "Log1PBackward": _inside(-1.0, float("inf")),
    "AsinBackward": _inside(-1.0, 1.0),
    "AcosBackward": _inside(-1.0, 1.0),
    "AtanhBackward": _inside(-1.0, 1.0),
    "ErfinvBackward": _inside(-1.0, 1.0),
    "AcoshBackward": _inside(1.0, float("inf")),
    "TanBackward": _finite("result"),
    "ReciprocalBackward": lambda node: _divisor(_saved(node, "result")),
    "PowBackward": _power,
    "StdBackward": _positive("result"),
    "StdMeanBackward": _positive("result0"),
    "LinalgVectorNormBackward": _euclidean,
    "NormBackward": _euclidean,
    "HypotBackward": _positive("result"),
    "WeightNormInterfaceBackward": lambda node: _between_0_and_infinity(node._saved_result1),
    **dict.fromkeys(
        [f"{name}Backward" for name in "Atan Celu Erf Erfc Glu LogSigmoid SoftMarginLoss".split()], _finite_input
    ),
    "SoftplusBackward": _softplus,
    "EluBackward": _elu,
    "SmoothL1LossBackward": lambda node: float(node._saved_beta) > 0,
    "HuberLossBackward": lambda node: float(node._saved_delta) > 0,
    "BinaryCrossEntropyBackward": _probability,
    "GridSampler2DBackward": lambda node: node.next_functions[1][0] is None,
    "GridSampler3DBackward": lambda node: node.next_functions[1][0] is None,
    "MkldnnRnnLayerBackward": lambda node: int(node._saved_mode) == 2,  # LSTM
    "IndexPutBackward": moves_only,
    "ScatterBackward": moves_only,
    "AsStridedBackward": _within,
    "MseLossBackward": _mean_of_all,
    **dict.fromkeys([f"UpsampleNearest{d}DBackward" for d in (1, 2, 3)], _nearest),
    **KINKS,
}
