"""The partial backward engine: time per difference and peak memory, beside torch.autograd.grad one by one."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn

from adcert import backward
from adcert.choices import Window
from adcert.differences import Differences
from adcert.layers import Graph, Leaves
from adcert.recorder import Recorder, recording
from adcert.records import OpRecord


def network() -> tuple[nn.Module, Graph, OpRecord, torch.Tensor]:
    """Two convolutions over 32x32 images, batch 128; the record is the second one's pooling."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)])
    x = torch.rand(128, 3, 32, 32)
    recorder = Recorder()
    window = Window((2, 2), (2, 2), (0, 0), (1, 1))
    with recording(recorder):
        z = recorder.max_pool2d(model[0](x), "first", window, ceil_mode=False, relu=True)
        y = model[1](z)
        loss = recorder.max_pool2d(y, "second", window, ceil_mode=False, relu=True).sum()
    return model, Graph([loss.grad_fn], recorder.records, Leaves(model)), recorder.records[1], y


def differences(count: int, y: torch.Tensor) -> Differences:
    generator = torch.Generator().manual_seed(1)
    plus = torch.randint(0, y.numel() - 1, (count,), generator=generator)
    return Differences(plus, plus + 1)


@pytest.mark.parametrize("count", [1, 32, 256])
def test_engine(benchmark, count: int) -> None:  # type: ignore[no-untyped-def]
    _, graph, record, y = network()
    d = differences(count, y)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    benchmark(lambda: [batch.count for batch in backward.gradients(graph, record.edge, d)])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    held = max(_bytes(batch) for batch in backward.gradients(graph, record.edge, d))
    benchmark.extra_info["seconds per difference"] = benchmark.stats.stats.median / count
    benchmark.extra_info["growth of the peak resident set, MiB"] = grown / 1024
    benchmark.extra_info["bytes of the largest batch's gradients"] = held
    assert held <= backward.BUDGET


@pytest.mark.parametrize("count", [1, 32])
def test_autograd_one_by_one(benchmark, count: int) -> None:  # type: ignore[no-untyped-def]
    model, _, _, y = network()
    d = differences(count, y)

    def loop() -> None:
        for plus, minus in zip(d.plus.tolist(), d.minus.tolist(), strict=True):
            seed = torch.zeros(y.numel())
            seed[plus], seed[minus] = 1.0, -1.0
            torch.autograd.grad(y, list(model.parameters()), seed.reshape(y.shape), retain_graph=True)

    benchmark(loop)
    benchmark.extra_info["seconds per difference"] = benchmark.stats.stats.median / count


def _bytes(batch: backward.Gradients) -> int:
    tensors = [t for ball in batch.leaves.values() for t in (ball.value, ball.radius) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)
