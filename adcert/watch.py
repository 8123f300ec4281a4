"""The function mode that is active during a step: it sees what the autograd graph does not show.

``x * (x > 0)`` holds no nonsmooth node. :class:`Watch` follows values that left the graph (comparisons, argmax, detach,
...) until they steer differentiable ones again; it notes which graph nodes were made under its eyes, routes functional
ReLUs and max poolings to the recorder, and sees the roots of every backward pass. Where it cannot follow, the step
becomes UNDECIDED.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from .followed import Followed, follow_program
from .functions import BACKWARD, GETTERS, GRAD_FN, OPEN, SWITCHES, UNVERSIONED, attribute_of, named, plain
from .nodes import Node
from .notes import Notes
from .recomputed import checkpointing, dropping, same_numbers
from .recorder import Recorder, transformed
from .routes import record
from .sites import Origin, caller, site, told
from .tensors import base_of, gather, list_tensors, version_of

_HOOKED = "saved-tensor hooks other than those of torch.utils.checkpoint are active: not supported"
_AGAIN = "what torch.utils.checkpoint computes again in backward is what the forward pass computed"
_TRANSFORMED = "a transform of torch.func (grad, vjp, jvp, vmap) or forward mode computes part of the step"
OnRoot = Callable[[list[Tensor], Any, bool], None]
OnGradients = Callable[[Any, Any], None]


class Watch(TorchFunctionMode):
    """Sees every torch function the step calls. ``on_root(roots, inputs, keep)`` runs before each backward pass,
    ``on_gradients(inputs, result)`` after it.

    ``keep``: the pass may leave the graph intact for another one. ``made``: graph nodes that came from seen calls.
    ``mixed``: (node, message) where a hidden value steers a differentiable one. ``problems``: reasons that hold for
    every root that follows. ``assumptions``: what the step's certificate takes as constant. ``pasted``: nodes that
    write an analytic function of their inputs into a view. ``harmless(func, args)``: does a call
    compute nothing, as somebody else knows?

    What is noted about tensors: ``hidden``, where a value that left the graph came from; ``written``, the same of
    memory; ``aliases``, a tensor of the graph that one outside shares memory with; ``versions``, as last seen;
    ``leaves``, with their versions when they were first used.
    """

    def __init__(
        self,
        recorder: Recorder,
        on_root: OnRoot,
        on_gradients: OnGradients = lambda inputs, result: None,
        harmless: Callable[[Any, tuple[Any, ...]], bool] | None = None,
    ) -> None:
        super().__init__()
        self.recorder = recorder
        self.on_root = on_root
        self.on_gradients = on_gradients
        self.harmless = harmless
        self.made: dict[Node, Origin] = {}
        self.mixed: list[tuple[Node, str]] = []
        self.assumptions: dict[str, None] = {}
        self.problems: dict[str, None] = {}
        self.flags: list[tuple[str, Tensor]] = []  # problems, where a device's flag is false
        self.pasted: set[Node] = set()
        self.began = 0  # nodes with smaller numbers were there before the step
        self.dropped: set[Node] = set()  # nodes whose saved tensors a checkpoint computes again
        self._held: Notes[int] = Notes()  # versions of what a checkpoint reads, as it read it
        self.hidden: Notes[Origin] = Notes()
        self.aliases: Notes[Tensor] = Notes()
        self.written: dict[int, tuple[Tensor, Origin]] = {}
        self.versions: Notes[int] = Notes()
        self.rewritten: Notes[int] = Notes()  # versions that seen writes have given memory, by its base
        self.leaves: dict[int, tuple[Tensor, int]] = {}
        self.frozen: Notes[bool] = Notes()  # running statistics that the graph reads again in backward
        self.constants: Notes[bool] = Notes()  # what it has read besides, and may read again
        self.modes = 0  # dispatch modes of our own
        self.calls = 0
        recorder.witness = self

    def __enter__(self) -> Watch:
        """A mode that is active already gets every call after this one, and nobody sees what it makes of it."""
        for mode in torch.overrides._get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            if type(mode) is not DeviceContext:
                text = f"the function mode {named(mode)}, active before the step, may replace any function"
                self.problems[text] = None
        super().__enter__()  # type: ignore[no-untyped-call]
        self.began = torch._C._autograd._get_sequence_nr()
        return self

    def forget(self) -> None:
        """Let go of every tensor; the step has ended."""
        for notes in (self.hidden, self.aliases, self.versions, self.rewritten):
            notes.clear()
        for marks in (self.frozen, self.constants, self._held):
            marks.clear()
        self.dropped.clear()
        self.written.clear()
        self.leaves.clear()

    def changed_leaf(self) -> Tensor | None:
        """A leaf that was written to after its first use in the step, or None."""
        return next((leaf for leaf, version in self.leaves.values() if leaf._version != version), None)

    def origin(self, node: Node) -> str:
        """' (function at file:line)' of the call that made a node; no line where all its nodes are analytic."""
        made = self.made.get(node)
        return "" if made is None else f" ({told(made)})"

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # Dynamo traces the program as if there were no mode
            return func(*args, **kwargs)
        self.calls += 1
        if func in GETTERS:
            if func == GRAD_FN and not args[0].is_leaf:
                self.assumptions[f"hooks on nodes of the graph, read{caller()}, leave its gradient as it is"] = None
            return func(*args, **kwargs)
        if func in SWITCHES:
            return self._switch(func, args, kwargs)
        if func in BACKWARD:
            return self._backward(func, args, kwargs)
        if self.harmless is not None and self.harmless(func, args):
            return func(*args, **kwargs)
        if types and not all(map(plain, types)):
            self.problems[f"a class of tensors takes {func.__name__}{caller()} into its own hands"] = None
        tensors: list[Tensor] = []
        gather(args, tensors)
        if kwargs:
            gather(kwargs.values(), tensors)
        name = getattr(func, "__name__", "")
        if name in UNVERSIONED or (name == "__set__" and attribute_of(func) == "data"):
            text = "writes to tensors, and no version counter tells: end the step before"
            self.problems[f"{name}{caller()} {text}"] = None
        if dropping() and any(isinstance(each, torch.Generator) for each in (*args, *kwargs.values())):
            self.problems[f"{name}{caller()} draws from a generator that torch.utils.checkpoint does not keep"] = None
        if dropping() and func not in BACKWARD:
            with self._checkpoint(func, tensors):
                return self._follow(func, args, kwargs, tensors)
        return self._follow(func, args, kwargs, tensors)

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        if not (any([t.requires_grad for t in tensors]) or self._concerned(tensors)):
            if func in OPEN:
                self.assumptions[f"constants whose memory was handed out{caller()} are not written through it"] = None
            return func(*args, **kwargs)
        if transformed():
            self._refuse()
            return func(*args, **kwargs)
        call = Followed(self, func, args, kwargs, tensors)
        output = record(self.recorder, func, args, kwargs, caller)
        call.known = output is not NotImplemented
        if output is NotImplemented:
            output = func(*args, **kwargs)
        if call.name in ("__iter__", "__reversed__"):
            output = list(output)
        try:
            call.follow(output)
        except RuntimeError as error:  # autograd refuses to tell about some views; the user's program may go on
            call.problem(f"{call.name}{caller()} cannot be followed: {error}")
        return iter(output) if call.name in ("__iter__", "__reversed__") else output

    @contextmanager
    def _checkpoint(self, func: Any, tensors: list[Tensor]) -> Iterator[None]:
        """Around a call whose saved tensors will be computed again: nothing that goes into it may change until then."""
        name = getattr(func, "__name__", str(func))
        before, state = [version_of(t) for t in tensors], torch.get_rng_state()
        yield
        drew = any(t.is_cuda for t in tensors) or not torch.equal(state, torch.get_rng_state())
        if drew and not same_numbers():
            text = f"{name}{caller()} may draw other numbers when torch.utils.checkpoint runs it again"
            self.problems[f"{text}: leave preserve_rng_state on"] = None
        for tensor, version in zip(tensors, before, strict=True):
            if tensor.is_floating_point() and version_of(tensor) != version:
                self._wrote_inside(name)
        self._hold(tensors)

    def _hold(self, tensors: list[Tensor]) -> None:
        if not checkpointing():
            self.problems[_HOOKED] = None
        self.assumptions[_AGAIN] = None
        for tensor in tensors:
            self._held.set(base_of(tensor), version_of(tensor))

    def _wrote_inside(self, name: str) -> None:
        text = f"{name}{caller()} writes in place under torch.utils.checkpoint, where autograd does not look after it"
        self.problems[f"{text}: use the form that is not in place"] = None

    def overwritten(self) -> list[str]:
        """What holds before a backward pass: nothing that a checkpoint will read again has been written to."""
        if all(version_of(tensor) == version for tensor, version in self._held.pairs()):
            return []
        return ["a tensor was written to after torch.utils.checkpoint had read it, which will read it again"]

    def _refuse(self) -> None:
        """Values are wrapped inside a transform, and its gradients are not those of a graph."""
        if not any(problem.startswith(_TRANSFORMED) for problem in self.problems):
            text = "call it outside of the step, or compute the step's gradient by backward()"
            self.problems[f"{_TRANSFORMED}{caller()}: {text}"] = None

    def _concerned(self, tensors: list[Tensor]) -> bool:
        """May one of these, none of which requires grad, hold or share what has left the graph?"""
        if self.written or self.aliases:
            return True
        return self.hidden.of_any(tensors) or self.frozen.of_any(tensors)

    def _switch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What was computed from a parameter while it did not require grad is in no graph."""
        tensor: Tensor = args[0] if args else kwargs["self"]
        before = tensor.requires_grad
        result = func(*args, **kwargs)
        if tensor.requires_grad != before and isinstance(tensor, Parameter):
            text = f"values computed from a parameter while it did not require grad, switched{caller()}, are constants"
            self.assumptions[text] = None
        return result

    def reads(self, tensor: Tensor, name: str) -> None:
        """A recorded operation is about to read a tensor of the graph."""
        if dropping():
            self._hold([tensor])
        if tensor.is_leaf:
            self.leaves.setdefault(id(tensor), (tensor, tensor._version))
        if self.stale(tensor, tensor._version):
            self.problems[f"a tensor of the graph was written to out of sight before {name}{caller()}"] = None
        if tensor._is_view() and tensor.grad_fn not in self.made:
            self.replayed(tensor, tensor.grad_fn)

    def ran(self, given: list[Tensor], written: list[Tensor], results: Sequence[Any], problem: str) -> None:
        """See :func:`adcert.followed.follow_program`."""
        follow_program(self, given, written, results, problem)

    @contextmanager
    def substituting(self) -> Iterator[None]:
        """Meanwhile a dispatch mode of our own gives operators the values of a compiled program."""
        self.modes += 1
        try:
            yield
        finally:
            self.modes -= 1

    def wrote(self, tensor: Tensor) -> None:
        """A recorded operation has overwritten a tensor, and autograd knows."""
        if dropping():
            self._wrote_inside("a ReLU")
        self.versions.set(tensor, tensor._version)
        self.rewritten.set(base_of(tensor), tensor._version)

    def stale(self, tensor: Tensor, version: int) -> bool:
        """Was its memory written to since it was last seen, other than by calls that were seen, too?"""
        last = self.versions.get(tensor)
        if last == version:
            return False
        base = base_of(tensor)
        written = self.rewritten.get(base)
        if written is None:
            written = self.versions.get(base) if last is None else last
        return written not in (None, version)

    def replayed(self, view: Tensor, node: Node) -> None:
        """A view whose memory was written to by a call that was seen gets a new node from autograd when it is used."""
        base = base_of(view)
        if self.versions.get(view) is not None and self.rewritten.get(base) == view._version:
            sources = [source for source, _ in node.next_functions]
            if sources == [base.grad_fn] and node.name() == "AsStridedBackward0":
                self.made[node] = ("a view", None)

    def _backward(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        roots: Any = args[0] if args else kwargs.get("tensors", kwargs.get("outputs", kwargs.get("self")))
        inputs = kwargs.get("inputs")
        if func is torch.autograd.grad and inputs is None and len(args) > 1:
            inputs = args[1]
        if transformed():
            self._refuse()
            return func(*args, **kwargs)
        others = list_tensors(args[1:], {k: v for k, v in kwargs.items() if k != "inputs"})
        if any(self.source_of(t) for t in others):
            self.problems[
                "the gradient handed to backward depends on the parameters in a way autograd does not see"
            ] = None
        keep = bool(kwargs.get("retain_graph") or kwargs.get("create_graph")) or len(args) > 2
        self.on_root([roots] if isinstance(roots, Tensor) else list(roots), inputs, keep)
        self.recorder.backward = True
        try:
            result = func(*args, **kwargs)
        finally:
            self.recorder.backward = False
        self.on_gradients(inputs, result)
        for gradient in list_tensors(result):  # a function of the parameters, without a graph
            if not gradient.requires_grad:
                self.hidden.set(gradient, (func.__name__, site()))
        return result

    def source_of(self, tensor: Tensor) -> Origin | None:
        """Where a value that left the graph came from, if this tensor is one (or shares memory written with one)."""
        found = self.hidden.get(tensor) if self.hidden else None
        if found is None and self.written and not tensor.requires_grad:
            held = self.written.get(tensor.untyped_storage()._cdata)
            found = None if held is None else held[1]
        return found


# Dynamo reads the mode when it traces a call under it. It must not compile the mode's own frame, which a call runs that
# compiled code could not hold: there is_dynamo_compiling() would be true, and nobody would see the call.
set_code_exec_strategy(Watch.__torch_function__.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
