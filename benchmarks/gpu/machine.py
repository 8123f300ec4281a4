"""What the figures were measured on: the GPU and the software, never the name of a machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch


def said(*command: str) -> str:
    """The output of a command, or nothing if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def nvcc() -> str:
    """The release of the CUDA compiler, e.g. ``13.0.88``; empty without one."""
    found = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")
    match = re.search(r"V(\d+\.\d+\.\d+)", said(found, "--version"))
    return match[1] if match else ""


def slug(name: str) -> str:
    """
    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(dry: bool = False) -> dict[str, Any]:
    """GPU, driver, versions and the precision settings the steps run with, which are torch's own."""
    software = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": nvcc(),
        "python": platform.python_version(),
        "triton": _version("triton"),
        "cores": os.cpu_count(),
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "tf32_convolutions": bool(torch.backends.cudnn.allow_tf32),
        "tf32_matrices": bool(torch.backends.cuda.matmul.allow_tf32),
    }
    if dry:
        return {"gpu": "dry", **software}
    about = torch.cuda.get_device_properties(0)
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return {
        "gpu": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "l2_mib": round(getattr(about, "L2_cache_size", 0) / 2**20),
        "driver": driver,
        **software,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
