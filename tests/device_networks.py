"""Networks of small integers, which every device computes alike, and steps of them on the host and elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from networks import Residual
from places import Place, content
from torch import Tensor, nn

import adcert
from adcert import Monitor
from adcert.certificate import Certificate
from adcert.transfer import host


def integers(model: nn.Module, seed: int = 0) -> nn.Module:
    """Small integers for parameters, in float64: there no GPU takes a shortcut that rounds (TF32, Winograd)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    return model.double()


def norm(channels: int, cudnn: bool = True) -> nn.BatchNorm2d:
    """In eval mode the scale is 1 / sqrt(0.75 + 0.25), exactly; a tiny eps is none for cuDNN."""
    norm = nn.BatchNorm2d(channels, eps=0.25)
    norm.running_var.fill_(0.75)
    if not cudnn:
        norm.eps, norm.running_var[:] = 2.0**-20, 1 - 2.0**-20
    return norm


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten())


def unbiased() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 2, 2, bias=False),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2),
    )  # fmt: skip


def pooled_first() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))


def in_place() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 2), nn.MaxPool2d(2),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3), nn.ReLU(inplace=True), nn.Linear(3, 2),
    )  # fmt: skip


def residual() -> nn.Module:
    body = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1, bias=False))
    return nn.Sequential(nn.Conv2d(1, 2, 3), Residual(body), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 2))


def evaluated() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), norm(2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2), norm(2, False),
        nn.ReLU(), nn.Flatten(), nn.Linear(8, 2),
    ).eval()  # fmt: skip


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2),
        nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(),
    )  # fmt: skip


EXACT = (plain, unbiased, pooled_first, in_place, residual, evaluated)
X = torch.randint(0, 3, (12, 1, 8, 8), generator=torch.Generator().manual_seed(1)).double()
FEW = X[:4]
SKY = torch.cat([torch.ones_like(X[:, :, :6]), X[:, :, 6:]], 2)  # equal patches
Closure = Callable[[nn.Module, Tensor], Tensor]


def total(model: nn.Module, x: Tensor) -> Tensor:
    """A loss that stays an integer."""
    y: Tensor = model(x)
    return (y * torch.arange(1, y.numel() + 1, device=y.device).reshape(y.shape)).sum()


def steps(
    model: nn.Module, inputs: list[Tensor], loss: Closure = total, **options: bool
) -> tuple[list[Certificate], list[Tensor]]:
    """Certificates of one step for each input, and the gradients they left, on the host."""
    adcert.convert(model)
    with Monitor(model, **options) as monitor:  # type: ignore[arg-type]
        done = []
        for x in inputs:
            with monitor.step() as step:
                loss(model, x).backward()
            done.append(step)
        certificates = [step.certificate() for step in done]
    return certificates, [host(p.grad) for p in model.parameters() if p.grad is not None]


def both(place: Place, build: Callable[[], nn.Module], inputs: list[Tensor], **given: object) -> list[Certificate]:
    """The same steps on the host and on a device; certificates of the device, compared with the host's."""
    model = integers(build()).to(inputs[0].dtype)
    elsewhere = place.to(copy.deepcopy(model))
    expected, gradients = steps(model, inputs, **given)  # type: ignore[arg-type]
    found, there = steps(elsewhere, [place.to(x) for x in inputs], **given)  # type: ignore[arg-type]
    assert [content(c) for c in found] == [content(c) for c in expected]
    assert all(torch.equal(a, b) for a, b in zip(gradients, there, strict=True))
    return found
