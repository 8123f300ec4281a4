"""Kinked activations that ran inside a function of torch's, out of the function mode's sight: records from their nodes.

``F.l1_loss`` takes an absolute value, ``F.normalize`` clamps a norm. Their nodes keep y for backward, so touches are
read from there, when backward begins. Only where there are some: else the node is smooth where it stands
(:mod:`adcert.guards`). On a GPU, where looking would mean waiting, the guards alone decide.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import activations, ops
from .activations import Activation
from .layers import Graph, kind_of
from .nodes import Node
from .recorder import Recorder
from .records import OpRecord


def _clamp(low: float | None, high: float | None) -> Activation | None:
    bounds = [float(b) for b in (low, high) if isinstance(b, (int, float))]
    if not bounds or bounds != sorted(set(bounds)) or len(bounds) < sum(b is not None for b in (low, high)):
        return None
    return activations.clamp(*(None if b is None else float(b) for b in (low, high)))


_OF: dict[str, Callable[[Node], Activation | None]] = {
    "AbsBackward": lambda node: activations.magnitude(),
    "ClampBackward": lambda node: _clamp(node._saved_min, node._saved_max),
    "ClampMinBackward": lambda node: _clamp(node._saved_min, None),
    "ClampMaxBackward": lambda node: _clamp(None, node._saved_max),
    "HardtanhBackward": lambda node: activations.hardtanh(float(node._saved_min_val), float(node._saved_max_val)),
    "LeakyReluBackward": lambda node: activations.leaky_relu(float(node._saved_negative_slope)),
    "HardsigmoidBackward": lambda node: activations.hardsigmoid(),
    "HardswishBackward": lambda node: activations.hardswish(),
    "SoftshrinkBackward": lambda node: activations.softshrink(float(node._saved_lambd)),
}


def adopt(graph: Graph, recorder: Recorder, origin: Callable[[Node], str]) -> None:
    """Record the unrecorded kinked nodes of a graph that touch a kink; ``origin``: tells who made a node."""
    for node in graph.nodes:
        make = _OF.get(kind_of(node))
        if make is None or node in graph.record_of or node in graph.dropped or isinstance(node, FunctionCtx):
            continue
        if not hasattr(node, "_saved_self"):
            continue
        y, rho = node._saved_self, make(node)
        if rho is None or not isinstance(y, Tensor) or y.is_cuda or node.next_functions[0][0] is None:
            continue
        record = _record(node, y.detach(), rho)
        if record is not None:
            record.name = recorder.unique(f"{rho.name}{origin(node)}")
            recorder.records.append(record)
            graph.record_of[node] = record


def _record(node: Node, y: Tensor, rho: Activation) -> OpRecord | None:
    sides = rho.sides(y) if y.dtype in ops.DTYPES else None
    if sides is None:
        return None
    seen = ops.touches(y, rho.kinks)
    if not len(seen.touches):
        return None
    record = OpRecord(rho.name, node, rho, None, seen.touches, seen.counts, y, y._version, tuple(y.shape))
    record.seen, record.seen_version, record.sides = y, y._version, sides
    return record
