"""The one pinned generator of random tiny networks with integer data, made of plain ``torch.nn`` modules.

Everything the tests claim about "random networks" is a claim about ``random_network(0)``,
``random_network(1)``, ... The data are small integers stored in float64, so every activation, gradient and
comparison is exact, and zeros and repeated values are frequent on purpose: ties and touches are the subject,
not an accident. ``tests/test_networks.py`` pins a digest of the first 50 networks; a change of the
distribution is a deliberate act that changes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

KINDS = ("mlp", "residual-mlp", "conv", "residual-conv")
MAX_PARAMETERS = 40
ATTEMPTS = 4

# Value tables: one draw is one uniform index, so a repeated entry is a heavier weight.
WEIGHTS = (-2, -1, -1, -1, 0, 0, 1, 1, 1, 2)
BIASES = (-2, -1, 0, 0, 0, 0, 1, 2)
OUTPUTS = (-2, -1, -1, 1, 1, 2)
INPUTS = (-2, -1, -1, 0, 0, 1, 1, 2)
LOSS = (-2, -1, -1, 1, 1, 2)

T = TypeVar("T")


class Residual(nn.Module):
    """``x + body(x)``: the skip connection of the residual kinds.

    >>> Residual(nn.ReLU())(torch.tensor([-1.0, 2.0])).tolist()
    [-1.0, 4.0]
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@dataclass(frozen=True)
class Network:
    """A tiny network, its minibatch and the linear loss ``sum(weights * model(inputs))``.

    ``inputs``: [B, features] or [B, C, H, W]; ``weights``: the shape of ``model(inputs)``; all integers.

    >>> random_network(0).closure().item().is_integer()
    True
    """

    seed: int
    kind: str
    model: nn.Module
    inputs: Tensor
    weights: Tensor

    def closure(self) -> Tensor:
        """The scalar loss, built afresh on every call (a new autograd graph each time)."""
        return (self.weights * self.model(self.inputs)).sum()

    def to(self, dtype: torch.dtype) -> Network:
        """An independent copy in another floating dtype; exact, the integers being small.

        >>> random_network(0).to(torch.float32).inputs.dtype
        torch.float32
        """
        return replace(
            self,
            model=copy.deepcopy(self.model).to(dtype),
            inputs=self.inputs.to(dtype),
            weights=self.weights.to(dtype),
        )

    def sample(self, index: int) -> Network:
        """The same network on one sample of the minibatch (batch size 1), sharing the model."""
        return replace(self, inputs=self.inputs[index : index + 1], weights=self.weights[index : index + 1])


class _Source:
    """Draws from one private generator; the global random state is neither read nor advanced."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """Uniform in {low, ..., high}."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def chance(self, numerator: int, denominator: int) -> bool:
        return self.integer(1, denominator) <= numerator

    def table(self, values: Sequence[int], shape: Sequence[int]) -> Tensor:
        index = torch.randint(0, len(values), tuple(shape), generator=self.generator)
        return torch.tensor(values, dtype=torch.float64)[index]


def random_network(seed: int) -> Network:
    """Network number ``seed`` of the pinned distribution.

    Kinds, with probabilities 3/10, 2/10, 4/10, 1/10; in each, a layer has a bias with a probability drawn
    once per network from {0, 0, 1/2, 1}:

    * ``mlp``: 1-4 inputs, 1-3 hidden ReLU layers of width 1-4, a linear layer with 1-2 outputs;
    * ``residual-mlp``: linear, 1-2 residual blocks ``x + body(x)`` (body: linear, ReLU, linear; or ReLU,
      linear; or linear, ReLU), each followed by a ReLU half of the time, linear; width 1-3;
    * ``conv``: 1-2 input channels of 3x3 to 5x5 pixels; 1-2 stages of convolution (kernel 1-3, stride 1,
      padding 0-1, groups 1 or 2, 1-4 output channels), then ReLU and max pooling in either order (kernel 2 or
      3, stride 1 or kernel, hence overlapping or not, padding 0-1), one time in six a second pooling directly
      after; then flatten, half of the time a hidden linear layer with ReLU, a linear layer with 1-2 outputs;
    * ``residual-conv``: convolution, ``x + body(x)`` (body: ReLU, convolution; or convolution, ReLU) of the
      same shape, ReLU, max pooling, flatten, linear. In the second form the ReLU output is consumed by a sum
      and only then by a window.

    Batch 1, 2, 3 with probabilities 1/5, 2/5, 2/5. Half of the time every later sample is the negation or the
    mirror image of the first, and then two times in three its loss weights are minus those of the first: f is
    a difference of nearly equal terms, where wrong gradients come from.
    Values are uniform draws from the tables above: weights and inputs in {-2..2} with P(0) = 1/5 and 1/4,
    biases 0 half of the time, loss weights and the last layer's weights in {-2, -1, 1, 2}. One layer in four
    has equal weight rows (ties and touches in groups of distinct parameters); one in four, and half of the
    first layers, one zero row and bias (a unit that touches at every sample and position, a map all of whose
    windows tie). Architectures with more than 40 parameters or an empty feature map are drawn again from the
    same stream; so is, up to three times, a network whose gradient vanishes at w and at a generic point near
    it. The model is in train mode, float64, every parameter trainable.

    >>> random_network(7).inputs.equal(random_network(7).inputs)
    True
    """
    source = _Source(seed)
    for _ in range(ATTEMPTS - 1):
        network = _draw(source, seed)
        if not _is_flat(source, network):
            return network
    return _draw(source, seed)


