"""Kernels against torch's, and against the time a copy of the bytes takes that must move.

A case's bytes are the least that the work has to read and write: the input once, the output, the one-byte offsets and
routes, the lists of what was found; backward, the gradient and the routes read, the input's gradient written. ``share``
is the part of the measured copy bandwidth at which they move, ``torch_share`` the same bytes over torch's time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adcert import ops
from gpu.session import Part, Row
from gpu.timing import Call, Device

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GEOMETRIES = {"k2": (2, 2, 0), "k3": (3, 2, 1)}  # kernel, stride, padding
SHAPES = {"vgg11": (128, 64, 32, 32), "resnet50 stem": (256, 64, 112, 112)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RATES = (0.02, 0.0, 0.2)  # the usual one first, should the time end
TIED = 125.0  # above everything else


@dataclass(frozen=True)
class Case:
    """The input of one measurement; ``rate``: of windows with a tie, or of units at the kink."""

    shape: str
    dtype: torch.dtype
    layout: str = "contiguous"
    geometry: str = "k2"
    rate: float = RATES[0]

    @property
    def window(self) -> tuple[int, int, int]:
        return GEOMETRIES[self.geometry]

    def about(self, size: tuple[int, ...]) -> Row:
        return {
            "shape": list(size),
            "dtype": str(self.dtype)[6:],
            "layout": self.layout,
            "window": self.geometry,
            "rate": self.rate,
        }

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype)[6:]} {self.layout} {self.geometry} {self.rate:.0%}"


def image(case: Case, device: Device) -> Tensor:
    """Whole numbers, exact in every dtype, without a tie in any window, half of them negative; then tied windows."""
    n, c, h, w = size_of(case, device)
    x = torch.randint(-7, 8, (n, c, h, w), dtype=torch.int16, device=device.torch) * 16
    rows, columns = (torch.arange(count, dtype=torch.int16, device=device.torch) % 3 for count in (h, w))
    x += 3 * rows[:, None] + columns + 1  # in a window of 3 x 3 no two cells are equal modulo 16, and none is 0
    if case.rate:
        chosen = torch.rand(n, c, h // 2, w // 2, device=device.torch) < case.rate
        for column in (0, 1):
            x[:, :, ::2, column::2].masked_fill_(chosen, int(TIED))
    return x.to(case.dtype).contiguous(memory_format=LAYOUTS[case.layout])


def size_of(case: Case, device: Device) -> tuple[int, int, int, int]:
    return (2, 8, 12, 12) if device.dry else SHAPES[case.shape]


def kinked(case: Case, device: Device) -> Tensor:
    """Random values, of which the given part is 0."""
    x = torch.randn(size_of(case, device), device=device.torch)
    x[x == 0] = 1.0
    x = x.to(case.dtype)
    x[torch.rand(x.shape, device=device.torch) < case.rate] = 0
    return x


# bandwidth and launches


def bandwidth(device: Device, part: Part) -> None:
    """Copies within the device, the ceiling of everything else; then what starting a kernel costs."""

    def copy(size: int) -> Row:
        a, b = (torch.ones(size // 4, device=device.torch) for _ in range(2))
        (spans,) = device.times(lambda: a.copy_(b), seconds=0.5)
        rate = 2 * a.nbytes / median(spans) / 1e6
        part.set(gb_s=round(max(rate, part.data.get("gb_s", 0.0)), 1))
        return {"bytes": 2 * a.nbytes, "ms": round(median(spans), 4), "gb_s": round(rate, 1)}

    sizes = {"4 MiB": 1 << 22} if device.dry else {"1 GiB": 1 << 30, "256 MiB": 1 << 28, "64 MiB": 1 << 26}
    part.each("copies", {name: lambda size=size: copy(size) for name, size in sizes.items()})
    one, small = torch.ones(1, device=device.torch), torch.ones(1, 1, 4, 4, device=device.torch)
    leaf = small.clone().requires_grad_()
    calls: dict[str, Call] = {
        "torch: x.add_(1) of one number": lambda: one.add_(1),
        "touches of one number": lambda: ops.touches(one, capacity=1),
        "torch: relu, then max_pool2d, of 16 numbers": lambda: F.max_pool2d(torch.relu(small), 2),
        "relu + max_pool2d of 16 numbers": lambda: ops.max_pool2d(small, 2, relu=True, capacity=4),
        "torch: the same with a graph": lambda: F.max_pool2d(torch.relu(leaf), 2),
        "relu + max_pool2d, the same with a graph": lambda: ops.max_pool2d(leaf, 2, relu=True, capacity=4),
    }
    part.each("launches", {name: lambda call=call: launch(device, call) for name, call in calls.items()})


def launch(device: Device, call: Call) -> Row:
    """Microseconds of a call: until the host goes on, until the device is done with many in a row, and with one.

    ``device_us``: between events around a call that the host has asked for long before.
    """
    count = 10 if device.dry else 500
    for _ in range(10):
        call()
    device.wait()
    start = time.perf_counter()
    for _ in range(count):
        call()
    host = time.perf_counter() - start
    device.wait()
    whole = time.perf_counter() - start
    alone = device.wall(call, seconds=0.1, most=200)
    (spans,) = device.times(call, seconds=0.1)
    return {
        "device_us": round(1e3 * median(spans), 2),
        "host_us": round(1e6 * host / count, 2),
        "in_a_row_us": round(1e6 * whole / count, 2),
        "alone_us": round(1e3 * alone, 2),
    }


# kernels


def kernels(device: Device, part: Part) -> None:
    ceiling = part.results.part("bandwidth").get("gb_s")

    def measured(measure: Callable[[Case, Device], tuple[Row, int]]) -> Callable[[Case], Row]:
        def run(case: Case) -> Row:
            row, moved = measure(case, device)
            row |= {"moved_mb": round(moved / 1e6, 2)}
            if ceiling:
                for share, time_of in (("share", "ours_ms"), ("torch_share", "torch_ms")):
                    row[share] = round(moved / 1e6 / row[time_of] / ceiling, 3) if row.get(time_of) else None
            return case.about(size_of(case, device)) | row

        return run

    def each(table: str, measure: Callable[[Case, Device], tuple[Row, int]], cases: Iterator[Case]) -> None:
        run = measured(measure)
        part.each(table, {str(case): lambda case=case: run(case) for case in cases})

    every = [Case(*items) for items in itertools.product(SHAPES, DTYPES, LAYOUTS, GEOMETRIES)]
    each("forward", forward, iter([*every, Case("vgg11", torch.float64)]))
    each("backward", backward, iter([*every, Case("vgg11", torch.float64)]))
    each("relu", relu, (Case(s, d, rate=rate) for rate, s, d in itertools.product(RATES, SHAPES, DTYPES)))
    each("touches", touches, (Case(s, d, rate=rate) for rate, s, d in itertools.product(RATES, SHAPES, DTYPES)))
    each("pooling", pooling, iter(every))
    each("forward", forward, (Case(*c, rate) for rate in RATES[1:] for c in itertools.product(*axes())))


def axes() -> tuple[Any, ...]:
    return SHAPES, DTYPES, LAYOUTS, GEOMETRIES


def forward(case: Case, device: Device, fused: bool = True) -> tuple[Row, int]:
    x, window = image(case, device), case.window
    found, count, room = exact(x, window, fused)
    expected = F.max_pool2d(torch.relu(x) if fused else x, *window)
    row = device.compare(
        lambda: ops.max_pool2d(x, *window, relu=fused, capacity=room),
        (lambda: F.max_pool2d(torch.relu(x), *window)) if fused else (lambda: F.max_pool2d(x, *window)),
    )
    row |= {"tied": round(count / max(1, found.output.numel()), 4), "same": torch.equal(found.output, expected)}
    return row, x.nbytes + found.output.nbytes + (1 + fused) * found.offsets.nbytes + 16 * count


def pooling(case: Case, device: Device) -> tuple[Row, int]:
    return forward(case, device, fused=False)


def exact(x: Tensor, window: tuple[int, int, int], fused: bool) -> tuple[ops.PoolResult, int, int]:
    """The result, the number of tied windows, and room for the lists with some to spare."""
    found = ops.max_pool2d(x, *window, relu=fused, capacity=1)
    windows, touched, _ = found.counts.tolist()
    return found, windows, max(windows, touched) * 5 // 4 + 64


def backward(case: Case, device: Device) -> tuple[Row, int]:
    """Both by their kernels alone: torch's two, ours from the routes."""
    x, (kernel, stride, pad) = image(case, device), case.window
    pairs = [[kernel] * 2, [stride] * 2, [pad] * 2, [1, 1]]
    routes = torch.ops.adcert.max_pool2d(x, *pairs, False, True, 1)[6]
    a = torch.relu(x)
    output, indices = torch.ops.aten.max_pool2d_with_indices(a, *pairs)
    grad = torch.randint(-4, 5, output.shape, device=device.torch).to(case.dtype)
    grad = grad.contiguous(memory_format=LAYOUTS[case.layout])
    last = case.layout == "channels_last"

    def ours() -> Tensor:
        result: Tensor = torch.ops.adcert.max_pool2d_backward(grad, routes, *x.shape[-2:], *pairs, last)
        return result

    def theirs() -> Tensor:
        through = torch.ops.aten.max_pool2d_with_indices_backward(grad, a, *pairs, False, indices)
        result: Tensor = torch.ops.aten.threshold_backward(through, a, 0)
        return result

    row = device.compare(ours, theirs)
    row["same"] = torch.equal(ours(), theirs())  # whole numbers: their sums do not round
    return row, grad.nbytes + routes.nbytes + x.nbytes


def relu(case: Case, device: Device) -> tuple[Row, int]:
    x = kinked(case, device)
    found = ops.relu(x, capacity=1)
    count = int(found.counts[1])
    row = device.compare(lambda: ops.relu(x, capacity=count * 5 // 4 + 64), lambda: torch.relu(x))
    return row | {"same": torch.equal(found.output, torch.relu(x))}, 2 * x.nbytes + 8 * count


def touches(case: Case, device: Device) -> tuple[Row, int]:
    """Beside torch's count of zeros, which reads as much and lists nothing."""
    x = kinked(case, device)
    count = int(ops.touches(x, capacity=1).counts[1])
    row = device.compare(lambda: ops.touches(x, capacity=count * 5 // 4 + 64), lambda: torch.count_nonzero(x))
    return row | {"same": count == x.numel() - int(torch.count_nonzero(x))}, x.nbytes + 8 * count
