"""`adcert verify FILE...`: recheck saved certificates exactly, from the files alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ..certificate import Certificate
from ..errors import CertificateError
from ._console import console, error_console, print_json, styled


def verify(
    paths: Annotated[
        list[Path],
        typer.Argument(exists=True, dir_okay=False, readable=True, metavar="FILE", show_default=False),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Recheck saved certificates in exact arithmetic, without adcert's solver.

    Checks that every system listed in a file has the direction, or the proof of emptiness, that the file
    claims. It cannot check that the list is complete: that takes the network and the data. Exit status 1 if a
    file is not valid or its verdict is not "certified".
    """
    shown = track(paths, "verifying", console=error_console(), transient=True, disable=len(paths) < 2)
    results = [check(path) for path in shown]
    if as_json:
        print_json(results)
    else:
        _show(results)
    if not all(result["valid"] and result["verdict"] == "certified" for result in results):
        raise typer.Exit(1)


def check(path: Path) -> dict[str, Any]:
    """Load and verify one file: {"file", "valid", "error", "verdict", ...}; verdict None if invalid."""
    start = time.perf_counter()
    result: dict[str, Any] = {"file": str(path), "valid": False, "error": "", "verdict": None}
    try:
        certificate = Certificate.load(path)
        certificate.verify()
    except CertificateError as error:
        return result | {"error": str(error), "seconds": time.perf_counter() - start}
    return result | {
        "valid": True,
        "verdict": certificate.verdict.value,
        "reasons": list(certificate.reasons),
        "system": certificate.system,
        "claim": certificate.claim,
        "theorem": certificate.theorem,
        "blocks": len(certificate.blocks),
        "rows": sum(len(block.rows) for block in certificate.blocks),
        "assumptions": list(certificate.assumptions),
        "seconds": time.perf_counter() - start,
    }


def _show(results: list[dict[str, Any]]) -> None:
    table = Table("file", "check", "verdict", "system", "claim", "theorem", "blocks", "rows", "remark", box=SIMPLE_HEAD)
    for result in results:
        if not result["valid"]:
            table.add_row(result["file"], Text("invalid", "red"), *[""] * 6, Text(result["error"]))
            continue
        table.add_row(
            result["file"],
            Text("valid", "green"),
            styled(result["verdict"]),
            result["system"],
            result["claim"],
            result["theorem"],
            str(result["blocks"]),
            str(result["rows"]),
            Text("; ".join(result["reasons"])),
        )
    console().print(table)
