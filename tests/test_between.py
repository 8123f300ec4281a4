"""Proxies between the one-sided derivatives (Theorem E5): literal cases, and a hull of gradients nearby."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from core_helpers import param
from scipy.optimize import linprog
from torch import Tensor, nn

import adcert
from adcert.between import Classes, Free, joined, judged
from adcert.certificate import Block, Certificate, Column, LayerReport
from adcert.errors import CertificateError
from adcert.feasibility import Proof

SEEDS = 150
ONES = torch.ones(2, 3, dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)


class Abs(nn.Module):
    """abs: AD's 0 at the kink is half of -1 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.abs(x)


def linear(inputs: int = 3, outputs: int = 2, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


def head(inputs: int = 2) -> nn.Linear:
    layer = linear(inputs, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, inputs + 1))
    return layer


def certify(model: nn.Module, x: Tensor, strict: bool = False) -> Certificate:
    certificate = adcert.certify(lambda: model(x).sum(), model, strict=strict)
    certificate.verify()
    return certificate


def half() -> adcert.nn.ReLU:
    return adcert.nn.ReLU(proxy=0.5)


# ---- a bias --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [half, Abs, lambda: adcert.nn.LeakyReLU(0.25, proxy=0.5)])
@pytest.mark.parametrize("strict", [False, True])
def test_one_lambda_and_a_bias(activation, strict: bool) -> None:
    """Theorem 4 with lambda in (0, 1): in dC, whatever the batch."""
    model = nn.Sequential(linear(), activation(), head())
    certificate = certify(model, ONES, strict)
    assert (certificate.verdict, certificate.claim, certificate.theorem) == ("certified", "clarke", "Theorem 4")
    assert [block.rules for block in certificate.blocks] == [("free",), ("free",)]
    assert adcert.analyze(model, ONES).theorem == "Theorem 4"
    assert not certificate.replay(lambda: model(ONES).sum(), model).replayable


def test_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2, dtype=torch.float64), half(), nn.Flatten(), head(8))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    certificate = certify(model, torch.ones(2, 1, 3, 3, dtype=torch.float64))
    assert (certificate.verdict, certificate.claim, certificate.theorem) == ("certified", "clarke", "Theorem 6")


def test_two_lambdas_of_one_bias() -> None:
    """relu(b) with proxy 1/2 minus relu(b) with proxy 1/4: the gradient is 0 everywhere, AD's 1/4."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = param([0.0])
            self.one, self.two = half(), adcert.nn.ReLU(proxy=0.25)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x * 1 + self.b) - self.two(x * 1 + self.b)

    certificate = certify(Net(), torch.zeros(1, dtype=torch.float64))
    assert certificate.verdict == "undecided"
    assert any("several lambdas" in reason or "not independent" in reason for reason in certificate.reasons)
    assert adcert.analyze(Net(), torch.zeros(1, dtype=torch.float64)).theorem == ""


def test_a_side_and_a_proxy_between_on_one_bias() -> None:
    """2 relu(b) - b - abs(b) is 0; AD's gradient is -1 (Gallery, 12)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = param([0.0])

        def forward(self, x: Tensor) -> Tensor:
            return 2 * torch.relu(self.b) - self.b - torch.abs(self.b) + x

    assert certify(Net(), torch.zeros(1, dtype=torch.float64)).verdict == "undecided"


def test_two_kinks_with_two_lambdas() -> None:
    """hardtanh(1 + b) + hardtanh(-1 + b) has slope 1 at 0; proxies 1/4, 1/4 have lambdas 3/4, 1/4: AD says 1/2."""
    model = nn.Sequential(linear(1, 1), adcert.nn.Hardtanh(proxy=(0.25, 0.25)))
    with torch.no_grad():
        model[0].weight.fill_(1)
    model[0].weight.requires_grad_(False)
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    certificate = certify(model, x)
    assert certificate.verdict == "undecided"
    same = nn.Sequential(model[0], adcert.nn.Hardtanh(proxy=(0.75, 0.25)))  # one lambda, 1/4: AD says 1
    certificate = certify(same, x)
    assert (certificate.verdict, certificate.claim) == ("certified", "clarke")


