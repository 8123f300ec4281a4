"""Loads runtime.cpp, and its operators under short names."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from .build import build, target

OPERATORS = ("host", "device", "adopt", "memory", "drain", "stream", "set_stream", "enable")
native = SimpleNamespace()  # the operators, once they are loaded


def load() -> None:
    """Load the runtime; does nothing the second time.

    It has to be there before the first backward pass of the process: the autograd engine starts its threads then, one
    for each device it knows.
    """
    if not vars(native):
        build("runtime")
        torch.ops.load_library(str(target("runtime")))
        for name in OPERATORS:
            setattr(native, name, getattr(torch.ops.adcert_device, name).default)
