"""What `adcert train` shows: a live table on a terminal, plain lines elsewhere, and the final tables."""

from __future__ import annotations

from collections import Counter, deque
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ._console import styled
from ._loop import Outcome, StepResult

ROWS = 10
LINES = 20
HEADER = ("step", "loss", "acc", "ties", "touches", "rows", "verdict", "s/step", "analysis")


class Display:
    """Shows steps as they come; a context manager around the run.

    On a terminal: a progress bar and the last ten steps, redrawn in place. Elsewhere: about twenty lines for
    the whole run, and one for the first step with each new verdict.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._recent: deque[StepResult] = deque(maxlen=ROWS)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("training", total=None)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._verdicts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, outcome: Outcome, result: StepResult) -> None:
        """Show one more step."""
        self._verdicts[result.verdict] += 1
        self._recent.append(result)
        if self._live:
            self._progress.update(self._task, total=outcome.planned, completed=result.step)
            self._live.update(Group(self._progress, self._table()), refresh=True)
            return
        every = max(1, outcome.planned // LINES)
        first = self._verdicts[result.verdict] == 1
        if (
            first
            or result.step % every == 0
            or result.step == outcome.planned
            or result.test_accuracy is not None
        ):
            self._console.print(_line(outcome, result), soft_wrap=True)

    def _table(self) -> Table:
        counts = "  ".join(f"{count} {verdict}" for verdict, count in self._verdicts.items())
        table = Table(title=counts, box=SIMPLE_HEAD)
        for heading in HEADER:
            table.add_column(heading, no_wrap=True)
        for result in self._recent:
            table.add_row(*_cells(result)[:-3], styled(result.verdict), *_cells(result)[-2:])
        return table


def _cells(result: StepResult) -> tuple[str, ...]:
    summary = result.summary or {}
    counts = (f"{summary[name]:,}" if summary else "-" for name in ("ties", "touches", "rows"))
    share = f"{result.analysis / result.seconds:.1%}" if summary else "-"
    return (
        str(result.step),
        f"{result.loss:.4f}",
        f"{result.accuracy:.3f}",
        *counts,
        result.verdict,
        f"{result.seconds:.3f}",
        share,
    )


def _line(outcome: Outcome, result: StepResult) -> Text:
    cells = zip(HEADER[1:], _cells(result)[1:], strict=True)
    parts = [f"step {result.step}/{outcome.planned}", *(f"{name} {value}" for name, value in cells)]
    if result.test_accuracy is not None:
        parts.append(f"test accuracy {result.test_accuracy:.3f}")
    if result.summary and result.summary["reasons"]:
        parts.append(str(result.summary["reasons"][0]))
    return Text("  ".join(parts))


def show_outcome(console: Console, outcome: Outcome) -> None:
    """The final tables: the run, the verdicts, the layers, the reasons."""
    if not outcome.results:
        console.print("no step was left to train" if outcome.resumed else "no step was finished")
        return
    _show_run(console, outcome)
    if outcome.report is None:
        return
    _show_verdicts(console, outcome)
    _show_layers(console, outcome)
    for reason, count in outcome.report["reasons"].items():
        console.print(Text(f"{count} steps: {reason}"))


def _show_run(console: Console, outcome: Outcome) -> None:
    found = outcome.as_dict()
    table = Table("run", "value", title=f"{outcome.job.model} on {outcome.job.data}", box=SIMPLE_HEAD)
    table.add_row("steps", f"{found['steps']} of {outcome.planned}, batch {outcome.job.batch_size}")
    if outcome.resumed:
        table.add_row("resumed after step", str(outcome.resumed))
    table.add_row("device", outcome.job.device)
    table.add_row("precision", outcome.job.precision)
    table.add_row("loss, accuracy (last batch)", f"{found['loss']:.4f}, {found['accuracy']:.3f}")
    if found["test_accuracy"] is not None:
        table.add_row("test accuracy", f"{found['test_accuracy']:.3f}")
    table.add_row(
        "seconds",
        f"{found['seconds']['steps']:.1f} in all, median step {found['seconds']['median_step']:.3f}",
    )
    if outcome.report is not None:
        table.add_row("median share of analysis", f"{found['seconds']['median_analysis_share']:.1%}")
    table.add_row("weights", f"sha256 {outcome.digest[:16]}")
    console.print(table)


def _show_verdicts(console: Console, outcome: Outcome) -> None:
    report = outcome.report or {}
    system = "the paper's Algorithm 1" if outcome.job.strict else "Algorithm 1 sharpened (lexicographic)"
    table = Table("verdict", "steps", "share", title="verdicts", caption=system, box=SIMPLE_HEAD)
    for verdict in ("certified", "uncertified", "undecided"):
        share = f"{report[verdict] / report['sampled']:.1%}" if report["sampled"] else "-"
        table.add_row(styled(verdict), str(report[verdict]), share)
    for theorem, steps in report["theorems"].items():
        table.add_row(f"  by {theorem}", str(steps), "")
    if report["every"] > 1:
        table.add_row("not drawn", str(report["steps"] - report["sampled"]), "")
    if report.get("aborted"):
        table.add_row("aborted", str(report["aborted"]), "")
    console.print(table)


def _show_layers(console: Console, outcome: Outcome) -> None:
    table = Table(title="layers, sums over all steps", box=SIMPLE_HEAD)
    for heading in ("layer", "windows", "tied", "touches", "differing", "rows", "blocks", "discharged by"):
        table.add_column(heading, overflow="fold")
    for name, totals in outcome.layers.items():
        counts = totals.counts
        share = f" ({counts['ties'] / counts['windows']:.2%})" if counts["windows"] else ""
        steps = f" ({totals.steps_differing} steps)" if totals.steps_differing else ""
        rules = ", ".join(f"{rule} {count:,}" for rule, count in totals.exemptions.most_common())
        table.add_row(
            Text(name),
            f"{counts['windows']:,}",
            f"{counts['ties']:,}{share}",
            f"{counts['touches']:,}",
            f"{counts['differing']:,}{steps}",
            f"{counts['rows']:,}",
            f"{counts['blocks']:,}",
            Text(rules),
        )
    console.print(table)
    console.print(
        "tied: windows with two or more maximisers; differing: those not all explained as one function"
    )