def _draw(source: _Source, seed: int) -> Network:
    kind = source.choice(("mlp",) * 3 + ("residual-mlp",) * 2 + ("conv",) * 4 + ("residual-conv",))
    while True:
        drawn = _BUILDERS[kind](source)
        if drawn is not None and sum(p.numel() for p in drawn[0].parameters()) <= MAX_PARAMETERS:
            break
    model, shape = drawn
    _fill(source, model)
    inputs, disguised = _minibatch(source, shape)
    with torch.no_grad():
        weights = source.table(LOSS, model(inputs).shape)
    if disguised and source.chance(2, 3):
        weights[1:] = -weights[:1]
    return Network(seed, kind, model, inputs, weights)


def _is_flat(source: _Source, network: Network) -> bool:
    """The gradient vanishes at w and at one generic point near w: most likely a dead network."""
    nearby = copy.deepcopy(network.model)
    with torch.no_grad():
        for parameter in nearby.parameters():
            noise = torch.rand(parameter.shape, generator=source.generator, dtype=torch.float64)
            parameter.add_(2.0**-10 * (noise - 0.5))
    return all(
        not bool(gradient.any())
        for candidate in (network, replace(network, model=nearby))
        for gradient in torch.autograd.grad(candidate.closure(), list(candidate.model.parameters()))
    )


def _fill(source: _Source, model: nn.Module) -> None:
    """Integer parameters layer by layer; rows repeated or zeroed; no zero in the last weight."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        for module in layers:
            module.weight.copy_(source.table(OUTPUTS if module is layers[-1] else WEIGHTS, module.weight.shape))
            if module.bias is not None:
                module.bias.copy_(source.table(BIASES, module.bias.shape))
            quirk = source.integer(0, 3)
            if quirk == 0:
                module.weight.copy_(module.weight[:1].expand_as(module.weight).clone())
            elif quirk == 1 or (quirk == 2 and module is layers[0]):
                row = source.integer(0, len(module.weight) - 1)
                module.weight[row] = 0
                if module.bias is not None:
                    module.bias[row] = 0


def _minibatch(source: _Source, shape: tuple[int, ...]) -> tuple[Tensor, bool]:
    """Inputs [B, *shape], and whether the later samples are the first one in disguise (half of the time)."""
    batch = source.choice((1, 2, 2, 3, 3))
    inputs = source.table(INPUTS, (batch, *shape))
    disguised = source.chance(1, 2)
    if disguised:
        for index in range(1, batch):
            inputs[index] = (-inputs[0], -inputs[0], inputs[0].flip(-1))[source.integer(0, 2)]
    return inputs, disguised


def _linear(source: _Source, inputs: int, outputs: int, bias_odds: int) -> nn.Module:
    bias = source.chance(bias_odds, 2)
    return skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=torch.float64)


def _convolution(
    source: _Source, inputs: int, outputs: int, kernel: int, padding: int, groups: int, bias_odds: int
) -> nn.Module:
    bias = source.chance(bias_odds, 2)
    return skip_init(nn.Conv2d, inputs, outputs, kernel, padding=padding, groups=groups, bias=bias, dtype=torch.float64)


_Drawn = tuple[nn.Module, tuple[int, ...]] | None


def _mlp(source: _Source) -> _Drawn:
    odds = source.choice((0, 0, 1, 2))
    features = source.choice((1, 1, 2, 2, 3, 4))
    modules: list[nn.Module] = []
    width = features
    for _ in range(source.choice((1, 2, 2, 3))):
        following = source.integer(1, 4)
        modules += [_linear(source, width, following, odds), nn.ReLU()]
        width = following
    modules.append(_linear(source, width, source.integer(1, 2), odds))
    return nn.Sequential(*modules), (features,)


def _residual_mlp(source: _Source) -> _Drawn:
    odds = source.choice((0, 0, 1, 2))
    features, width = source.choice((1, 2, 3)), source.choice((1, 2, 3))
    modules: list[nn.Module] = [_linear(source, features, width, odds)]
    if source.chance(1, 2):
        modules.append(nn.ReLU())
    for _ in range(source.integer(1, 2)):
        form = source.integer(0, 2)
        hidden = source.integer(1, 3)
        if form == 0:
            body = [_linear(source, width, hidden, odds), nn.ReLU(), _linear(source, hidden, width, odds)]
        elif form == 1:
            body = [nn.ReLU(), _linear(source, width, width, odds)]
        else:
            body = [_linear(source, width, width, odds), nn.ReLU()]
        modules.append(Residual(nn.Sequential(*body)))
        if source.chance(1, 2):
            modules.append(nn.ReLU())
    modules.append(_linear(source, width, source.integer(1, 2), odds))
    return nn.Sequential(*modules), (features,)


def _pooling(source: _Source) -> nn.MaxPool2d:
    kernel = source.choice((2, 2, 3))
    stride = source.choice((1, kernel))
    return nn.MaxPool2d(kernel, stride, padding=1 if source.chance(1, 4) else 0)


def _image(source: _Source) -> tuple[int, int, int]:
    return source.integer(1, 2), source.integer(3, 5), source.integer(3, 5)


def _output_shape(modules: Sequence[nn.Module], shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Shape [C, H, W] after the modules; None when a feature map becomes empty."""
    channels, height, width = shape
    for module in modules:
        if isinstance(module, nn.Conv2d):
            kernel, stride, padding = module.kernel_size[0], module.stride[0], int(module.padding[0])
            channels = module.out_channels
        elif isinstance(module, nn.MaxPool2d):
            kernel, stride, padding = int(module.kernel_size), int(module.stride), int(module.padding)
        else:
            continue
        if min(height, width) + 2 * padding < kernel:
            return None
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size in (height, width))
    return channels, height, width


