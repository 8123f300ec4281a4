"""What a part of the run may rely on: its figures are saved one by one, and what goes wrong costs one figure.

The results are one JSON file, whole after every change; one process at a time writes it. ``parts`` holds for each part
its ``status`` (running, again, done, failed, skipped), its tables of rows, ``errors`` and ``notes``.
"""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gpu.paths import without_folders

Row = dict[str, Any]


class PoisonedError(Exception):
    """A kernel failed in a way that leaves this process without its GPU: the rest needs a new process."""


class Results:
    """The JSON file. An existing one is read first, so that a new process goes on where the last one was cut off."""

    def __init__(self, path: Path, fresh: Row | None = None) -> None:
        self.path = path
        self.data: Row = fresh if fresh is not None else json.loads(path.read_text())
        self.data.setdefault("parts", {})

    def part(self, name: str) -> Row:
        found: Row = self.data["parts"].setdefault(name, {"status": "waiting"})
        return found

    def save(self) -> None:
        """Never half a file, whenever the process ends."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(beside, self.path)


class Part:
    """One part of the run while it runs.

    Arguments:
        seconds: it has, from now on; a case that has begun may take a little longer.
        poisoned: tells whether the GPU is lost to this process.
    """

    def __init__(
        self, results: Results, name: str, seconds: float, poisoned: Callable[[], bool] = lambda: False
    ) -> None:
        self.results, self.name = results, name
        self.data = results.part(name)
        self.deadline = time.monotonic() + seconds
        self._poisoned = poisoned

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def set(self, **values: Any) -> None:
        self.data.update(values)
        self.results.save()

    def note(self, text: str) -> None:
        self.data.setdefault("notes", []).append(text)
        self.results.save()

    def row(self, table: str, row: Row) -> None:
        self.data.setdefault(table, []).append(row)
        self.results.save()

    def each(self, table: str, cases: Mapping[str, Callable[[], Row | None]], least: float = 0.5) -> None:
        """Run the cases while there are ``least`` seconds left; each gives a row of the table, or fails alone.

        A case that was begun before, by a process that did not survive it, is not begun again.

        Raises:
            PoisonedError: this process has lost the GPU; a new one may go on with the cases that are left.
        """
        tried = self.data.setdefault("tried", {}).setdefault(table, [])
        todo = [case for case in cases if case not in tried]
        for number, case in enumerate(todo):
            if self.left() < least:
                self.note(f"{table}: out of time before {len(todo) - number} of {len(cases)} cases: {case}, ...")
                return
            tried.append(case)
            self.set(at=f"{table}: {case}")
            row, failure = None, None
            try:
                row = cases[case]()
            except Exception as error:
                failure = described(error)
            if failure is not None:  # after the block, so that the tensors of its frames can go
                self.data.setdefault("errors", []).append({"table": table, "case": case, **failure})
                self.results.save()
                gc.collect()
                if self._poisoned():
                    raise PoisonedError(f"{table}: {case}")
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            if row is not None:
                self.row(table, {"case": case, **row})


def described(error: BaseException) -> Row:
    """Type, message and place, without the names of this machine's folders."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return {
        "type": type(error).__name__,
        "message": without_folders(str(error))[:600],
        "where": [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames],
    }
