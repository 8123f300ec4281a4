"""torch.compile: what a compiled plain step takes, and that a converted network compiles to the same outside a step."""

from __future__ import annotations

import copy
import time
from functools import partial
from statistics import median
from typing import Any

import torch
from training import Batch, Case, spread, trainer

import adcert
from gpu.session import Part, Row
from gpu.steps import batches
from gpu.timing import Device

CASES = (Case("vgg11-bn"), Case("resnet18"))


def compiled(device: Device, part: Part) -> None:
    """First whether a converted network compiles without a graph break, then the times; compiling takes most of it."""
    cases = (Case("vgg11"),) if device.dry else CASES
    part.each("breaks", {str(case): partial(breaks, device, case) for case in cases}, least=8.0)
    part.each("compiled", {str(case): partial(raced, device, case) for case in cases}, least=30.0)


def breaks(device: Device, case: Case) -> Row:
    model = adcert.convert(case.build(device=device.torch))
    ((x, _),), _ = batches(case, device, 2 if device.dry else 128, 1)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(x)  # type: ignore[no-untyped-call]
    reasons = [str(reason.reason)[:200] for reason in found.break_reasons]
    return {"model": case.model, "graph_breaks": found.graph_break_count, "graphs": found.graph_count, "why": reasons}


def raced(device: Device, case: Case) -> Row:
    """Eager and compiled plain steps, a compiled step of the converted network, and a certified one, in turns."""
    data, _ = batches(case, device, 2 if device.dry else 128, 2)
    backend: dict[str, Any] = {"backend": "eager"} if device.dry else {}
    torch._dynamo.reset()
    plain = case.build(device=device.torch)
    converted, certified = (adcert.convert(copy.deepcopy(plain)) for _ in range(2))
    monitor = adcert.Monitor(certified)
    models: dict[str, tuple[Any, adcert.Monitor | None]] = {
        "compiled": (torch.compile(copy.deepcopy(plain), **backend), None),
        "converted": (torch.compile(converted, fullgraph=True, **backend), None),
        "plain": (plain, None),
        "certified": (certified, monitor),
    }
    steps = {kind: trainer(model, watcher, case.low) for kind, (model, watcher) in models.items()}
    compiling = {}
    for kind, step in steps.items():
        start = time.perf_counter()
        step(*data[0])
        device.wait()
        compiling[kind] = time.perf_counter() - start
    found = race(device, steps, data, monitor)
    row = {"model": case.model, "low": case.low, "compiling_s": round(compiling["compiled"], 1)}
    row |= {f"{kind}_ms": round(1e3 * median(seconds), 4) for kind, seconds in found.items()}
    for name, over, under in (
        ("converted_ratio", "converted", "compiled"),
        ("compiled_ratio", "compiled", "plain"),
        ("certified_ratio", "certified", "compiled"),
    ):
        row |= spread([a / b for a, b in zip(found[over], found[under], strict=True)], name)
    return row


def race(device: Device, steps: dict[str, Any], data: list[Batch], monitor: adcert.Monitor) -> dict[str, list[float]]:
    """Seconds of a step, in rounds of consecutive steps of each kind in turn."""
    length, rounds = (2, 2) if device.dry else (10, 8)
    found: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(rounds + 1):
        for kind, step in steps.items():
            device.wait()
            start = time.perf_counter()
            for k in range(length):
                step(*data[k % len(data)])
            device.wait()
            if number:  # the first warms up
                found[kind].append((time.perf_counter() - start) / length)
            monitor.flush()
    return found
