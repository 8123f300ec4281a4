"""The arguments with which a real step calls the native operators, taken on the CPU and movable to any device."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import adcert

Arguments = tuple[Any, ...]
WANTED = ("resolve_ties", "conv_patches", "distinct_rows", "opposite_rows")


class Calls(TorchDispatchMode):
    """Keeps the arguments of every call of the wanted operators on this thread."""

    def __init__(self, wanted: Iterable[str] = WANTED) -> None:
        super().__init__()
        self.wanted = frozenset(wanted)
        self.seen: dict[str, list[Arguments]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Arguments = (), kwargs: Any = None) -> Any:
        if func.namespace == "adcert" and func._opname in self.wanted:
            self.seen[func._opname].append(args)
        return func(*args, **(kwargs or {}))


def captured(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, list[Arguments]]:
    """The calls of one certified step, which runs on this thread alone."""
    model = adcert.convert(model)
    calls = Calls()
    step = adcert.Monitor(model, queue=0).step()
    with contextlib.ExitStack() as stack:
        step.__enter__()
        number = loss(model)
        stack.enter_context(calls)  # a mode that is active while the model runs would not be believed
        number.backward()  # type: ignore[no-untyped-call]
        step.__exit__(None, None, None)
    return dict(calls.seen)


def nbytes(arguments: Arguments) -> int:
    return sum(t.nbytes for t in tree_leaves(arguments) if isinstance(t, Tensor))


def largest(calls: Iterable[Arguments]) -> Arguments:
    return max(calls, key=nbytes)


def moved(arguments: Arguments, device: torch.device) -> Arguments:
    result: Arguments = tree_map(lambda t: t.detach().to(device) if isinstance(t, Tensor) else t, arguments)
    return result


def call(name: str, arguments: Arguments) -> Any:
    return getattr(torch.ops.adcert, name)(*arguments)
