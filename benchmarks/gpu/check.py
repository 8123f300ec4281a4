"""Every operator on small odd shapes, against its CPU kernel: right after a build, and under compute-sanitizer.

    python -m gpu.check [--device cuda] [--thin]

Inputs are made on the CPU and copied, so that whatever a kernel reads was written by a copy or by that kernel.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adcert import ops, reference
from adcert.reference import ACTIVATIONS, DTYPES
from gpu.capture import Arguments, call, captured, moved
from gpu.session import Part

Check = Callable[[], None]
SHAPES = ((2, 5, 7, 9), (1, 3, 1, 1), (3, 17, 12, 33), (0, 3, 8, 8))
GEOMETRIES = ((2, 2, 0, 1, False), (3, 2, 1, 1, False), (3, 1, 1, 1, True), ((2, 3), (3, 1), (1, 0), (1, 2), True))
WIDE = (17, 3, 8, 1, False)  # bit sets of several words, offsets of four bytes
LAYOUTS = ("contiguous", "channels_last", "sliced")
ROOMS = (1 << 14, 3, 0)


def image(shape: tuple[int, ...], dtype: torch.dtype, layout: str, special: bool = True) -> Tensor:
    """Small integers, both zeros, and, if special, NaN and infinities, in a few places."""
    x = torch.randint(-3, 3, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    x[x == -3] = -0.0
    if special:
        flat = x.view(-1)
        for start, value in ((2, float("nan")), (11, float("inf")), (5, float("-inf"))):
            flat[start::97] = value
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return x


def placed(x: Tensor, layout: str, device: torch.device) -> Tensor:
    """On the device; ``sliced`` is a view with gaps."""
    x = x.to(device)
    return x[:, ::2, :, 1:] if layout == "sliced" and x.shape[3] > 1 else x


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Equal bits and layout; every NaN counts as the same."""
    ours, theirs = ours.cpu(), theirs.cpu()
    if looks(ours) != looks(theirs):
        raise AssertionError(f"{what}: {looks(ours)} for {looks(theirs)}")
    if ours.is_floating_point():
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
        nan = ours.isnan() & theirs.isnan()
        ours, theirs = (t.masked_fill(nan, 1.0).view(integer) for t in (ours, theirs))
    if not torch.equal(ours, theirs):
        wrong = (ours != theirs).nonzero()
        raise AssertionError(f"{what}: {len(wrong)} of {ours.numel()} entries differ, first at {wrong[0].tolist()}")