# ---- rows of the own layer -----------------------------------------------------------------------


def test_independent_inputs() -> None:
    """Theorem 5 with proxies in dC: no bias, three samples that are the unit vectors."""
    model = nn.Sequential(linear(bias=False), half(), head())
    certificate = certify(model, EYE)
    assert (certificate.verdict, certificate.claim, certificate.theorem) == ("certified", "clarke", "Theorem 5")
    assert certify(model, EYE, strict=True).verdict == "undecided"  # Theorem 8 wants one-sided derivatives


def test_dependent_inputs() -> None:
    """Samples x and -x: relu(w) + relu(-w) with proxies 1/2 and 1/2 is right by luck, and nobody says so."""
    model = nn.Sequential(linear(1, 1, bias=False), half())
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    certificate = certify(model, x)
    assert certificate.verdict == "undecided"
    assert "not independent" in certificate.reasons[0]
    assert "joint" in certificate.reasons[1]


def test_equal_rows_are_two_choices() -> None:
    """relu with 1/2 minus relu with 1/4 of one and the same w: rows that are equal must not count as one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = linear(1, 1, bias=False)
            self.one, self.two = half(), adcert.nn.ReLU(proxy=0.25)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.one(y) - self.two(y)

    assert certify(Net(), torch.ones(1, 1, dtype=torch.float64)).verdict == "undecided"


def test_independent_features_of_a_convolution() -> None:
    """Theorem E5 where Theorem 5 has no say: patches (1) and nothing else touch."""
    model = nn.Sequential(nn.Conv1d(1, 1, 2, bias=False, dtype=torch.float64), half())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[1.0, -1.0]]]))
    certificate = certify(model, torch.tensor([[[1.0, 1.0, 3.0]]], dtype=torch.float64))
    assert (certificate.verdict, certificate.claim, certificate.theorem) == ("certified", "clarke", "Theorem E5")


# ---- what rests on the choice --------------------------------------------------------------------


def test_a_zero_gradient_below_may_depend_on_the_proxies_above() -> None:
    """z + relu(z - z) with z = relu(b): a touch with gradient 0, for these proxies as far as anybody has looked."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.inner = param([0.0]), half()

        def forward(self, x: Tensor) -> Tensor:
            z = self.inner(self.b + x)
            return z + torch.relu(z - z)

    certificate = certify(Net(), torch.zeros(1, dtype=torch.float64))
    assert certificate.verdict == "undecided"
    assert any("rests on proxies of" in reason for reason in certificate.reasons)


