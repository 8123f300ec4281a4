"""What the function mode has seen, followed: what results have to be remembered for, and what a call may hide."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .functions import (
    FUNCTIONAL_NORM,
    HOOKS,
    NATIVE_NORM,
    NORMS,
    READS,
    SATURATING,
    VALUE_FREE,
    attribute_of,
    named,
    opaque,
    plain,
    writes_analytically,
)
from .guards import finite
from .layers import ACCUMULATE
from .nodes import COPY_SLICES, Node
from .recomputed import dropping
from .sites import Origin, Site, caller, site, told
from .smooth import ANALYTIC
from .tensors import base_of, list_tensors, version_of

if TYPE_CHECKING:
    from .watch import Watch

_dispatch_modes = torch._C._len_torch_dispatch_stack


class Followed:
    """One call: what it was given, and what its result has to be remembered for."""

    __slots__ = (
        "args",
        "func",
        "inputs",
        "known",
        "kwargs",
        "live",
        "name",
        "out",
        "seen",
        "target",
        "tensors",
        "versions",
        "watch",
    )

    def __init__(
        self, watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> None:
        self.watch = watch
        self.func = func
        self.args, self.kwargs = args, kwargs
        self.known = False  # to the routing table, which computes what torch computes
        self.name: str = getattr(func, "__name__", None) or str(func)
        self.tensors = tensors
        self.live = any([tensor.requires_grad for tensor in tensors])  # detach_ ends it
        self.target = args[0] if args and isinstance(args[0], Tensor) else None
        self.out = list_tensors(kwargs["out"]) if "out" in kwargs else []
        # An in-place call changes grad_fn and version: look before it runs.
        self.inputs: set[Node] = set()
        self.versions = [version_of(tensor) for tensor in tensors]
        for tensor, version in zip(tensors, self.versions, strict=True):
            if tensor.requires_grad:
                self._sight(tensor, version)
            if not plain(type(tensor)):
                self.problem(f"{self.name}{caller()} is given a {named(tensor)}, which may compute something else")
        # A view made out of sight loses the node that says so when it is written to.
        target = self.target
        self.seen = target is not None and (not target.requires_grad or watch.versions.get(target) is not None)
        if self.live and self.name in SATURATING and torch.is_grad_enabled():
            self._bounded()
        if _dispatch_modes() > watch.modes:
            self.problem(f"a dispatch mode may replace what {self.name}{caller()} computes")

    def _bounded(self) -> None:
        """An overflow must not pass as the limit of the function."""
        text = f"{self.name}{caller()} is given NaN or infinite values"
        for tensor in self.tensors:
            found = finite(tensor)
            if isinstance(found, Tensor):
                self.watch.flags.append((text, found))
            elif not found:
                self.problem(text)

    def _sight(self, tensor: Tensor, version: int) -> None:
        """Note where a differentiable tensor stands; it must not have changed since it was last seen."""
        try:
            node = tensor.grad_fn
        except RuntimeError as error:
            self.problem(f"{self.name}{caller()} meets a view that autograd refuses: {error}")
            return
        if node is not None:
            self.inputs.add(node)
            watch = self.watch
            if watch.stale(tensor, version):
                self.problem(f"a tensor of the graph was written to out of sight before {self.name}{caller()}")
            if node not in watch.made and tensor._is_view():
                watch.replayed(tensor, node)

    def problem(self, text: str) -> None:
        self.watch.problems[text] = None

    def in_place(self) -> bool:
        name = self.name
        return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")

    def setter(self) -> str:
        """Name of the attribute a ``__set__`` call writes, else ''."""
        return attribute_of(self.func) if self.name == "__set__" else ""

    def follow(self, output: Any) -> None:
        if self.name in VALUE_FREE or (self.name == "__set__" and self.setter() != "data"):
            return
        outputs = [output] if isinstance(output, Tensor) else list_tensors(output)
        outputs += [t for t in self.out if not any(t is other for other in outputs)]  # some return nothing
        if self.in_place() and self.target is not None and not any(t is self.target for t in outputs):
            outputs.append(self.target)
        statistics, training = self._statistics()
        unread = statistics if training else []
        watch = self.watch
        source = self._source(unread) if watch.written or watch.hidden.of_any(self.tensors) else None
        live = self.live
        alias = bool(watch.aliases) and any(watch.aliases.get(t) is not None for t in self.tensors)
        self._keep_statistics(statistics, training, live)
        if live and torch.is_grad_enabled():
            for tensor in self.tensors:
                if not tensor.requires_grad and not any(tensor is each for each in statistics):
                    watch.constants.set(tensor, True)
        if source is None and not live and not alias:
            return
        if self.name in HOOKS:
            if self.target is not None and self.target.grad_fn is not None:
                self.problem(f"a hook{caller()} may change the gradient on its way")
            return
        if self.name in READS:
            self.watch.assumptions[f"values read into Python by {self.name}{caller()} are constants of the step"] = None
            return
        self._check_writes()
        for tensor in unread:  # written without a new version
            watch.hidden.set(tensor, (f"the running statistics of {self.name}", None))
        for tensor in outputs:
            if not tensor.requires_grad:
                self._note_alias(tensor)
            if source is not None or live:
                self._result(tensor, source)
        if any([tensor.requires_grad and not tensor.is_leaf for tensor in outputs]):
            for tensor in self.tensors:
                if tensor.requires_grad and tensor.is_leaf:
                    watch.leaves.setdefault(id(tensor), (tensor, tensor._version))

    def _source(self, unread: list[Tensor]) -> Origin | None:
        """Where a value that left the graph came from, if the call reads one."""
        read = [tensor for tensor in self.tensors if not any(tensor is other for other in unread)]
        return next((found for found in map(self.watch.source_of, read) if found), None)

    def _statistics(self) -> tuple[list[Tensor], bool]:
        """A normalisation's running statistics; are they written and not read, as in train mode?"""
        name = self.name.split(".", 1)[0]  # of an overload
        if name not in NORMS:
            return [], False
        names = FUNCTIONAL_NORM if isinstance(self.func, FunctionType) else NATIVE_NORM
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        training = given.get("training", given.get("use_input_stats", name == "instance_norm"))
        statistics = (given.get("running_mean"), given.get("running_var"))
        return [t for t in statistics if isinstance(t, Tensor)], bool(training)

    def _keep_statistics(self, statistics: list[Tensor], training: bool, live: bool) -> None:
        """Backward in eval mode reads the statistics again, and autograd does not know who has written them."""
        frozen = self.watch.frozen
        for tensor in statistics:
            if not training and live and torch.is_grad_enabled():
                frozen.set(tensor, True)
            elif training and (frozen.get(tensor) or self.watch.constants.get(tensor)):
                self.problem(f"{self.name}{caller()} changes running statistics that the graph still needs")

    def _check_writes(self) -> None:
        """Writes that change values behind the graph's back: a new version without a new node."""
        data = self.setter() == "data"
        for tensor, version in zip(self.tensors, self.versions, strict=True):
            if version_of(tensor) == version and not data:
                continue
            base = self.watch.aliases.get(tensor)
            unused = base is not None and base.is_leaf and id(base) not in self.watch.leaves
            if (base is not None and not unused) or data:
                self.problem(f"{self.name}{caller()} changes a tensor of the graph through a detached alias")
            elif tensor.requires_grad and tensor.grad_fn is not None and tensor.grad_fn in self.inputs:
                self.problem(f"{self.name}{caller()} changes a tensor of the graph without autograd (under no_grad)")
            elif not tensor.requires_grad:  # a buffer that holds a function of the parameters from now on
                origin = (self.name, site())
                self.watch.hidden.set(tensor, origin)
                self.watch.written[tensor.untyped_storage()._cdata] = (tensor, origin)  # views of it, too

    def _result(self, tensor: Tensor, source: Origin | None) -> None:
        watch = self.watch
        if tensor.requires_grad and tensor.grad_fn is not None:
            watch.versions.set(tensor, tensor._version)
            if tensor is self.target and tensor._version != self.versions[0]:
                watch.rewritten.set(base_of(tensor), tensor._version)
            pastes = self._name_nodes(tensor.grad_fn)
            message = ""
            if source is not None:
                message = f"{told(source)} steers the differentiable {self.name}{caller()}"
            elif not self.known and opaque(self.func, self.args, self.kwargs):
                message = f"{self.name}{caller()} is written in Python and may hide a branch from autograd"
            if message:  # the base of a view reaches what was written into it past the view's own node
                watch.mixed += [(node, message) for node in (tensor.grad_fn, *pastes)]
            elif pastes and self.seen and writes_analytically(self.func, self.args, self.kwargs):
                watch.pasted.update(pastes)
        elif tensor.requires_grad and source is None:
            return  # a leaf as it was
        elif not torch.is_grad_enabled() and source is None:
            watch.assumptions[f"values computed under no_grad by {self.name}{caller()} are constants"] = None
        else:
            origin = source or (self.name, site())
            watch.hidden.set(tensor, origin)
            if self.in_place() or self.out:
                watch.written[tensor.untyped_storage()._cdata] = (tensor, origin)

    def _note_alias(self, tensor: Tensor) -> None:
        """A result outside the graph that shares memory with a tensor of it: a write to it would be unseen."""
        aliases, memory = self.watch.aliases, tensor.untyped_storage()._cdata
        for given in self.tensors:
            if given is not tensor and given.untyped_storage()._cdata == memory:
                known = aliases.get(given)
                if given.requires_grad or known is not None:
                    aliases.set(tensor, given if known is None else known)

    def _name_nodes(self, node: Node) -> list[Node]:
        """Every node between the result and what the call was given was made by this call; those that write to views.

        But not a weight that autocast has cast before the step and keeps: it may have changed since.
        Nothing else of an in-place function on a view is in the graph.
        """
        pastes, dropped = [], dropping()
        made, inputs, stack = self.watch.made, self.inputs, [node]
        place: Site | None = None  # looking for it costs more than all the rest
        while stack:
            node = stack.pop()
            if node is None or node in inputs or node in made:
                continue
            name = node.name()
            if name == ACCUMULATE or node._sequence_nr() < self.watch.began:
                continue
            if place is None and name.rstrip("0123456789") not in ANALYTIC:
                place = site()
            made[node] = (self.name, place)
            if dropped:
                self.watch.dropped.add(node)
            if name == COPY_SLICES:
                pastes.append(node)
            stack += [source for source, _ in node.next_functions]
        return pastes


