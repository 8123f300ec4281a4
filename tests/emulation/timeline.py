"""Who may touch which memory when: what streams, events and the host know of each other, by vector clocks.

Every operator runs at once. What a real device would leave undone for a while are copies between the device and pinned
host memory: they wait here until the host learns that they are done. An operator that touches memory another stream
wrote or still reads, without having waited for it, is an error; so is memory given back while a stream that its
allocator does not know of may be using it.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .runtime import native

ALLOCATED, FREED, RECORDED, BLOCKED, USED = range(5)  # runtime.cpp has the same numbers

Clock = dict[int, int]  # stream -> how many of its operators


@dataclass
class Memory:
    """One allocation: the stream it was made on, the last accesses, the streams told by ``record_stream``."""

    stream: int
    writes: Clock
    reads: Clock = field(default_factory=dict)
    used: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Transfer:
    """A copy that is under way. ``content`` is the source as it was when the copy was asked for."""

    stream: int
    position: int
    target: Tensor | None  # pinned host memory, or None for an upload
    source: Tensor | None  # pinned host memory of an upload
    content: Tensor

    def finish(self) -> None:
        if self.target is not None:
            self.target.copy_(self.content)
        elif self.source is not None and not _same(self.source, self.content):
            raise RuntimeError("pinned memory was overwritten while a copy from it to the device was under way")


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


class Timeline:
    """``queries``: how often an event or a stream is asked in vain before it has passed."""

    def __init__(self, queries: int) -> None:
        self.queries = queries
        self.position: Counter[int] = Counter()
        self.memory: dict[int, Memory] = {}
        self.transfers: list[Transfer] = []
        self.hazards: list[tuple[int, int, str]] = []  # stream, position, what is wrong with that operator
        self._seen: defaultdict[int, Clock] = defaultdict(dict)
        self._host: Clock = {}
        self._events: dict[int, Clock] = {}  # of the autograd engine
        self._asked: Counter[Hashable] = Counter()
        self._lock = threading.RLock()
        native.drain()

    def clock(self, stream: int) -> Clock:
        """What is done once everything asked of this stream so far is done."""
        with self._lock:
            self.follow()
            return _merged(self._seen[stream], self._host) | {stream: self.position[stream]}

    def order(self, stream: int, clock: Clock) -> None:
        """The stream waits for what is on this clock."""
        with self._lock:
            self.follow()
            self._seen[stream] = _merged(self._seen[stream], clock)

    def passed(self, clock: Clock) -> bool:
        """The host knows already that all of it is done."""
        return all(self._host.get(stream, 0) >= position for stream, position in clock.items())

    def query(self, key: Hashable, clock: Clock) -> bool:
        with self._lock:
            if not self.passed(clock):
                self._asked[key] += 1
                if self._asked[key] <= self.queries:
                    return False
            self.complete(clock)
            return True

    def complete(self, clock: Clock) -> None:
        """The host learns that all of it is done.

        Raises:
            RuntimeError: an operator among it used memory it must not use.
        """
        with self._lock:
            self.follow()
            self._host = _merged(self._host, clock)
            done = [job for job in self.transfers if job.position <= clock.get(job.stream, 0)]
            self.transfers = [job for job in self.transfers if job not in done]
            self._raise(lambda stream, position: position <= clock.get(stream, 0))
            with torch._C.DisableTorchFunction():  # unseen, as the device's own doings are
                for job in done:
                    job.finish()

    def begin(self, transfer: Transfer) -> None:
        """A copy is under way from now on; another thread may be completing others."""
        with self._lock:
            self.transfers.append(transfer)

    def close(self) -> None:
        """The end: nothing may be left that was wrong."""
        with self._lock:
            self.follow()
            self._raise(lambda *_: True)

    def access(self, name: str, stream: int, read: Iterable[int], written: Iterable[int]) -> int:
        """An operator is asked of a stream; returns its position.

        Raises:
            RuntimeError: other streams have to be waited for first.
        """
        with self._lock:
            self.follow()
            self.position[stream] += 1
            position = self.position[stream]
            for number in read:
                if (memory := self.memory.get(number)) is not None:
                    self._check(name, stream, memory.writes, "written")
                    memory.reads[stream] = position
            for number in written:
                self.wrote(name, stream, number)
            return position

    def wrote(self, name: str, stream: int, number: int) -> None:
        with self._lock:
            self.follow()
            memory = self.memory.get(number)
            if memory is None:
                return
            self._check(name, stream, memory.writes, "written")
            position = self.position[stream]
            others = {other: at for other, at in memory.reads.items() if (other, at) != (stream, position)}
            self._check(name, stream, others, "read")
            memory.writes, memory.reads = {stream: position}, {}

    def follow(self) -> None:
        """Read the runtime's journal."""
        entries = native.drain()
        for kind, what, stream in zip(entries[::3], entries[1::3], entries[2::3], strict=True):
            if kind == ALLOCATED:
                self.memory[what] = Memory(stream, {stream: self.position[stream]})
            elif kind == FREED and what in self.memory:
                self._free(self.memory.pop(what))
            elif kind == RECORDED:
                self._events[what] = _merged(self._seen[stream], self._host) | {stream: self.position[stream]}
            elif kind == BLOCKED:
                self._seen[stream] = _merged(self._seen[stream], self._events.get(what, {}))
            elif kind == USED and what in self.memory:
                self.memory[what].used.add(stream)

    def _free(self, memory: Memory) -> None:
        for stream, position in _merged(memory.reads, memory.writes).items():
            if stream not in memory.used and not self._knows(memory.stream, stream, position):
                message = f"memory was freed while stream {stream} was using it, without record_stream"
                self.hazards.append((stream, position, message))

    def _raise(self, concerned: Callable[[int, int], bool]) -> None:
        found = [hazard for hazard in self.hazards if concerned(*hazard[:2])]
        self.hazards = [hazard for hazard in self.hazards if hazard not in found]
        if found:
            raise RuntimeError(found[0][2])

    def _check(self, name: str, stream: int, others: Clock, done: str) -> None:
        for other, position in others.items():
            if not self._knows(stream, other, position):
                where = f"{name} on stream {stream} uses memory that was {done} on stream {other}"
                raise RuntimeError(f"{where}, for which it has not waited")

    def _knows(self, stream: int, other: int, position: int) -> bool:
        known = max(self._seen[stream].get(other, 0), self._host.get(other, 0))
        return stream == other or known >= position


def _merged(a: Clock, b: Clock) -> Clock:
    return {stream: max(a.get(stream, 0), b.get(stream, 0)) for stream in (*a, *b)}
