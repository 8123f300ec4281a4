"""Tiny networks over every kind of operation, with small integers everywhere, so that ties and touches abound."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOUBLE = torch.float64


@dataclass(frozen=True)
class Case:
    """A loss of a model: ``closure()``; the random state it needs is set by itself."""

    name: str
    model: nn.Module
    function: Callable[[], Tensor]
    seed: int

    def closure(self) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.function()


class Then(nn.Module):
    """Modules in order, then a function of their result."""

    def __init__(self, function: Callable[[Tensor], Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.body, self.function = nn.Sequential(*modules), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.body(x))


class Recurrent(nn.Module):
    """One ReLU layer used at every step of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(2, 2, nonlinearity="relu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Autoencoder(nn.Module):
    """A decoder that is the encoder's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.encoder(x)), self.encoder.weight.t())


class Branches(nn.Module):
    """Convolutions of two sizes side by side, concatenated, pooled, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], dim=1)
        return F.max_pool2d(both, 2) + F.avg_pool2d(x, 2)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.25),
    "prelu": lambda: nn.PReLU(init=0.25),
    "prelu per channel": lambda: nn.PReLU(2, init=0.5),
    "rrelu eval": lambda: nn.RReLU(0.25, 0.75).eval(),
    "hardtanh": nn.Hardtanh,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "softshrink": lambda: nn.Softshrink(1.0),
    "threshold": lambda: nn.Threshold(1.0, 1.0),
    "abs": lambda: Then(torch.abs),
    "clamp": lambda: Then(lambda x: x.clamp(-1, 2)),
    "elu, kinked": lambda: nn.ELU(0.5),
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": lambda: nn.CELU(0.5),
}
POOLS2: dict[str, Callable[[], nn.Module]] = {
    "max": lambda: nn.MaxPool2d(2),
    "max, overlapping and padded": lambda: nn.MaxPool2d(3, 2, 1),
    "max, dilated": lambda: nn.MaxPool2d(2, dilation=2),
    "max, ceil mode": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "adaptive": lambda: nn.AdaptiveMaxPool2d(2),
    "adaptive, overlapping": lambda: nn.AdaptiveMaxPool2d((2, 3)),
    "fractional": lambda: nn.FractionalMaxPool2d(2, output_size=2),
    "twice": lambda: nn.Sequential(nn.MaxPool2d(2, 1), nn.MaxPool2d(2, 1)),
}
SELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max of a dim": lambda y: y.max(1)[0],
    "amax": lambda y: y.amax(1),
    "max of all": lambda y: y.max(),
    "min of a dim": lambda y: y.min(1)[0],
    "maximum": lambda y: torch.maximum(y[:, :1], y[:, 1:]),
    "minimum": lambda y: torch.minimum(y[:, :1], y[:, 1:]),
    "median": lambda y: y.median(1)[0],
    "sort": lambda y: y.sort(1)[0] * torch.tensor([1.0, -2.0, 1.0], dtype=DOUBLE),
    "topk": lambda y: y.topk(2, 1)[0],
    "kthvalue": lambda y: y.kthvalue(2, 1)[0],
    "cummax": lambda y: y.cummax(1)[0],
    "products": lambda y: (y[:, :1] * y[:, 1:]).relu(),
    "batch norm": lambda y: F.batch_norm(y, None, None, training=True).relu(),
    "layer norm": lambda y: F.layer_norm(y, (3,)).relu(),
    "softmax": lambda y: torch.softmax(y, 1).amax(1),
}


def chain(*modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(nn.Sequential(*modules))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(1, 2, 2, stride=2), nn.ReLU(), nn.MaxPool2d(2, 1)),
        (1, 2, 2),
    ),
    "depthwise": (chain(nn.Conv2d(2, 2, 2, groups=2), nn.ReLU(), nn.MaxPool2d(2)), (2, 3, 3)),
    "dilated": (chain(nn.Conv2d(1, 1, 2, dilation=2), nn.ReLU(), nn.MaxPool2d(2)), (1, 4, 4)),
    "circular": (
        chain(nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.MaxPool1d(2)),
        (1, 4),
    ),
    "batch norm, eval": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2, eps=0.0).eval(), nn.ReLU(), nn.MaxPool2d(2)
        ),
        (1, 3, 3),
    ),
    "3d": (chain(nn.Conv3d(1, 1, 2), nn.ReLU(), nn.MaxPool3d(2)), (1, 3, 3, 3)),
    "adaptive 1d": (chain(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.AdaptiveMaxPool1d(2)), (1, 4)),
    "adaptive 3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 1, 2), nn.ReLU(), nn.AdaptiveMaxPool3d((1, 2, 1))),
        (1, 3, 3, 3),
    ),
    "recurrent": (Recurrent, (2, 2)),
    "tied": (Autoencoder, (3,)),
    "branches": (Branches, (1, 4, 4)),
    "dropout": (chain(nn.Linear(2, 3), nn.Dropout(0.5), nn.ReLU(), nn.Linear(3, 1)), (2,)),
}


def names() -> list[str]:
    return [
        *(f"activation: {name}" for name in ACTIVATIONS),
        *(f"pool: {name}" for name in POOLS2),
        *(f"selection: {name}" for name in SELECTIONS),
        *(f"layer: {name}" for name in LAYERS),
    ]


def case(name: str, seed: int) -> Case:
    """Case number ``seed`` of a kind: weights and inputs from {-1, 0, 1, 2}, several samples, a linear loss."""
    kind, what = name.split(": ")
    generator = torch.Generator().manual_seed(seed)
    shape: tuple[int, ...]
    if kind == "activation":
        model: nn.Module = nn.Sequential(nn.Linear(2, 2), ACTIVATIONS[what](), nn.Linear(2, 1))
        shape = (2,)
    elif kind == "pool":
        model = nn.Sequential(nn.Conv2d(1, 1, 2), nn.ReLU(), POOLS2[what]())
        shape = (1, 4, 4)
    elif kind == "selection":
        model, shape = Then(SELECTIONS[what], nn.Linear(2, 3)), (2,)
    else:
        build, shape = LAYERS[what]
        model = build()
    model = model.to(DOUBLE)
    with torch.no_grad():
        for module in model.modules():
            for parameter in () if isinstance(module, nn.PReLU) else module.parameters(recurse=False):
                parameter.copy_(torch.randint(-1, 3, parameter.shape, generator=generator))
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                module.running_var.fill_(4.0)
    inputs = torch.randint(-1, 2, (2, *shape), generator=generator).to(DOUBLE)
    with torch.no_grad():
        output = model(inputs)
    weights = torch.randint(0, 2, output.shape, generator=generator).to(DOUBLE) * 2 - 1
    return Case(name, model, lambda: (weights * model(inputs)).sum(), seed)