def follow_program(
    watch: Watch, given: list[Tensor], written: list[Tensor], results: Sequence[Any], problem: str
) -> None:
    """A compiled program has run on ``given``; it may have written to some.

    ``problem``: why it cannot be followed, or "": it may have done anything then with what it was given.
    """
    outputs = [out for out in results if isinstance(out, Tensor)]
    if any(tensor.layout is not torch.strided for tensor in (*written, *outputs)):
        watch.problems["compiled code returns or writes sparse tensors, which are not followed"] = None
        return
    live = any([tensor.requires_grad for tensor in given])
    source = next((found for found in map(watch.source_of, given) if found), None)
    if problem and (live or source is not None):
        watch.problems[problem] = None
    if live and any(not isinstance(out, Tensor) and out is not None for out in results):
        text = f"values read into Python by a compiled program{caller()} are constants of the step"
        watch.assumptions[text] = None
    if source is None and live and torch.is_grad_enabled():
        source = ("a compiled program", site())
    for tensor in written:
        base = watch.aliases.get(tensor)
        unused = base is not None and base.is_leaf and id(base) not in watch.leaves
        if tensor.requires_grad or (base is not None and not unused):
            watch.problems[f"compiled code{caller()} writes to a tensor of the graph"] = None
        elif source is not None or live:
            source = source or ("a compiled program", site())
            watch.hidden.set(tensor, source)
            watch.written[tensor.untyped_storage()._cdata] = (tensor, source)
    for tensor in outputs:
        if tensor.requires_grad:
            watch.versions.set(tensor, tensor._version)
            continue
        memory = tensor.untyped_storage()._cdata
        for other in (*given, *outputs):
            known = watch.aliases.get(other)
            if (other.requires_grad or known is not None) and other.untyped_storage()._cdata == memory:
                watch.aliases.set(tensor, other if known is None else known)
        if source is not None:
            watch.hidden.set(tensor, source)
        elif live:
            watch.assumptions[f"values computed under no_grad by a compiled program{caller()} are constants"] = None
