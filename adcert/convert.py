"""Swap the modules of an existing model for the recording ones, in place, and back."""

from __future__ import annotations

import torch

from . import nn as recording
from .errors import AdcertError

# Exact types only: a subclass may compute something else.
_TO: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.ReLU: recording.ReLU,
    torch.nn.MaxPool2d: recording.MaxPool2d,
    torch.nn.Sequential: recording.Sequential,
}
_BACK = {ours: theirs for theirs, ours in _TO.items()}


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Swap every ``nn.ReLU`` and ``nn.MaxPool2d`` (and the ``nn.Sequential`` that fuses them) for adcert's.

    The swap is in place and keeps everything users rely on: parameters are the same objects (optimisers stay
    valid), ``state_dict`` keys, hooks, hyperparameters, train/eval mode and ``isinstance`` relations stay, outputs
    and gradients are bitwise the same. Calling it again changes nothing.

    Args:
        model: any module. Modules of other classes, subclasses included, are left alone; what a step cannot account
            for is named in its reasons.

    Returns:
        The same model.

    Raises:
        AdcertError: if ``model`` is not a ``torch.nn.Module``.

    Example:
        >>> import torch, adcert
        >>> model = adcert.convert(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
        >>> type(model[1]).__module__
        'adcert.nn'
    """
    return _swap(model, _TO)


def unconvert(model: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`convert`: put torch's own modules back, in place.

    Example:
        >>> import torch, adcert
        >>> type(adcert.unconvert(adcert.convert(torch.nn.ReLU()))) is torch.nn.ReLU
        True
    """
    return _swap(model, _BACK)


def _swap(model: torch.nn.Module, table: dict[type[torch.nn.Module], type[torch.nn.Module]]) -> torch.nn.Module:
    if not isinstance(model, torch.nn.Module):
        raise AdcertError(f"convert needs a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        target = table.get(type(module))
        if target is not None and "forward" not in vars(module):  # an instance with a forward of its own stays
            module.__class__ = target
    return model
