"""The function mode that is active during a step: it sees what the autograd graph does not show.

``x * (x > 0)`` holds no nonsmooth node. :class:`Watch` follows values that left the graph (comparisons, argmax, detach,
...) until they steer differentiable ones again; it notes which graph nodes were made under its eyes, routes functional
ReLUs and max poolings to the recorder, and sees the roots of every backward pass. Where it cannot follow, the step
becomes UNDECIDED.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from .functions import named, opaque, plain, writes_analytically
from .guards import finite
from .layers import ACCUMULATE
from .nodes import COPY_SLICES, Node
from .recomputed import checkpointing, dropping, same_numbers
from .recorder import Recorder, transformed
from .routes import record
from .smooth import ANALYTIC

# Their results depend on shapes, types and devices only, never on values.
_VALUE_FREE = frozenset(
    """zeros_like ones_like empty_like rand_like randn_like randint_like new_zeros new_ones new_empty size
    dim numel stride is_contiguous is_floating_point retain_grad requires_grad_ __repr__ __format__ __len__
    __hash__""".split()
)
_GETTERS = frozenset(
    getattr(Tensor, name).__get__
    for name in """shape dtype device layout requires_grad is_leaf ndim itemsize nbytes grad_fn is_cuda is_cpu
    is_sparse is_quantized is_meta is_mkldnn is_nested _version output_nr""".split()
)
_GRAD_FN = getattr(Tensor, "grad_fn").__get__  # noqa: B009 - the stubs know the value only
_READS = frozenset(
    """item tolist numpy __bool__ __int__ __float__ __index__ __array__ __contains__ __dlpack__
    untyped_storage storage data_ptr""".split()
)
_SWITCHES = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__})  # type: ignore[attr-defined]
# They hand out memory, or another tensor over it, that can be written to without a new version.
_OPEN = frozenset(
    {
        getattr(Tensor, "data").__get__,  # noqa: B009 - the stubs know the value only
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.data_ptr,
        Tensor.storage,
        Tensor.untyped_storage,
    }
)
# They make ordinary numbers of infinite ones, which their nodes do not show.
_SATURATING = frozenset("sigmoid sigmoid_ expit tanh tanh_ elu elu_ celu celu_".split())
_HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook"})
# Their schemas do not say that they write running statistics, and autograd does not learn of it.
_NORMS = frozenset(
    """batch_norm instance_norm native_batch_norm cudnn_batch_norm miopen_batch_norm _batch_norm_impl_index""".split()
)
_FUNCTIONAL_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training")
_NATIVE_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training")
_BACKWARD = frozenset({Tensor.backward, torch.autograd.backward, torch.autograd.grad})

Site = tuple[CodeType, int]  # a line of somebody's program
Origin = tuple[str, Site | None]  # a function, and where it was called
_HOOKED = "saved-tensor hooks other than those of torch.utils.checkpoint are active: not supported"
_AGAIN = "what torch.utils.checkpoint computes again in backward is what the forward pass computed"
_TRANSFORMED = "a transform of torch.func (grad, vjp, jvp, vmap) or forward mode computes part of the step"
_dispatch_modes = torch._C._len_torch_dispatch_stack
OnRoot = Callable[[list[Tensor], Any, bool], None]
OnGradients = Callable[[Any, Any], None]
Note = TypeVar("Note")


# They write in place, and leave the version of what they write as it is.
_UNVERSIONED = frozenset("_fused_sgd_ _fused_adam_ _fused_adamw_ _fused_adagrad_ apply_ map_ map2_".split())


class Notes(Generic[Note]):
    """Notes about tensors, each as an object of its own; the tensors are not kept alive (a note may keep another)."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[weakref.ref[Tensor], Note]] = {}

    def get(self, tensor: Tensor) -> Note | None:
        found = self._of.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None  # an id may come again

    def set(self, tensor: Tensor, note: Note) -> None:
        notes, key = self._of, id(tensor)
        notes[key] = weakref.ref(tensor, lambda _: notes.pop(key, None)), note

    def of_any(self, tensors: list[Tensor]) -> bool:
        """Quick, and never wrong where there is none."""
        notes = self._of
        return bool(notes) and any([id(tensor) in notes for tensor in tensors])

    def pairs(self) -> Iterator[tuple[Tensor, Note]]:
        """The tensors that are still there, with their notes."""
        for reference, note in list(self._of.values()):
            tensor = reference()
            if tensor is not None:
                yield tensor, note

    def __bool__(self) -> bool:
        return bool(self._of)

    def clear(self) -> None:
        self._of.clear()


