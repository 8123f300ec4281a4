"""Training as people write it: mixed precision, scaled, accumulated, clipped and averaged gradients, closures, layouts.

Every loop runs twice, on plain modules and on converted ones that are monitored: the same weights, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import adcert
from adcert import Monitor, Verdict
from adcert.cli._loop import digest

X = (torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 8).floor() / 8
X[:, :, :8] = 0
Y = torch.arange(8) % 4
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Block = Callable[[], contextlib.AbstractContextManager[Any]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 8, 3, padding=1), nn.PReLU(8), nn.MaxPool2d(3, 2, padding=1)),
        *(nn.Flatten(), nn.Linear(128, 16), nn.LayerNorm(16), nn.ReLU6(), nn.Dropout(0.1), nn.Linear(16, 4)),
    )


def auto(precision: str) -> contextlib.AbstractContextManager[Any]:
    dtype = PRECISIONS[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


# ---- loops: (model, block) -> None; ``block()`` is the monitored step, or nothing ---------------------------------


def outside(model: nn.Module, block: Block, precision: str) -> None:
    """Gradients unscaled and clipped after the block, an average of the weights kept."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=precision == "fp16")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    for _ in range(3):
        optimizer.zero_grad()
        with block():
            with auto(precision):
                loss = F.cross_entropy(model(X), Y)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)


def inside(model: nn.Module, block: Block, precision: str) -> None:
    """Everything in the block, to the last ``zero_grad``."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=precision == "fp16")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    for _ in range(3):
        with block(), auto(precision):
            scaler.scale(F.cross_entropy(model(X), Y)).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            nn.utils.clip_grad_value_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(model)
            optimizer.zero_grad()


def accumulated(model: nn.Module, block: Block, precision: str) -> None:
    """Four micro-batches a step under one scale."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=precision == "fp16")
    for _ in range(2):
        optimizer.zero_grad()
        with block():
            for part in range(4):
                with auto(precision):
                    loss = F.cross_entropy(model(X[part::4]), Y[part::4]) / 4
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()


def closures(model: nn.Module, block: Block, precision: str) -> None:
    """LBFGS evaluates its closure several times a step: each evaluation is a block."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> float:
        optimizer.zero_grad()
        with block():
            with auto(precision):
                loss = F.cross_entropy(model(X), Y)
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(closure)


def channels_last(model: nn.Module, block: Block, precision: str) -> None:
    model.to(memory_format=torch.channels_last)
    x = X.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        with block():
            with auto(precision):
                loss = F.cross_entropy(model(x), Y)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def narrow_weights(model: nn.Module, block: Block, precision: str) -> None:
    """Weights, images and gradients in 16 bits, without autocast."""
    dtype = PRECISIONS[precision] or torch.float64
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        with block():
            F.cross_entropy(model(X.to(dtype)), Y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


LOOPS = [outside, inside, accumulated, closures, channels_last, narrow_weights]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_every_step_is_decided_and_the_weights_are_those_of_plain_torch(
    loop: Callable[[nn.Module, Block, str], None], precision: str
) -> None:
    plain, model = network(), adcert.convert(network())
    torch.manual_seed(1)
    loop(plain, contextlib.nullcontext, precision)
    monitor = Monitor(model)
    torch.manual_seed(1)
    loop(model, monitor.step, precision)
    report = monitor.report()
    assert digest(model) == digest(plain)
    assert report.steps >= 2 and report.undecided == report.aborted == 0, report.reasons
    assert report.certified > 0


def test_one_block_around_several_evaluations_is_undecided() -> None:
    """Weights move between them, and a step is about one point."""
    model = adcert.convert(network())
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with Monitor(model).step() as step:
        optimizer.step(closure)
    assert step.certificate().verdict is Verdict.UNDECIDED
    assert "modified after its first use" in step.certificate().reasons[0]


# ---- third-party networks ------------------------------------------------------------------------------------------


def _third_party(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers", reason="the networks come from transformers")
    torch.manual_seed(0)
    images = (torch.rand(4, 3, 32, 32) * 8).floor() / 8
    images[:, :, :16] = 0
    if name == "ResNet-50":
        sizes = {"embedding_size": 8, "hidden_sizes": [16, 32, 64, 128], "depths": [3, 4, 6, 3]}
        config = transformers.ResNetConfig(**sizes, layer_type="bottleneck", hidden_act="relu", num_labels=4)
        labels = torch.tensor([0, 1, 2, 3])
        return transformers.ResNetForImageClassification(config), {"pixel_values": images, "labels": labels}
    layers = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
    layers |= {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    config = transformers.SegformerConfig(**layers, hidden_act="relu", decoder_hidden_size=16, num_labels=4)
    labels = torch.randint(4, (4, 32, 32))
    return transformers.SegformerForSemanticSegmentation(config), {"pixel_values": images, "labels": labels}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["ResNet-50", "SegFormer"])
def test_third_party_networks_train_five_steps(name: str, precision: str) -> None:
    """Unchanged but for convert. A step is undecided only where the scaler skips it: its gradients overflow."""
    states = []
    for monitored in (False, True):
        model, batch = _third_party(name)
        model = adcert.convert(model) if monitored else model
        monitor = Monitor(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=precision == "fp16")
        torch.manual_seed(2)
        for _ in range(5):
            optimizer.zero_grad()
            with monitor.step() if monitored else contextlib.nullcontext() as step:
                with auto(precision):
                    loss = model(**batch).loss
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if monitored and scaler.get_scale() >= before:
                assert step.certificate().verdict is not Verdict.UNDECIDED, step.certificate().reasons
            elif monitored:
                assert "is not finite" in step.certificate().reasons[0]
        states.append(digest(model))
        if monitored:
            assert monitor.report().certified >= 2
    assert states[0] == states[1]
