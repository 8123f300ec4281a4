"""Where in somebody's program a function was called."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

Site = tuple[CodeType, int]  # a line of somebody's program
Origin = tuple[str, Site | None]  # a function, and where it was called

_ROOMS = """calls_activations calls_pooling calls_recurrent calls_selections compiled followed monitor recorder replay
    routes sites step substitution watch"""
_OURS = frozenset(f"adcert.{room}" for room in _ROOMS.split())

_inner: dict[str, bool] = {}  # is a module torch's, or one of the recording ones?


def site() -> Site | None:
    """The nearest frame outside torch and the recording modules."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        inner = _inner.get(module)
        if inner is None:
            inner = _inner[module] = f"{module}.".startswith(("torch.", "adcert.nn.")) or module in _OURS
        if not inner:
            return frame.f_code, frame.f_lineno
        frame = frame.f_back
    return None


def caller() -> str:
    """' at file:line' of :func:`site`."""
    return told(("", site()))


def told(origin: Origin) -> str:
    """'function at file:line'."""
    name, place = origin
    return name if place is None else f"{name} at {place[0].co_filename.rsplit('/', 1)[-1]}:{place[1]}"
