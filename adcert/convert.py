"""Swap the modules of an existing model for the recording ones, in place, and back."""

from __future__ import annotations

import torch

from . import nn as recording
from .errors import AdcertError

# Exact types only: a subclass may compute something else.
_TO: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, name): getattr(recording, name) for name in recording.__all__
}
_BACK = {ours: theirs for theirs, ours in _TO.items()}


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Swap every kinked activation and max pooling (and the ``nn.Sequential`` that fuses them) for adcert's own.

    The swap is in place and keeps everything users rely on: parameters are the same objects (optimisers stay
    valid), ``state_dict`` keys, hooks, hyperparameters, train/eval mode and ``isinstance`` relations stay, outputs
    and gradients are bitwise the same. Calling it again changes nothing.

    Args:
        model: any module. Modules of other classes, subclasses included, are left alone; what a step cannot account
            for is named in its reasons.

    Returns:
        The same model.

    Raises:
        AdcertError: if ``model`` is not a ``torch.nn.Module``, or holds a discontinuous activation (``nn.Hardshrink``,
            ``nn.Threshold`` with another value than its threshold): no theorem covers those. Nothing is swapped then.

    Example:
        >>> import torch, adcert
        >>> model = adcert.convert(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
        >>> type(model[1]).__module__
        'adcert.nn.activation'
    """
    if isinstance(model, torch.nn.Module):
        for name, module in model.named_modules():
            _refuse_discontinuous(name, module)
    return _swap(model, _TO)


def _refuse_discontinuous(name: str, module: torch.nn.Module) -> None:
    jump = ""
    if isinstance(module, torch.nn.Hardshrink) and module.lambd != 0:
        jump = f"jumps by {module.lambd} at {module.lambd} and at {-module.lambd}; Softshrink is continuous"
    if isinstance(module, torch.nn.Threshold) and module.value != module.threshold:
        jump = f"jumps at {module.threshold}; it is continuous only if value equals threshold"
    if jump:
        raise AdcertError(
            f"{name or 'the model'} is a {type(module).__name__}, which {jump}: a discontinuous function has no Clarke "
            "subdifferential, so no gradient of this model can be certified"
        )


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
