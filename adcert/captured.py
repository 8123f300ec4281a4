"""What Dynamo captured of compiled code: which of its nodes are recorded, and the program that shows them.

A ReLU or a max pooling becomes a recording operator of :mod:`adcert.ops`: opaque to the compiler, so that its input is
a tensor in memory, what it saw is among its outputs, and backward selects by those. These outputs, and those of
convolutions, are further outputs of the program. See :mod:`adcert.compiled`.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from . import ops
from .choices import Window
from .reference import pair

LEAST = 1024  # entries of a list
SHARE = 16  # a list has room for one of so many that its operation could find

_RELU = frozenset({F.relu, torch.relu, Tensor.relu})
_RELU_IN_PLACE = frozenset({F.relu_, torch.relu_, Tensor.relu_})
_POOL = frozenset({F.max_pool2d, torch.max_pool2d})
_POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_NORMS = frozenset({F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm})
_NATIVE = ("input", "weight", "bias", "running_mean", "running_var", "training")
_CONVOLUTIONS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d})
# Their autograd nodes keep no output: where nobody else reads it, nobody computes it.
_UNKEPT = frozenset({F.batch_norm, operator.add, operator.sub, torch.add, torch.sub, Tensor.add, Tensor.sub})
# They return memory of their own: a write to it that nobody else reads is as good out of place.
_FRESH = _CONVOLUTIONS | _UNKEPT | {F.linear, torch.cat}
# They keep the order of the elements.
_RESHAPES = frozenset(
    {torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, Tensor.flatten, Tensor.reshape, Tensor.view}
    | {Tensor.squeeze, Tensor.unsqueeze, Tensor.contiguous, Tensor.float, Tensor.to}
)
_OUT_OF_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, "add_": "add", "sub_": "sub"}


_SWITCHES = frozenset(
    "grad backward requires_grad_ _set_grad_enabled set_grad_enabled inference_mode _get_data_attr set_ detach_".split()
)
_WRITES = frozenset("setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul".split())
_OURS = ("torch", "_operator", "math", "builtins")  # modules whose functions do nothing but compute


class Refused(Exception):
    """Something that no replay can account for."""


class Overflow(Refused):
    """A list that had too little room; ``needed``: entries."""

    def __init__(self, found: str, needed: int) -> None:
        super().__init__(f"{found}, more than compiled code has room for")
        self.needed = needed


def unrecorded(name: str) -> str:
    return f"{name} in compiled code is not recorded: run what calls it uncompiled (torch.compiler.disable)"


@dataclass(frozen=True)
class Site:
    """A recorded operation of a captured graph: a ReLU (``window`` is None), a max pooling, or both fused."""

    module: int  # id of the module that calls it, or 0
    relu: bool
    window: Window | None
    ceil_mode: bool

    @property
    def kind(self) -> str:
        return "ReLU" if self.window is None else "MaxPool2d"

    @property
    def outputs(self) -> int:
        """What the operator returns, but for the last of a pooling, which only backward reads."""
        return 3 if self.window is None else 6


class Region:
    """A captured graph, and what its compiled program returns beside its own outputs.

    ``graph``: nodes with a ``"site"`` in their ``meta`` are recorded. ``shown``: nodes whose values the program
    returns, how many tensors each, and which of the program's own outputs is the first of them (None: none).
    ``unread``: nodes whose values no replay reads. ``rooms``: entries the lists of a recorded node have room for;
    ``outgrown``: that was too little, and the next call compiles anew. ``dynamic``: sizes are symbols. ``problem``:
    why there is no replay, or "". ``statistics``: which arguments are running statistics that are
    written; a backend may do so without a new version.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(module.graph, {}))
        self.outputs = len(_returned(self.graph))
        self.shown: list[tuple[fx.Node, int, int | None]] = []
        self.rooms: dict[fx.Node, int] = {}
        self.outgrown = False
        self.dynamic = any(node.op == "placeholder" and _symbolic(node) for node in self.graph.nodes)
        self.unread: frozenset[fx.Node] = frozenset()
        given = [node for node in self.graph.nodes if node.op == "placeholder"]
        statistics = {each for node in self.graph.nodes for each in _statistics(node)}
        self.statistics = [number for number, node in enumerate(given) if node in statistics]
        self.problem = ""
        try:
            self._analyse()
        except Refused as error:
            self.refuse(str(error))

    def refuse(self, problem: str) -> None:
        self.problem = problem
        self.shown = []

    def _analyse(self) -> None:
        for node in list(self.graph.nodes):
            _check(node)
            in_place = function_of(node) is not None and node.target in _OUT_OF_PLACE
            if in_place and _fresh(node.args[0]) and _like(node, node.args[0]):
                node.target = _OUT_OF_PLACE[node.target]
            site = _site(node)
            if site is None:
                _check_write(node)
            else:
                x = _input(node)
                below = x.meta.get("site")
                if site.window is not None and below is not None and below.window is None and len(x.users) == 1:
                    site = Site(site.module, True, site.window, site.ceil_mode)
                    node.args, node.kwargs = (_input(x),), {}
                    self.graph.erase_node(x)
                    del self.rooms[x]
                node.meta["site"] = site
                share = 2 if self.dynamic else SHARE if site.window is not None else 16 * SHARE
                self.rooms[node] = _room(node.meta["example_value"], share)
        self.unread = _unread(self.graph)
        for node in self.graph.nodes:
            if "site" in node.meta:
                self.shown.append((node, node.meta["site"].outputs, self._returned_as(node)))
            elif node.op == "call_function" and node.target in _CONVOLUTIONS and not self._sharing(node):
                self.shown.append((node, 1, None))

    def _sharing(self, node: fx.Node) -> list[int]:
        """Outputs of the program that share memory with a node's value."""
        memory = _memory(node)
        outputs = enumerate(_returned(self.graph))
        return [k for k, out in outputs if isinstance(out, fx.Node) and _memory(out) == memory is not None]

    def _returned_as(self, node: fx.Node) -> int | None:
        """The output of the program that is all of a node's value, in its order.

        Compilers return one tensor for two outputs that are one; whether it has a graph would not be ours to say.
        """
        sharing = self._sharing(node)
        for k in sharing:
            out = _returned(self.graph)[k]
            while out is not node and function_of(out) in _RESHAPES and isinstance(out.args[0], fx.Node):
                out = out.args[0]
            if out is node:
                return k
        if sharing:
            raise Refused("an output of compiled code is a view of a recorded operation's")
        return None

    def program(self) -> fx.GraphModule:
        """What is compiled: recorded operations by recording operators, and the shown values as further outputs."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.graph_copy(self.graph, copies)
        replaced: dict[fx.Node, fx.Node] = {}
        further: list[fx.Node] = []
        for original, _, own in self.shown:
            node = copies[original]
            site = original.meta.get("site")
            with graph.inserting_after(node):
                if site is None:
                    further.append(graph.call_method("detach", (node,)))
                    continue
            with graph.inserting_before(node):
                call = graph.call_function(*_operator(site, _input(node), self.rooms[original]))
                parts = [graph.call_function(operator.getitem, (call, k)) for k in range(site.outputs)]
                further += [graph.call_method("detach", (parts[0],))] if own is None else []
                further += parts[1:]
            parts[0].meta = dict(node.meta)
            replaced[node] = parts[0]
            node.replace_all_uses_with(parts[0])
            graph.erase_node(node)
        returned = fx.node.map_arg(_returned(self.graph), lambda node: replaced.get(copies[node], copies[node]))
        graph.output((*returned, *further))
        graph.lint()
        return fx.GraphModule(self.module, graph)


def _symbolic(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.SymInt) or (
        isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)
    )


def _memory(node: fx.Node) -> int | None:
    value = node.meta.get("example_value")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _returned(graph: fx.Graph) -> Sequence[Any]:
    (returned,) = next(node for node in reversed(graph.nodes) if node.op == "output").args
    return returned if isinstance(returned, (tuple, list)) else (returned,)


def _check(node: fx.Node) -> None:
    """Nodes that are no plain call of torch, or not to be moved past: higher order operators, contexts, submodules,
    what switches gradients on or off or hides a tensor from them, and functions of the user's."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return
    name = getattr(node.target, "__name__", str(node.target))
    if (
        node.op == "call_module"
        or isinstance(node.target, torch._ops.HigherOrderOperator)
        or name in _SWITCHES
        or name.startswith(("_enter", "_exit", "_functorch", "_vmap", "_jvp", "_grad_"))
        or not (getattr(node.target, "__module__", None) or "torch").startswith(_OURS)
    ):
        raise Refused(f"{name} in compiled code is not followed")


