"""Steps whose model and data are on a GPU have the certificates of the host.

The emulated device fails on tensors of two devices that meet, and fills what has not arrived yet with garbage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from core_helpers import Probe, autograd_rows, engine_rows, look, pairs
from device_networks import (
    EXACT,
    FEW,
    SKY,
    X,
    both,
    evaluated,
    in_place,
    integers,
    norm,
    normalised,
    plain,
    steps,
    total,
    unbiased,
)  # fmt: skip
from networks import random_network
from places import Place, content, opened
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert import Monitor, Verdict, analysis, certify, hull
from adcert.audit import ANALYTIC, GUARDED
from adcert.gallery import ROWS, Row
from adcert.lists import LEAST
from adcert.normalization import BATCH_NORM, eps_of
from adcert.rules import RULES

# ---- the same certificates -----------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("build", EXACT, ids=lambda build: build.__name__)
def test_certificates_are_those_of_the_host(place: Place, build: Callable[[], nn.Module], strict: bool) -> None:
    found = both(place, build, [FEW, X, SKY], strict=strict)
    assert any(layer.ties + layer.touches for layer in found[0].layers)


def test_certificates_from_the_cuda_sources() -> None:
    with opened("kernels") as gpu:
        for build in (unbiased, in_place, evaluated):
            both(gpu, build, [FEW, X[:2]])


def test_every_verdict_was_compared() -> None:
    """The networks above, on the host alone: ties, touches, rows, and both answers."""
    seen = [c for build in EXACT for c in steps(integers(build()), [FEW, X, SKY])[0]]
    assert {c.verdict for c in seen} >= {Verdict.CERTIFIED, Verdict.UNCERTIFIED}
    assert sum(layer.rows for c in seen for layer in c.layers) > 20
    assert any(rule == "congruent" for c in seen for layer in c.layers for rule in layer.exemptions)


def test_rounded_rows_come_from_the_host(gpu: Place) -> None:
    """Batch statistics round: the emulated device rounds as the host does, a real one in its own way."""
    if gpu.emulation:
        found = both(gpu, normalised, [X, X.flip(3)])
        assert sum(layer.rows for layer in found[0].layers) > 0
    else:
        found = steps(gpu.to(integers(normalised())), [gpu.to(X)] * 2)[0]
    for certificate in found:
        certificate.verify()
        assert not any("failed" in reason for reason in certificate.reasons)


@pytest.mark.parametrize("strict", [False, True])
def test_random_networks(gpu: Place, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hull, "SECONDS", 60.0)  # as long as it takes, on either
    for seed in range(40):
        network = random_network(seed)
        expected = certify(network.closure, adcert.convert(network.model), strict=strict)
        away = replace(
            network, model=gpu.to(network.model), inputs=gpu.to(network.inputs), weights=gpu.to(network.weights)
        )
        assert content(certify(away.closure, away.model, strict=strict)) == content(expected), seed


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.number)
def test_the_gallery(gpu: Place, row: Row) -> None:
    with torch.device(gpu.device):
        model = gpu.to(adcert.convert(row.build()))
        certificate = certify(model, model)
    assert certificate.verdict.value in row.allowed
    assert content(certificate)["verdict"] is certify(here := adcert.convert(row.build()), here).verdict


def test_low_precision_under_autocast(gpu: Place) -> None:
    """Thousands of ties, more exact rows than are looked at one by one, lists in no order."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return model(x).float().sum()

    x = torch.randint(0, 3, (32, 1, 32, 32), generator=torch.Generator().manual_seed(2)).float()
    wide = lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())  # noqa: E731
    found = both(gpu, wide, [x, x], loss=loss)
    assert found[-1].layers[0].ties > LEAST
    assert found[-1].layers[0].rows > analysis.SAMPLE
    assert found[-1].verdict is Verdict.UNCERTIFIED