def test_a_pooling_below() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, dtype=torch.float64), half(), nn.MaxPool2d(2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    certificate = certify(model, torch.ones(1, 1, 2, 2, dtype=torch.float64))
    assert certificate.verdict == "undecided"


def test_biases_below_do_not_mind() -> None:
    model = nn.Sequential(linear(), half(), linear(2, 2), nn.ReLU(), head())
    with torch.no_grad():
        model[2].weight.fill_(1)  # with 0 the first layer would be idle
    certificate = certify(model, ONES)
    assert certificate.layers[1].touches == 4
    assert (certificate.verdict, certificate.claim) == ("certified", "clarke")


def test_weight_tying() -> None:
    layer = linear(2, 2)
    model = nn.Sequential(layer, half(), layer, half())
    assert certify(model, torch.ones(1, 2, dtype=torch.float64)).verdict == "undecided"


def test_several_passes_are_one_step() -> None:
    model = nn.Sequential(linear(), half(), head())
    monitor = adcert.Monitor(model, queue=0)
    with monitor.step() as step:
        for x in ONES.split(1):
            model(x).sum().backward()
    certificate = step.certificate()
    certificate.verify()
    assert (certificate.verdict, certificate.claim, certificate.theorem) == ("certified", "clarke", "Theorem 4")


# ---- the records ---------------------------------------------------------------------------------


def block(rows: list[list[float]], rules: tuple[str, ...], **answer) -> Block:
    columns = (Column("w", np.arange(len(rows[0]))),)
    return Block("l", 1, columns, np.array(rows), rules=rules, **answer)


def test_a_block_with_free_rows_needs_independence() -> None:
    good = block([[1.0, 0.0], [1.0, 1.0]], ("free", "touch"), direction=(1, 0))
    assert judged(good) is good
    bad = block([[1.0, 0.0], [2.0, 0.0]], ("free", "touch"), direction=(1, 0))
    assert judged(bad).direction is None and "not independent" in judged(bad).reason
    empty = block([[1.0], [-1.0]], ("free", "touch"), proof=Proof((0, 1), (1, 1)))
    assert judged(empty).nonempty is None
    true = block([[1.0], [-1.0], [1.0]], ("tie", "touch", "free"), proof=Proof((0, 1), (1, 1)))
    assert judged(true) is true
    plain = block([[1.0], [2.0]], ("tie", "touch"), direction=(1,))
    assert judged(plain) is plain


def test_verify_looks_at_free_rows() -> None:
    report = LayerReport("l", ("w",), "none", 1, rows=2, blocks=1)
    good = block([[1.0, 0.0], [1.0, 1.0]], ("free", "touch"), direction=(1, 0))

    def certificate(item: Block, claim: str) -> Certificate:
        return Certificate(
            adcert.Verdict.CERTIFIED, (), (report,), (item,), claim=claim, shapes={"w": (2,)}, scales={"w": 1}
        )

    certificate(good, "clarke").verify()
    with pytest.raises(CertificateError, match="claims bouligand"):
        certificate(good, "bouligand").verify()
    bad = dataclasses.replace(good, rows=np.array([[1.0, 0.0], [2.0, 0.0]]))
    with pytest.raises(CertificateError, match="not independent"):
        certificate(bad, "clarke").verify()
    empty = dataclasses.replace(
        bad, rows=np.array([[1.0, 0.0], [-1.0, 0.0]]), direction=None, proof=Proof((0, 1), (1, 1))
    )
    with pytest.raises(CertificateError, match="either sign"):
        dataclasses.replace(
            certificate(empty, ""), verdict=adcert.Verdict.UNCERTIFIED, reasons=["the system is empty"]
        ).verify()


def test_free_rows_are_saved(tmp_path) -> None:
    certificate = certify(nn.Sequential(linear(), half(), head()), ONES)
    certificate.save(tmp_path / "free.adcert")
    again = Certificate.load(tmp_path / "free.adcert")
    again.verify()
    assert [item.rules for item in again.blocks] == [item.rules for item in certificate.blocks]


def test_classes_of_a_step_are_joined() -> None:
    def classes(op: str, groups: list[int], weight: Fraction) -> Free:
        return Free([Classes(op, "b", torch.tensor(groups), weight, frozenset({"w"}))])

    third = Fraction(1, 3)
    (rows,), doubts = joined([classes("r", [0, 2], third), classes("s", [2, 3], third)], {"b": (4,)})
    assert (rows.count, rows.rule, rows.below, doubts) == (3, "free", frozenset({"w"}), [])
    _, doubts = joined([classes("r", [0, 2], third), classes("s", [2, 3], Fraction(1, 2))], {"b": (4,)})
    assert len(doubts) == 1
    assert joined([], {}) == ([], [])


# ---- against gradients nearby --------------------------------------------------------------------


class Pair(nn.Module):
    """``one(y) - two(s y)`` with ``y = layer(x)``: two operations that share what they read."""

    def __init__(self, layer: nn.Module, one: nn.Module, two: nn.Module, sign: float) -> None:
        super().__init__()
        self.layer, self.one, self.two, self.sign = layer, one, two, sign

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.one(y) - self.two(self.sign * y)


class Sum(nn.Module):
    """Weights 1, 2, ..., so that no unit of the last layer is idle."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.arange(1, x.shape[1] + 1)).sum(1, keepdim=True)


def random_step(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of at most three layers, integers, with proxies anywhere between the one-sided derivatives."""
    draw = random.Random(seed)

    def activation() -> nn.Module:
        proxy = draw.choice((0.0, 0.25, 0.5, 0.75, 1.0))
        kinds = [
            lambda: adcert.nn.ReLU(proxy=proxy),
            lambda: adcert.nn.LeakyReLU(0.5, proxy=0.5 + proxy / 2),
            lambda: adcert.nn.Hardtanh(proxy=(proxy, draw.choice((proxy, 1 - proxy, 0.5)))),
            Abs,
            nn.ReLU,
        ]
        return draw.choice(kinds)()

    layers: list[nn.Module] = []
    width = draw.choice((1, 2))
    x = torch.tensor([[draw.choice((-1.0, 0.0, 1.0)) for _ in range(width)] for _ in range(draw.choice((1, 2, 2, 3)))])
    for _ in range(draw.choice((1, 2, 2))):
        new = draw.choice((1, 2))
        layer = nn.Linear(width, new, bias=draw.random() < 0.6)
        if draw.random() < 0.3:
            layers.append(Pair(layer, activation(), activation(), draw.choice((-1.0, 1.0))))
        else:
            layers += [layer, activation()]
        width = new
    layers.append(Sum())
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            values = [draw.choice((-1, 0, 1)) for _ in range(parameter.numel())]
            parameter.copy_(torch.tensor(values).view_as(parameter))
    weights = torch.tensor([[draw.choice((-2.0, -1.0, 1.0, 2.0))] for _ in range(len(x))])
    return model, x.double(), weights.double()


def gradient(model: nn.Module, x: Tensor, weights: Tensor) -> np.ndarray:
    parameters = list(model.parameters())
    found = torch.autograd.grad((weights * model(x)).sum(), parameters, allow_unused=True)
    each = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.flatten() for g in each]).numpy()


