"""The names of torch.cuda that a CPU build of torch leaves empty, filled for a while."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import streams


def install(stack: ExitStack, random: torch.Generator) -> None:
    """Fill them until the stack unwinds. ``random``: the device's generator."""
    for name, value in (_queries() | _streams() | _random(random)).items():
        stack.enter_context(mock.patch.object(torch.cuda, name, value))
    stack.enter_context(mock.patch.object(torch.storage._StorageBase, "clone", _clone_storage))


def _queries() -> dict[str, Any]:
    properties = SimpleNamespace(
        name="emulated", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, warp_size=32
    )
    return {
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_device_name": lambda device=None: "emulated",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
    }


def _streams() -> dict[str, Any]:
    names = ("Stream", "Event", "current_stream", "default_stream", "set_stream", "synchronize")
    return {name: getattr(streams, name) for name in names}


def _random(random: torch.Generator) -> dict[str, Any]:
    """The device's random state is its own: whoever saves and restores the CPU's alone has missed it."""

    def get_state(device: object = "cuda") -> Tensor:
        return random.get_state()

    def set_state(state: Tensor, device: object = "cuda") -> None:
        random.set_state(state)

    def seed(number: int) -> None:
        random.manual_seed(number)

    return {
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        "get_rng_state_all": lambda: [get_state()],
        "set_rng_state_all": lambda states: set_state(*states),
        "manual_seed": seed,
        "manual_seed_all": seed,
        "initial_seed": random.initial_seed,
    }


_clone = torch.storage._StorageBase.clone


def _clone_storage(storage: Any) -> Any:
    """copy.deepcopy of a tensor clones its storage, for which a CPU build knows no device but its own."""
    if storage.device.type != "cuda":
        return _clone(storage)
    held = torch.empty(0, dtype=torch.uint8, device="cuda")
    return held.set_(storage).clone().untyped_storage()
