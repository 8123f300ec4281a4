"""The operators that wait for the device, at the sizes of a real step, and those that do not, inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import Case, photos

from adcert import ops
from gpu.capture import WANTED, Arguments, call, captured, largest, moved, nbytes
from gpu.check import image, opposite, same, same_record
from gpu.session import Part, Row
from gpu.timing import Device

MODEL = "vgg11-bn"


def operators(device: Device, part: Part) -> None:
    """The largest call of each operator in a certified step: milliseconds on the device, and on this machine's CPU."""
    found: dict[str, tuple[str, Arguments]] = {}

    def collect(low: bool) -> None:
        case = Case(MODEL, low)
        model = case.build()
        ((x, y),) = photos(4 if device.dry else 128, 1)

        def loss(network: nn.Module) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                return nn.functional.cross_entropy(network(x), y)

        for name, calls in captured(model, loss).items():
            found[f"{name}, {case}"] = (name, largest(calls))

    for low in (False, True):  # not as cases of each(): a new process needs them again
        try:
            collect(low)
        except Exception as error:
            part.note(f"a step of {Case(MODEL, low)} on the CPU failed: {type(error).__name__}: {error}")
    for name in WANTED:
        if not any(seen == name for seen, _ in found.values()):
            part.note(f"{name}: no call in these steps")
    found.setdefault("opposite_rows, 300 small rows", ("opposite_rows", opposite()))
    part.each("operators", {label: partial(timed, device, *seen) for label, seen in found.items()})


def timed(device: Device, name: str, arguments: Arguments) -> Row:
    there = moved(arguments, device.torch)
    row: Row = {"operator": name, "sizes": sizes(arguments), "mb": round(nbytes(arguments) / 1e6, 2)}
    row["ms"] = round(device.wall(lambda: call(name, there)), 4)
    if name == "conv_patches":
        mixed = (there[0], arguments[1], *there[2:])
        row["ms_units_on_the_host"] = round(device.wall(lambda: call(name, mixed)), 4)
    if name == "resolve_ties":
        mixed = (arguments[0], arguments[1], *there[2:])
        row["ms_windows_on_the_host"] = round(device.wall(lambda: call(name, mixed)), 4)
    row["cpu_ms"] = round(device.wall(lambda: call(name, arguments)), 4)
    return row


def sizes(arguments: Arguments) -> list[list[int]]:
    return [list(t.shape) for t in arguments if isinstance(t, Tensor)]


# CUDA graphs


class Replayed:
    """A call captured once: every later one copies its input to where the captured one read it, and replays."""

    def __init__(self, device: Device, run: Callable[[Tensor], Any], x: Tensor) -> None:
        self.run, self.x, self.graph = run, x.clone(memory_format=torch.preserve_format), None
        if device.dry:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is allocated and loaded only the first time
            for _ in range(3):
                run(self.x)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = run(self.x)

    def __call__(self, x: Tensor) -> Any:
        self.x.copy_(x)
        if self.graph is None:
            return self.run(self.x)
        self.graph.replay()
        return self.result


def graphs(device: Device, part: Part) -> None:
    """Operators with a capacity, captured once and replayed with other inputs, one with more to list than room."""
    cases: dict[str, Callable[[], Row]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            for name, window in (("k2", (2, 2, 0)), ("k3", (3, 2, 1))):
                for fused in (True, False):
                    label = f"max_pool2d{' of relu' if fused else ''} {str(dtype)[6:]} {layout} {name}"
                    cases[label] = partial(replay_pool, device, dtype, layout, window, fused)
        cases[f"relu {str(dtype)[6:]}"] = partial(replay_relu, device, dtype)
        cases[f"forward and backward {str(dtype)[6:]}"] = partial(replay_gradient, device, dtype)
    part.each("graphs", cases)


def inputs(dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Three inputs of one shape: usual ones, and one all of whose windows are tied."""
    first = image((4, 16, 20, 24), dtype, layout)
    tied = torch.ones_like(first)
    return [first, first.roll(5, 0).neg().contiguous(memory_format=_format(layout)), tied]


def _format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def replay_pool(device: Device, dtype: torch.dtype, layout: str, window: tuple[int, int, int], fused: bool) -> Row:
    hosts = inputs(dtype, layout)
    expected = [ops.max_pool2d(x, *window, relu=fused) for x in hosts]
    room = max(max(e.counts[:2].tolist()) for e in expected[:2])
    first = hosts[0].to(device.torch)
    replay = Replayed(device, lambda x: ops.max_pool2d(x, *window, relu=fused, capacity=room), first)
    for host, theirs in zip(hosts, expected, strict=True):
        x = host.to(device.torch)
        same_record(replay(x), theirs, room, F.max_pool2d(torch.relu(x) if fused else x, *window))
    return {"room": room, "found": [int(e.counts[0]) for e in expected]}


def replay_relu(device: Device, dtype: torch.dtype) -> Row:
    hosts = [image((4, 16, 20, 24), dtype, "contiguous"), image((4, 16, 20, 24), dtype, "contiguous").roll(7, 3)]
    hosts.append(torch.zeros_like(hosts[0]))
    expected = [ops.relu(x) for x in hosts]
    room = max(int(e.counts[1]) for e in expected[:2])
    replay = Replayed(device, lambda x: ops.relu(x, capacity=room), hosts[0].to(device.torch))
    for host, theirs in zip(hosts, expected, strict=True):
        x = host.to(device.torch)
        same_record(replay(x), theirs, room, torch.relu(x))
    return {"room": room, "found": [int(e.counts[1]) for e in expected]}


def replay_gradient(device: Device, dtype: torch.dtype) -> Row:
    def gradient(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        output = ops.max_pool2d(leaf, 3, 2, 1, relu=True, capacity=64).output
        (found,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
        return found

    hosts = [image((4, 16, 20, 24), dtype, "contiguous", special=False).roll(k, 2) for k in range(3)]
    replay = Replayed(device, gradient, hosts[0].to(device.torch))
    for x in hosts:
        same(replay(x.to(device.torch)), gradient(x), "gradient")
    return {}
