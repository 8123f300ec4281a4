"""A step whose block begins in one callback and ends in another."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from ..monitor import Monitor
from ..step import Step


class Block:
    """At most one step of a monitor, open from :meth:`begin` to :meth:`end` or :meth:`abort`."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self._open: tuple[AbstractContextManager[Step], Step] | None = None

    @property
    def is_open(self) -> bool:
        """Is a step running?"""
        return self._open is not None

    def state_dict(self) -> dict[str, Any]:
        """The monitor's; of a step that is running nothing, it will be done again."""
        return self.monitor._state_before() if self.is_open else self.monitor.state_dict()

    def begin(self) -> None:
        """Begin a step, unless one is running: the next part of an accumulated gradient belongs to it."""
        if self._open is None:
            context = self.monitor.step()
            self._open = context, context.__enter__()

    def end(self) -> Step:
        """End the running step; UncertifiedError as the monitor's ``on_fail`` wants it."""
        assert self._open is not None
        (context, step), self._open = self._open, None
        context.__exit__(None, None, None)
        return step

    def abort(self, error: BaseException | None = None) -> None:
        """Leave the running step, if there is one, as an exception does: it has no verdict."""
        if self._open is not None:
            (context, _), self._open = self._open, None
            error = error or RuntimeError("training ended within a step")
            context.__exit__(type(error), error, error.__traceback__)
