"""The tensors among the arguments of a call, and the version of their memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_ATOMS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size})


def list_tensors(*values: Any) -> list[Tensor]:
    """Every tensor inside nested lists, tuples, dicts and slices."""
    found: list[Tensor] = []
    gather(values, found)
    return found


def gather(values: Iterable[Any], found: list[Tensor]) -> None:
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:  # nearly all values, told quickly
            found.append(value)
        elif kind in _ATOMS:
            continue
        elif isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            gather(value, found)
        elif isinstance(value, dict):
            gather(value.values(), found)
        elif isinstance(value, slice):
            gather((value.start, value.stop, value.step), found)


def base_of(tensor: Tensor) -> Tensor:
    """The tensor this one is a view of, else itself; they share one version."""
    base = tensor._base
    return tensor if base is None else base


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not count, and are not written to outside their mode."""
    return -1 if tensor.is_inference() else tensor._version