class Watch(TorchFunctionMode):
    """Sees every torch function the step calls. ``on_root(roots, inputs, keep)`` runs before each backward pass,
    ``on_gradients(inputs, result)`` after it.

    ``keep``: the pass may leave the graph intact for another one. ``made``: graph nodes that came from seen calls.
    ``mixed``: (node, message) where a hidden value steers a differentiable one. ``problems``: reasons that hold for
    every root that follows. ``assumptions``: what the step's certificate takes as constant. ``pasted``: nodes that
    write an analytic function of their inputs into a view. ``harmless(func, args)``: does a call
    compute nothing, as somebody else knows?
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
        self._hidden: Notes[Origin] = Notes()
        self._aliases: Notes[Tensor] = Notes()
        self._written: dict[int, tuple[Tensor, Origin]] = {}
        self._versions: Notes[int] = Notes()
        self._rewritten: Notes[int] = Notes()  # versions that seen writes have given memory, by its base
        self._leaves: dict[int, tuple[Tensor, int]] = {}
        self._frozen: Notes[bool] = Notes()  # running statistics that the graph reads again in backward
        self._constants: Notes[bool] = Notes()  # what it has read besides, and may read again
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
        for notes in (self._hidden, self._aliases, self._versions, self._rewritten):
            notes.clear()
        for marks in (self._frozen, self._constants, self._held):
            marks.clear()
        self.dropped.clear()
        self._written.clear()
        self._leaves.clear()

    def changed_leaf(self) -> Tensor | None:
        """A leaf that was written to after its first use in the step, or None."""
        return next((leaf for leaf, version in self._leaves.values() if leaf._version != version), None)

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
        if func in _GETTERS:
            if func == _GRAD_FN and not args[0].is_leaf:
                self.assumptions[f"hooks on nodes of the graph, read{caller()}, leave its gradient as it is"] = None
            return func(*args, **kwargs)
        if func in _SWITCHES:
            return self._switch(func, args, kwargs)
        if func in _BACKWARD:
            return self._backward(func, args, kwargs)
        if self.harmless is not None and self.harmless(func, args):
            return func(*args, **kwargs)
        if types and not all(map(plain, types)):
            self.problems[f"a class of tensors takes {func.__name__}{caller()} into its own hands"] = None
        tensors: list[Tensor] = []
        _gather(args, tensors)
        if kwargs:
            _gather(kwargs.values(), tensors)
        name = getattr(func, "__name__", "")
        if name in _UNVERSIONED or (name == "__set__" and attribute_of(func) == "data"):
            text = "writes to tensors, and no version counter tells: end the step before"
            self.problems[f"{name}{caller()} {text}"] = None
        if dropping() and any(isinstance(each, torch.Generator) for each in (*args, *kwargs.values())):
            self.problems[f"{name}{caller()} draws from a generator that torch.utils.checkpoint does not keep"] = None
        if dropping() and func not in _BACKWARD:
            with self._checkpoint(func, tensors):
                return self._follow(func, args, kwargs, tensors)
        return self._follow(func, args, kwargs, tensors)

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        if not (any([t.requires_grad for t in tensors]) or self._concerned(tensors)):
            if func in _OPEN:
                self.assumptions[f"constants whose memory was handed out{caller()} are not written through it"] = None
            return func(*args, **kwargs)
        if transformed():
            self._refuse()
            return func(*args, **kwargs)
        call = _Call(self, func, args, kwargs, tensors)
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
        if self._written or self._aliases:
            return True
        return self._hidden.of_any(tensors) or self._frozen.of_any(tensors)

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
            self._leaves.setdefault(id(tensor), (tensor, tensor._version))
        if self._stale(tensor, tensor._version):
            self.problems[f"a tensor of the graph was written to out of sight before {name}{caller()}"] = None
        if tensor._is_view() and tensor.grad_fn not in self.made:
            self.replayed(tensor, tensor.grad_fn)

    def ran(self, given: list[Tensor], written: list[Tensor], results: Sequence[Any], problem: str) -> None:
        """A compiled program has run on ``given``; it may have written to some.

        ``problem``: why it cannot be followed, or "": it may have done anything then with what it was given.
        """
        outputs = [out for out in results if isinstance(out, Tensor)]
        if any(tensor.layout is not torch.strided for tensor in (*written, *outputs)):
            self.problems["compiled code returns or writes sparse tensors, which are not followed"] = None
            return
        live = any([tensor.requires_grad for tensor in given])
        source = next((found for found in map(self.source_of, given) if found), None)
        if problem and (live or source is not None):
            self.problems[problem] = None
        if live and any(not isinstance(out, Tensor) and out is not None for out in results):
            text = f"values read into Python by a compiled program{caller()} are constants of the step"
            self.assumptions[text] = None
        if source is None and live and torch.is_grad_enabled():
            source = ("a compiled program", site())
        for tensor in written:
            base = self._aliases.get(tensor)
            unused = base is not None and base.is_leaf and id(base) not in self._leaves
            if tensor.requires_grad or (base is not None and not unused):
                self.problems[f"compiled code{caller()} writes to a tensor of the graph"] = None
            elif source is not None or live:
                source = source or ("a compiled program", site())
                self._hidden.set(tensor, source)
                self._written[tensor.untyped_storage()._cdata] = (tensor, source)
        for tensor in outputs:
            if tensor.requires_grad:
                self._versions.set(tensor, tensor._version)
                continue
            memory = tensor.untyped_storage()._cdata
            for other in (*given, *outputs):
                known = self._aliases.get(other)
                if (other.requires_grad or known is not None) and other.untyped_storage()._cdata == memory:
                    self._aliases.set(tensor, other if known is None else known)
            if source is not None:
                self._hidden.set(tensor, source)
            elif live:
                self.assumptions[f"values computed under no_grad by a compiled program{caller()} are constants"] = None

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
        self._versions.set(tensor, tensor._version)
        self._rewritten.set(base_of(tensor), tensor._version)

    def _stale(self, tensor: Tensor, version: int) -> bool:
        """Was its memory written to since it was last seen, other than by calls that were seen, too?"""
        last = self._versions.get(tensor)
        if last == version:
            return False
        base = base_of(tensor)
        written = self._rewritten.get(base)
        if written is None:
            written = self._versions.get(base) if last is None else last
        return written not in (None, version)

    def replayed(self, view: Tensor, node: Node) -> None:
        """A view whose memory was written to by a call that was seen gets a new node from autograd when it is used."""
        base = base_of(view)
        if self._versions.get(view) is not None and self._rewritten.get(base) == view._version:
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
                self._hidden.set(gradient, (func.__name__, site()))
        return result

    def source_of(self, tensor: Tensor) -> Origin | None:
        """Where a value that left the graph came from, if this tensor is one (or shares memory written with one)."""
        found = self._hidden.get(tensor) if self._hidden else None
        if found is None and self._written and not tensor.requires_grad:
            held = self._written.get(tensor.untyped_storage()._cdata)
            found = None if held is None else held[1]
        return found


# Dynamo reads the mode when it traces a call under it. It must not compile the mode's own frame, which a call runs that
# compiled code could not hold: there is_dynamo_compiling() would be true, and nobody would see the call.
set_code_exec_strategy(Watch.__torch_function__.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


class _Call:
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
        self.seen = target is not None and (not target.requires_grad or watch._versions.get(target) is not None)
        if self.live and self.name in _SATURATING and torch.is_grad_enabled():
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
            if watch._stale(tensor, version):
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
        if self.name in _VALUE_FREE or (self.name == "__set__" and self.setter() != "data"):
            return
        outputs = [output] if isinstance(output, Tensor) else list_tensors(output)
        outputs += [t for t in self.out if not any(t is other for other in outputs)]  # some return nothing
        if self.in_place() and self.target is not None and not any(t is self.target for t in outputs):
            outputs.append(self.target)
        statistics, training = self._statistics()
        unread = statistics if training else []
        watch = self.watch
        source = self._source(unread) if watch._written or watch._hidden.of_any(self.tensors) else None
        live = self.live
        alias = bool(watch._aliases) and any(watch._aliases.get(t) is not None for t in self.tensors)
        self._keep_statistics(statistics, training, live)
        if live and torch.is_grad_enabled():
            for tensor in self.tensors:
                if not tensor.requires_grad and not any(tensor is each for each in statistics):
                    watch._constants.set(tensor, True)
        if source is None and not live and not alias:
            return
        if self.name in _HOOKS:
            if self.target is not None and self.target.grad_fn is not None:
                self.problem(f"a hook{caller()} may change the gradient on its way")
            return
        if self.name in _READS:
            self.watch.assumptions[f"values read into Python by {self.name}{caller()} are constants of the step"] = None
            return
        self._check_writes()
        for tensor in unread:  # written without a new version
            watch._hidden.set(tensor, (f"the running statistics of {self.name}", None))
        for tensor in outputs:
            if not tensor.requires_grad:
                self._note_alias(tensor)
            if source is not None or live:
                self._result(tensor, source)
        if any([tensor.requires_grad and not tensor.is_leaf for tensor in outputs]):
            for tensor in self.tensors:
                if tensor.requires_grad and tensor.is_leaf:
                    watch._leaves.setdefault(id(tensor), (tensor, tensor._version))

    def _source(self, unread: list[Tensor]) -> Origin | None:
        """Where a value that left the graph came from, if the call reads one."""
        read = [tensor for tensor in self.tensors if not any(tensor is other for other in unread)]
        return next((found for found in map(self.watch.source_of, read) if found), None)

    def _statistics(self) -> tuple[list[Tensor], bool]:
        """A normalisation's running statistics; are they written and not read, as in train mode?"""
        name = self.name.split(".", 1)[0]  # of an overload
        if name not in _NORMS:
            return [], False
        names = _FUNCTIONAL_NORM if isinstance(self.func, FunctionType) else _NATIVE_NORM
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        training = given.get("training", given.get("use_input_stats", name == "instance_norm"))
        statistics = (given.get("running_mean"), given.get("running_var"))
        return [t for t in statistics if isinstance(t, Tensor)], bool(training)

    def _keep_statistics(self, statistics: list[Tensor], training: bool, live: bool) -> None:
        """Backward in eval mode reads the statistics again, and autograd does not know who has written them."""
        frozen = self.watch._frozen
        for tensor in statistics:
            if not training and live and torch.is_grad_enabled():
                frozen.set(tensor, True)
            elif training and (frozen.get(tensor) or self.watch._constants.get(tensor)):
                self.problem(f"{self.name}{caller()} changes running statistics that the graph still needs")

    def _check_writes(self) -> None:
        """Writes that change values behind the graph's back: a new version without a new node."""
        data = self.setter() == "data"
        for tensor, version in zip(self.tensors, self.versions, strict=True):
            if version_of(tensor) == version and not data:
                continue
            base = self.watch._aliases.get(tensor)
            unused = base is not None and base.is_leaf and id(base) not in self.watch._leaves
            if (base is not None and not unused) or data:
                self.problem(f"{self.name}{caller()} changes a tensor of the graph through a detached alias")
            elif tensor.requires_grad and tensor.grad_fn is not None and tensor.grad_fn in self.inputs:
                self.problem(f"{self.name}{caller()} changes a tensor of the graph without autograd (under no_grad)")
            elif not tensor.requires_grad:  # a buffer that holds a function of the parameters from now on
                origin = (self.name, site())
                self.watch._hidden.set(tensor, origin)
                self.watch._written[tensor.untyped_storage()._cdata] = (tensor, origin)  # views of it, too

    def _result(self, tensor: Tensor, source: Origin | None) -> None:
        watch = self.watch
        if tensor.requires_grad and tensor.grad_fn is not None:
            watch._versions.set(tensor, tensor._version)
            if tensor is self.target and tensor._version != self.versions[0]:
                watch._rewritten.set(base_of(tensor), tensor._version)
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
            watch._hidden.set(tensor, origin)
            if self.in_place() or self.out:
                watch._written[tensor.untyped_storage()._cdata] = (tensor, origin)

    def _note_alias(self, tensor: Tensor) -> None:
        """A result outside the graph that shares memory with a tensor of it: a write to it would be unseen."""
        aliases, memory = self.watch._aliases, tensor.untyped_storage()._cdata
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


