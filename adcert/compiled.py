"""Compiled code inside a step: the compiled program's own touches, ties and activations, and the graph it stands for.

Under ``torch.compile`` a forward pass is one opaque autograd node. While a step runs, the stance of
``torch.compiler`` sends every graph that Dynamo captures through :func:`backend`, which has the user's own backend
compile it with two changes. A ReLU or a max pooling is a recording operator of :mod:`adcert.ops`: opaque to the
compiler, so that its input is a tensor in memory, what it saw is among its outputs, and backward selects by those. And
these outputs, and those of convolutions, are outputs of the program, too.

Each call is then replayed for its structure: the captured graph runs under the step's function mode, node by node,
with the compiled program's values where it has shown them (:class:`_Substitute`). Autograd nodes, records and audit
are those of an eager step. Smooth operations in between are computed again where somebody reads their values, and
filled with NaN where nobody does. Where an edge of the step's graph leads into the compiled node,
:class:`adcert.layers.Graph` goes on in the replayed one.

A replay may run nothing that a second evaluation could decide in another way (:data:`_SMOOTH`): other operations make
the step undecided, and are named.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from .captured import Region
from .recorder import active
from .substitution import Replay


def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """A backend of torch.compile: the user's own, given a graph that shows what a step has to know."""
    compiler = _own_backend()
    region = Region(module)
    if not region.problem and _recomputes():
        region.refuse(
            "compiled code may compute activations a second time in backward (torch._functorch.config: "
            "activation_memory_budget, aggressive_recomputation, ban_recompute_not_in_allowlist)"
        )
    if region.problem and _split():
        region.refuse(
            f"{region.problem} (DistributedDataParallel has cut the program where its buckets end: "
            "torch._dynamo.config.optimize_ddp = False leaves it whole)"
        )
    compiled = compiler(module if region.problem else region.program(), example_inputs)

    def run(*args: Any) -> Any:
        nonlocal compiled
        tensors = [given for given in args if isinstance(given, Tensor)]
        if any(isinstance(given, FakeTensor) for given in tensors):  # the compiler asks for shapes of outputs
            return tuple(compiled(*args))[: region.outputs]
        recorder = active()
        with torch._C.DisableTorchFunction():
            if region.outgrown:
                compiled, region.outgrown = compiler(region.program(), list(args)), False
            versions = [given._version for given in tensors] if recorder is not None else []
            results = tuple(compiled(*args))
        outputs = results[: region.outputs]
        if recorder is not None and recorder.witness is not None:
            with torch._C.DisableTorchFunction():
                written = [t for t, version in zip(tensors, versions, strict=True) if t._version != version]
                written += [args[number] for number in region.statistics]
                if region.problem:  # it may write without a new version
                    written += [t for t in tensors if t.is_floating_point() and not t.requires_grad]
                recorder.witness.ran(tensors, written, outputs, region.problem)
            Replay(region, recorder, args, results).account()
        return outputs

    return run


def _own_backend() -> Callable[..., Any]:
    """What would have compiled the graph outside of a step: it is known to the call that is being compiled."""
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.eval_frame import innermost_backend

    forced = _stance.before
    if forced is not None:
        return lookup_backend(forced) if isinstance(forced, str) else forced
    frame = sys._getframe(1)
    while frame is not None:
        callback = frame.f_locals.get("callback") if frame.f_code.co_name == "compile_wrapper" else None
        if callable(callback):
            return innermost_backend(callback)
        frame = frame.f_back  # type: ignore[assignment]
    return lookup_backend("inductor")


def _split() -> bool:
    """Is the graph that is being compiled a part of one that DistributedDataParallel's optimizer has cut?"""
    context = torch._guards.TracingContext.try_get()
    return getattr(context, "ddp_optimizer_ctx", None) is not None


def _recomputes() -> bool:
    from torch._functorch import config

    kept = config.activation_memory_budget == 1.0 and config.ban_recompute_not_in_allowlist
    return not kept or bool(config.aggressive_recomputation)


class _Stance:
    """How many steps run, and the backend that was forced before the first of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.steps = 0
        self.before: Any = None
        self.set: Any = None


_stance = _Stance()


@contextlib.contextmanager
def seen() -> Iterator[None]:
    """While a step runs, graphs that Dynamo captures go through :func:`backend`.

    A stance of the user's other than the default stays: what it runs compiled nobody sees, and the audit says so.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None or dynamo._stance.stance != "default":
        yield
        return
    with _stance.lock:
        _stance.steps += 1
        if _stance.steps == 1:
            _stance.before = dynamo._stance.backend
            _stance.set = torch.compiler.set_stance("default", force_backend=backend)
    try:
        yield
    finally:
        with _stance.lock:
            _stance.steps -= 1
            if _stance.steps == 0:
                _stance.set.__exit__(None, None, None)
                _stance.before = _stance.set = None


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Meanwhile compiled functions run as Python would run them."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
