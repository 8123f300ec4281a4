"""The offset network of docs/theory.md, section 1.4, written out: an oracle for gradients in mixed precision.

A forward pass under autocast leaves the value of every call behind. A second one computes in float64 and adds to each
call the constant that makes it equal to the recorded value, casts included; autograd differentiates that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from core_helpers import Seen, look
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Op = Callable[[Tensor], Tensor]
Network = Callable[[nn.Module, Op, Op], Tensor]  # (model, relu, pool) -> output
#: What CPU autocast narrows, as far as the tests use it.
NARROWED = frozenset(
    {F.conv2d, F.linear, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm}
)
CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.to})


class _Record(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.requires_grad:
            self.values.append(result.detach().clone())
        return result


class _Offset(TorchFunctionMode):
    """``constants``: what is added to each value; found from the recorded ``values`` the first time, then kept."""

    def __init__(self, values: list[Tensor], narrow: torch.dtype, constants: list[Tensor]) -> None:
        super().__init__()
        self.values = iter(values)
        self.narrow = narrow
        self.constants = constants
        self.known = iter(constants[:])
        self.fresh = not constants

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in NARROWED:
            args = tuple(self._narrowed(a) for a in args)
            given = {name: self._narrowed(a) for name, a in given.items()}
        result = args[0] * 1 if func in CASTS else func(*args, **given)
        if isinstance(result, Tensor) and result.requires_grad:
            result = self._moved(result, next(self.values).to(torch.float64))
        return result

    def _narrowed(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return self._moved(value, value.detach().to(self.narrow).to(torch.float64))

    def _moved(self, value: Tensor, target: Tensor) -> Tensor:
        if self.fresh:
            self.constants.append((target - value).detach())
        return value + (self.constants[-1] if self.fresh else next(self.known))


class Offset:
    """The offset network of a forward pass under autocast, in float64 on a copy of the model.

    ``inputs``: of every ReLU and pooling in order, of the latest evaluation.
    """

    def __init__(self, network: Network, model: nn.Module, narrow: torch.dtype) -> None:
        self.network, self.narrow = network, narrow
        self.model = copy.deepcopy(model).to(torch.float64)
        self.inputs: list[Tensor] = []
        self._constants: list[Tensor] = []
        record = _Record()
        with record, torch.autocast("cpu", narrow):
            network(copy.deepcopy(model), torch.relu, pool)
        self._values = record.values
        self()

    def __call__(self) -> Tensor:
        self.inputs = []
        with _Offset(self._values, self.narrow, self._constants):
            return self.network(self.model, self._kept(torch.relu), self._kept(pool))

    def _kept(self, operation: Op) -> Op:
        def apply(y: Tensor) -> Tensor:
            self.inputs.append(y)
            return operation(y)

        return apply


def pool(y: Tensor) -> Tensor:
    """The max pooling of the tests' networks."""
    return F.max_pool2d(y, 2)


def recorded(network: Network, model: nn.Module, narrow: torch.dtype) -> Seen:
    """The same forward pass under autocast, recorded."""
    with torch.autocast("cpu", narrow):
        return look(lambda probe: network(model, probe.relu, probe.max_pool2d), model)
