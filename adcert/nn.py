"""Drop-in modules that record what the theory needs while a step is monitored, and are torch's own otherwise.

Each class derives from the torch.nn class of the same name, holds the same hyperparameters and the same (empty)
state, and returns bitwise the same outputs and gradients. Outside a step nothing is recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import records
from .choices import Window


def pair(value: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    """``k`` or ``(kh, kw)`` as ``(kh, kw)``."""
    if isinstance(value, int):
        return value, value
    if len(value) == 1:
        return int(value[0]), int(value[0])
    height, width = value
    return int(height), int(width)


def window_of(module: torch.nn.MaxPool2d) -> Window:
    """The window geometry of a ``MaxPool2d``."""
    kernel = pair(module.kernel_size)
    stride = pair(module.stride) if module.stride is not None else kernel
    return Window(kernel, stride, pair(module.padding), pair(module.dilation))


class ReLU(torch.nn.ReLU):
    """``relu(x) = max(x, 0)``, elementwise; AD's proxy at the kink 0 is 0 (torch's choice).

    Inside a monitored step the units with ``x == 0`` are recorded.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.ReLU()(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0., 0., 2.])
    """

    def forward(self, input: Tensor) -> Tensor:
        recorder = records.active()
        if recorder is None:
            return F.relu(input, inplace=self.inplace)
        return recorder.relu(input, recorder.name_of(self, "ReLU"), inplace=self.inplace)


class MaxPool2d(torch.nn.MaxPool2d):
    """``z_j = max_{i in I_j} a_i`` over two-dimensional windows; AD selects the first maximiser in row-major order.

    Inside a monitored step the argmax sets with two or more members are recorded. ``return_indices=True`` is
    not supported: ``convert`` leaves such a module alone.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.MaxPool2d(2)(torch.tensor([[[1.0, 3.0], [3.0, 2.0]]]))
        tensor([[[3.]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        recorder = records.active()
        if recorder is None or self.return_indices:
            output: Tensor = super().forward(input)
            return output
        name = recorder.name_of(self, "MaxPool2d")
        return recorder.max_pool2d(input, name, window_of(self), ceil_mode=self.ceil_mode)


class Sequential(torch.nn.Sequential):
    """``torch.nn.Sequential`` that runs an adjacent (ReLU, MaxPool2d) pair as one fused kernel in a monitored step.

    Only the call of the pair is replaced, never the modules themselves. A hook on either module, or an in-place ReLU
    whose input somebody else may hold, keeps the pair apart.
    """

    def forward(self, input: Tensor) -> Tensor:
        recorder = records.active()
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
    if type(first) is not ReLU or type(second) is not MaxPool2d or second.return_indices:
        return False
    if first.inplace and (type(previous) not in _FRESH or _hooked(previous)):
        return False
    return not _hooked(first) and not _hooked(second)


def _hooked(module: torch.nn.Module | None) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)
