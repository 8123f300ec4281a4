"""Where the host waits for the device: the list of it, and a block in which it must not."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Waits(list[str]):
    """What made the host wait so far: the operator and the nearest caller outside torch."""

    def __init__(self) -> None:
        super().__init__()
        self._forbidden: threading.Thread | None = None
        self._caught: list[str] = []
        self._paused = 0

    def add(self, what: str) -> None:
        if self._paused:
            return
        self.append(f"{what}{caller()}")
        thread = threading.current_thread()
        # The threads of the autograd engine are not Python's: to it they are dummies.
        if self._forbidden is not None and (thread is self._forbidden or isinstance(thread, threading._DummyThread)):
            self._caught.append(self[-1])
            raise RuntimeError(f"the host waits for the device: {self[-1]}")

    @contextmanager
    def forbidden(self) -> Iterator[None]:
        """On this thread and in backward passes a wait is an error, at once and, if it is caught there, in the end."""
        self._caught, self._forbidden = [], threading.current_thread()
        try:
            yield
        finally:
            self._forbidden = None
        if self._caught:
            raise RuntimeError(f"the host waited for the device: {', '.join(self._caught)}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What a test itself does here is not counted."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1


def caller() -> str:
    """' at file:line' of the nearest frame outside torch and the emulation; '' inside a backward pass."""
    frame = sys._getframe(1)
    while frame is not None:
        room = frame.f_globals.get("__name__", "").split(".", 1)[0]
        if room not in ("torch", "emulation", "contextlib", "functools"):
            return f" at {frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
