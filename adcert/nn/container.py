"""``Sequential`` that runs an adjacent (ReLU, MaxPool2d) pair as one kernel in a monitored step."""

from __future__ import annotations

import torch
from torch import Tensor

from adcert.recorder import active

from .activation import ReLU
from .pooling import MaxPool2d, window_of


class Sequential(torch.nn.Sequential):
    """``torch.nn.Sequential`` that runs an adjacent (ReLU, MaxPool2d) pair as one fused kernel in a monitored step.

    Only the call of the pair is replaced, never the modules themselves. A hook on either module, or an in-place ReLU
    whose input somebody else may hold, keeps the pair apart.
    """

    def forward(self, input: Tensor) -> Tensor:
        recorder = active()
        if recorder is None:
            output: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
            return output
        modules = list(self)
        previous: torch.nn.Module | None = None
        position = 0
        while position < len(modules):
            module = modules[position]
            follower = modules[position + 1] if position + 1 < len(modules) else None
            if isinstance(follower, MaxPool2d) and fusible(previous, module, follower):
                name = recorder.name_of(follower, "MaxPool2d")
                window = window_of(follower)
                input = recorder.max_pool2d(input, name, window, ceil_mode=follower.ceil_mode, relu=True)
                previous = follower
                position += 2
            else:
                input = module(input)
                previous = module
                position += 1
        return input


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Modules that return memory nobody else holds: after them an in-place ReLU is invisible from outside.
_FRESH = (torch.nn.Conv2d, torch.nn.BatchNorm2d)


def fusible(previous: torch.nn.Module | None, first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """True if ``second(first(x))`` is ReLU then max pooling and nobody can look in between."""
    if type(first) is not ReLU or first.proxy is not None or type(second) is not MaxPool2d or second.return_indices:
        return False
    if first.inplace and (type(previous) not in _FRESH or _hooked(previous)):
        return False
    return not _hooked(first) and not _hooked(second)


def _hooked(module: torch.nn.Module | None) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)
