"""`adcert analyze`: what holds for a network whatever its values are, and what is left for each step."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..errors import AdcertError
from ..models import MODELS, build
from ..theorems import HEADER, Analysis, analyze, describe, reasons_of
from ._console import console, print_json


def analyze_command(
    model: Annotated[
        str,
        typer.Argument(
            help=f"One of {', '.join(MODELS)}, or MODULE:FACTORY, a function of your own without arguments that "
            "returns the model, or (model, example input).",
            show_default=False,
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a step: Theorem 1 asks for one.")] = 128,
    channels: Annotated[int, typer.Option(min=1, help="Channels of the images.")] = 3,
    size: Annotated[int, typer.Option(min=1, help="Pixels of the images a side.")] = 32,
    classes: Annotated[int, typer.Option(min=1, help="Classes of a built-in network.")] = 10,
    shape: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Shape of one sample, instead of CHANNELS,SIZE,SIZE."),
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--eval", help="In evaluation mode; without it as in training.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with status 1 unless a theorem holds at every step.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Tell which theorems of Park, Chun and Lee hold for a network, from its architecture alone.

    Per nonsmooth operation: the bias structure, autodiff's proxies measured in the running torch, lambda with
    proxy = lambda D- + (1 - lambda) D+, the theorem that decides it, and what each training step has to check.
    A network under Theorem 1, 4 or 6 is certified at every step without any system to solve. Exit status 1 if no
    step can be certified.
    """
    network, example = _network(model, classes, channels, size)
    network.train(not evaluate)
    if example is None:
        example = torch.zeros(batch_size, *_shape(shape, channels, size))
    found = analyze(network, example)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)
    if found.problems or (check and not found.theorem):
        raise typer.Exit(1)


def _shape(text: str | None, channels: int, size: int) -> tuple[int, ...]:
    if text is None:
        return channels, size, size
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise AdcertError(f"--shape takes whole numbers with commas between them, got {text!r}") from error
    if min(numbers, default=1) < 1:
        raise AdcertError(f"--shape takes positive numbers, got {text!r}")
    return numbers


def _network(name: str, classes: int, channels: int, size: int) -> tuple[torch.nn.Module, Any]:
    """The model, and its example input if the factory gives one."""
    if ":" not in name:
        return build(name, classes, channels, size), None
    made = _factory(name)()
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module):
        raise AdcertError(f"{name} must return a torch.nn.Module or (module, example), not {type(made).__name__}")
    return model, example


def _factory(name: str) -> Any:
    """The function MODULE:FACTORY; modules of the current directory are found, as with `python -m`."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise AdcertError(f"{name} cannot be imported: {error}") from error
    if not callable(factory):
        raise AdcertError(f"{name} is not a function")
    return factory


def _show(found: Analysis) -> None:
    out = console()
    out.print(Text(found.conclusion, "green" if found.theorem else "red" if found.problems else "yellow"))
    table = Table(box=SIMPLE_HEAD)
    for heading in HEADER:
        table.add_column(heading, overflow="fold")
    for operation in found.operations:
        table.add_row(*(Text(cell) for cell in operation.cells()))
    if found.operations:
        out.print(table)
    for theorem in found.theorems:
        out.print(Text(describe(theorem), "dim" if theorem.failing else "bold"))
        for reason in reasons_of(theorem):
            out.print(Text(f"  fails: {reason}"))
    for assumption in found.assumptions:
        out.print(Text(f"assumed: {assumption}"))
