"""Random arguments for the native operators: ties, both zeros, NaN, infinities, odd strides and odd geometries."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from emulation.kernels import hardsigmoid, hardswish
from torch import Tensor

from adcert.reference import ACTIVATIONS, DTYPES

NAN, INF = float("nan"), float("inf")
LAYOUTS = tuple(
    """contiguous channels_last some_channels shifted shifted_channels_last transposed sliced same_samples same_channels
    swapped 3d 3d_transposed every_second_channel""".split()
)

T = TypeVar("T")
Geometry = tuple[list[int], list[int], list[int], list[int], bool]  # kernel, stride, padding, dilation, ceil_mode


def bits(t: Tensor) -> Tensor:
    """The bits of a floating tensor; every NaN the same."""
    t = torch.where(t.isnan(), torch.full_like(t, NAN), t)
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


class Dice:
    """All that is random about a case; its seed tells the case."""

    def __init__(self, seed: int) -> None:
        self._numbers = random.Random(seed)
        self.tensors = torch.Generator().manual_seed(seed)

    def chance(self, share: float) -> bool:
        return self._numbers.random() < share

    def number(self, low: int, high: int) -> int:
        """Both ends are possible."""
        return self._numbers.randint(low, high)

    def one_of(self, choices: Sequence[T]) -> T:
        return self._numbers.choice(choices)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64; both ends are possible."""
        return torch.randint(low, high + 1, shape, generator=self.tensors)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.tensors)

    def which(self, share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.tensors) < share


def dtype(dice: Dice) -> torch.dtype:
    return dice.one_of(DTYPES)


def capacity(dice: Dice) -> int:
    """Often too small, sometimes ample."""
    return dice.one_of([0, 1, 2, 5, 33, 100_000, 100_000])


def image(dice: Dice, dtype: torch.dtype, *shape: int) -> Tensor:
    """Contiguous. Few values, so that there are ties and touches; in every second one NaN, infinities, tiny numbers."""
    x = dice.integers(-3, 2, *shape).to(dtype)
    x[x == -3] = -0.0
    if dice.chance(0.3):
        x = dice.integers(-(2 ** dice.number(1, 10)), 511, *shape).to(dtype)
    if x.numel() and dice.chance(0.5):
        flat = x.view(-1)
        for _ in range(dice.number(1, 6)):
            flat[dice.number(0, len(flat) - 1)] = dice.one_of([NAN, INF, -INF, -0.0, 65504.0, 1e-8])
        if dice.chance(0.2):
            x[dice.number(0, shape[0] - 1)] = dice.one_of([NAN, -INF, INF, 0.0])
    return x


def shifted(x: Tensor, by: int) -> Tensor:
    """The same, `by` elements behind the start of its memory: packs that kernels read do not fit its alignment."""
    return torch.cat([x.new_zeros(by), x.flatten()])[by:].view(x.shape)


def images(dice: Dice, dtype: torch.dtype, n: int, c: int, h: int, w: int, layouts: Sequence[str] = LAYOUTS) -> Tensor:
    """``[n, c, h, w]``, or ``[c, h, w]`` of a layout whose name begins with 3d."""

    def new(*shape: int) -> Tensor:
        return image(dice, dtype, *shape)

    last, first, by = torch.channels_last, dice.number(0, 3), dice.number(1, 9)
    return {
        "contiguous": lambda: new(n, c, h, w),
        "channels_last": lambda: new(n, c, h, w).contiguous(memory_format=last),
        "some_channels": lambda: new(n, c + 3, h, w).contiguous(memory_format=last)[:, first : first + c],
        "shifted": lambda: shifted(new(n, c, h, w), by),
        "shifted_channels_last": lambda: shifted(new(n, h, w, c), by).permute(0, 3, 1, 2),
        "transposed": lambda: new(n, c, w, h).transpose(2, 3),
        "sliced": lambda: new(n, c, h + 2, w * 2)[:, :, 1 : h + 1, ::2],
        "same_samples": lambda: new(1, c, h, w).expand(n, c, h, w),
        "same_channels": lambda: new(n, 1, h, w).expand(n, c, h, w),
        "swapped": lambda: new(c, n, h, w).transpose(0, 1),
        "3d": lambda: new(c, h, w),
        "3d_transposed": lambda: new(c, w, h).transpose(1, 2),
        "every_second_channel": lambda: new(n, 2 * c, h, w)[:, ::2],
    }[dice.one_of(layouts)]()


