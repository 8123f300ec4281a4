"""What a real device refuses or waits for: tensors on two devices, answers the host has to know."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload


class Call:
    """One call of an operator: its arguments by name, its tensors."""

    def __init__(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.op = op
        self.name: str = op.overloadpacket.__name__
        names, self._writes, tensors = signature(op)
        if self.name not in _ARITHMETIC:
            args = tuple(_tensor(value) if name in tensors else value for name, value in zip(names, args, strict=False))
        self.args, self.kwargs = args, kwargs
        self.given = dict(zip(names, self.args, strict=False)) | self.kwargs
        self.tensors = [(name, tensor) for name, value in self.given.items() for tensor in tensors_in(value)]

    def written(self, name: str) -> bool:
        if name in ("running_mean", "running_var"):  # no schema says so
            return bool(self.given.get("training", self.given.get("train", False)))
        return name in self._writes


@functools.cache
def signature(op: OpOverload) -> tuple[tuple[str, ...], frozenset[str], frozenset[str]]:
    """Names of the arguments, of those that are written and of those that are tensors."""
    arguments = op._schema.arguments
    writes = (a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    tensors = (a.name for a in arguments if str(a.type) in ("Tensor", "Optional[Tensor]"))
    return tuple(a.name for a in arguments), frozenset(writes), frozenset(tensors)


# C++ makes a tensor of the number in `x % 3`; on its way here it became a number again, and only these take one.
_ARITHMETIC = frozenset("add add_ sub sub_ rsub mul mul_ div div_ floor_divide floor_divide_ true_divide".split())


def _tensor(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, (bool, int, float)) else value


def tensors_in(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


# Arguments that may lie on the CPU though the others do not.
_ANYWHERE = frozenset(
    {
        ("index", "indices"),
        ("_unsafe_index", "indices"),
        ("_index_put_impl_", "indices"),
        ("resolve_ties", "windows"),
        ("resolve_ties", "members"),
        ("conv_patches", "units"),
    }
)
# The same, for tensors without dimensions only. Pointwise operators take such tensors as numbers.
_NUMBERS = frozenset({("_index_put_impl_", "values"), ("fill_", "value"), ("masked_fill_", "value")})


def check_devices(call: Call) -> None:
    """Raises:
    RuntimeError: tensors on the CPU where torch wants all of them on the GPU.
    """
    if all(tensor.is_cuda for _, tensor in call.tensors):
        return
    pointwise = torch.Tag.pointwise in call.op.tags
    for name, tensor in call.tensors:
        if tensor.is_cuda or (call.name, name) in _ANYWHERE:
            continue
        number = tensor.dim() == 0 and not call.written(name)
        if not (number and (pointwise or (call.name, name) in _NUMBERS)):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(when checking argument {name} of {call.op})"
            )


def _masks(call: Call) -> bool:
    """Boolean masks among the indices: torch looks for their true entries."""
    return any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(call.given["indices"]))


def _from_host(call: Call) -> bool:
    return any(not tensor.is_cuda for _, tensor in call.tensors)


def _index_put(call: Call) -> bool:
    if call.given.get("accumulate"):
        return _masks(call) or _from_host(call)
    indices, values = list(tensors_in(call.given["indices"])), call.given["values"]
    if values.numel() == 1 and not values.is_cuda and len(indices) == 1 and indices[0].dtype == torch.bool:
        return False  # torch fills under the mask
    return _masks(call) or _from_host(call)


def _isin(call: Call) -> bool:
    """torch compares with few elements one by one; for more it sorts, and drops duplicates first."""
    elements, among = call.given.get("elements"), call.given.get("test_elements")
    if not isinstance(elements, Tensor) or not isinstance(among, Tensor) or call.given.get("assume_unique"):
        return False
    return among.numel() >= 10 * elements.numel() ** 0.145


def _number_on_device(argument: str) -> Callable[[Call], bool]:
    return lambda call: isinstance(value := call.given.get(argument), Tensor) and value.is_cuda


def _always(call: Call) -> bool:
    return True


_WAITS: dict[str, Callable[[Call], bool]] = dict.fromkeys(
    """_local_scalar_dense nonzero masked_select equal bincount _unique _unique2 unique_dim unique_consecutive
    unique_dim_consecutive _linalg_check_errors multinomial histc _histogramdd_bin_edges
    resolve_ties distinct_rows opposite_rows""".split(),
    _always,
)
_WAITS |= {
    "_index_put_impl_": _index_put,
    "repeat_interleave": lambda call: call.given.get("output_size") is None,
    "masked_fill_": _number_on_device("value"),
    "index_fill_": _number_on_device("value"),
    "conv_patches": lambda call: call.given["units"].is_cuda,
    "isin": _isin,
}


def waits(call: Call) -> bool:
    """True if the host has to wait for the device before this operator is through."""
    rule = _WAITS.get(call.name)
    return rule is not None and rule(call)
