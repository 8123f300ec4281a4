"""What a forward pass saw: touches and ties, as structs of tensors.

A :class:`Recorder` is active on one thread while a step runs. The modules of :mod:`adcert.nn` and the function
mode of :mod:`adcert.audit` hand their inputs to it; it runs the recording kernels of :mod:`adcert.ops` and keeps
one :class:`OpRecord` for each call. Outside a step nothing is active and nothing is recorded.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import activations, ops
from .activations import Activation
from .balls import Ball
from .choices import Choice, Ties, Window
from .lists import Rooms
from .recomputed import dropping
from .transfer import take

Own = Tensor | Callable[[Any], Tensor] | None
COPY_SLICES = "torch::autograd::CopySlices"  # an in-place function on a view, as a node of the view's base
Node = Any  # torch.autograd.graph.Node; C++ nodes are not instances of the Python class
Edge = tuple[Node, int]
Links = dict[Edge, Edge]


def linked(links: Links, edge: Edge) -> Edge:
    """The edge itself, or where it leads instead."""
    while edge in links:
        edge = links[edge]
    return edge


@dataclass(eq=False)
class OpRecord:
    """One nonsmooth operation of the step: ``z = phi(rho(y))`` in the notation of Park, Chun, Lee (2024).

    ``rho``: the activation, None for the identity. ``ties``: what phi chose, None where phi is the identity. ``node``
    is the autograd node of the output; its first input edge leads to y, a second one to PReLU's slopes. ``touches``:
    int64 [M], ``K unit + k`` for every flat unit of y that equals the k-th of the K kinks of rho. ``output`` shares its
    memory with z, at version ``version``, or with relu(z) if a recorded ReLU has overwritten it: only its sign may be
    read. It is let go when the last backward pass starts. ``signs``: where z > 0, if a checkpoint is not to be kept
    from dropping z; ``output`` is then a stand-in of its shape.

    ``seen``: where AD's slopes are read for every rho but the ReLU: y itself, or codes of :meth:`Activation.code` where
    y has been overwritten. ``left``: PReLU's or RReLU's own slopes, broadcast to y.

    ``listed``: the lists and ``counts`` are on the host, whole and ascending. On a GPU they are not until
    :class:`adcert.lists.Coming` has brought them; ``room``: how many entries each has room for there, None if it is
    as long as what was found. ``overflow``: why the lists are missing, or "".
    """

    name: str
    node: Node
    rho: Activation | None
    ties: Ties | Choice | None
    touches: Tensor
    counts: Tensor
    output: Tensor
    version: int
    input_shape: tuple[int, ...]
    room: int | None = None
    listed: bool = True
    seen: Tensor | None = None
    seen_version: int = 0
    left: Tensor | None = None
    signs: Tensor | None = None
    sides: tuple[int, ...] = (-1,)
    released: bool = False
    overflow: str = ""
    links: Links = field(default_factory=dict)

    @property
    def relu(self) -> bool:
        """Is rho the ReLU with proxy 0?"""
        return self.rho is not None and self.rho.name == "relu" and self.rho.given is None

    @property
    def edge(self) -> tuple[Node, int]:
        """The autograd edge of y: (node, output number); the node is None where y is constant."""
        return linked(self.links, self.node.next_functions[0])

    @property
    def own_edge(self) -> tuple[Node, int]:
        """The edge of PReLU's slopes; the node is None for everything else."""
        edges: tuple[Edge, ...] = self.node.next_functions
        own = self.rho is not None and self.rho.name == "prelu" and len(edges) > 1
        return linked(self.links, edges[1]) if own else (None, 0)

    def values(self, units: Tensor) -> Tensor:
        """y, where it is kept, at flat units."""
        assert self.seen is not None
        return take(self.seen, units)

    def positive(self, units: Tensor) -> Tensor:
        """Which of these flat outputs are above 0; of a ReLU, or of a pooling."""
        return take(self.output if self.signs is None else self.signs, units) > 0

    def slopes(self, units: Tensor) -> Ball:
        """AD's rho' for flat outputs (of a fused ReLU and pooling: at the units they select)."""
        if self.rho is None:
            return Ball(torch.ones(units.shape, dtype=torch.float64))
        if self.relu:
            return Ball(self.positive(units).to(torch.float64))
        found = self.values(units)
        left = None if self.left is None else take(self.left.expand(self.input_shape), units)
        if found.dtype == torch.uint8:
            return self.rho.slope(found, self.output, None, left)
        return self.rho.slope(self.rho.code(found), self.output, found, left)

    def decides(self) -> bool:
        """Is there a touch or a tie?"""
        return bool(len(self.touches)) or (self.ties is not None and bool(len(self.ties.windows)))

    def touched(self) -> tuple[Tensor, Tensor, Tensor]:
        """(flat unit, number of its kink, side of AD's proxy there) of every touch, int64 [M] each."""
        count = max(1, len(self.sides))
        kinks = self.touches % count
        return self.touches // count, kinks, torch.tensor(self.sides)[kinks]

    def release(self) -> None:
        """Let go of the activations; the counts stay."""
        self.released = True
        self.output = self.output.new_empty(0)
        self.seen = self.left = self.signs = None
        self.ties = None

    def altered(self) -> bool:
        """True if what has to be read was modified in place after it was recorded."""
        if self.seen is not None:
            return bool(self.seen._version != self.seen_version)
        return bool(self.output._version != self.version)


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
                source = _edge_of(_whole(x))
                if inplace:
                    output, touches, counts = self._relu_in_place(x, room)
                elif dropping():  # torch's own operation, which saves what it will save when it runs again
                    output, (touches, counts) = F.relu(x), ops.touches(x, capacity=room)
                else:
                    output, touches, counts = ops.relu(x, room)
                node = _written(x, source) if inplace and x._is_view() else output.grad_fn
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
                source, written = _edge_of(x), _edge_of(_whole(x))
                seen, touches, counts = x.detach(), own.touches, own.counts
                if inplace:
                    seen = seen.clone() if rho.derivative is not None else rho.code(seen)
                elif dropped and left is None and rho.derivative is None:
                    seen = rho.code(seen)
                output = run()
                node = _written(x, written) if inplace and x._is_view() else _node_from(output, source)
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
            source = _edge_of(x)
            self._begin(x, name)
            result = run()
            output = result if isinstance(result, Tensor) else result[0]
            node = _node_from(output, source, widened=True)
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
                node = _node_from(pooled, _edge_of(x)) if dropped else pooled.grad_fn
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
_VIEWS = ("Squeeze", "Unsqueeze", "View", "UnsafeView", "ReshapeAlias", "Alias")