class Twice(nn.Module):
    """One module, two records of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = unbiased()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) + self.body(x.flip(3))
        return y


def test_modules_that_are_used_twice(gpu: Place) -> None:
    assert len(both(gpu, Twice, [FEW, FEW, FEW])[-1].fingerprints) == 6


def test_other_inputs(gpu: Place) -> None:
    """Nothing, one sample, strides of images in channels_last and of every other column."""
    model = lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.MaxPool2d(2))  # noqa: E731
    wide = torch.cat([X, X.flip(2)], 1)
    spread = torch.stack([wide, wide], -1)[..., 0]
    for x in (wide[:0], wide[:1], wide[:5].to(memory_format=torch.channels_last), spread[:5]):
        both(gpu, model, [x, x])


class Move(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.device)


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_model_on_two_devices(gpu: Place, cut: int) -> None:
    def build(device: str) -> nn.Sequential:
        layers = list(integers(unbiased()))
        below, above = nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:]).to(device)
        return nn.Sequential(below, Move(device), above)

    expected, gradients = steps(build("cpu"), [FEW, X, FEW])
    found, there = steps(build(gpu.device), [FEW, X, FEW])
    assert all(torch.equal(a, b) for a, b in zip(gradients, there, strict=True))
    for a, b in zip(found, expected, strict=True):
        a.verify()
        assert (a.verdict, a.reasons, a.fingerprints) == (b.verdict, b.reasons, b.fingerprints)
        seen = [[(layer.ties, layer.touches) for layer in one.layers] for one in (a, b)]
        assert seen[0] == seen[1]


def test_several_backward_passes(gpu: Place) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        first = total(model, x)
        first.backward(retain_graph=True)
        total(model, x.flip(2)).backward()
        return first

    both(gpu, plain, [X, X], loss=loss)


# ---- names, replay, defaults ---------------------------------------------------------------------


def test_both_names_of_batch_normalisation(gpu: Place) -> None:
    """cuDNN takes images with an eps that is not too small; the rest is torch's own."""
    images, table = gpu.to(X).float().requires_grad_(), gpu.to(torch.ones(2, 3)).requires_grad_()
    norms = gpu.to(norm(1)), gpu.to(nn.BatchNorm1d(3, eps=0.5))
    nodes = [norms[0](images).grad_fn, norms[1](table).grad_fn]
    assert {node.name() for node in nodes} == {f"{name}0" for name in BATCH_NORM}
    assert [eps_of(node) for node in nodes] == [0.25, 0.5]


def test_the_witness_is_replayed(place: Place) -> None:
    model, x = place.to(adcert.convert(integers(plain()))), place.to(FEW)
    closure = lambda: total(model, x)  # noqa: E731
    before = [p.detach().clone() for p in model.parameters()]
    certificate = certify(closure, model)
    assert certificate.verdict is Verdict.CERTIFIED
    outcome = certificate.replay(closure, model)
    assert outcome.converges, outcome
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_replay_repeats_the_random_numbers_of_the_device(place: Place) -> None:
    model, x = place.to(adcert.convert(integers(plain()))), place.to(X)
    closure = lambda: total(model, F.dropout(x, 0.5) * 2)  # noqa: E731
    torch.manual_seed(3)
    if place.device == "cuda":
        torch.cuda.manual_seed_all(3)
    state = torch.cuda.get_rng_state() if place.device == "cuda" else torch.get_rng_state()
    certificate = certify(closure, model)
    if place.device == "cuda":
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)
    outcome = certificate.replay(closure, model)
    assert outcome.replayable == (certificate.verdict is Verdict.CERTIFIED), outcome.reason


@pytest.mark.parametrize("model", ["vgg11-bn", "resnet18"])
def test_training_leaves_the_same_weights(model: str) -> None:
    from adcert.cli._loop import Job, run

    def train(device: str) -> tuple[object, ...]:
        outcome = run(Job(model=model, data="photos", steps=2, batch_size=16, device=device), lambda *_: None)
        summaries = [result.summary for result in outcome.results]
        kept = ("verdict", "reasons", "ties", "touches", "rows", "exemptions")
        return outcome.digest, [{key: summary[key] for key in kept} for summary in summaries if summary]

    expected = train("cpu")
    with opened("emulated"):
        assert train("cuda") == expected


def test_a_default_device_of_the_users_does_not_matter() -> None:
    """Nothing of ours may land there: on "meta" it would have no values."""
    model = adcert.convert(integers(unbiased()))
    expected = [content(c) for c in steps(integers(unbiased()), [X, X])[0]]
    with torch.device("meta"), Monitor(model, queue=0) as monitor:
        for _ in range(2):
            with monitor.step():
                model(X).sum().backward()
    sums = [content(c) for c in steps(integers(unbiased()), [X, X], loss=lambda model, x: model(x).sum())[0]]
    assert [content(c) for c in monitor.certificates] == sums
    assert expected


@pytest.mark.parametrize("p", [0.5, 0.3, 0.0, 1.0])
def test_dropout_as_a_gpu_does_it(p: float) -> None:
    """One node with a mask, where the CPU multiplies: the partial backward engine knows both."""
    model = integers(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)))

    def forward(probe: Probe) -> Tensor:
        torch.manual_seed(4)
        return probe.relu(model[1](torch.native_dropout(model[0](X[:3, 0, 0, :3]), p, True)[0]))

    seen = look(forward, model)
    wanted = pairs((0, 1), (4, 2), (-1, 8))
    found = engine_rows(seen, seen.records[0], wanted)
    for name, expected in autograd_rows(seen.inputs[0], seen.parameters(), wanted).items():
        assert found[name].radius is not None
        assert bool(((found[name].value - expected).abs() <= found[name].radius).all()), name
        assert bool((found[name].radius <= expected.abs() * 2.0**-20 + 1e-200).all()), name


@pytest.mark.parametrize(
    "kind",
    """MiopenBatchNorm FlashAttention EfficientAttention CudnnAttention FusedRmsNorm CudnnRnn
    ThnnFusedLstmCell""".split(),
)
def test_kernels_that_nobody_has_vouched_for_stay_undecided(kind: str) -> None:
    assert f"{kind}Backward" not in ANALYTIC | GUARDED.keys() | RULES.keys()
