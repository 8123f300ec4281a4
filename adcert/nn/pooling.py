"""Drop-in max poolings, whose ties are recorded while a step is monitored; AD selects the first maximiser of a window.

With ``return_indices`` the indices are returned as torch's own pooling does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adcert.choices import Window
from adcert.recorder import active


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


def _named(module: torch.nn.Module, forward: Any, input: Tensor) -> Any:
    recorder = active()
    if recorder is None:
        return forward(input)
    with recorder.naming(module, type(module).__name__):
        return forward(input)


class MaxPool2d(torch.nn.MaxPool2d):
    """``z_j = max_{i in I_j} a_i`` over two-dimensional windows; AD selects the first maximiser in row-major order.

    Inside a monitored step the argmax sets with two or more members are recorded.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.MaxPool2d(2)(torch.tensor([[[1.0, 3.0], [3.0, 2.0]]]))
        tensor([[[3.]]])
    """

    def forward(self, input: Tensor) -> Any:
        recorder = active()
        if recorder is None or self.return_indices:
            return _named(self, super().forward, input)
        name = recorder.name_of(self, "MaxPool2d")
        return recorder.max_pool2d(input, name, window_of(self), ceil_mode=self.ceil_mode)


class MaxPool1d(torch.nn.MaxPool1d):
    """``z_j = max_(i in I_j) a_i`` over one-dimensional windows.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.MaxPool1d(2)(torch.tensor([[1.0, 3.0, 3.0, 2.0]]))
        tensor([[3., 3.]])
    """

    def forward(self, input: Tensor) -> Any:
        return _named(self, super().forward, input)


class MaxPool3d(torch.nn.MaxPool3d):
    """``z_j = max_(i in I_j) a_i`` over three-dimensional windows.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.MaxPool3d(2)(torch.arange(8.0).reshape(1, 2, 2, 2))
        tensor([[[[7.]]]])
    """

    def forward(self, input: Tensor) -> Any:
        return _named(self, super().forward, input)


class AdaptiveMaxPool1d(torch.nn.AdaptiveMaxPool1d):
    """``z_j = max_(i in I_j) a_i`` over as many windows as ``output_size`` asks for.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.AdaptiveMaxPool1d(2)(torch.tensor([[1.0, 3.0, 3.0, 2.0]]))
        tensor([[3., 3.]])
    """

    def forward(self, input: Tensor) -> Any:
        return _named(self, super().forward, input)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """``z_j = max_(i in I_j) a_i`` over as many windows as ``output_size`` asks for.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.AdaptiveMaxPool2d(1)(torch.arange(4.0).reshape(1, 2, 2))
        tensor([[[3.]]])
    """

    def forward(self, input: Tensor) -> Any:
        return _named(self, super().forward, input)


class AdaptiveMaxPool3d(torch.nn.AdaptiveMaxPool3d):
    """``z_j = max_(i in I_j) a_i`` over as many windows as ``output_size`` asks for.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.AdaptiveMaxPool3d(1)(torch.arange(8.0).reshape(1, 2, 2, 2))
        tensor([[[[7.]]]])
    """

    def forward(self, input: Tensor) -> Any:
        return _named(self, super().forward, input)


class FractionalMaxPool2d(torch.nn.FractionalMaxPool2d):
    """``z_j = max_(i in I_j) a_i`` over windows at random places, which are constants of the step.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.FractionalMaxPool2d(2, output_size=1)(torch.arange(4.0).reshape(1, 2, 2))
        tensor([[[3.]]])
    """

    def forward(self, input: Tensor) -> Any:
        return _named(self, super().forward, input)