def looks(t: Tensor) -> tuple[Any, ...]:
    """dtype, shape, and the strides that mean something."""
    strides = [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
    return t.dtype, tuple(t.shape), strides if t.numel() else []


def same_record(ours: Any, theirs: Any, room: int, output: Tensor | None = None) -> None:
    """A recording operator with room against the exact lists; what does not fit is only counted.

    ``output``: torch's on the same device, which for a ReLU of -0.0 is not what it is on the CPU.
    """
    if output is not None:
        same(ours.output, output, "output")
    same(ours.counts, theirs.counts, "counts")
    windows, touched, _ = theirs.counts.tolist()
    if touched <= room:
        same(ours.touches[:touched].sort().values, theirs.touches, "touches")
    if hasattr(theirs, "windows"):
        same(ours.offsets, theirs.offsets, "offsets")
        if windows <= room:
            found, order = ours.windows[:windows].sort()
            same(found, theirs.windows, "windows")
            same(ours.members[:windows][order], theirs.members, "members")


def records(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device, rooms: Any) -> None:
    """relu, touches, the other activations, and max_pool2d with its two ways back."""
    host = image(shape, dtype, layout)
    x, here = placed(host, layout, device), placed(host, layout, torch.device("cpu"))
    for room in rooms:
        same_record(ops.relu(x, capacity=room), ops.relu(here), room, torch.relu(x))
        same_record(ops.touches(x, -1.0, capacity=room), ops.touches(here, -1.0), room)
        activations(x, here, room)
    for geometry, relu in itertools.product((*GEOMETRIES, WIDE), (False, True)):
        span = [d * (k - 1) + 1 for k, d in zip(_pair(geometry[0]), _pair(geometry[3]), strict=True)]
        if any(s > size + 2 * p for s, size, p in zip(span, here.shape[2:], _pair(geometry[2]), strict=True)):
            continue
        expected = ops.max_pool2d(here, *geometry, relu=relu)
        output = F.max_pool2d(torch.relu(x) if relu else x, *geometry)
        for room in rooms:
            same_record(ops.max_pool2d(x, *geometry, relu=relu, capacity=room), expected, room, output)
        ways_back(x, here, geometry, relu)


def activations(x: Tensor, here: Tensor, room: int) -> None:
    """All kinds, with one parameter or two."""
    for kind, count in ACTIVATIONS.items():
        arguments = kind, (-1.0, 2.0)[:count]
        output = reference.activation(x, *arguments).output
        same_record(ops.activation(x, *arguments, capacity=room), ops.activation(here, *arguments), room, output)
    weight = torch.linspace(-1, 2, here.shape[1]).to(here.dtype)
    there = weight.to(x.device)
    same_record(ops.prelu(x, there, capacity=room), ops.prelu(here, weight), room, F.prelu(x, there))
    same_record(ops.touches(x, (-1.0, 2.0), capacity=room), ops.touches(here, (-1.0, 2.0)), room)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def ways_back(x: Tensor, here: Tensor, geometry: tuple[Any, ...], relu: bool) -> None:
    """max_pool2d_backward and its adjoint, on gradients in whole numbers."""
    pairs = [list(_pair(value)) for value in geometry[:4]]
    last = here.is_contiguous(memory_format=torch.channels_last) and not here.is_contiguous()
    grads = []
    for t in (x, here):
        raw = torch.ops.adcert.max_pool2d(t, *pairs, geometry[4], relu, 4)
        routes = raw[6] if relu else raw[1]
        seed = torch.randint(-4, 5, raw[0].shape, generator=torch.Generator().manual_seed(1)).to(t.dtype)
        back = torch.ops.adcert.max_pool2d_backward(seed.to(t.device), routes, *t.shape[-2:], *pairs, last)
        grads.append((back, torch.ops.adcert.max_pool2d_gather(back, routes, *pairs)))
    for ours, theirs, what in zip(*grads, ("backward", "gather"), strict=True):
        same(ours, theirs, what)


def network(norm: bool) -> dict[str, list[Arguments]]:
    """What a step of a small network with whole numbers asks of the resolver and of the rows."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), *([nn.BatchNorm2d(6)] if norm else []), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    x = torch.randint(0, 3, (3, 2, 13, 11), generator=generator).float()
    model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=generator))
    return captured(model, lambda network: network(x).sum())


def resolved(name: str, arguments: Arguments, device: torch.device) -> None:
    """One call on both devices; lists of the resolver are compared as sets."""
    ours, theirs = call(name, moved(arguments, device)), call(name, arguments)
    if name != "resolve_ties":
        return same(ours, theirs, name)
    same(ours[4], theirs[4], "counts")
    lists = [sorted(zip(*(column.tolist() for column in result[:4]), strict=True)) for result in (ours, theirs)]
    if lists[0] != lists[1]:
        raise AssertionError(f"resolve_ties: {len(lists[0])} pairs for {len(lists[1])}, or other answers")
    return None


def opposite() -> Arguments:
    plus = torch.randint(-1, 2, (300, 7), generator=torch.Generator().manual_seed(2)).float()
    return plus, torch.zeros_like(plus), torch.arange(300) % 3


def checks(device: torch.device, thin: bool) -> dict[str, Check]:
    """``thin``: a few of them, for a tool that slows every kernel down."""
    dtypes, shapes, rooms = (DTYPES[:1], SHAPES[:1], ROOMS[:2]) if thin else (DTYPES, SHAPES, ROOMS)
    found: dict[str, Check] = {}
    for dtype, shape, layout in itertools.product(dtypes, shapes, LAYOUTS):
        name = f"records {str(dtype)[6:]} {list(shape)} {layout}"
        found[name] = partial(records, shape, dtype, layout, device, rooms)
    if thin:
        found["records bfloat16"] = partial(records, (2, 9, 8, 19), torch.bfloat16, "channels_last", device, rooms[:1])
    for norm in (False, True):
        for name, calls in network(norm).items():
            for number, arguments in enumerate(calls):
                found[f"{name} {'norm ' if norm else ''}{number}"] = partial(resolved, name, arguments, device)
    found["opposite_rows"] = partial(resolved, "opposite_rows", opposite(), device)
    return found


def part(device: Any, part: Part) -> None:
    """As a part of the run: a mismatch is an error of its own."""
    passed = 0

    def run(check: Check) -> None:
        nonlocal passed
        check()
        device.wait()
        passed += 1
        part.data["passed"] = passed

    part.each("checks", {name: partial(run, check) for name, check in checks(device.torch, device.dry).items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--thin", action="store_true")
    options = parser.parse_args()
    device, failed = torch.device(options.device), 0
    everything = checks(device, options.thin)
    for name, check in everything.items():
        try:
            check()
        except AssertionError as error:
            failed += 1
            print(f"FAILED {name}: {error}")
    print(f"{len(everything) - failed} of {len(everything)} checks passed on {device.type}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