def _whole(x: Tensor) -> Tensor:
    """The base of a view that shows all of it, unit by unit (as linear layers return), else the tensor itself."""
    base = x._base
    if base is None or x.numel() != base.numel() or x.storage_offset() != base.storage_offset():
        return x
    return base if x.is_contiguous() and base.is_contiguous() else x


def _written(x: Tensor, source: tuple[Any, int]) -> Node | None:
    """The node of an operation in place on a view: autograd puts it on the base, whose edge was ``source``.

    None if the view does not show all of its base: then the node is about other units, too.
    """
    base = _whole(x)
    node = base.grad_fn
    if base is x or node is None or node.name() != COPY_SLICES or not _is(node.next_functions[0], source):
        return None
    return node


def _edge_of(x: Tensor) -> tuple[Any, int]:
    """The autograd edge of a tensor: (node, or a leaf itself, or None for a constant; output number)."""
    return (x.grad_fn, x.output_nr) if x.grad_fn is not None else (x if x.requires_grad else None, 0)


def _node_from(output: Tensor, source: tuple[Any, int], widened: bool = False) -> Node | None:
    """The node that made ``output`` from the tensor at ``source``, itself or between views; None if it did otherwise.

    A cast in between (autocast) that rounds would mean that the operation saw other values than we did. ``widened``:
    one that does not is no matter, as for a selection, which compares entries with each other only.
    """
    node = output.grad_fn
    while node is not None:
        above = node.next_functions[0]
        while above[0] is not None and not _is(above, source) and _passes(above[0], widened):
            above = above[0].next_functions[0]
        if _kind(node) not in _VIEWS:
            return node if _is(above, source) else None
        node = node.next_functions[0][0]
    return None


def _passes(node: Node, widened: bool) -> bool:
    """A view, or a cast that rounds nothing."""
    if _kind(node) in _VIEWS:
        return True
    if not widened or _kind(node) != "ToCopy":
        return False
    source, number = node.next_functions[0]
    given, made = source._input_metadata[number].dtype, node._input_metadata[0].dtype
    return bool(torch.promote_types(given, made) == made)


def _kind(node: Node) -> str:
    name: str = node.name().rstrip("0123456789")
    return name.removesuffix("Backward")


def _is(edge: tuple[Node, int], source: tuple[Any, int]) -> bool:
    if isinstance(source[0], Tensor):
        return edge[0] is not None and getattr(edge[0], "variable", None) is source[0]
    return edge == source or (edge[0] is None and source[0] is None)


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