def in_hull(model: nn.Module, x: Tensor, weights: Tensor, seed: int, samples: int = 100) -> bool:
    """Is AD's gradient a convex combination of true gradients at random points nearby? Steps of very different sizes
    reach narrow cells."""
    target = gradient(model, x, weights)
    at = [parameter.detach().clone() for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(seed)
    points = []
    for _ in range(samples):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), at, strict=True):
                size = 10.0 ** -(6 + 3 * torch.rand(value.shape, generator=generator, dtype=torch.float64))
                parameter.copy_(value + size * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        points.append(gradient(model, x, weights))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), at, strict=True):
            parameter.copy_(value)
    hull = np.unique(np.round(np.stack(points), 3), axis=0).T
    count = hull.shape[1]
    slack = np.concatenate([hull, np.eye(len(target)), -np.eye(len(target))], axis=1)
    cost = np.concatenate([np.zeros(count), np.ones(2 * len(target))])
    ones = np.concatenate([np.ones(count), np.zeros(2 * len(target))])[None]
    answer = linprog(cost, A_eq=np.concatenate([slack, ones]), b_eq=np.concatenate([target, [1.0]]))
    assert answer.status == 0
    return bool(answer.fun < 0.02)


def test_certified_gradients_are_convex_combinations() -> None:
    """No false certificate among random networks with proxies of all kinds; some wrong gradients are among them."""
    counts: Counter[str] = Counter()
    for seed in range(SEEDS):
        model, x, weights = random_step(seed)
        certificate = adcert.certify(lambda m=model, x=x, w=weights: (w * m(x)).sum(), model)
        certificate.verify()
        found = adcert.analyze(model, x)
        if found.theorem:
            assert (certificate.verdict, certificate.theorem) == ("certified", found.theorem), seed
        if certificate.verdict is adcert.Verdict.CERTIFIED:
            if certificate.claim == "bouligand" and not any(report.touches for report in certificate.layers):
                continue
            right = in_hull(model, x, weights, seed) or in_hull(model, x, weights, seed + 1, 4000)
            assert right, f"network {seed}: a false certificate by {certificate.theorem}"
            counts[certificate.claim] += 1
            counts[certificate.theorem] += certificate.claim == "clarke"
        else:
            counts["wrong"] += not in_hull(model, x, weights, seed)
    assert min(counts[key] for key in ("clarke", "bouligand", "Theorem 4", "Theorem E5", "wrong")) >= 5, counts
