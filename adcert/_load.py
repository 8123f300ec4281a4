"""Finds and loads the compiled library; with :mod:`adcert.ops` the only file that knows it."""

from __future__ import annotations

from pathlib import Path

import torch

from adcert.errors import BuildError

REMEDY = "run `pip install --no-build-isolation -e .` in the source tree, with the torch you use installed"


def find(folder: Path) -> Path:
    """The compiled library in ``folder``.

    Raises:
        BuildError: if there is none, or more than one.

    >>> find(Path(__file__).parent).name.startswith("_C")
    True
    """
    found = sorted(p for p in folder.glob("_C.*") if p.suffix in {".so", ".pyd", ".dylib"})
    if len(found) == 1:
        return found[0]
    if not found:
        raise BuildError(f"adcert's compiled library _C.* is not in {folder}: {REMEDY}")
    names = ", ".join(p.name for p in found)
    raise BuildError(f"{folder} holds several compiled libraries ({names}): delete them all, then {REMEDY}")


def load(folder: Path | None = None) -> Path:
    """Loads the library, so that ``torch.ops.adcert`` is filled; does nothing the second time.

    Raises:
        BuildError: if it is missing or does not load into this torch.
    """
    path = find(Path(__file__).parent if folder is None else folder)
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        found = f"torch {torch.__version__} (adcert needs torch >= 2.10)"
        raise BuildError(f"{path.name} does not load into {found}: {error}; {REMEDY}") from error
    if not hasattr(torch.ops.adcert, "max_pool2d"):
        raise BuildError(f"{path.name} loaded, but registered no operators: {REMEDY}")
    return path
