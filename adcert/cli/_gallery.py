"""`adcert gallery`: functions with a known answer, autodiff's value and adcert's verdict, measured now."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..gallery import ROWS, Measurement, measure
from ._console import console, error_console, print_json, styled


def gallery(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show functions on which autodiff is right or wrong, and what adcert says about each.

    Every gradient and every verdict is computed now. A gradient outside the Clarke subdifferential dC must
    not be certified; a function outside the theory must be undecided or refused, with the reason. Exit status
    1 if a verdict contradicts the theory.
    """
    measured = [measure(row) for row in ROWS]
    if as_json:
        print_json([_record(result) for result in measured])
    else:
        _show(measured)
    wrong = [result for result in measured if result.contradiction]
    for result in wrong:
        error_console().print(Text(f"row {result.row.number}: {result.contradiction}", "bold red"))
    if wrong:
        raise typer.Exit(1)


def _record(result: Measurement) -> dict[str, Any]:
    row = result.row
    return {
        "row": row.number,
        "function": row.text,
        "clarke": row.truth,
        "vertices": row.vertices,
        "autodiff": result.autodiff,
        "autodiff_in_torch_2.13": row.autodiff,
        "right": result.right,
        "verdict": result.verdict,
        "reasons": result.reasons,
        "allowed": sorted(row.allowed),
        "contradiction": result.contradiction,
    }


def _show(measured: list[Measurement]) -> None:
    table = Table(title="autodiff at points of nondifferentiability", box=SIMPLE_HEAD)
    for name in ("row", "function and point", "dC", "AD", "AD in dC", "verdict", "reason"):
        table.add_column(name, overflow="fold")
    for result in measured:
        table.add_row(
            result.row.number,
            Text(result.row.text),
            Text(result.row.truth),
            _vector(result.autodiff),
            Text("yes", "green") if result.right else Text("no", "red"),
            styled(result.verdict),
            Text("; ".join(result.reasons)),
        )
    console().print(table)


def _vector(values: tuple[float, ...]) -> str:
    entries = ", ".join(f"{value:.6g}" for value in values)
    return entries if len(values) == 1 else f"({entries})"
