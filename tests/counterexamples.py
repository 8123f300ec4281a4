"""The counterexamples of docs/theory.md, section 11: functions whose true gradients near a point are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Vector = tuple[float, ...]


class Function(nn.Module):
    """A scalar function of one parameter ``w`` (float64), or of what ``build`` holds; it is its own closure."""

    def __init__(self, formula: Callable[[nn.Module], Tensor], point: Vector | None, build: nn.Module | None) -> None:
        super().__init__()
        self.formula = formula
        if point is not None:
            self.w = nn.Parameter(torch.tensor(point, dtype=torch.float64))
        if build is not None:
            self.net = build

    def forward(self) -> Tensor:
        return self.formula(self).sum()


@dataclass(frozen=True)
class Example:
    """``near``: every gradient at a smooth point near the point; ``autodiff``: torch 2.13's at the point.

    ``covered``: adcert records everything in it, so the verdict is "uncertified", not merely "not certified".
    """

    number: str
    near: tuple[Vector, ...]
    autodiff: Vector
    formula: Callable[..., Tensor]
    point: Vector | None = (0.0,)
    build: Callable[[], nn.Module] | None = None
    covered: bool = False

    def module(self) -> Function:
        torch.manual_seed(0)
        return Function(self.formula, self.point, None if self.build is None else self.build())


def pool(*values: Tensor) -> Tensor:
    """Maximum by max pooling: one-hot, the first maximiser."""
    row = torch.stack([value.reshape(()) for value in values])
    return F.max_pool2d(row.view(1, 1, 1, -1), (1, len(values))).reshape(())


def identity(x: Tensor) -> Tensor:
    """relu(x) - relu(-x), which is x."""
    return F.relu(x) - F.relu(-x)


def split(x: Tensor) -> Tensor:
    """max(x, 0) with an even split at 0."""
    return torch.maximum(x, torch.zeros_like(x))


def _lemma7(f: Function) -> Tensor:
    u, b = f.w[0], f.w[1]
    return pool(u + b, b) - pool(b - u, b)


def _tied_layers(f: Function) -> Tensor:
    a = F.relu(f.w)
    return a - F.relu(a - f.w)


def _patches() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 1, (1, 2), (1, 2), dtype=torch.float64), nn.ReLU(), nn.MaxPool2d((1, 2)))
    for leaf, value in zip(net.parameters(), (1, 0), strict=True):
        nn.init.constant_(leaf, value)
    return net


def _swapped(f: Function) -> Tensor:
    images = torch.tensor([[1, 2, 2, 1], [2, 1, 1, 2]], dtype=torch.float64).view(2, 1, 1, 4)
    first, second = f.net(images).flatten()
    return first - second


def _skip(f: Function) -> Tensor:
    a, b, zero = F.relu(f.w), F.relu(-f.w), torch.zeros((), dtype=torch.float64)
    return pool(a - 1, zero) + pool(b - 1, zero) + a - b


def _tied_units(f: Function) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    return pool(F.relu(f.w), zero) - pool(F.relu(-f.w), zero)


def _two_layers() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)])


def _deepest(f: Function) -> Tensor:
    return identity(f.net[1] - F.relu(f.net[0] + 1) + 1)


def _recurrent_bias(f: Function) -> Tensor:
    b = f.w
    return F.relu(b - 2 * F.relu(b + 1) + 2) - F.relu(b)


def _kth(f: Function) -> Tensor:
    return (f.w * torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)).kthvalue(2).values


def _pool_minus_amax(f: Function) -> Tensor:
    return pool(f.w[0], f.w[1]) - f.w.amax()


def _linear(bias: bool = False) -> nn.Module:
    net = nn.Linear(1, 1, bias=bias, dtype=torch.float64)
    for leaf in net.parameters():
        nn.init.zeros_(leaf)
    return net


def _across_groups(f: Function) -> Tensor:
    return pool(f.w[0], f.w[1]) - pool(f.w[1], f.w[0])


def _leaky(f: Function) -> Tensor:
    z = F.leaky_relu(f.w, 0.5)
    return pool(-2 * z, -3 * z)


def opposite_samples(f: Function) -> Tensor:
    first, second = F.relu(f.net(torch.tensor([[1.0], [-1.0]], dtype=torch.float64))).flatten()
    return first - second


def normalised(affine: bool = False) -> nn.Module:
    """Linear layer with bias, then batch normalisation in training; eps makes 1 / sigma = 1 at the point."""
    linear, norm = nn.Linear(2, 1, dtype=torch.float64), nn.BatchNorm1d(1, eps=0.5, affine=affine, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0]]))
        linear.bias.zero_()
    return nn.Sequential(linear, norm)


def removed_bias(f: Function) -> Tensor:
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    z = F.relu(f.net(x)).flatten()
    return z[2] - z[3]


def frozen_bias(trainable: bool = False) -> nn.Module:
    net = _linear(bias=True)
    net.bias.requires_grad_(trainable)
    return net


def _near_equal(f: Function) -> Tensor:
    w, more = f.w, f.w * (1 + 2.0**-30)
    return pool(w, more) - pool(-w, -more)


def _padded() -> nn.Module:
    """A 1x1 convolution with bias, then one with zero padding: equal receptive fields, other functions."""
    one = nn.Conv2d(1, 1, 1, dtype=torch.float64)
    two = nn.Conv2d(1, 2, (1, 3), padding=(0, 1), bias=False, dtype=torch.float64)
    with torch.no_grad():
        one.weight.fill_(1)
        one.bias.zero_()
        two.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 1, 1, 3))
    return nn.Sequential(one, two, nn.MaxPool2d((1, 3)))


def _padding(f: Function) -> Tensor:
    up, down = f.net(torch.zeros(1, 1, 1, 3, dtype=torch.float64)).flatten()
    return up - down


EXAMPLES = (
    Example("X1", ((1,),), (0,), lambda f: F.relu(f.w) - F.relu(-f.w), covered=True),
    Example("X2", ((1 / 6,),), (0,), lambda f: F.hardsigmoid(3 + f.w) + F.hardsigmoid(f.w - 3)),
    Example("X3", ((1, 0),), (2, 0), _lemma7, (0.0, 0.0), covered=True),
    Example("X4", ((1,),), (0,), _tied_layers),
    Example("X5", ((0, 0, 0),), (-1, 1, 0), _swapped, None, _patches, covered=True),
    Example("X6", ((0.5,), (1,)), (0,), lambda f: F.relu(identity(f.w) - f.w / 2) - F.relu(-f.w)),
    Example("X7", ((1,),), (0,), _skip, covered=True),
    Example("X8", ((1,),), (0,), _tied_units, covered=True),
    Example("X9", ((-1,),), (0,), lambda f: F.relu(pool(f.w, -f.w)) - 2 * F.relu(f.w), covered=True),
    Example("X10", ((-1, 1),), (0, 0), _deepest, None, _two_layers, covered=True),
    Example("X11", ((-1,),), (0,), _recurrent_bias),
    Example("X12", ((0,),), (-0.25,), lambda f: split(split(f.w)) - split(f.w)),
    Example("X13", ((0,),), (1,), _kth),
    Example("X14", ((0, 0),), (0.5, -0.5), _pool_minus_amax, (1.0, 1.0)),
    Example("X15", ((1,),), (0,), opposite_samples, None, _linear, covered=True),
    Example("X16", ((0, 1, 0),), (0, 0, 0), removed_bias, None, normalised),
    Example("X17", ((1,),), (0,), opposite_samples, None, frozen_bias, covered=True),
    Example("X18", ((0,),), (-1,), lambda f: 2 * F.relu(f.w) - f.w - f.w.abs()),
    Example("X19", ((2 + 2.0**-30,),), (2,), _near_equal, covered=True),
    Example("X24", ((0, 0),), (1, -1), _across_groups, (0.0, 0.0), covered=True),
    Example("X25", ((-2,), (-1.5,)), (-1,), _leaky),
    Example("X22", ((0, 5, 0, 0, 0, 0, 0, 0),), (0, 4, 0, 0, 0, 0, 0, 0), _padding, None, _padded, covered=True),
)
