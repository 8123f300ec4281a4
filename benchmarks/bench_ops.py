"""The native operators against plain torch: run with `make bench`; compare the rows of a group.

The group's name says the work. With each of our rows are stored `ratio`, ours / torch, measured in turn in the same
process (the least of several runs each, since a machine is rarely idle), and `floor`, the part of the memory
bandwidth that is reached: the time a copy of as many bytes takes, over ours. The bytes are the least that any
implementation has to read and write; what the process reuses from the cache can lift `floor` above 1.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adcert import ops
from adcert.reference import DTYPES

SHAPE = (128, 64, 32, 32)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GEOMETRIES = {"k2": (2, 2, 0), "k3": (3, 2, 1)}
CASES = [
    pytest.param(dtype, LAYOUTS[layout], GEOMETRIES[k], id=f"{str(dtype)[6:]}-{layout}-{k}")
    for dtype, layout, k in itertools.product(DTYPES, LAYOUTS, GEOMETRIES)
]
RELU_CASES = [pytest.param(dtype, id=str(dtype)[6:]) for dtype in DTYPES]


def best(*calls: Callable[[], Any], rounds: int = 9) -> list[float]:
    """The least time of each call, in seconds; the calls take turns."""
    least = [float("inf")] * len(calls)
    for turn in range(rounds + 1):
        for k, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn:  # the first is for warming up
                least[k] = min(least[k], time.perf_counter() - start)
    return least


@functools.cache
def copy_source() -> Tensor:
    """Twice 64 MiB, more than most caches hold."""
    return torch.ones(2, 1 << 24)


def compare(benchmark: Any, group: str, ours: Callable[[], Any], theirs: Callable[[], Any], moved: int) -> None:
    """Times ours under pytest-benchmark and stores its ratio to theirs and to a copy of `moved` bytes."""
    torch.set_num_threads(2)
    benchmark.group = group
    a, b = copy_source()
    mine, plain, copy = best(ours, theirs, lambda: a.copy_(b))
    bandwidth = 2 * a.nbytes / copy
    ratio, floor = mine / plain, moved / bandwidth / mine
    benchmark.extra_info |= {
        "ratio": round(ratio, 3),
        "floor": round(floor, 3),
        "torch_ms": round(1e3 * plain, 3),
        "moved_mb": round(moved / 1e6, 1),
        "copy_gb_s": round(bandwidth / 1e9, 1),
    }
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    print(f"\n{group}: ours {1e3 * mine:.2f} ms, ours / torch = {ratio:.3f}, {floor:.2f} of the floor")


def image(dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.randn(SHAPE).to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize(("dtype", "layout", "geometry"), CASES)
def test_relu_pool_forward(benchmark: Any, dtype: Any, layout: Any, geometry: tuple[int, ...]) -> None:
    x = image(dtype, layout)
    output, offsets = ops.max_pool2d(x, *geometry, relu=True)[:2]
    compare(
        benchmark,
        f"relu + max_pool2d forward {dtype} {layout} {geometry}",
        lambda: ops.max_pool2d(x, *geometry, relu=True),
        lambda: F.max_pool2d(torch.relu(x), *geometry),
        x.nbytes + output.nbytes + 2 * offsets.nbytes,  # offsets and routes
    )


@pytest.mark.parametrize(("dtype", "layout", "geometry"), CASES)
def test_relu_pool_backward(benchmark: Any, dtype: Any, layout: Any, geometry: tuple[int, ...]) -> None:
    x = image(dtype, layout).requires_grad_()
    ours, offsets = ops.max_pool2d(x, *geometry, relu=True)[:2]
    theirs = F.max_pool2d(torch.relu(x), *geometry)
    seed = torch.randn_like(theirs)
    compare(
        benchmark,
        f"relu + max_pool2d backward {dtype} {layout} {geometry}",
        lambda: torch.autograd.grad(ours, x, seed, retain_graph=True),
        lambda: torch.autograd.grad(theirs, x, seed, retain_graph=True),
        seed.nbytes + offsets.nbytes + x.nbytes,
    )


@pytest.mark.parametrize("dtype", RELU_CASES)
def test_relu_forward(benchmark: Any, dtype: torch.dtype) -> None:
    x = image(dtype, torch.contiguous_format)
    compare(benchmark, f"relu forward {dtype}", lambda: ops.relu(x), lambda: torch.relu(x), 2 * x.nbytes)


@pytest.mark.parametrize("dtype", RELU_CASES)
def test_relu_in_place(benchmark: Any, dtype: torch.dtype) -> None:
    x = image(dtype, torch.contiguous_format).abs().add(1)  # what it stays from call to call
    a, b = x.clone(), x.clone()
    compare(
        benchmark,
        f"touches, then relu_ {dtype}",
        lambda: (ops.touches(a), a.relu_()),
        lambda: b.relu_(),
        3 * x.nbytes,
    )


ACTIVATIONS: dict[str, tuple[float, ...]] = {
    "hardtanh": (0, 6),
    "leaky_relu": (0.01,),
    "hardsigmoid": (),
    "hardswish": (),
    "threshold": (0.1,),
    "clamp": (-1, 1),
    "abs": (),
}


@pytest.mark.parametrize("dtype", RELU_CASES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_forward(benchmark: Any, kind: str, dtype: torch.dtype) -> None:
    x, parameters = image(dtype, torch.contiguous_format), ACTIVATIONS[kind]
    stock = getattr(F, kind, None) or getattr(torch, kind)
    theirs = (*parameters, *parameters) if kind == "threshold" else parameters
    compare(
        benchmark,
        f"{kind} forward {dtype}",
        lambda: ops.activation(x, kind, parameters),
        lambda: stock(x, *theirs),
        2 * x.nbytes,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", RELU_CASES)
def test_prelu_forward(benchmark: Any, layout: str, dtype: torch.dtype) -> None:
    x, weight = image(dtype, LAYOUTS[layout]), torch.rand(SHAPE[1]).to(dtype)
    compare(
        benchmark,
        f"prelu forward {dtype} {layout}",
        lambda: ops.prelu(x, weight),
        lambda: F.prelu(x, weight),
        2 * x.nbytes,
    )


@pytest.mark.parametrize("dtype", RELU_CASES)
def test_window_ties(benchmark: Any, dtype: torch.dtype) -> None:
    """Beside the pooling itself, whose ties are looked for when it is done."""
    x = torch.randn(16, 16, 16, 32, 32).to(dtype)
    output = F.max_pool3d(x, 2)
    axes = [torch.arange(n).view(-1, 2) for n in x.shape[2:]]
    compare(
        benchmark,
        f"ties of max_pool3d {dtype}",
        lambda: ops.window_ties(x, output, axes),
        lambda: F.max_pool3d(x, 2),
        x.nbytes + output.nbytes,
    )


def test_many_ties(benchmark: Any) -> None:
    x = image(torch.bfloat16, torch.contiguous_format).mul(8).round()
    result = ops.max_pool2d(x, 2, relu=True)
    compare(
        benchmark,
        "relu + max_pool2d forward, integers: most windows tied",
        lambda: ops.max_pool2d(x, 2, relu=True),
        lambda: F.max_pool2d(torch.relu(x), 2),
        x.nbytes + sum(t.nbytes for t in result) + result.offsets.nbytes,
    )
