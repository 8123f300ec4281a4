"""Builds and loads runtime.cpp, once for each version of it and of torch."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch

SOURCE = Path(__file__).with_name("runtime.cpp")
CACHE = Path(__file__).parents[2] / "build" / "emulation"

OPERATORS = ("host", "device", "adopt", "memory", "drain", "stream", "set_stream", "enable")
native = SimpleNamespace()  # the operators of runtime.cpp, once it is loaded


def load() -> None:
    """Load the runtime; does nothing the second time.

    It has to be there before the first backward pass of the process: the autograd engine starts its threads then, one
    for each device it knows.
    """
    if not vars(native):
        torch.ops.load_library(str(_built()))
        for name in OPERATORS:
            setattr(native, name, getattr(torch.ops.adcert_device, name).default)


def _built() -> Path:
    stamp = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    library = CACHE / f"runtime-{stamp}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")  # several test processes may get here at once
        home = Path(torch.__file__).parent
        include = [f"-I{home / 'include'}", f"-I{home / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
        links = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"]
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC"]
        command = [os.environ.get("CXX", "g++"), *flags, *include, str(SOURCE), "-o", str(partial), *links]
        subprocess.run(command, check=True)
        partial.replace(library)
    return library