_ATOMS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size})


def list_tensors(*values: Any) -> list[Tensor]:
    """Every tensor inside nested lists, tuples, dicts and slices."""
    found: list[Tensor] = []
    _gather(values, found)
    return found


def _gather(values: Iterable[Any], found: list[Tensor]) -> None:
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:  # nearly all values, told quickly
            found.append(value)
        elif kind in _ATOMS:
            continue
        elif isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            _gather(value, found)
        elif isinstance(value, dict):
            _gather(value.values(), found)
        elif isinstance(value, slice):
            _gather((value.start, value.stop, value.step), found)


def attribute_of(setter: Any) -> str:
    """Name of the attribute of tensors that a ``__set__`` belongs to, else ''."""
    return getattr(getattr(setter, "__self__", None), "__name__", "")


def base_of(tensor: Tensor) -> Tensor:
    """The tensor this one is a view of, else itself; they share one version."""
    base = tensor._base
    return tensor if base is None else base


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not count, and are not written to outside their mode."""
    return -1 if tensor.is_inference() else tensor._version


_ROOMS = """calls_activations calls_pooling calls_recurrent calls_selections compiled monitor recorder replay routes
    step substitution watch"""
_OURS = frozenset(f"adcert.{room}" for room in _ROOMS.split())


_inner: dict[str, bool] = {}  # is a module torch's, or one of the recording ones?


def site() -> Site | None:
    """The nearest frame outside torch and the recording modules."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        inner = _inner.get(module)
        if inner is None:
            inner = _inner[module] = f"{module}.".startswith(("torch.", "adcert.nn.")) or module in _OURS
        if not inner:
            return frame.f_code, frame.f_lineno
        frame = frame.f_back
    return None


def caller() -> str:
    """' at file:line' of :func:`site`."""
    return told(("", site()))


def told(origin: Origin) -> str:
    """'function at file:line'."""
    name, place = origin
    return name if place is None else f"{name} at {place[0].co_filename.rsplit('/', 1)[-1]}:{place[1]}"
