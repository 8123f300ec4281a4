"""What a step's verdict comes to, as numbers to plot."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ..monitor import Monitor
from ..step import Step
from ..totals import COUNTS, VERDICTS


class Scalars:
    """Numbers of the steps of a monitor, in their order, as soon as their verdicts are there.

    Per step: windows, ties, touches, differing, rows; and how many steps so far were certified, uncertified and
    undecided. A resumed job counts on: make this after ``monitor.load_state_dict``.
    """

    def __init__(self, monitor: Monitor) -> None:
        report = monitor.report()
        self._verdicts = {verdict: int(getattr(report, verdict)) for verdict in VERDICTS}
        self._waiting: deque[Step] = deque()

    def add(self, step: Step) -> None:
        """A step whose block has ended; one that was skipped or left by an exception has no numbers."""
        if not step.skipped:
            self._waiting.append(step)

    def settled(self, wait: bool = False) -> Iterator[tuple[int, dict[str, float]]]:
        """(number of the step, its numbers) of the steps that have a verdict now; with ``wait`` of all."""
        while self._waiting and (wait or self._waiting[0].settled):
            step = self._waiting.popleft()
            summary = step.summary
            if summary:
                self._verdicts[summary["verdict"]] += 1
                yield step.number, {name: summary[name] for name in COUNTS} | self._verdicts
