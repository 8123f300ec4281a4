"""The graph's half of the audit: every node below a root is recorded, or analytic where it stands, or a reason.

The other half, values that leave the graph and come back, is :mod:`adcert.watch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .layers import ACCUMULATE, Graph, kind_of
from .records import Node
from .smooth import ANALYTIC
from .watch import Watch

Answer = bool | Tensor  # of a device: a flag that nobody has waited for yet


def _told(flag: Tensor) -> Answer:
    return flag if flag.is_cuda else bool(flag)


def _all_positive(value: Any) -> Answer:
    return value is not None and _told((torch.as_tensor(value) > 0).all())


def _division_is_smooth(node: Node) -> Answer:
    other = node._saved_other
    rounded = getattr(node, "_saved_rounding_mode", None) is not None
    return not rounded and (other is None or _told((torch.as_tensor(other) != 0).all()))


def _embedding_is_plain(node: Node) -> Answer:
    """padding_idx, where it occurs, and scale_grad_by_freq change the gradient without changing the function."""
    if node._saved_scale_grad_by_freq:
        return False
    padding = int(node._saved_padding_idx)
    return padding in (-1, (1 << 64) - 1) or _told((node._saved_indices != padding).all())


def _norm_is_smooth(node: Node) -> Answer:
    return node._saved_ord == 2 and _all_positive(node._saved_result)


def _pow_is_smooth(node: Node) -> Answer:
    exponent = node._saved_exponent
    if isinstance(exponent, (int, float)) and exponent >= 0 and float(exponent).is_integer():
        return True
    return _all_positive(node._saved_self)


# Nodes that are analytic away from a singular point; the saved values must keep away from it.
GUARDED: dict[str, Callable[[Node], Answer]] = {
    "DivBackward": _division_is_smooth,
    "EmbeddingBackward": _embedding_is_plain,
    "LinalgVectorNormBackward": _norm_is_smooth,
    "SqrtBackward": lambda node: _all_positive(node._saved_result),
    "RsqrtBackward": lambda node: _all_positive(node._saved_result),
    "LogBackward": lambda node: _all_positive(node._saved_self),
    "PowBackward": _pow_is_smooth,
    "ReciprocalBackward": lambda node: _told(torch.isfinite(node._saved_result).all()),
}


def audit_graph(graph: Graph, watch: Watch) -> list[tuple[str, Tensor | None]]:
    """Reasons why some node of the graph is not covered: one line each, naming operation and call.

    A reason with a flag, on a device, holds only if the flag is false.
    """
    reasons: list[tuple[str, Tensor | None]] = []
    for node in graph.nodes:
        if node in graph.record_of or node.name() == ACCUMULATE:
            continue
        kind = kind_of(node)
        where = watch.origin(node)
        custom = isinstance(node, FunctionCtx)  # a user's autograd.Function may bear any name
        if kind in GUARDED and not custom:
            smooth = GUARDED[kind](node)
            if isinstance(smooth, Tensor) or not smooth:
                text = f"{node.name()}{where} at a point, or in a mode, where its derivative is not the function's"
                reasons.append((text, smooth if isinstance(smooth, Tensor) else None))
        elif (kind not in ANALYTIC and node not in watch.pasted) or custom:
            reasons.append((f"{node.name()}{where} is not recorded: adcert does not know where it is smooth", None))
        if node not in watch.made:
            text = (
                f"{node.name()} was made out of adcert's sight (before the step, in another thread, by TorchScript, "
                "torch.compile or a custom Function)"
            )
            reasons.append((text, None))
    return reasons
