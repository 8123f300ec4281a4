"""What runs on the host in place of a device's own kernels, where a GPU gives another answer or torch has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adcert.ops import ACTIVATIONS

Kernel = Callable[..., Any]
NAMES = tuple(
    """relu activation prelu touches max_pool2d max_pool2d_backward max_pool2d_gather window_ties resolve_ties
    conv_patches distinct_rows opposite_rows fingerprints""".split()
)


def relu(x: Tensor) -> Tensor:
    """A GPU's ReLU sends -0.0 to +0.0."""
    return torch.relu(x).add_(0)


def relu_(x: Tensor) -> Tensor:
    return torch.relu_(x).add_(0)


def _sixth(x: Tensor, factor: Callable[[Tensor], Tensor | float]) -> Tensor:
    """A GPU multiplies with the float32 next to 1/6, whatever the dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    gate = factor(wide) * (wide + 3).clamp(0, 6)
    return (gate * float(torch.tensor(1 / 6, dtype=torch.float32))).to(x.dtype)


def hardsigmoid(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    result = _sixth(x, lambda _: 1.0)
    return result if out is None else out.resize_(x.shape).copy_(result)


def hardswish(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    result = _sixth(x, lambda wide: wide)
    return result if out is None else out.resize_(x.shape).copy_(result)


def hardsigmoid_(x: Tensor) -> Tensor:
    return x.copy_(hardsigmoid(x))


def hardswish_(x: Tensor) -> Tensor:
    return x.copy_(hardswish(x))


def cudnn_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, *saved = torch.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    if not training:
        saved = [weight.new_empty(0), weight.new_empty(0)]
    return output, *saved, torch.empty(0, dtype=torch.uint8)


def cudnn_batch_norm_backward(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    saved_mean: Tensor | None,
    saved_var: Tensor | None,
    eps: float,
    reserve: Tensor,
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, mean, var, saved_mean, saved_var, True, eps, [True, True, True]
    )
    return found


class Recording:
    """A recording operator of the CPU as CUDA may answer: lists in no order, their unused ends undefined."""

    def __init__(self, kernel: Kernel, lists: dict[int, int], counts: int, position: int) -> None:
        """``lists``: entry of the result -> entry of the counts that says how long it is; lists of one length go
        together. ``counts``: entry of the result. ``position`` of the argument ``capacity``.
        """
        self.kernel, self.lists, self.counts, self.position = kernel, lists, counts, position
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        room = args[self.position] if len(args) > self.position else -1
        if room < 0:
            raise RuntimeError("adcert's recording operators take a capacity >= 0 on CUDA")
        result = list(self.kernel(*args))
        for place in set(self.lists.values()):
            found = min(int(result[self.counts][place]), room)
            order = torch.randperm(found, generator=self.random)
            for entry in (entry for entry, count in self.lists.items() if count == place):
                if len(result[entry]):
                    result[entry] = _shuffled(result[entry], order)
        return tuple(result)


def _shuffled(entries: Tensor, order: Tensor) -> Tensor:
    mixed = torch.full_like(entries, torch.iinfo(entries.dtype).min + 1)
    mixed[: len(order)] = entries[order]
    return mixed


def _relu(*args: Any) -> tuple[Tensor, ...]:
    output, *seen = torch.ops.adcert.relu(*args)
    return output.add_(0), *seen


def _activation(x: Tensor, kind: int, *args: Any) -> tuple[Tensor, ...]:
    output, *seen = torch.ops.adcert.activation(x, kind, *args)
    others = {"hardsigmoid": hardsigmoid, "hardswish": hardswish}
    other = others.get(tuple(ACTIVATIONS)[kind])
    return output if other is None else other(x), *seen


def _max_pool2d(*args: Any) -> tuple[Tensor, ...]:
    output, *seen = torch.ops.adcert.max_pool2d(*args)
    return output.add_(0) if args[6] else output, *seen


def stand_ins() -> dict[str, Kernel]:
    """adcert's own CPU kernels, made to answer as CUDA's may."""
    ops = torch.ops.adcert
    return {name: getattr(ops, name) for name in NAMES} | {
        "relu": Recording(_relu, {1: 1}, 2, 1),
        "activation": Recording(_activation, {1: 1}, 2, 3),
        "prelu": Recording(ops.prelu, {1: 1}, 2, 2),
        "window_ties": Recording(ops.window_ties, {0: 1, 1: 1}, 2, 3),
        "touches": Recording(ops.touches, {0: 1}, 1, 2),
        "max_pool2d": Recording(_max_pool2d, {2: 0, 3: 0, 4: 1}, 5, 7),
    }


def emulated() -> dict[str, Kernel]:
    """The CUDA kernels themselves, compiled for the CPU."""
    from . import build  # its compiler run takes a while

    build.load()
    return {name: getattr(torch.ops.adcert_emulated, name) for name in NAMES}
