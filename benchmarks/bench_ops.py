"""The native operators against plain torch: run with `make bench`; compare the rows of a group.

The group's name says the work; `ours / torch` is stored with each of our rows as `ratio`, measured back to
back in the same process (the least of several runs each, since a machine is rarely idle).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adcert import ops

SHAPE = (128, 64, 32, 32)
CASES = [
    pytest.param(dtype, layout, geometry, id=f"{str(dtype)[6:]}-{str(layout)[6:]}-k{geometry[0]}")
    for dtype in (torch.float32, torch.bfloat16)
    for layout in (torch.contiguous_format, torch.channels_last)
    for geometry in ((2, 2, 0), (3, 2, 1))
]


def best(f: Callable[[], Any], rounds: int = 7) -> float:
    """The least time of one call, in seconds."""
    f()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def compare(benchmark: Any, group: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """Times ours under pytest-benchmark and stores its ratio to theirs."""
    torch.set_num_threads(2)
    benchmark.group = group
    plain = best(theirs)
    ratio = best(ours) / plain
    benchmark.extra_info |= {"torch_ms": round(1e3 * plain, 3), "ratio": round(ratio, 3)}
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    print(f"\n{group}: ours / torch = {ratio:.3f} ({1e3 * plain:.2f} ms)")


def image(dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.randn(SHAPE).to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize(("dtype", "layout", "geometry"), CASES)
def test_relu_pool_forward(benchmark: Any, dtype: Any, layout: Any, geometry: tuple[int, ...]) -> None:
    x = image(dtype, layout)
    compare(
        benchmark,
        f"relu + max_pool2d forward {dtype} {layout} {geometry}",
        lambda: ops.max_pool2d(x, *geometry, relu=True),
        lambda: F.max_pool2d(torch.relu(x), *geometry),
    )


@pytest.mark.parametrize(("dtype", "layout", "geometry"), CASES)
def test_relu_pool_backward(benchmark: Any, dtype: Any, layout: Any, geometry: tuple[int, ...]) -> None:
    x = image(dtype, layout).requires_grad_()
    ours = ops.max_pool2d(x, *geometry, relu=True).output
    theirs = F.max_pool2d(torch.relu(x), *geometry)
    seed = torch.randn_like(theirs)
    compare(
        benchmark,
        f"relu + max_pool2d backward {dtype} {layout} {geometry}",
        lambda: torch.autograd.grad(ours, x, seed, retain_graph=True),
        lambda: torch.autograd.grad(theirs, x, seed, retain_graph=True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_forward(benchmark: Any, dtype: torch.dtype) -> None:
    x = image(dtype, torch.contiguous_format)
    compare(benchmark, f"relu forward {dtype}", lambda: ops.relu(x), lambda: torch.relu(x))


def test_many_ties(benchmark: Any) -> None:
    x = image(torch.bfloat16, torch.contiguous_format).mul(8).round()
    compare(
        benchmark,
        "relu + max_pool2d forward, integers: most windows tied",
        lambda: ops.max_pool2d(x, 2, relu=True),
        lambda: F.max_pool2d(torch.relu(x), 2),
    )
