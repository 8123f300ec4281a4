"""What every command shares: the two consoles, JSON output, and errors without a traceback."""

from __future__ import annotations

import json
import math
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from ..errors import AdcertError

STYLES = {"certified": "green", "uncertified": "red", "undecided": "yellow", "refused": "yellow"}


class Group(TyperGroup):
    """Turns an AdcertError of any command into one line on standard error and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AdcertError as error:
            error_console().print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
            raise typer.Exit(2) from error


def console() -> Console:
    """Standard output: results. A file or pipe, which has no width, gets lines of up to 140 characters."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=140)


def error_console() -> Console:
    """Standard error: progress and errors."""
    return Console(stderr=True, highlight=False)


def styled(verdict: str) -> Text:
    """The verdict in its colour."""
    return Text(verdict, style=STYLES.get(verdict, ""))


def print_json(value: Any) -> None:
    """One JSON document on standard output; NaN and infinities become strings, which JSON can hold."""
    typer.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
