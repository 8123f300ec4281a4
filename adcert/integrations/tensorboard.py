"""Verdicts and counts of a run as scalars of TensorBoard."""

from __future__ import annotations

from typing import Protocol

from ..monitor import Monitor
from ..step import Step
from .scalars import Scalars


class Writer(Protocol):
    """What is used of ``torch.utils.tensorboard.SummaryWriter``; tensorboardX's and others' have it too."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...

    def flush(self) -> object: ...


class TensorBoard:
    """Writes a step's numbers (:class:`~adcert.integrations.scalars.Scalars`) once its verdict is there.

    Training does not wait for verdicts: they are written by later calls, in the order of the steps, on the calling
    thread.

    Args:
        writer: a ``SummaryWriter``, or anything with its ``add_scalar`` and ``flush``.
        monitor: of the run; where the job was resumed, after ``load_state_dict``.
        prefix: of the tags, ``adcert/ties`` and so on.

    Example:
        >>> import torch, adcert
        >>> class Printer:
        ...     def add_scalar(self, tag, value, step): print(step, tag, value)
        ...     def flush(self): pass
        >>> model = torch.nn.Linear(1, 1)
        >>> with adcert.Monitor(model) as monitor, TensorBoard(Printer(), monitor) as board:
        ...     with monitor.step() as step:
        ...         model(torch.ones(1, 1)).sum().backward()
        ...     board.add(step)
        ...     board.flush()  # doctest: +ELLIPSIS
        1 adcert/windows 0
        ...
        1 adcert/certified 1
        1 adcert/uncertified 0
        1 adcert/undecided 0
    """

    def __init__(self, writer: Writer, monitor: Monitor, prefix: str = "adcert/") -> None:
        self._writer = writer
        self._prefix = prefix
        self._scalars = Scalars(monitor)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def add(self, step: Step) -> None:
        """Take a step whose block has ended, and write what has been decided meanwhile."""
        self._scalars.add(step)
        self._write(wait=False)

    def flush(self) -> None:
        """Wait for all verdicts, write them and flush the writer."""
        self._write(wait=True)
        self._writer.flush()

    def _write(self, wait: bool) -> None:
        for number, scalars in self._scalars.settled(wait):
            for name, value in scalars.items():
                self._writer.add_scalar(self._prefix + name, value, number)
