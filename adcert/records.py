"""What a forward pass saw: touches and ties, as structs of tensors.

A :class:`Recorder` is active on one thread while a step runs. The modules of :mod:`adcert.nn` and the function
mode of :mod:`adcert.audit` hand their inputs to it; it runs the recording kernels of :mod:`adcert.ops` and keeps
one :class:`OpRecord` for each call. Outside a step nothing is active and nothing is recorded.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .lists import Rooms

Node = Any  # torch.autograd.graph.Node; C++ nodes are not instances of the Python class


@dataclass(frozen=True)
class Window:
    """Geometry of a two-dimensional pooling window, each entry (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def most(self, shape: Sequence[int]) -> int:
        """An upper bound of the windows, and of the input units, for an input of this shape."""
        *planes, height, width = shape
        return math.prod(planes) * (height + 2 * self.padding[0]) * (width + 2 * self.padding[1])


@dataclass(frozen=True, eq=False)
class Ties:
    """Argmax sets of a max pooling.

    ``windows``: int64 [T], flat output indices (logical row-major) of windows with two or more maximisers.
    ``members``: int64 [T, W], bit ``kh * KW + kw`` is set iff that cell attains the maximum.
    ``offsets``: in-window offset of the member AD selects, for every output; on the device of the output.
    """

    windows: Tensor
    members: Tensor
    offsets: Tensor
    window: Window

    def pairs(self, mask: Tensor) -> int:
        """Number of (selected, other) pairs in the windows of this mask."""
        bits = torch.arange(min(64, self.window.kernel[0] * self.window.kernel[1]))
        held = ((self.members[mask][:, :, None] >> bits) & 1).sum()
        return int(held) - int(mask.sum())


@dataclass(eq=False)
class OpRecord:
    """One nonsmooth operation of the step: ``z = phi(rho(y))`` in the notation of Park, Chun, Lee (2024).

    ``relu``: rho is the ReLU (proxy 0 at its kink), else the identity. ``ties`` is None when phi is the identity.
    ``node`` is the autograd node of the output; its first input edge leads to y. ``touches``: int64 [M], flat
    indices of y with ``y == 0``. ``output`` shares its memory with z, at version ``version``, or with relu(z) if a
    recorded ReLU has overwritten it: only its sign may be read. It is let go when the last backward pass starts.

    ``listed``: the lists and ``counts`` are on the host, whole and ascending. On a GPU they are not until
    :class:`adcert.lists.Coming` has brought them; ``room``: how many entries each has room for there, None if it is
    as long as what was found. ``overflow``: why the lists are missing, or "".
    """

    name: str
    node: Node
    relu: bool
    ties: Ties | None
    touches: Tensor
    counts: Tensor
    output: Tensor
    version: int
    input_shape: tuple[int, ...]
    room: int | None = None
    listed: bool = True
    released: bool = False
    overflow: str = ""

    @property
    def edge(self) -> tuple[Node, int]:
        """The autograd edge of y: (node, output number); the node is None where y is constant."""
        edge: tuple[Node, int] = self.node.next_functions[0]
        return edge

    def release(self) -> None:
        """Let go of the activations; the counts stay."""
        self.released = True
        self.output = self.output.new_empty(0)
        if self.ties is not None:
            self.ties = None

    def altered(self) -> bool:
        """True if the output was modified in place after it was recorded."""
        return bool(self.output._version != self.version)


class Witness(Protocol):
    """Who has to know that a recorded operation reads or overwrites a tensor, out of the function mode's sight."""

    def reads(self, tensor: Tensor, name: str) -> None: ...

    def wrote(self, tensor: Tensor) -> None: ...


class Recorder:
    """Collects the records of one step. Not thread-safe: one recorder belongs to one thread.

    ``rooms``: of lists on a GPU; new ones ask for exact lists. ``streams``: where recorded operations ran on a GPU.
    """

    def __init__(self, names: dict[int, str] | None = None, rooms: Rooms | None = None) -> None:
        self.witness: Witness | None = None
        self.records: list[OpRecord] = []
        self.rooms = Rooms() if rooms is None else rooms
        self.streams: dict[torch.cuda.Stream, None] = {}
        self._names = names or {}
        self._uses: dict[str, int] = {}

    def clear(self) -> None:
        self.records.clear()
        self.streams.clear()
        self._uses.clear()

    def name_of(self, module: object, default: str) -> str:
        """Qualified name of a module in the monitored model, or ``default``."""
        return self._names.get(id(module), default)

    def relu(self, x: Tensor, name: str, *, inplace: bool = False) -> Tensor:
        """``torch.relu`` (in place if asked), recording the units that touch the kink at 0."""
        with torch._C.DisableTorchFunction():
            if _recordable(x):
                self._read(x, name)
                name = self._unique(name)
                room = self.rooms.of(name, x.numel()) if x.is_cuda else None
                output, touches, counts = self._relu_in_place(x, room) if inplace else ops.relu(x, room)
                self._add(name, output, tuple(x.shape), True, None, touches, counts, room)
                return output
        return F.relu(x, inplace=inplace)

    def max_pool2d(self, x: Tensor, name: str, window: Window, *, ceil_mode: bool, relu: bool = False) -> Tensor:
        """``max_pool2d`` of ``x``, or of ``relu(x)``, recording touches and ties in the same pass."""
        geometry = window.kernel, window.stride, window.padding, window.dilation
        with torch._C.DisableTorchFunction():
            if _recordable(x):
                self._read(x, name)
                name = self._unique(name)
                room = self.rooms.of(name, window.most(x.shape)) if x.is_cuda else None
                result = ops.max_pool2d(x, *geometry, ceil_mode, relu=relu, capacity=room)
                ties = Ties(result.windows, result.members, result.offsets, window)
                self._add(name, result.output, tuple(x.shape), relu, ties, result.touches, result.counts, room)
                return result.output
        a = F.relu(x) if relu else x
        output: Tensor = F.max_pool2d(a, *geometry, ceil_mode)
        return output

    def _read(self, x: Tensor, name: str) -> None:
        if self.witness is not None:
            self.witness.reads(x, name)

    def ran_on(self, device: torch.device) -> None:
        """Something of the step was enqueued on the current stream of a GPU."""
        self.streams[torch.cuda.current_stream(device)] = None

    def _unique(self, name: str) -> str:
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
        name: str,
        output: Tensor,
        shape: tuple[int, ...],
        relu: bool,
        ties: Ties | None,
        touches: Tensor,
        counts: Tensor,
        room: int | None,
    ) -> None:
        """Keep what was seen; the caller has switched the function mode off."""
        kept, version = output.detach(), output._version
        record = OpRecord(
            name, output.grad_fn, relu, ties, touches, counts, kept, version, shape, room, not output.is_cuda
        )
        self.records.append(record)
        if output.is_cuda:
            self.ran_on(output.device)


def _recordable(x: Tensor) -> bool:
    """Differentiable, and not part of what a checkpoint will run again in backward.

    On a GPU that happens on autograd's own thread, where no recorder is active and torch's operators save other
    tensors than ours.
    """
    if not (x.requires_grad and torch.is_grad_enabled() and x.is_floating_point()):
        return False
    return not x.is_cuda or torch._C._autograd._top_saved_tensors_default_hooks(True) is None


_state = threading.local()


def active() -> Recorder | None:
    """The recorder of the step that is running on this thread, or None."""
    recorder: Recorder | None = getattr(_state, "recorder", None)
    return recorder


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Make ``recorder`` the active one of this thread; the caller has checked that none is."""
    _state.recorder = recorder
    try:
        yield recorder
    finally:
        _state.recorder = None
