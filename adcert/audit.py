"""Nothing nonsmooth goes unseen: an allow-list of graph nodes, and a function mode that follows hidden branches.

The autograd graph alone is not enough: ``x * (x > 0)`` holds no nonsmooth node. :class:`Watch` is active during the
step. It routes functional ReLUs and max poolings to the recorder, follows values that left the graph (comparisons,
argmax, detach, ...) until they meet differentiable ones again, and sees the roots of every backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .layers import ACCUMULATE, Graph, kind_of
from .nn import pair
from .records import Node, Recorder, Window

# Nodes that are analytic wherever their inputs are finite. Anything else unrecorded means UNDECIDED.
ANALYTIC = frozenset(
    f"{name}Backward" for name in """
    Add Sub Rsub Mul Neg View UnsafeView ReshapeAlias Squeeze Unsqueeze Expand Permute Transpose T Slice Select
    Cat Stack Split SplitWithSizes Unbind ConstantPadNd Clone ToCopy Alias Flip Roll Repeat Narrow Diagonal AsStrided
    Convolution Addmm Mm Bmm Baddbmm Addbmm Mv Dot Linear Mean Sum Exp Expm1 Tanh Sigmoid LogSigmoid Gelu Silu Sin Cos Erf
    NativeBatchNorm NativeLayerNorm NativeGroupNorm CudnnBatchNorm LogSoftmax Softmax NllLoss NllLoss2D MseLoss
    BinaryCrossEntropyWithLogits AvgPool2D AvgPool3D AvgPool1D AdaptiveAvgPool2D MkldnnAdaptiveAvgPool2D Index
    IndexSelect Gather Where MaskedFill NativeDropout UpsampleBilinear2D UpsampleNearest2D
    PixelShuffle ScaledDotProductFlashAttentionForCpu Logsumexp
    """.split()
)  # fmt: skip


def _all_positive(value: Any) -> bool:
    return value is not None and bool((torch.as_tensor(value) > 0).all())


def _division_is_smooth(node: Node) -> bool:
    other = node._saved_other
    rounded = getattr(node, "_saved_rounding_mode", None) is not None
    return not rounded and (other is None or bool((torch.as_tensor(other) != 0).all()))


def _embedding_is_plain(node: Node) -> bool:
    """padding_idx and scale_grad_by_freq change the gradient without changing the function."""
    return int(node._saved_padding_idx) in (-1, (1 << 64) - 1) and not node._saved_scale_grad_by_freq


def _pow_is_smooth(node: Node) -> bool:
    exponent = node._saved_exponent
    if isinstance(exponent, (int, float)) and exponent >= 0 and float(exponent).is_integer():
        return True
    return _all_positive(node._saved_self)


# Nodes that are analytic away from a singular point; the saved values must keep away from it.
GUARDED: dict[str, Callable[[Node], bool]] = {
    "DivBackward": _division_is_smooth,
    "EmbeddingBackward": _embedding_is_plain,
    "SqrtBackward": lambda node: _all_positive(node._saved_result),
    "RsqrtBackward": lambda node: _all_positive(node._saved_result),
    "LogBackward": lambda node: _all_positive(node._saved_self),
    "PowBackward": _pow_is_smooth,
    "ReciprocalBackward": lambda node: bool(torch.isfinite(node._saved_result).all()),
}


def audit_graph(graph: Graph, origins: dict[Node, str]) -> list[str]:
    """Reasons why some node of the graph is not covered: one line for each, naming the operation and where it was called."""
    reasons: dict[str, None] = {}
    for node in graph.nodes:
        if node in graph.record_of or node.name() == ACCUMULATE:
            continue
        kind = kind_of(node)
        where = origins.get(node, "")
        if kind in ANALYTIC:
            continue
        if kind in GUARDED:
            if not GUARDED[kind](node):
                reasons[f"{node.name()}{where} at a point, or in a mode, where its derivative is not the function's"] = None
            continue
        reasons[f"{node.name()}{where} is not recorded: adcert does not know where it is smooth"] = None
    return list(reasons)


# Their results depend on shapes, types and devices only, never on values.
_VALUE_FREE = frozenset(
    """zeros_like ones_like empty_like rand_like randn_like randint_like new_zeros new_ones new_empty size dim numel stride
    is_contiguous is_floating_point register_hook retain_grad requires_grad_ __repr__ __format__ __len__ __hash__""".split()
)
_READS = frozenset("item tolist numpy __bool__ __int__ __float__ __index__ __array__ __contains__ __dlpack__".split())
_RELU = frozenset({F.relu, torch.relu, Tensor.relu})
_RELU_INPLACE = frozenset({F.relu_, torch.relu_, Tensor.relu_})
_POOL = frozenset({F.max_pool2d, torch.max_pool2d})
_BACKWARD = frozenset({Tensor.backward, torch.autograd.backward, torch.autograd.grad})

OnRoot = Callable[[list[Tensor], Any, bool], None]


class Watch(TorchFunctionMode):
    """Sees every torch function the step calls. ``on_root(roots, inputs, keep)`` runs before each backward pass.

    ``keep``: the pass may leave the graph intact for another one.
    """

    def __init__(self, recorder: Recorder, on_root: OnRoot) -> None:
        super().__init__()
        self.recorder = recorder
        self.on_root = on_root
        self.origins: dict[Node, str] = {}
        self.mixed: list[tuple[Node, str]] = []
        self.assumptions: dict[str, None] = {}
        self.problems: dict[str, None] = {}
        self._hidden: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._written: dict[int, tuple[Tensor, str]] = {}

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARD:
            return self._backward(func, args, kwargs)
        name = getattr(func, "__name__", str(func))
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            self.problems["saved-tensor hooks (activation checkpointing or offloading) are active: not supported"] = None
        tensors = list(_tensors((args, kwargs)))
        output = self._recorded(func, args, kwargs)
        if output is None:
            output = func(*args, **kwargs)
        if name not in _VALUE_FREE:
            self._follow(func, name, args, tensors, output)
        return output

    def _recorded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Functional ReLU and max pooling go to the recorder; None if the call is something else."""
        if func in _RELU or func in _RELU_INPLACE:
            inplace = func in _RELU_INPLACE or bool(kwargs.get("inplace", len(args) > 1 and args[1]))
            x = args[0] if args else kwargs["input"]
            return self.recorder.relu(x, f"relu{_caller()}", inplace=inplace)
        if func in _POOL:
            names: tuple[str, ...] = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
            given: dict[str, Any] = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
            given |= dict(zip(names, args, strict=False)) | kwargs
            if given["return_indices"]:
                return None
            kernel = pair(given["kernel_size"])
            stride = pair(given["stride"]) if given["stride"] else kernel
            window = Window(kernel, stride, pair(given["padding"]), pair(given["dilation"]))
            name = f"max_pool2d{_caller()}"
            return self.recorder.max_pool2d(given["input"], name, window, ceil_mode=given["ceil_mode"])
        return None

    def _backward(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        roots: Any = args[0] if args else kwargs.get("tensors", kwargs.get("outputs", kwargs.get("self")))
        inputs = kwargs.get("inputs")
        if func is torch.autograd.grad and inputs is None and len(args) > 1:
            inputs = args[1]
        keep = bool(kwargs.get("retain_graph") or kwargs.get("create_graph")) or len(args) > 2
        self.on_root([roots] if isinstance(roots, Tensor) else list(roots), inputs, keep)
        return func(*args, **kwargs)

    def _follow(self, func: Any, name: str, args: tuple[Any, ...], tensors: list[Tensor], output: Any) -> None:
        source = next((found for found in map(self._origin, tensors) if found), None)
        live = any(tensor.requires_grad for tensor in tensors)
        if source is None and not live:
            return
        if name in _READS:
            self.assumptions[f"values read into Python by {name}{_caller()} are constants of the step"] = None
            return
        outputs = [tensor for tensor in _tensors(output) if isinstance(tensor, Tensor)]
        if name in ("__setitem__", "copy_") and args and isinstance(args[0], Tensor):
            outputs.append(args[0])
        for tensor in outputs:
            if tensor.requires_grad:
                if source is not None and tensor.grad_fn is not None:
                    self.mixed.append((tensor.grad_fn, f"{source} steers the differentiable {name}{_caller()}"))
                elif tensor.grad_fn is not None:
                    self._name_nodes(tensor.grad_fn, {t.grad_fn for t in tensors}, name)
            elif not torch.is_grad_enabled():
                if source is None:
                    self.assumptions[f"values computed under no_grad by {name}{_caller()} are constants"] = None
            else:
                origin = source or f"{name}{_caller()}"
                self._hidden[tensor] = origin
                if name.endswith("_") or name == "__setitem__":
                    self._written[tensor.untyped_storage()._cdata] = (tensor, origin)

    def _name_nodes(self, node: Node, inputs: set[Node], name: str) -> None:
        """Note which call made the nodes between its output and its inputs that are not plainly analytic."""
        stack, left = [node], 64
        while stack and left:
            node, left = stack.pop(), left - 1
            if node is None or node in inputs or node in self.origins or node.name() == ACCUMULATE:
                continue
            if kind_of(node) not in ANALYTIC:
                self.origins[node] = f" ({name}{_caller()})"
            stack += [source for source, _ in node.next_functions]

    def _origin(self, tensor: Tensor) -> str | None:
        """Where a value that left the graph came from, if this tensor is one (or shares memory written with one)."""
        found: str | None = self._hidden.get(tensor)  # type: ignore[no-untyped-call]
        if found is None and self._written and not tensor.requires_grad:
            held = self._written.get(tensor.untyped_storage()._cdata)
            found = None if held is None else held[1]
        return found


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _caller() -> str:
    """' at file:line' of the nearest frame outside torch and adcert."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("torch.", "adcert.")) and module not in ("torch", "adcert"):
            return f" at {frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