def _check_write(node: fx.Node) -> None:
    """A write to a tensor that others may read: what follows reads it at its own place, and may not be moved."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method"):
        return
    out = node.kwargs.get("out") is not None
    named = (name.endswith("_") and not name.endswith("__")) or name.strip("_") in _WRITES
    if not (named or out or _in_place(node)):
        return
    written = node.args[0].meta.get("example_value") if node.args and isinstance(node.args[0], fx.Node) else None
    if out or not isinstance(written, Tensor) or written.is_floating_point():  # integers count batches
        raise Refused(f"{name} in compiled code writes to a tensor, which is not followed")


def _in_place(node: fx.Node) -> bool:
    """Is it a function of torch.nn.functional that is asked to overwrite its input?"""
    function = function_of(node)
    if getattr(function, "__module__", None) != F.__name__:
        return bool(node.kwargs.get("inplace"))
    try:
        return bool(inspect.signature(function).bind(*node.args, **node.kwargs).arguments.get("inplace"))
    except (TypeError, ValueError):
        return True


def _statistics(node: fx.Node) -> list[fx.Node]:
    """Running statistics that a normalisation writes."""
    function = function_of(node)
    if function not in _NORMS:
        return []
    functional = function.__module__ == F.__name__
    names = ("input", "running_mean", "running_var", "weight", "bias", "training") if functional else _NATIVE
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("training", given.get("use_input_stats", functional)) is False:
        return []
    found = (given.get("running_mean"), given.get("running_var"))
    return [each for each in found if isinstance(each, fx.Node)]


def function_of(node: fx.Node) -> Any:
    """The function that a node calls, None where it calls none."""
    if node.op == "call_method":
        return getattr(Tensor, str(node.target), None)
    return node.target if node.op == "call_function" else None


def _input(node: fx.Node) -> fx.Node:
    found = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(found, fx.Node)
    return found


def _fresh(value: Any) -> bool:
    """Is it memory of its own that one node alone reads?"""
    return isinstance(value, fx.Node) and function_of(value) in _FRESH and len(value.users) == 1


def _like(node: fx.Node, other: Any) -> bool:
    """Are both tensors, of one dtype and shape?"""
    mine, theirs = node.meta.get("example_value"), other.meta.get("example_value")
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return False
    return mine.dtype == theirs.dtype and mine.shape == theirs.shape


def _site(node: fx.Node) -> Site | None:
    """What a node records; None for anything that no recording operator replaces."""
    function = function_of(node)
    relu = function in _RELU or function in _RELU_IN_PLACE
    if not relu and function not in _POOL:
        return None
    given = dict(zip(_POOL_ARGUMENTS if not relu else ("input", "inplace"), node.args, strict=False)) | node.kwargs
    x = given["input"]
    value = x.meta.get("example_value") if isinstance(x, fx.Node) else None
    if not isinstance(value, Tensor) or value.dtype not in ops.DTYPES or value.device.type not in ("cpu", "cuda"):
        return None
    path = node.meta.get("nn_module_stack") or {"0": None}
    module = str(next(reversed(path)))
    owner = int(module) if module.isdigit() else 0
    if relu:
        if (function in _RELU_IN_PLACE or given.get("inplace")) and not _fresh(x):
            return None
        node.kwargs = {}
        node.args = (x,)
        return Site(owner, True, None, False)
    if given.get("return_indices") or any(isinstance(v, fx.Node) for k, v in given.items() if k != "input"):
        return None
    kernel = _pair(given["kernel_size"])
    stride = _pair(given.get("stride") or kernel)
    window = Window(kernel, stride, _pair(given.get("padding", 0)), _pair(given.get("dilation", 1)))
    return Site(owner, False, window, bool(given.get("ceil_mode")))


def _pair(value: Any) -> tuple[int, int]:
    return pair(tuple(value) if isinstance(value, list) else value, "window")


def _room(value: Tensor, share: int) -> int:
    """One entry for so many elements, by the sizes of the example where sizes are symbols."""
    sizes = [size if isinstance(size, int) else int(size.node.hint or 1) for size in value.shape]
    return max(LEAST, math.prod(sizes) // share)


def _operator(site: Site, x: fx.Node, room: int) -> tuple[Any, tuple[Any, ...]]:
    if site.window is None:
        return torch.ops.adcert.relu.default, (x, room)
    w = site.window
    geometry = [list(each) for each in (w.kernel, w.stride, w.padding, w.dilation)]
    return torch.ops.adcert.max_pool2d.default, (x, *geometry, site.ceil_mode, site.relu, room)


def _unread(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes whose values no replay reads: only recorded operations, whose results are known, and their like do."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if function_of(node) in _UNKEPT:
            reads = [user for user in node.users if user.op != "output" and "site" not in user.meta]
            if all(user in found and user.target not in (F.batch_norm,) for user in reads):
                found.add(node)
    return frozenset(found)
