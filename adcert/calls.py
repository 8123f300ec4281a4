"""One call of a torch function, for those that record it: ``calls_*.py``, by the table in :mod:`adcert.routes`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .recorder import Recorder

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of a torch function: ``run()`` computes it; ``given``: its arguments by name, defaults included."""

    name: str
    given: Arguments
    run: Callable[[], Any]
    inplace: bool


Handler = Callable[[Recorder, Call], Any]  # NotImplemented: not recorded
ALIKE: set[Handler] = set()  # they save what the call saves that is not recorded, as a checkpoint demands
