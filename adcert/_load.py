"""Finds and loads the compiled libraries; with :mod:`adcert.ops` the only file that knows them."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from adcert.errors import BuildError

REMEDY = "run `pip install --no-build-isolation -e .` in the source tree, with the torch you use installed"
CUDA_REMEDY = (
    "with the CUDA toolkit (nvcc 12.4 or later) installed, run "
    "`ADCERT_CUDA=1 pip install --no-build-isolation -e .` in the source tree"
)
HERE = Path(__file__).parent


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
    """Loads the CPU library, so that ``torch.ops.adcert`` is filled; does nothing the second time.

    Then the CUDA library, where this torch has CUDA. Without it everything on the CPU works: what is wrong is
    kept in :func:`cuda_problem` for the moment a CUDA tensor comes.

    Raises:
        BuildError: if the CPU library is missing or does not load into this torch.
    """
    folder = HERE if folder is None else folder
    path = find(folder)
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise BuildError(f"{_does_not_load(path, error)}; {REMEDY}") from error
    if not hasattr(torch.ops.adcert, "max_pool2d"):
        raise BuildError(f"{path.name} loaded, but registered no operators: {REMEDY}")
    cuda_problem(folder)
    return path


def cuda_library(folder: Path) -> Path | None:
    """The CUDA library in ``folder``, if it was built."""
    path = folder / "_cuda.so"
    return path if path.is_file() else None


def cuda_problem(folder: Path | None = None) -> str | None:
    """Why the operators do not take CUDA tensors, with the remedy; None if they do. Loads the CUDA library once."""
    return _load_cuda(HERE if folder is None else folder)


@functools.cache
def _load_cuda(folder: Path) -> str | None:
    # Not torch.cuda.is_available(): it starts the driver, and then no forked process could use CUDA.
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install one with CUDA"
    path = cuda_library(folder)
    if path is None:
        return f"adcert's CUDA library _cuda.so is not in {folder}: {CUDA_REMEDY}"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{_does_not_load(path, error)}; {CUDA_REMEDY}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("adcert::max_pool2d", "CUDA"):
        return f"{path.name} loaded, but registered no operators: {CUDA_REMEDY}"
    return None


def _does_not_load(path: Path, error: OSError) -> str:
    return f"{path.name} does not load into torch {torch.__version__} (adcert needs torch >= 2.10): {error}"
