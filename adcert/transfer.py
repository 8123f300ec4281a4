"""The doors between a device and the host.

Index lists and rows live on the host; activations, offsets, outputs and parameters stay on their device. Values cross
here and nowhere else: :func:`take`, :func:`pick`, :func:`host` and :func:`through` bring back what somebody needs at
once, an :class:`Arrival` what can come later. On tensors of the host all of it is what its plain form would be.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def take(t: Tensor, index: Tensor) -> Tensor:
    """Entries of ``t`` at flat indices in logical row-major order, in any memory format and without a copy of ``t``.

    ``index`` and the result are on the host, wherever ``t`` is.
    """
    index = _sent_to(index, t)
    if t.is_contiguous():
        return t.view(-1)[index].cpu()
    return t[torch.unravel_index(index, tuple(t.shape))].cpu()


def pick(t: Tensor, index: Tensor, dim: int = 0) -> Tensor:
    """The slices of ``t`` at these places (int64 [K], on the host) of one dimension, on the host."""
    return t.detach().index_select(dim, _sent_to(index, t)).cpu()


def host(t: Tensor) -> Tensor:
    """All of a tensor on the host; for small ones, or where every entry is needed."""
    return t.detach().cpu()


def through(node: Any, number: int, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """What a node of the graph makes of the gradient of its output ``number``, computed where the node lives."""
    given: list[Tensor | None] = [None] * len(node._input_metadata)
    given[number] = gradient.to(node._input_metadata[number].device)
    found = node(*given)
    each = found if isinstance(found, (tuple, list)) else (found,)
    return tuple(None if t is None else t.cpu() for t in each)


def in_use(t: Tensor) -> Tensor:
    """``t``, whose memory must outlast what the current stream does with it: it may come from another stream."""
    if t.is_cuda:
        t.record_stream(torch.cuda.current_stream(t.device))
    return t


class Arrival:
    """Tensors on their way to the host, each into pinned memory, on a stream beside the current one.

    ``tensors``: where they arrive, in the order given; shapes are right at once, values only after :meth:`wait`. A
    tensor of the host is itself. Nothing that is enqueued later is waited for. ``patient``: a thread that waits sleeps,
    which costs no core and some microseconds.
    """

    __slots__ = ("_events", "tensors")

    def __init__(self, sources: Iterable[Tensor], patient: bool = False) -> None:
        held = [source.contiguous() if source.is_cuda else source for source in sources]
        streams = {source.device: _copying(source.device) for source in held if source.is_cuda}
        self.tensors = tuple(_brought(t, streams[t.device]) if t.is_cuda else t for t in held)
        self._events = [
            stream.record_event(torch.cuda.Event(blocking=patient))  # type: ignore[no-untyped-call]
            for stream in streams.values()
        ]

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, once they are there. Any thread may wait, any number of times."""
        for event in self._events:
            event.synchronize()
        self._events = []
        return self.tensors


class Batch:
    """An :class:`Arrival` of many small tensors of one shape: one copy for each device and dtype."""

    __slots__ = ("_arrival", "_places")

    def __init__(self, tensors: Sequence[Tensor], patient: bool = False) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for place, t in enumerate(tensors):
            groups.setdefault((t.device, t.dtype), []).append(place)
        self._places = list(groups.values())
        stacks = [torch.stack([tensors[place] for place in group]) for group in self._places]
        self._arrival = Arrival(stacks, patient)

    def wait(self) -> list[Tensor]:
        """The tensors on the host, in the order given."""
        stacks = zip(self._places, self._arrival.wait(), strict=True)
        found = {place: t for places, stack in stacks for place, t in zip(places, stack, strict=True)}
        return [found[place] for place in range(len(found))]


def _sent_to(index: Tensor, t: Tensor) -> Tensor:
    """An index of the host on the device of ``t``; from pinned memory it gets there without a wait."""
    return index.pin_memory().to(t.device, non_blocking=True) if t.is_cuda else index


def follow(streams: Iterable[torch.cuda.Stream]) -> None:
    """From now on the current streams are behind what these have been given."""
    for stream in streams:
        current = torch.cuda.current_stream(stream.device)
        if stream != current:
            current.wait_stream(stream)


@functools.cache
def _side(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def _copying(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device's copies, from now on behind what its current stream has been given."""
    stream = _side(device.index)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _brought(source: Tensor, stream: torch.cuda.Stream) -> Tensor:
    copy = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
    with torch.cuda.stream(stream):
        copy.copy_(source, non_blocking=True)
    source.record_stream(stream)
    return copy