def _stage(source: _Source, channels: int, odds: int) -> tuple[list[nn.Module], int]:
    """Convolution, then ReLU and pooling in either order, now and then a second pooling."""
    groups = 2 if channels % 2 == 0 and source.chance(1, 2) else 1
    outputs = groups * source.integer(1, 2)
    convolution = _convolution(source, channels, outputs, source.integer(1, 3), source.integer(0, 1), groups, odds)
    modules: list[nn.Module] = [nn.ReLU(), _pooling(source)]
    if source.chance(1, 3):
        modules.reverse()
    if source.chance(1, 6):
        modules.append(_pooling(source))
    return [convolution, *modules], outputs


def _conv(source: _Source) -> _Drawn:
    odds = source.choice((0, 0, 1, 2))
    shape = _image(source)
    channels = shape[0]
    modules: list[nn.Module] = []
    for _ in range(source.choice((1, 1, 2))):
        stage, channels = _stage(source, channels, odds)
        modules += stage
    return _head(source, modules, shape, odds)


def _residual_conv(source: _Source) -> _Drawn:
    odds = source.choice((0, 0, 1, 2))
    shape = _image(source)
    width = source.integer(1, 2)
    first = _convolution(source, shape[0], width, source.choice((1, 2)), source.integer(0, 1), 1, odds)
    kernel, padding = source.choice(((1, 0), (3, 1)))
    body = [nn.ReLU(), _convolution(source, width, width, kernel, padding, 1, odds)]
    if source.chance(1, 2):
        body.reverse()
    modules = [first, Residual(nn.Sequential(*body)), nn.ReLU(), _pooling(source)]
    return _head(source, modules, shape, odds)


def _head(source: _Source, modules: list[nn.Module], shape: tuple[int, ...], odds: int) -> _Drawn:
    """Flatten, half of the time one hidden ReLU layer, and the final linear layer."""
    final = _output_shape(modules, shape)
    if final is None:
        return None
    width = math.prod(final)
    head: list[nn.Module] = [nn.Flatten()]
    if source.chance(1, 2):
        hidden = source.integer(1, 3)
        head += [_linear(source, width, hidden, odds), nn.ReLU()]
        width = hidden
    head.append(_linear(source, width, source.integer(1, 2), odds))
    return nn.Sequential(*modules, *head), shape


_BUILDERS: dict[str, Callable[[_Source], _Drawn]] = {
    "mlp": _mlp,
    "residual-mlp": _residual_mlp,
    "conv": _conv,
    "residual-conv": _residual_conv,
}
