"""Stand-ins for torch.cuda's streams and events, on a timeline in place of a device."""

from __future__ import annotations

from typing import Any

import torch

from .runtime import native
from .timeline import Clock, Timeline
from .waits import Waits


class Hub:
    """What the streams and events of the running emulation belong to."""

    timeline: Timeline
    waits: Waits


class Stream(torch.Stream):
    """``torch.cuda.Stream``: a sequence of operators that knows of other streams only what it waited for."""

    def __new__(cls, device: object = None, priority: int = 0, **given: int) -> Stream:
        if given:
            made: Stream = super().__new__(cls, stream_id=given["stream_id"], device_index=0, device_type=1)
            return made
        return super().__new__(cls, device="cuda:0", priority=priority)  # type: ignore[no-any-return]

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def wait_event(self, event: Event) -> None:  # type: ignore[override]
        event.wait(self)

    def wait_stream(self, stream: torch.Stream) -> None:
        Hub.timeline.order(self.stream_id, Hub.timeline.clock(stream.stream_id))

    def record_event(self, event: Event | None = None) -> Event:  # type: ignore[override]
        made = Event() if event is None else event
        made.record(self)
        return made

    def query(self) -> bool:
        clock = Hub.timeline.clock(self.stream_id)
        return Hub.timeline.query((self.stream_id, clock[self.stream_id]), clock)

    def synchronize(self) -> None:
        _wait_for("Stream.synchronize", Hub.timeline.clock(self.stream_id))


class Event:
    """``torch.cuda.Event``. One that was never recorded has passed, as CUDA has it."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self._clock: Clock = {}
        self._key = object()

    def record(self, stream: torch.Stream | None = None) -> None:
        self._clock = Hub.timeline.clock((current_stream() if stream is None else stream).stream_id)
        self._key = object()

    def wait(self, stream: torch.Stream | None = None) -> None:
        Hub.timeline.order((current_stream() if stream is None else stream).stream_id, self._clock)

    def query(self) -> bool:
        return Hub.timeline.query(self._key, self._clock)

    def synchronize(self) -> None:
        _wait_for("Event.synchronize", self._clock)

    def elapsed_time(self, end: Event) -> float:
        return 1.0


def _wait_for(name: str, clock: Clock) -> None:
    if not Hub.timeline.passed(clock):
        Hub.waits.add(name)
    Hub.timeline.complete(clock)


def current_stream(device: object = None) -> Stream:
    return Stream(stream_id=native.stream())


def default_stream(device: object = None) -> Stream:
    return Stream(stream_id=0)


def set_stream(stream: torch.Stream) -> None:
    native.set_stream(stream.stream_id)


def synchronize(device: Any = None) -> None:
    """Wait for all streams."""
    timeline = Hub.timeline
    timeline.follow()
    _wait_for("torch.cuda.synchronize", {stream: at for stream, at in timeline.position.items()})
