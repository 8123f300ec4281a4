"""A desk with one clerk: jobs are done in order, on a thread of their own, and none is ever lost."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .errors import AdcertError

Job = TypeVar("Job")

_IDLE = 10.0  # seconds after which a thread without work ends; the next job starts another
_PULSE = 0.5  # seconds between looks at whether the thread is still alive


@dataclass(frozen=True)
class Bounds:
    """How many jobs may wait, and how many bytes of them; with 0 jobs each is done at once on the calling thread."""

    jobs: int
    nbytes: int


class Desk(Generic[Job]):
    """Does jobs one after the other; each ends in exactly one of ``do`` and ``fail``.

    Args:
        do: does a job.
        fail: takes a job that ``do`` left by an exception, or that its thread died over, and the reason.
        bounds: :meth:`submit` waits while more than this is waiting.
    """

    def __init__(self, do: Callable[[Job], None], fail: Callable[[Job, str], None], bounds: Bounds) -> None:
        self._do, self._fail, self._bounds = do, fail, bounds
        self._changed = threading.Condition()
        self._jobs: deque[tuple[Job, int]] = deque()  # with their sizes; the first one is in work
        self._working = False
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        _DESKS.add(self)

    def submit(self, job: Job, nbytes: int = 0) -> None:
        """Hand in a job of this size; waits for room.

        The job is taken before the wait, so that an interrupt during the wait does not lose it.

        Raises:
            AdcertError: in a process that was forked from the one that made the desk.
        """
        if self._bounds.jobs == 0:
            self._attempt(job)
            return
        if self.foreign():
            raise AdcertError("a monitor cannot be used in a forked process: make a new one there")
        with self._changed:
            self._jobs.append((job, nbytes))
            self._changed.notify_all()
        self.wait(self._has_room)

    def foreign(self) -> bool:
        """This process was forked from the one that made the desk, whose thread is not here."""
        return os.getpid() != self._process

    def flush(self) -> None:
        """Wait until every job is done."""
        self.wait(lambda: not self._jobs)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until ``ready()``, or until there is nothing left to wait for."""
        if self.foreign() or threading.current_thread() is self._thread:
            return
        with self._changed:
            while self._jobs and not ready():
                self._keep_alive()
                self._changed.wait(_PULSE)
            self._keep_alive()

    def _has_room(self) -> bool:
        held = sum(nbytes for _, nbytes in self._jobs)
        return len(self._jobs) <= self._bounds.jobs and (len(self._jobs) <= 1 or held <= self._bounds.nbytes)

    def _keep_alive(self) -> None:
        """Start a thread if there is work and none is there; if one died over a job, that job has failed."""
        if not self._jobs or (self._thread is not None and self._thread.is_alive()):
            return
        if self._working:
            try:
                self._reject(self._jobs[0][0], "adcert's worker thread died over it")
            finally:
                self._take_off()
        self._thread = threading.Thread(target=self._run, name="adcert", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._changed.wait(_IDLE)
                if not self._jobs:
                    self._thread = None
                    return
                self._working = True
                job, _ = self._jobs[0]
            try:
                self._attempt(job)
            finally:
                del job
                with self._changed:
                    self._take_off()

    def _take_off(self) -> None:
        self._jobs.popleft()
        self._working = False
        self._changed.notify_all()

    def _attempt(self, job: Job) -> None:
        try:
            self._do(job)
        except BaseException as error:
            self._reject(job, f"adcert's worker failed with {type(error).__name__}: {error}")
            if self._bounds.jobs == 0 and not isinstance(error, Exception):
                raise  # on the user's own thread an interrupt is the user's

    def _reject(self, job: Job, reason: str) -> None:
        self._fail(job, reason)
        with contextlib.suppress(Warning):  # where warnings are errors the failure itself is still on record
            warnings.warn(reason, RuntimeWarning, stacklevel=2)


_DESKS: weakref.WeakSet[Desk[Any]] = weakref.WeakSet()


@atexit.register
def flush_all() -> None:
    """What is still waiting when the program ends is done before it does."""
    for desk in list(_DESKS):
        desk.flush()
