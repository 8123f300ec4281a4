"""Drop-in modules that record what the theory needs while a step is monitored, and are torch's own otherwise.

Each class derives from the torch.nn class of the same name, holds the same hyperparameters and the same state, and
returns bitwise the same outputs and gradients. Outside a step nothing is recorded.
"""

from __future__ import annotations

from .activation import (
    CELU,
    ELU,
    SELU,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    PReLU,
    ReLU,
    ReLU6,
    RReLU,
    Softshrink,
    Threshold,
)
from .container import Sequential
from .pooling import (
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    FractionalMaxPool2d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)

__all__ = [
    "CELU",
    "ELU",
    "SELU",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "FractionalMaxPool2d",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "PReLU",
    "RReLU",
    "ReLU",
    "ReLU6",
    "Sequential",
    "Softshrink",
    "Threshold",
]
