"""Calls of kinked activations, recorded: which row of :mod:`adcert.activations` their arguments ask for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from . import activations
from .activations import Activation
from .calls import ALIKE, Arguments, Call, Handler
from .recorder import Recorder

Rho = Callable[[Arguments], Activation | None]  # None: no kink that the theory knows how to take


def activation(rho: Rho) -> Handler:
    """The handler of an activation: ``rho`` reads the arguments of a call."""

    def handle(recorder: Recorder, call: Call) -> Any:
        found = rho(call.given)
        if found is None or len(set(found.kinks)) < len(found.kinks):
            return NotImplemented
        return recorder.kinked(call.given["input"], found, call.name, call.run, None, call.inplace)

    ALIKE.add(handle)
    return handle


def relu(recorder: Recorder, call: Call) -> Any:
    """``relu``, in place or not."""
    return recorder.relu(call.given["input"], call.name, inplace=call.inplace)


def prelu(recorder: Recorder, call: Call) -> Any:
    """Under autocast it runs in autocast's dtype, and so do its record and :func:`ops.prelu`."""
    x, weight = call.given["input"], call.given["weight"]
    if torch.is_autocast_enabled(x.device.type):
        narrow = torch.get_autocast_dtype(x.device.type)
        with torch._C.DisableTorchFunction():
            x, weight = (t.to(narrow) if t.dtype != torch.float64 else t for t in (x, weight))
        call = replace(call, run=lambda: F.prelu(x, weight))
    shape = [1] * x.dim()
    if weight.numel() != 1:
        if x.dim() < 2 or x.shape[1] != weight.numel():
            return NotImplemented  # torch says why
        shape[1] = weight.numel()
    left = weight.reshape(shape)
    return recorder.kinked(x, activations.prelu(), call.name, call.run, left, False)


def rrelu(recorder: Recorder, call: Call) -> Any:
    """In training every unit has a slope of its own, which the node keeps."""
    given = call.given
    if not given["training"]:
        slope = (given["lower"] + given["upper"]) / 2
        return recorder.kinked(given["input"], activations.leaky_relu(slope), call.name, call.run, None, call.inplace)
    drawn = activations.rrelu()
    return recorder.kinked(given["input"], drawn, call.name, call.run, lambda node: node._saved_noise, call.inplace)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def clamp(given: Arguments) -> Activation | None:
    """``clamp``, where its bounds are numbers, the lower below the upper."""
    low, high = given.get("min"), given.get("max")
    bounds = [_number(low), _number(high)]
    if (low is None and high is None) or any(
        b is None and v is not None for b, v in zip(bounds, (low, high), strict=True)
    ):
        return None
    if None not in bounds and not bounds[0] < bounds[1]:  # type: ignore[operator]
        return None
    return activations.clamp(*bounds)


def hardtanh(given: Arguments) -> Activation | None:
    """``hardtanh``, where its bounds are numbers, the lower below the upper."""
    low, high = _number(given["min_val"]), _number(given["max_val"])
    return activations.hardtanh(low, high) if low is not None and high is not None and low < high else None


def elu(given: Arguments) -> Activation | None:
    """``elu``, where it has a kink: not at alpha 1."""
    return None if given["alpha"] == 1 else activations.elu(float(given["alpha"]))


def leaky(given: Arguments) -> Activation | None:
    """``leaky_relu``, where it has a kink: not at slope 1."""
    return None if given["negative_slope"] == 1 else activations.leaky_relu(float(given["negative_slope"]))


def threshold(given: Arguments) -> Activation | None:
    """``threshold``, where it is continuous."""
    at = _number(given["threshold"])
    return activations.threshold(at) if at is not None and given["value"] == at else None


def softshrink(given: Arguments) -> Activation | None:
    """``softshrink``, where it has kinks: not at lambda 0."""
    return activations.softshrink(float(given["lambd"])) if given["lambd"] > 0 else None


ALIKE.update((relu, prelu, rrelu))