def geometry(dice: Dice) -> Geometry:
    """2 x 2 and 3 x 3 of stride 2, which have kernels of their own, huge ones, or anything; some fit no small image."""
    if dice.chance(0.1):
        kernels = [dice.number(8, 18), dice.number(8, 18)]
        return kernels, [dice.number(1, 3), 2], [kernel // 2 for kernel in kernels], [1, 1], dice.chance(0.3)
    if dice.chance(0.35):
        kernel, padding = dice.number(2, 3), dice.one_of([0, 0, 1])
        return [kernel] * 2, [2, 2], [padding] * 2, [1, 1], dice.chance(0.3)
    axes = []
    for _ in range(2):
        kernel = dice.one_of([1, 2, 3, 3, 4, 5, dice.number(1, 18)])
        dilation = dice.one_of([1, 1, 1, 2, 3, 5])
        padding = dice.number(0, (dilation * (kernel - 1) + 1) // 2) if dice.chance(0.5) else 0
        axes.append((kernel, dice.one_of([1, 2, 3, kernel, kernel + 1, dice.number(1, 25)]), padding, dilation))
    kernels, strides, paddings, dilations = map(list, zip(*axes, strict=True))
    return kernels, strides, paddings, dilations, dice.chance(0.4)


def activation(dice: Dice) -> tuple[str, tuple[float, ...]]:
    """A kind, or "prelu", and parameters: some round, to a neighbour or to zero, some are infinite."""
    kind = dice.one_of([*ACTIVATIONS, "prelu"])
    choices = [-2.0, -1.0, -0.7, -1e-30, -0.0, 0.0, 1e-30, 0.1, 1.0, 2.0, 6.0]
    if kind == "clamp" and dice.chance(0.5):
        return kind, dice.one_of([(dice.one_of(choices), INF), (-INF, dice.one_of(choices))])
    return kind, tuple(sorted(dice.one_of(choices) for _ in range(ACTIVATIONS.get(kind, 0))))


def slopes(dice: Dice, x: Tensor) -> Tensor:
    channels = x.shape[1] if dice.chance(0.7) else 1
    return dice.normal(channels).to(x.dtype) if dice.chance(0.8) else dice.integers(-1, 1, channels).to(x.dtype)


def on_cuda(x: Tensor, kind: str, parameters: Sequence[float], output: Tensor) -> Tensor:
    """An activation as torch computes it on CUDA, given the CPU's: some is rounded later, a sixth is a float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    if kind in ("hardtanh", "clamp"):
        low, high = (torch.tensor(p, dtype=wide.dtype) for p in parameters)
        raised = torch.where(wide < low, low, wide)
        return torch.where(high < raised, high, raised).to(x.dtype)
    if kind in ("hardsigmoid", "hardswish"):
        return {"hardsigmoid": hardsigmoid, "hardswish": hardswish}[kind](x)
    if kind == "threshold":
        at = torch.tensor(parameters[0], dtype=wide.dtype).to(x.dtype)
        return torch.where(x <= at, at, x)
    return output


class Pooling(NamedTuple):
    x: Tensor
    geometry: Geometry
    relu: bool


def pooling(dice: Dice) -> Pooling:
    """Often planes whose lines are whole packs."""
    if dice.chance(0.3):
        height, width = 2 * dice.number(1, 8), dice.one_of([2, 4, 8, 16, 24])
    else:
        height, width = dice.number(1, 22), dice.number(1, 22)
    x = images(dice, dtype(dice), dice.number(0, 3), dice.one_of([1, 2, 3, 4, 5, 8, 16, 17]), height, width)
    return Pooling(x, geometry(dice), dice.chance(0.5))


class Windows(NamedTuple):
    x: Tensor
    output: Tensor
    axes: list[Tensor]


def windows(dice: Dice) -> Windows:
    """Any tables, some places of them outside; every output the largest in its window, or now and then another."""
    floating, count = dtype(dice), dice.number(1, 3)
    planes = dice.number(0, 3)
    sizes = [dice.number(1, 7) for _ in range(count)]
    x = image(dice, floating, planes, *sizes)
    axes, grid = [], torch.zeros(planes, 1, dtype=torch.int64)
    valid = torch.ones(planes, 1, dtype=torch.bool)
    outputs: list[int] = []
    for size in sizes:
        own = dice.chance(0.3)
        outputs.append(dice.number(1, 4))
        order = torch.rand(planes if own else 1, outputs[-1], size + 2, generator=dice.tensors).argsort(-1)
        table = order[..., : dice.number(1, size + 1)] - 1  # distinct; -1 and size are outside
        axes.append(table if own else table[0])
        cells = table.expand(planes, *table.shape[1:]).flatten(1)
        valid = (valid[:, :, None] & ((cells >= 0) & (cells < size))[:, None]).flatten(1)
        grid = (grid[:, :, None] * size + cells.clamp(0, size - 1)[:, None]).flatten(1)
    values = torch.where(valid, x.flatten(1).gather(1, grid), torch.tensor(-INF, dtype=floating))
    shape = [n for pair in zip(outputs, (axis.shape[-1] for axis in axes), strict=True) for n in pair]
    output = values.reshape(planes, *shape).amax(tuple(range(2, 2 + 2 * count, 2)))
    if dice.chance(0.3):
        output = torch.where(dice.which(0.2, *output.shape), image(dice, floating, *output.shape), output)
    return Windows(x, output, axes)


def gradient(dice: Dice, like: Tensor) -> Tensor:
    """For an output of a pooling, sometimes for three batches of them at once; in some layout."""
    grad = (dice.normal(*like.shape) if dice.chance(0.4) else dice.integers(-9, 8, *like.shape)).to(like.dtype)
    if grad.dim() == 4 and dice.chance(0.2):
        return torch.cat([grad, -grad, grad + 1])
    if grad.dim() == 4 and dice.chance(0.3):
        return grad.contiguous(memory_format=torch.channels_last)
    return shifted(grad, 1) if dice.chance(0.2) else grad


class Matrices(NamedTuple):
    """rows: of any dtype. plus, minus: of one floating dtype. group: of each row of these."""

    rows: Tensor
    plus: Tensor
    minus: Tensor
    group: Tensor


def matrices(dice: Dice) -> Matrices:
    """Small integers; rows that repeat, and their opposites; now and then a NaN or an infinity."""
    count, width, shift, most = dice.number(0, 40), dice.number(0, 70), dice.number(0, 3), dice.number(1, 3)
    floating = dtype(dice)

    def matrix() -> Tensor:
        m = dice.integers(-most, most, count, width).to(floating)
        if count and dice.chance(0.5):
            m = m[dice.integers(0, count - 1, count)] * dice.integers(-1, 1, count, 1).to(floating)
        if m.numel() and dice.chance(0.1):
            m.view(-1)[dice.number(0, m.numel() - 1)] = dice.one_of([NAN, INF])
        return shifted(m, shift)

    plus, minus = matrix(), matrix()
    if dice.chance(0.4):
        minus = torch.zeros_like(minus)
    whole = dice.one_of([torch.int8, torch.uint8, torch.int64])
    rows = shifted(dice.integers(0, most, count, width).to(whole), shift) if dice.chance(0.3) else matrix()
    return Matrices(rows, plus, minus, dice.integers(0, dice.one_of([0, 1, 3]), count))


def convolution_axis(dice: Dice, size: int) -> tuple[int, ...]:
    """size, kernel, stride, padding, dilation, count; the padding may be wider than the kernel."""
    while True:
        kernel, stride, dilation = dice.number(1, 4), dice.one_of([1, 1, 2, 3]), dice.one_of([1, 1, 2])
        padding = dice.one_of([0, 0, 1, 2, kernel, kernel + dilation])
        count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if count > 0:
            return size, kernel, stride, padding, dilation, count


class Convolution(NamedTuple):
    x: Tensor
    units: Tensor
    stage: list[int]


def convolution(dice: Dice) -> Convolution:
    groups = dice.one_of([1, 1, 2, 3])
    channels, filters = groups * dice.number(1, 4), groups * dice.number(1, 3)
    size, batch = (dice.number(1, 9), dice.number(1, 3)), dice.number(1, 3)
    planes = [layout for layout in LAYOUTS if not layout.startswith("3d")]
    x = images(dice, dtype(dice), batch, channels, *size, planes)
    height, width = (convolution_axis(dice, extent) for extent in size)
    units = dice.integers(-1, batch * filters * height[5] * width[5] - 1, dice.number(0, 50))
    return Convolution(x, units, [5, 0, 0, -1, channels, groups, filters, *height, *width])
