"""`adcert info`: versions, the compiled library, its operators and their devices."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from adcert._load import cuda_problem

from ._console import console, print_json

PACKAGES = (
    "adcert",
    "torch",
    "numpy",
    "scipy",
    "highspy",
    "python-flint",
    "scikit-learn",
    "scikit-image",
)


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show versions, the compiled library, its operators and the devices each one runs on."""
    found = collect()
    if as_json:
        print_json(found)
        return
    out = console()
    out.print(f"Python {found['python']}, {found['platform']}, {found['threads']} threads")
    table = Table("package", "version", box=SIMPLE_HEAD)
    for name, installed in found["packages"].items():
        table.add_row(name, installed or "not installed")
    out.print(table)
    for path in found["libraries"]:
        out.print(f"library: {path}", soft_wrap=True)
    if not found["libraries"]:
        out.print("library: not loaded")
    if found["cuda_problem"]:
        out.print(f"no CUDA kernels: {found['cuda_problem']}", markup=False, soft_wrap=True)
    out.print(f"CUDA devices: {', '.join(found['cuda_devices']) or 'none'}")
    table = Table("operator", "kernels", box=SIMPLE_HEAD)
    for name, devices in found["operators"].items():
        table.add_row(name, ", ".join(devices) or "none")
    out.print(table)


def collect() -> dict[str, Any]:
    """Everything `adcert info` shows, as plain data."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in PACKAGES},
        "libraries": sorted(str(path) for path in torch.ops.loaded_libraries if "adcert" in str(path)),
        "cuda_problem": cuda_problem(),
        "cuda_devices": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
        "operators": {name: _kernels(name) for name in _operators()},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _operators() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name for name in names if name.startswith("adcert::")})


def _kernels(name: str) -> list[str]:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [key for key in ("CPU", "CUDA", "Meta", "Autograd", "AutogradCPU") if has(name, key)]
