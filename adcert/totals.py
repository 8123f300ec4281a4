"""What the steps of a run add up to."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from .errors import AdcertError
from .state import count, counts, damaged, fields

COUNTS = ("windows", "ties", "touches", "differing", "rows")
VERDICTS = ("certified", "uncertified", "undecided")
_STATE = ("steps", "sampled", "aborted", "counts", "seconds", "reasons", "theorems", "layers")


@dataclass(frozen=True)
class Report:
    """Totals of a run; also the last line of its log.

    ``steps``: all that began; ``sampled``: those of them that ``Monitor(every=...)`` drew, which have a verdict or are
    ``aborted`` (left by an exception). Everything else is about these. ``estimates``: unbiased ones of the verdicts and
    counts of all steps, ``every`` times those of the sampled ones.

    ``reasons``: reason -> number of steps that gave it; ``theorems``: theorem -> certified steps that rest on it.
    ``layers``: per layer the counts, and in how many steps S_j \\ T_j was nonempty somewhere.
    """

    steps: int = 0
    sampled: int = 0
    every: int = 1
    certified: int = 0
    uncertified: int = 0
    undecided: int = 0
    aborted: int = 0
    windows: int = 0
    ties: int = 0
    touches: int = 0
    differing: int = 0
    rows: int = 0
    estimates: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    theorems: dict[str, int] = field(default_factory=dict)
    layers: dict[str, dict[str, int]] = field(default_factory=dict)


class Totals:
    """Adds up the steps of a run. The training thread counts steps, the worker adds their summaries."""

    def __init__(self) -> None:
        self.steps = self.sampled = self.aborted = 0
        self._counts: Counter[str] = Counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._reasons: Counter[str] = Counter()
        self._theorems: Counter[str] = Counter()
        self._layers: dict[str, Counter[str]] = {}

    def add(self, summary: dict[str, Any]) -> None:
        """One step's line of the log."""
        self._counts[summary["verdict"]] += 1
        self._counts.update({key: summary[key] for key in COUNTS})
        for stage, seconds in summary["seconds"].items():
            self._seconds[stage] += seconds
        self._reasons.update(summary["reasons"])
        self._theorems.update([summary["theorem"]] if summary["theorem"] else [])
        for layer in summary["layers"]:
            total = self._layers.setdefault(layer["name"], Counter())
            total.update({key: layer[key] for key in COUNTS} | {"steps_differing": int(layer["differing"] > 0)})

    def report(self, every: int) -> Report:
        """So far; the worker must be idle."""
        counts = {name: int(self._counts[name]) for name in (*VERDICTS, *COUNTS)}
        return Report(
            steps=self.steps,
            sampled=self.sampled,
            every=every,
            aborted=self.aborted,
            **counts,
            estimates={name: every * count for name, count in counts.items()},
            seconds=dict(self._seconds),
            reasons=dict(self._reasons),
            theorems=dict(self._theorems),
            layers={name: dict(total) for name, total in self._layers.items()},
        )

    def state(self) -> dict[str, Any]:
        """As plain numbers; the worker must be idle.

        Raises:
            AdcertError: if a step is running.
        """
        if self._verdicts() + self.aborted != self.sampled:
            raise AdcertError("a step is running on another thread: take the monitor's state between two steps")
        return {
            "steps": self.steps,
            "sampled": self.sampled,
            "aborted": self.aborted,
            "counts": {name: int(self._counts[name]) for name in (*VERDICTS, *COUNTS)},
            "seconds": dict(self._seconds),
            "reasons": dict(self._reasons),
            "theorems": dict(self._theorems),
            "layers": {name: dict(total) for name, total in self._layers.items()},
        }

    @classmethod
    def restored(cls, state: Any) -> Totals:
        """Of a :meth:`state`.

        Raises:
            AdcertError: for anything that is no such state, or whose numbers contradict each other.
        """
        found = fields(state, _STATE, "totals")
        self = cls()
        self.steps, self.sampled, self.aborted = (count(found[name], name) for name in _STATE[:3])
        self._counts.update(fields(counts(found["counts"], "counts"), (*VERDICTS, *COUNTS), "counts"))
        self._reasons.update(counts(found["reasons"], "reasons"))
        self._theorems.update(counts(found["theorems"], "theorems"))
        if not isinstance(found["layers"], dict) or not isinstance(found["seconds"], dict):
            raise damaged("layers and seconds should be given by name")
        for name, layer in found["layers"].items():
            parts = counts(layer, f"layer {name!r}")
            self._layers[str(name)] = Counter(fields(parts, (*COUNTS, "steps_differing"), f"layer {name!r}"))
        for name, seconds in found["seconds"].items():
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
                raise damaged(f"seconds of {name!r} are {seconds!r}")
            self._seconds[str(name)] = float(seconds)
        self._check()
        return self

    def _verdicts(self) -> int:
        return sum(self._counts[name] for name in VERDICTS)

    def _check(self) -> None:
        verdicts = self._verdicts()
        if verdicts + self.aborted != self.sampled or self.sampled > self.steps:
            raise damaged(f"{self.sampled} of {self.steps} steps, {verdicts} verdicts and {self.aborted} aborted steps")
        if sum(self._theorems.values()) > self._counts["certified"]:
            raise damaged("more theorems than certified steps")
        for name in COUNTS:
            if sum(layer[name] for layer in self._layers.values()) != self._counts[name]:
                raise damaged(f"the {name} of the layers do not add up")
