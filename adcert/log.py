"""The log of a run: a file of JSON lines that a resumed job goes on with."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from .errors import AdcertError
from .state import count, damaged, fields

_BLOCK = 1 << 20
_STATE = ("start", "stop", "crc32")


class Log:
    """Appends lines to a file; ``state()`` marks a place in it, ``resume(state)`` goes back there.

    The mark is where this job's lines begin and end and the CRC-32 of what lies between.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: FileIO | None = None
        self._first: dict[str, Any] | None = None
        self._start = self._stop = self._crc = 0
        self._regular = False  # a file that was opened, and no pipe
        self._cut = False  # a killed job has left half a line: the next one begins a new one

    @property
    def is_open(self) -> bool:
        """May lines be written?"""
        return self._file is not None

    def open(self) -> None:
        """Open the file, at its end if it exists. A second call does nothing.

        Raises:
            AdcertError: if it cannot be written.
        """
        if self._file is not None:
            return
        try:
            self._file = self.path.open("ab", buffering=0)
            status = os.fstat(self._file.fileno())
            self._regular = stat.S_ISREG(status.st_mode)
            if self._regular and status.st_size != self._stop:
                self._start = self._stop = status.st_size
                self._crc = 0
                self._cut = not self._ends_a_line()
            if self._first is not None:
                self.write(self._first)
                self._first = None
        except OSError as error:
            raise AdcertError(f"cannot write the log {self.path}: {error}") from error

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; it has reached the operating system when this returns. OSError if that fails."""
        assert self._file is not None
        data = b"\n" * self._cut + json.dumps(line).encode() + b"\n"
        rest = data
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            if self._regular:
                with contextlib.suppress(OSError):  # half a line would spoil the next one
                    os.ftruncate(self._file.fileno(), self._stop)
            raise
        self._stop += len(data)
        self._crc = zlib.crc32(data, self._crc)
        self._cut = False

    def _ends_a_line(self) -> bool:
        with self.path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return True
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def begin(self, line: dict[str, Any]) -> None:
        """Write a line as soon as the log is open.

        Raises:
            AdcertError: if it cannot be written.
        """
        if not self.is_open:
            self._first = line
            return
        try:
            self.write(line)
        except OSError as error:
            raise AdcertError(f"cannot write the log {self.path}: {error}") from error

    def close(self) -> None:
        """Close the file; :meth:`open` goes on with it."""
        if self._file is not None:
            if self._regular:
                os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def state(self) -> dict[str, int] | None:
        """The mark of this place, on disk before it is given; None for a log that was never open or is no file."""
        if not self._regular:
            return None
        if self._file is not None:
            os.fsync(self._file.fileno())
        return {"start": self._start, "stop": self._stop, "crc32": self._crc}

    def resume(self, state: Any, step: int) -> None:
        """Go back to a mark. What the killed job wrote after it, lines of steps after ``step``, will be written again:
        it moves to the end of ``PATH.superseded``, so that nothing is lost if the resumed job ends earlier.

        Raises:
            AdcertError: if the file is not the one that was marked, or if it goes on with lines of somebody else.
        """
        found = fields(state, _STATE, "log")
        start, stop, crc = (count(found[name], f"the log's {name}") for name in _STATE)
        if start > stop:
            raise damaged(f"the log ends at {stop}, before it begins at {start}")
        try:
            with self.path.open("r+b") as file:
                self._check(file, start, stop, crc)
                tail = file.read()
                if tail:
                    self._supersede(tail, step)
                    file.truncate(stop)
        except OSError as error:
            raise AdcertError(f"cannot go on with the log {self.path}: {error}. {self._remedy()}") from error
        self._start, self._stop, self._crc, self._cut = start, stop, crc, False

    def _check(self, file: BinaryIO, start: int, stop: int, crc: int) -> None:
        """The marked part is there, byte for byte; leaves the file where it stops."""
        size = file.seek(0, os.SEEK_END)
        if size < stop:
            raise AdcertError(
                f"the log {self.path} ends after {size} bytes, the resumed job had written {stop}. {self._remedy()}"
            )
        file.seek(start)
        found = 0
        for block in _blocks(file, stop - start):
            found = zlib.crc32(block, found)
        if found != crc:
            raise AdcertError(f"the log {self.path} is not the one of the resumed job. {self._remedy()}")

    def _supersede(self, tail: bytes, step: int) -> None:
        *lines, last = tail.split(b"\n")
        for number, line in enumerate(lines):
            follows = _step_of(line)
            if follows is None or follows <= step:
                report = number == len(lines) - 1 and not last and line.startswith(b'{"report"')
                if not report:
                    raise AdcertError(
                        f"the log {self.path} goes on after step {step} with a line of another job: "
                        f"{line[:60].decode(errors='replace')!r}. {self._remedy()}"
                    )
            else:
                step = follows
        with self.path.with_name(self.path.name + ".superseded").open("ab") as file:
            file.write(tail if not last else tail + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _remedy(self) -> str:
        return 'Put the right file there, or set state["log"] = None to begin a log with the totals so far'


def _step_of(line: bytes) -> int | None:
    """The step of a step's line."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else None


def _blocks(file: BinaryIO, length: int) -> Iterator[bytes]:
    while length > 0 and (block := file.read(min(_BLOCK, length))):
        length -= len(block)
        yield block
