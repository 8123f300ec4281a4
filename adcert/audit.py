"""The graph's half of the audit: every node below a root is recorded, or analytic where it stands, or a reason.

The other half, values that leave the graph and come back, is :mod:`adcert.watch`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import distributed

from .guards import GUARDED
from .layers import ACCUMULATE, Graph
from .nodes import Node
from .recomputed import DroppedError
from .smooth import ANALYTIC, SEVERAL
from .watch import Watch


def audit_graph(graph: Graph, watch: Watch, roots: Iterable[Tensor] = ()) -> list[tuple[str, Tensor | None]]:
    """Reasons why some node of the graph is not covered: one line each, naming operation and call.

    A reason with a flag, on a device, holds only if the flag is false.
    """
    reasons: list[tuple[str, Tensor | None]] = []
    refused = [watch.recorder.refused[node] for node in graph.nodes if node in watch.recorder.refused]
    if refused:
        return [(reason, None) for reason in refused]
    further = {node for node, number in map(watch.recorder.edge, roots) if number}
    for node in graph.nodes:
        name = node.name()
        if name == ACCUMULATE or node in graph.record_of or _is_sink(node):
            continue
        kind = name.rstrip("0123456789")
        custom = isinstance(node, FunctionCtx)  # a user's autograd.Function may bear any name
        if kind in GUARDED and not custom:
            try:
                smooth = GUARDED[kind](graph.legible(node))
            except DroppedError as error:
                reasons.append((f"{name}{watch.origin(node)}: {error}", None))
                continue
            if isinstance(smooth, Tensor) or not smooth:
                where = watch.origin(node)
                text = f"{name}{where} at a point, or in a mode, where its derivative is not the function's"
                reasons.append((text, smooth if isinstance(smooth, Tensor) else None))
        elif (kind not in ANALYTIC and node not in watch.pasted) or custom:
            where = watch.origin(node)
            more = "; use_reentrant=False can be followed" if kind == "CheckpointFunctionBackward" else ""
            reasons.append((f"{name}{where} is not recorded: adcert does not know where it is smooth{more}", None))
        if kind not in SEVERAL and (node in further or any(number for _, _, number in graph.consumers[node])):
            reasons.append((f"{name}{watch.origin(node)} may drop the gradient of its further outputs", None))
        if node not in watch.made:
            text = (
                f"{name} was made out of adcert's sight (before the step, in another thread, by TorchScript, "
                "torch.compile or a custom Function)"
            )
            if kind == "ToCopyBackward":
                text += ": autocast keeps the weights it has cast until it ends, so begin it inside the step"
            reasons.append((text, None))
    return reasons


def _is_sink(node: Node) -> bool:
    """DistributedDataParallel's own node for unused parameters and static graphs: the identity, forth and back."""
    return getattr(node, "_forward_cls", None) is distributed._DDPSink
