"""The command line. Exit status: 0, 1 (something is not certified or not valid), 2 (usage or set-up)."""

from __future__ import annotations

import typer

from ._analyze import analyze_command
from ._console import Group
from ._gallery import gallery
from ._info import info
from ._train import train
from ._verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="adcert",
    cls=Group,
    help="Certify that the gradients automatic differentiation returns are Clarke subgradients.",
    epilog="Exit status: 0; 1 if something is not certified or not valid; 2 on wrong usage or set-up.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, gallery, verify, info):
    app.command()(command)
app.command("analyze")(analyze_command)


def main() -> None:
    """Entry point of the script `adcert` and of `python -m adcert`."""
    app(prog_name="adcert")
