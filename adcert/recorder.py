"""The recorder of a step: it runs recorded operations and keeps what each of them saw.

A :class:`Recorder` is active on one thread while a step runs. The modules of :mod:`adcert.nn` and the function
mode of :mod:`adcert.watch` hand their inputs to it; it runs the recording kernels of :mod:`adcert.ops` and keeps
one :class:`~adcert.records.OpRecord` for each call. Outside a step nothing is active and nothing is recorded.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import activations, ops
from .activations import Activation
from .choices import Choice, Ties, Window
from .lists import Rooms
from .nodes import Edge, Links, Node, edge_of, linked, node_from, node_in_place, whole
from .recomputed import dropping
from .records import OpRecord

Own = Tensor | Callable[[Any], Tensor] | None


class Witness(Protocol):
    """Who has to know that a recorded operation reads or overwrites a tensor, out of the function mode's sight.

    ``calls``: how many the function mode has seen.
    """

    calls: int

    def reads(self, tensor: Tensor, name: str) -> None: ...

    def wrote(self, tensor: Tensor) -> None: ...

    def ran(self, given: list[Tensor], written: list[Tensor], results: Sequence[Any], problem: str) -> None: ...

    def source_of(self, tensor: Tensor) -> tuple[str, Any] | None: ...

    def substituting(self) -> contextlib.AbstractContextManager[None]: ...


class Recorder:
    """Collects the records of one step. Not thread-safe: one recorder belongs to one thread.

    ``rooms``: of lists on a GPU; new ones ask for exact lists. ``streams``: where recorded operations ran on a GPU.
    ``links``: from outputs of compiled programs to those of their replays (:mod:`adcert.compiled`), as edges;
    ``refused``: nodes of compiled programs without one, and why.
    """

    def __init__(self, names: dict[int, str] | None = None, rooms: Rooms | None = None) -> None:
        self.witness: Witness | None = None
        self.records: list[OpRecord] = []
        self.rooms = Rooms() if rooms is None else rooms
        self.streams: dict[torch.cuda.Stream, None] = {}
        self.links: Links = {}
        self.refused: dict[Node, str] = {}
        self._names = names or {}
        self._uses: dict[str, int] = {}
        self._name = ""
        self.named: str | None = None  # the module that is running, if it is one of ours
        self.backward = False  # a backward pass runs, in which a checkpoint runs its forward pass again

    def clear(self) -> None:
        self.records.clear()
        self.streams.clear()
        self.links.clear()
        self.refused.clear()
        self._uses.clear()

    def edge(self, tensor: Tensor) -> Edge:
        """Where a tensor of a graph stands in it; in a replay, if a compiled program has made it."""
        return linked(self.links, (tensor.grad_fn, tensor.output_nr))

    def name_of(self, module: object, default: str) -> str:
        """Qualified name of a module in the monitored model, or ``default``."""
        return self.name_at(id(module), default)

    def name_at(self, module: int, default: str) -> str:
        """:meth:`name_of` the module with this id."""
        return self._names.get(module) or default

    def relu(self, x: Tensor, name: str, *, inplace: bool = False) -> Tensor:
        """``torch.relu`` (in place if asked), recording the units that touch the kink at 0."""
        with torch._C.DisableTorchFunction():
            if self._sees(x):
                name = self._begin(x, name)
                room = self.rooms.of(name, x.numel()) if x.is_cuda else None
                source = edge_of(whole(x))
                if inplace:
                    output, touches, counts = self._relu_in_place(x, room)
                elif dropping():  # torch's own operation, which saves what it will save when it runs again
                    output, (touches, counts) = F.relu(x), ops.touches(x, capacity=room)
                else:
                    output, touches, counts = ops.relu(x, room)
                node = node_in_place(x, source) if inplace and x._is_view() else output.grad_fn
                if node is not None:
                    self._add(output, node, x.shape, _RELU, None, touches, counts, room)
                return output
        return F.relu(x, inplace=inplace)

    def kinked(
        self, x: Tensor, rho: Activation, name: str, run: Callable[[], Tensor], left: Own = None, inplace: bool = False
    ) -> Tensor:
        """``run()``, which applies ``rho`` to ``x`` by torch's own operation, with the units that touch a kink.

        ``left``: slopes below the kink that are not rho's own, broadcast to x: a tensor (PReLU), or read from the node
        that was made (RReLU). Where y is overwritten, codes of a byte tell AD's slopes, or a copy if they are curved.
        """
        with torch._C.DisableTorchFunction():
            if not (self._sees(x) or (isinstance(left, Tensor) and self._sees(left))):
                return run()
            dropped = dropping()
            if dropped and callable(left):  # it would read the node
                return run()
            sides = rho.sides(x)
            if sides is None:
                return run()
            name = self._begin(x, name)
            room = self.rooms.of(name, len(rho.kinks) * x.numel()) if x.is_cuda else None
            if left is None and not inplace and not dropped and rho.given is None and _fused(rho):
                output, touches, counts = ops.activation(x, rho.name, rho.arguments, room)
                seen, node = x.detach(), output.grad_fn
            else:
                own = ops.touches(x, rho.kinks, room)
                source, written = edge_of(x), edge_of(whole(x))
                seen, touches, counts = x.detach(), own.touches, own.counts
                if inplace:
                    seen = seen.clone() if rho.derivative is not None else rho.code(seen)
                elif dropped and left is None and rho.derivative is None:
                    seen = rho.code(seen)
                output = run()
                node = node_in_place(x, written) if inplace and x._is_view() else node_from(output, source)
            if node is not None:
                record = self._add(output, node, x.shape, rho, None, touches, counts, room)
                slopes = left(node) if callable(left) else left
                record.seen, record.seen_version, record.sides = seen, seen._version, sides
                record.left = None if slopes is None else slopes.detach()
            return output

    def chosen(self, x: Tensor, name: str, run: Callable[[], Any], choice: Callable[[Any], Choice]) -> Any:
        """``run()``, a selection from ``x`` by torch's own operation; ``choice`` of its result is what it chose.

        The first tensor of the result is the selection. On a GPU this waits for the device.
        """
        with torch._C.DisableTorchFunction():
            if not self._sees(x) or dropping():  # choices are read from nodes
                return run()
            source = edge_of(x)
            self._begin(x, name)
            result = run()
            output = result if isinstance(result, Tensor) else result[0]
            node = node_from(output, source, widened=True)
            if node is None:
                return result
            with torch.no_grad():
                try:
                    seen = choice(result)
                except Exception:  # not what it should be: the node stays unrecorded, and the audit names it
                    return result
                wrong = int((~torch.isfinite(x)).sum())
            counts = torch.tensor([len(seen.windows), 0, wrong], device="cpu")
            nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
            self._add(output, node, x.shape, None, _on_host(seen), nothing, counts, None).listed = True
            return result

    def max_pool2d(self, x: Tensor, name: str, window: Window, *, ceil_mode: bool, relu: bool = False) -> Tensor:
        """``max_pool2d`` of ``x``, or of ``relu(x)``, recording touches and ties in the same pass."""
        geometry = window.kernel, window.stride, window.padding, window.dilation
        with torch._C.DisableTorchFunction():
            dropped = self._sees(x) and dropping()
            if dropped and relu:
                x, relu = self.relu(x, name), False
            if self._sees(x):
                name = self._begin(x, name)
                room = self.rooms.of(name, window.most(x.shape)) if x.is_cuda else None
                result = ops.max_pool2d(x.detach() if dropped else x, *geometry, ceil_mode, relu=relu, capacity=room)
                ties = Ties(result.windows, result.members, result.offsets, window, tuple(x.shape))
                rho = _RELU if relu else None
                pooled = F.max_pool2d(x, *geometry, ceil_mode) if dropped else result.output
                node = node_from(pooled, edge_of(x)) if dropped else pooled.grad_fn
                if node is not None:
                    self._add(pooled, node, x.shape, rho, ties, result.touches, result.counts, room)
                return pooled
        a = F.relu(x) if relu else x
        output: Tensor = F.max_pool2d(a, *geometry, ceil_mode)
        return output

    def _sees(self, x: Tensor) -> bool:
        """Does a record of an operation on x belong to the step? Not if a checkpoint repeats it."""
        return recordable(x) and not (self.backward and dropping())

    def _begin(self, x: Tensor, name: str) -> str:
        """Tell the witness that ``x`` is read; the record's own name, which :meth:`_add` uses."""
        if self.witness is not None:
            self.witness.reads(x, name)
        self._name = self.unique(name)
        return self._name

    @contextlib.contextmanager
    def naming(self, module: object, default: str) -> Iterator[None]:
        """What is recorded meanwhile bears the module's name."""
        before, self.named = self.named, self.name_of(module, default)
        try:
            yield
        finally:
            self.named = before

    def ran_on(self, device: torch.device) -> None:
        """Something of the step was enqueued on the current stream of a GPU."""
        self.streams[torch.cuda.current_stream(device)] = None

    def unique(self, name: str) -> str:
        """The name, with a number from the second use on."""
        uses = self._uses[name] = self._uses.get(name, 0) + 1
        return name if uses == 1 else f"{name}#{uses}"

    def _relu_in_place(self, x: Tensor, room: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Read the touches, then overwrite ``x``: no second activation is held.

        Where ``x`` is the output of a recorded operation, that record reads nothing of it but the sign, which stays.
        """
        before = [record for record in self.records if record.node is x.grad_fn and not record.altered()]
        seen = ops.touches(x, capacity=room)
        output = torch.relu_(x)
        for record in before:
            record.version = output._version
        if self.witness is not None:
            self.witness.wrote(output)
        return output, seen.touches, seen.counts

    def _add(
        self,
        output: Tensor,
        node: Node,
        shape: Sequence[int],
        rho: Activation | None,
        ties: Ties | Choice | None,
        touches: Tensor,
        counts: Tensor,
        room: int | None,
    ) -> OpRecord:
        """Keep what was seen; the caller has switched the function mode off."""
        kept, version = output.detach(), output._version
        if node is not output.grad_fn:  # between views: the operation's own shapes count
            kept, above = kept.reshape(node._input_metadata[0].shape), node.next_functions[0]
            shape = shape if above[0] is None else above[0]._input_metadata[above[1]].shape
        record = OpRecord(self._name, node, rho, ties, touches, counts, kept, version, tuple(shape), room)
        record.listed, record.links = not output.is_cuda, self.links
        if dropping():
            record.signs = record.output > 0 if rho is None or record.relu else None
            record.output = record.output.new_zeros(()).expand(record.output.shape)
            record.version = record.output._version
        self.records.append(record)
        if output.is_cuda:
            self.ran_on(output.device)
        return record


_RELU = activations.relu()


def _on_host(choice: Choice) -> Choice:
    """The lists on the host; where every output came from stays on the device."""
    windows, owner, plus, minus = (t.cpu() for t in (choice.windows, choice.owner, choice.plus, choice.minus))
    return replace(choice, windows=windows, owner=owner, plus=plus, minus=minus)


def _fused(rho: Activation) -> bool:
    """There is a kernel for it, which numbers the same kinks."""
    return rho.name in ops.ACTIVATIONS and ops.kinks(rho.name, rho.arguments) == rho.kinks


def recordable(x: Tensor) -> bool:
    """Differentiable, and of a kind that the recording kernels know."""
    if not (x.requires_grad and torch.is_grad_enabled() and x.is_floating_point()) or transformed():
        return False
    return x.layout is torch.strided and not x.is_nested and not torch._C._is_tracing()


def transformed() -> bool:
    """Is a transform (vmap, grad, jvp) or forward mode active? Values are wrapped then; operators have no rules."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


_state = threading.local()


def active() -> Recorder | None:
    """The recorder of the step that is running on this thread, or None; None for code that is being compiled."""
    if torch.compiler.is_dynamo_compiling():
        return None  # compiled code is that of torch's own modules; adcert.compiled shows what it computes
    recorder: Recorder | None = getattr(_state, "recorder", None)
    return recorder


def running() -> bool:
    """Is a step running on this thread, recorded or not?"""
    return bool(getattr(_state, "running", False))


@contextlib.contextmanager
def recording(recorder: Recorder | None) -> Iterator[Recorder | None]:
    """Make ``recorder``, None for a step that is not recorded, the one of this thread; the caller has checked that no
    step is running.
    """
    _state.recorder, _state.running = recorder, True
    try:
        yield recorder
    finally:
        _state.recorder, _state.running = None, False
