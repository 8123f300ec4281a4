"""Tables of saved benchmarks, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

VERDICTS = "certified / uncertified / undecided steps"
Row = dict[str, Any]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, or nothing without lines.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = list(lines)
    if not lines:
        return ""
    rule = "|" + "---|" * len(header)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def verdicts(row: Row) -> str:
    """``certified / uncertified / undecided`` steps."""
    return " / ".join(str(row[key]) for key in ("certified", "uncertified", "undecided"))
