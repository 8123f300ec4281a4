"""What wide random networks are made of: activations, poolings, selections and layers as users write them.

A form is a line of user code: ``nn.ReLU6()`` (a module) or ``F.relu6(x)`` (a call inside ``forward``). ``{C}`` stands
for the channels of x, ``{n}`` for its spatial dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_NAMES: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}


@dataclass(frozen=True)
class Forms:
    """``kinks``: where the function has them; ``inplace``: forms that write to x; ``random``: reads random numbers."""

    kinks: tuple[float, ...]
    plain: tuple[str, ...]
    inplace: tuple[str, ...] = ()
    random: tuple[str, ...] = ()


class Call(nn.Module):
    """A line of code of one tensor x inside a forward.

    >>> Call("x.relu()")(torch.tensor([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code = code
        self.call: Callable[[Tensor], Tensor] = eval(f"lambda x: {code}", _NAMES)  # text of this file only

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)

    def extra_repr(self) -> str:
        return self.code


class First(nn.Module):
    """The values of a module that returns values and indices."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.body(x)[0]
        return values


class FunctionalPReLU(nn.Module):
    """``F.prelu`` with a parameter of one's own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.weight)


_NAMES["First"], _NAMES["FunctionalPReLU"] = First, FunctionalPReLU


def build(form: str, **names: int) -> nn.Module:
    """The module of a form.

    >>> build("nn.PReLU({C})", C=2).weight.numel()
    2
    """
    for name, value in names.items():
        form = form.replace(f"{{{name}}}", str(value))
    if form.startswith(("nn.", "First(", "FunctionalPReLU(")) and "(x" not in form:
        module: nn.Module = eval(form, _NAMES)
        return module
    return Call(form)


# An activation may also be smooth for some of its forms (elu(alpha=1), celu): those belong to the kind all the same.
ACTIVATIONS: dict[str, Forms] = {
    "relu": Forms(
        (0,),
        ("nn.ReLU()", "nn.ReLU()", "F.relu(x)", "torch.relu(x)", "x.relu()"),
        ("nn.ReLU(inplace=True)", "F.relu(x, inplace=True)", "F.relu_(x)", "torch.relu_(x)", "x.relu_()"),
    ),
    "relu6": Forms((0, 6), ("nn.ReLU6()", "F.relu6(x)"), ("nn.ReLU6(inplace=True)", "F.relu6(x, inplace=True)")),
    "leaky_relu": Forms(
        (0,),
        ("nn.LeakyReLU(0.5)", "nn.LeakyReLU(0.25)", "nn.LeakyReLU()", "F.leaky_relu(x, 0.5)", "F.leaky_relu(x, -0.5)",
         "nn.LeakyReLU(2.0)"),
        ("nn.LeakyReLU(0.5, inplace=True)", "F.leaky_relu(x, 0.25, inplace=True)", "F.leaky_relu_(x, 0.5)"),
    ),
    "prelu": Forms((0,), ("nn.PReLU()", "nn.PReLU({C})", "FunctionalPReLU({C})", "FunctionalPReLU(1)")),
    "rrelu": Forms(
        (0,),
        ("nn.RReLU(0.25, 0.75).eval()", "F.rrelu(x, 0.5, 0.5)", "F.rrelu(x)"),
        ("nn.RReLU(0.25, 0.75, inplace=True).eval()", "F.rrelu(x, 0.5, 0.5, inplace=True)"),
        ("nn.RReLU()", "F.rrelu(x, 0.25, 0.75, training=True)", "torch.rrelu(x, training=True)"),
    ),
    "hardtanh": Forms(
        (-1, 1),
        ("nn.Hardtanh()", "F.hardtanh(x)", "nn.Hardtanh(-1.0, 2.0)", "F.hardtanh(x, -2.0, 1.0)"),
        ("nn.Hardtanh(inplace=True)", "F.hardtanh_(x)", "F.hardtanh(x, inplace=True)"),
    ),
    "hardsigmoid": Forms(
        (-3, 3),
        ("nn.Hardsigmoid()", "F.hardsigmoid(x)"),
        ("nn.Hardsigmoid(inplace=True)", "F.hardsigmoid(x, inplace=True)"),
    ),
    "hardswish": Forms(
        (-3, 3), ("nn.Hardswish()", "F.hardswish(x)"), ("nn.Hardswish(inplace=True)", "F.hardswish(x, inplace=True)")
    ),
    "softshrink": Forms((-1, 1), ("nn.Softshrink(1.0)", "F.softshrink(x, 1.0)", "nn.Softshrink(0.5)")),
    "elu": Forms(
        (0,),
        ("nn.ELU(2.0)", "F.elu(x, 0.5)", "nn.ELU()", "F.elu(x, 2.0)"),
        ("nn.ELU(2.0, inplace=True)", "F.elu_(x, 0.5)", "F.elu(x, inplace=True)"),
    ),
    "selu": Forms((0,), ("nn.SELU()", "F.selu(x)", "torch.selu(x)"), ("nn.SELU(inplace=True)", "torch.selu_(x)")),
    "celu": Forms(
        (0,), ("nn.CELU(2.0)", "F.celu(x, 0.5)", "torch.celu(x)"), ("nn.CELU(inplace=True)", "F.celu_(x, 2.0)")
    ),
    "threshold": Forms(
        (1,),
        ("nn.Threshold(1.0, 1.0)", "F.threshold(x, 1.0, 1.0)", "nn.Threshold(0.0, 0.0)", "F.threshold(x, -1.0, -1.0)"),
        ("nn.Threshold(1.0, 1.0, inplace=True)", "F.threshold_(x, 1.0, 1.0)"),
    ),
    "abs": Forms((0,), ("x.abs()", "torch.abs(x)", "abs(x)", "torch.absolute(x)"), ("x.abs_()",)),
    "clamp": Forms(
        (0, 1),
        ("x.clamp(min=0)", "torch.clamp(x, 0, 1)", "x.clamp(-1, 1)", "x.clip(max=1)", "torch.clamp_min(x, 0)",
         "torch.clamp_max(x, 1)", "torch.clamp(x, -2.0)"),
        ("x.clamp_(min=0)", "torch.clamp_(x, 0, 1)", "x.clip_(-1, 1)", "x.clamp_min_(0)"),
    ),
}  # fmt: skip

# One-hot or not, each over the last dimension or the channels; the number of dimensions stays.
SELECTIONS: dict[str, tuple[str, ...]] = {
    "max_dim": (
        "torch.max(x, dim=-1, keepdim=True).values", "x.max(-1, keepdim=True)[0]", "x.max(1, keepdim=True).values",
        "torch.min(x, dim=-1, keepdim=True).values", "x.min(1, True)[0]",
    ),
    "amax": ("torch.amax(x, dim=-1, keepdim=True)", "x.amax(1, keepdim=True)", "x.amin(-1, keepdim=True)"),
    "maximum": (
        "torch.maximum(x, x.flip(-1))", "torch.max(x, x.roll(1, -1))", "torch.minimum(x, -x)",
        "torch.maximum(x, torch.zeros_like(x))", "x.minimum(x.flip(1))", "torch.fmax(x, x.roll(1, -1))",
    ),
    "median": ("x.median(dim=-1, keepdim=True).values", "torch.median(x, 1, keepdim=True)[0]"),
    "sort": (
        "torch.sort(x, dim=-1).values", "x.sort(dim=-1, descending=True)[0]", "x.sort(dim=1, stable=True)[0]",
        "torch.msort(x.transpose(0, -1)).transpose(0, -1)",
    ),
    "topk": (
        "torch.topk(x, 2, dim=-1).values", "x.topk(1, dim=-1)[0]", "x.topk(1, dim=1, largest=False).values",
        "torch.topk(x, 2, dim=-1, sorted=False).values",
    ),
    "kthvalue": ("x.kthvalue(1, dim=-1, keepdim=True).values", "torch.kthvalue(x, 2, dim=-1, keepdim=True)[0]"),
    "cummax": ("torch.cummax(x, dim=-1).values", "x.cummin(-1)[0]"),
}  # fmt: skip

_GEOMETRIES = ("2", "2, 1", "3, 1, 1", "2, padding=1", "2, ceil_mode=True", "2, 1, dilation=2", "3, 2")


def _pooling(n: int) -> tuple[str, ...]:
    modules = tuple(f"nn.MaxPool{n}d({geometry})" for geometry in _GEOMETRIES)
    calls = tuple(f"F.max_pool{n}d(x, {geometry})" for geometry in _GEOMETRIES)
    return (*modules, *calls, f"torch.max_pool{n}d(x, 2, 1)")


POOLINGS: dict[str, tuple[str, ...]] = {
    **{f"max_pool{n}d": _pooling(n) for n in (1, 2, 3)},
    **{
        f"adaptive_max_pool{n}d": (
            f"nn.AdaptiveMaxPool{n}d(1)", f"nn.AdaptiveMaxPool{n}d(2)", f"F.adaptive_max_pool{n}d(x, 2)",
            f"F.adaptive_max_pool{n}d(x, 2, return_indices=True)[0]", f"F.adaptive_max_pool{n}d(x, 1)",
        )
        for n in (1, 2, 3)
    },
    **{
        f"fractional_max_pool{n}d": (
            f"nn.FractionalMaxPool{n}d(2, output_size=2)", f"F.fractional_max_pool{n}d(x, 2, output_size=2)",
            f"nn.FractionalMaxPool{n}d(2, output_ratio=0.7)",
        )
        for n in (2, 3)
    },
    "return_indices": (
        "First(nn.MaxPool{n}d(2, 1, return_indices=True))", "F.max_pool{n}d(x, 2, return_indices=True)[0]",
        "F.max_pool{n}d_with_indices(x, 2, 1)[0]",
    ),
}  # fmt: skip

# Parameter-free mixing: no layer of its own, so the rows of what follows reach further down.
MIXINGS = ("x - x.flip(-1)", "x + x.roll(1, -1)", "x - x.roll(1, 1)", "2 * x - x.flip(1)", "-x", "x.flip(-1) * 0.5")


def spatial(shape: Sequence[int]) -> int:
    """Spatial dimensions of a sample [C, *S]."""
    return len(shape) - 1
