"""What a forward pass saw: touches and ties, as structs of tensors on the device they came from.

A :class:`Recorder` is active on one thread while a step runs. The modules of :mod:`adcert.nn` and the function
mode of :mod:`adcert.audit` hand their inputs to it; it runs the recording kernels of :mod:`adcert.ops` and keeps
one :class:`OpRecord` for each call. Outside a step nothing is active and nothing is recorded.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops


def take(t: Tensor, index: Tensor) -> Tensor:
    """Entries of ``t`` at flat indices in logical row-major order, in any memory format and without a copy of ``t``."""
    if t.is_contiguous():
        return t.view(-1)[index]
    return t[torch.unravel_index(index, tuple(t.shape))]


Node = Any  # torch.autograd.graph.Node; C++ nodes are not instances of the Python class


@dataclass(frozen=True)
class Window:
    """Geometry of a two-dimensional pooling window, each entry (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Ties:
    """Argmax sets of a max pooling.

    ``windows``: int64 [T], flat output indices (logical row-major) of windows with two or more maximisers.
    ``members``: int64 [T, W], bit ``kh * KW + kw`` is set iff that cell attains the maximum.
    ``offsets``: in-window offset of the member AD selects, for every output.
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
    released: bool = False

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
    """Collects the records of one step. Not thread-safe: one recorder belongs to one thread."""

    def __init__(self, names: dict[int, str] | None = None) -> None:
        self.witness: Witness | None = None
        self.records: list[OpRecord] = []
        self._names = names or {}
        self._uses: dict[str, int] = {}

    def clear(self) -> None:
        self.records.clear()
        self._uses.clear()

    def name_of(self, module: object, default: str) -> str:
        """Qualified name of a module in the monitored model, or ``default``."""
        return self._names.get(id(module), default)

    def relu(self, x: Tensor, name: str, *, inplace: bool = False) -> Tensor:
        """``torch.relu`` (in place if asked), recording the units that touch the kink at 0."""
        with torch._C.DisableTorchFunction():
            if _differentiable(x):
                self._read(x, name)
                output, touches, counts = self._relu_in_place(x) if inplace else ops.relu(x)
                self._add(name, output, tuple(x.shape), True, None, touches, counts)
                return output
        return F.relu(x, inplace=inplace)

    def max_pool2d(self, x: Tensor, name: str, window: Window, *, ceil_mode: bool, relu: bool = False) -> Tensor:
        """``max_pool2d`` of ``x``, or of ``relu(x)``, recording touches and ties in the same pass."""
        geometry = window.kernel, window.stride, window.padding, window.dilation
        with torch._C.DisableTorchFunction():
            if _differentiable(x):
                self._read(x, name)
                result = ops.max_pool2d(x, *geometry, ceil_mode, relu=relu)
                ties = Ties(result.windows, result.members, result.offsets, window)
                self._add(name, result.output, tuple(x.shape), relu, ties, result.touches, result.counts)
                return result.output
        a = F.relu(x) if relu else x
        output: Tensor = F.max_pool2d(a, *geometry, ceil_mode)
        return output

    def _read(self, x: Tensor, name: str) -> None:
        if self.witness is not None:
            self.witness.reads(x, name)

    def _relu_in_place(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read the touches, then overwrite ``x``: no second activation is held.

        Where ``x`` is the output of a recorded operation, that record reads nothing of it but the sign, which stays.
        """
        before = [record for record in self.records if record.node is x.grad_fn and not record.altered()]
        seen = ops.touches(x)
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
    ) -> None:
        """Keep what was seen; the caller has switched the function mode off."""
        uses = self._uses[name] = self._uses.get(name, 0) + 1
        unique = name if uses == 1 else f"{name}#{uses}"
        kept = output.detach()
        record = OpRecord(unique, output.grad_fn, relu, ties, touches, counts, kept, output._version, shape)
        self.records.append(record)


def _differentiable(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled() and x.is_floating_point()


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
