"""Theorem H: gradients that are convex combinations of certified elements; by hand, by oracle, and what is refused."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import random_network
from test_gallery import BY_NUMBER
from test_joint import Function, r
from torch import Tensor, nn

import adcert
from adcert import Certificate, Verdict, backward, branches, certify, hull, oracle
from adcert.certificate import Combination
from adcert.errors import CertificateError

CERTIFIED = Verdict.CERTIFIED


def certified(model: nn.Module, strict: bool = False) -> Certificate:
    """The verified certificate of one step; a certified gradient is one by the oracle, too."""
    certificate = certify(model, model, strict=strict)
    certificate.verify()
    if certificate.verdict is CERTIFIED:
        assert oracle.judge(model, model).member is True
    return certificate


def combined(model: nn.Module) -> dict[tuple[float, ...], int]:
    """The weight of every element of a step that only Theorem H certifies."""
    certificate = certified(model)
    assert (certificate.verdict, certificate.system, certificate.theorem) == (CERTIFIED, "hull", "Theorem H")
    found = certificate.combination
    assert found is not None and certificate.reasons == []
    return {tuple(e): w for e, w in zip(found.elements.tolist(), found.weights, strict=True)}


def extremes(m: Any) -> Tensor:
    """max(min(x, -y), y - x) of Khan and Barton."""
    return torch.maximum(torch.minimum(m.w[:1], -m.w[1:]), m.w[1:] - m.w[:1])


def lemma7(m: Any) -> Tensor:
    """max(u + b, b) - max(b - u, b) = u by even splits."""
    u, b = m.w[:1], m.w[1:]
    return torch.maximum(u + b, b) - torch.maximum(b - u, b)


class Pooled(nn.Module):
    """ReLU and pooling in one, of (x1, x2) and (-x1, -x2) at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, 1, 1, 2, dtype=torch.float64))
        self.pool = nn.Sequential(nn.ReLU(), nn.MaxPool2d((1, 2)))

    def forward(self) -> Tensor:
        found: Tensor = (self.pool(self.w) + self.pool(-self.w)).sum()
        return found


KNOWN: list[tuple[Callable[[Any], Tensor], list[float], dict[tuple[float, ...], int]]] = [
    (lambda m: r(m.w) + r(-m.w), [0.0], {(-1.0,): 1, (1.0,): 1}),
    (lambda m: 3 * r(m.w) + r(-m.w), [0.0], {(-1.0,): 3, (3.0,): 1}),
    (lambda m: r(m.w) + m.w.clamp(min=0) - m.w.clamp(min=0), [0.0], {(0.0,): 1}),
    (lambda m: r(m.w) + m.w.abs() - m.w.abs(), [0.0], {(0.0,): 1}),
    (lambda m: m.w.abs() - r(m.w) - r(-m.w), [0.0], {(0.0,): 1}),
    (lambda m: m.w.abs() + (2 * m.w).abs(), [0.0], {(-3.0,): 1, (3.0,): 1}),
    (lambda m: r(m.w * r(m.w + 1) - 2) + r(2 - m.w * r(m.w + 1)), [1.0], {(-3.0,): 1, (3.0,): 1}),
    (lambda m: m.w.amax() + m.w.flip(0).amax(), [1.0, 1.0], {(0.0, 2.0): 1, (2.0, 0.0): 1}),
    (lambda m: m.w.amin() + m.w.amin(), [1.0, 1.0], {(0.0, 2.0): 1, (2.0, 0.0): 1}),
    (extremes, [0.0, 0.0], {(-1.0, 1.0): 2, (0.0, -1.0): 1, (1.0, 0.0): 1}),
    (lemma7, [0.0, 0.0], {(1.0, 0.0): 1}),
]


@pytest.mark.parametrize(("function", "point", "expected"), KNOWN)
def test_by_hand(function: Any, point: list[float], expected: dict[tuple[float, ...], int]) -> None:
    assert combined(Function(function, w=point)) == expected


@pytest.mark.parametrize("number", ["8", "18"])
def test_rows_of_the_gallery(number: str) -> None:
    found = combined(adcert.convert(BY_NUMBER[number].build()))
    assert sum(w * e[0] for e, w in found.items()) == 0


def test_a_fused_pooling() -> None:
    """AD's gradient is 0, the mean of the elements at x and -x."""
    found = combined(adcert.convert(Pooled()))
    total = np.sum([w * np.array(e) for e, w in found.items()], axis=0)
    assert not total.any() and all(sorted(map(abs, e)) in ([0.0, 1.0], [1.0, 1.0]) for e in found)


@pytest.mark.parametrize("number", ["1", "2", "3", "9", "9b.1", "9b.2", "10", "11", "12", "13", "19"])
def test_wrong_rows_of_the_gallery(number: str) -> None:
    assert certified(adcert.convert(BY_NUMBER[number].build())).verdict is not CERTIFIED


def _positive(x: Tensor) -> Tensor:
    return torch.maximum(x, torch.zeros_like(x))


WRONG: list[tuple[Callable[[Any], Tensor], list[float]]] = [
    (lambda m: _positive(_positive(m.w)) - _positive(m.w), [0.0]),
    (lambda m: r(m.w * r(m.w + 1) - 2) - r(2 - m.w * r(m.w + 1)), [1.0]),
    (lambda m: m.w.abs() - 2 * r(m.w) + m.w, [0.0]),
    (lambda m: torch.nn.functional.max_pool1d(m.w.reshape(1, 1, 2), 2) - m.w.amax(), [1.0, 1.0]),
    (lambda m: r(m.w) - r(-m.w) + m.w.abs().detach(), [0.0]),
]


@pytest.mark.parametrize(("function", "point"), WRONG)
def test_wrong_gradients(function: Any, point: list[float]) -> None:
    model = Function(function, w=point)
    assert certified(model).verdict is not CERTIFIED and oracle.judge(model, model).member is False


# ---- what it is not tried for ----------------------------------------------------------------------------------

BOTH = KNOWN[0][0]


def losses(model: nn.Module, *functions: Callable[[Any], Tensor]) -> Certificate:
    with adcert.Monitor(model) as monitor, monitor.step() as step:
        for function in functions:
            function(model).sum().backward()
    step.certificate().verify()
    return step.certificate()


def test_one_number_in_one_backward_pass() -> None:
    model = Function(BOTH, w=[0.0])
    assert losses(model, BOTH).system == "hull"
    assert losses(model, BOTH, BOTH).verdict is not CERTIFIED
    assert losses(model, BOTH, lambda m: m.w * 2).verdict is not CERTIFIED
    two = Function(lambda m: BOTH(m), w=[0.0, 0.0])
    with adcert.Monitor(two) as monitor, monitor.step() as step:
        BOTH(two).backward(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert step.certificate().verdict is not CERTIFIED


def test_the_same_number_once_more() -> None:
    model = Function(BOTH, w=[0.0])
    with adcert.Monitor(model) as monitor, monitor.step() as step:
        loss = step.loss(BOTH(model).sum())
        loss.backward()
    assert step.certificate().system == "hull"


def test_strict() -> None:
    assert certified(Function(BOTH, w=[0.0]), strict=True).verdict is Verdict.UNCERTIFIED


@pytest.mark.parametrize("name", ["DECISIONS", "ENTRIES", "UNITS", "SECONDS", "DIRECTIONS"])
def test_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hull, name, -1)
    assert certified(Function(BOTH, w=[0.0])).verdict is Verdict.UNCERTIFIED


def test_rounded_elements() -> None:
    """0.1 w relu(0.3 w) has a gradient that is known up to rounding only."""
    product = lambda m: 0.1 * m.w * r(0.3 * m.w)  # noqa: E731
    at = product(Function(product, w=[0.7])).detach()
    model = Function(lambda m: r(product(m) - at) + r(at - product(m)), w=[0.7])
    assert certify(model, model).verdict is not CERTIFIED


def test_an_operation_without_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise backward.Unsupported("NoBackward")

    monkeypatch.setattr(branches, "through_record", refuse)
    assert certified(Function(BOTH, w=[0.0])).verdict is Verdict.UNCERTIFIED


def test_shares_that_are_rounded() -> None:
    model = Function(lambda m: m.w.amax() + m.w.amax(), w=[1.0, 1.0, 1.0])
    assert certify(model, model).verdict is Verdict.UNDECIDED


def test_an_even_split_that_torch_does_not_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """The split is measured: without a known operation nothing is combined."""
    monkeypatch.setattr(branches, "_EXTREMA", {})
    branches._even.cache_clear()
    model = Function(KNOWN[7][0], w=[1.0, 1.0])
    assert certify(model, model).verdict is Verdict.UNDECIDED
    branches._even.cache_clear()


ORDERS: list[tuple[Callable[[Any], Tensor], list[float]]] = [
    (lambda m: m.w.median(0).values + m.w.abs().sum(), [0.0, 0.0, 0.0]),
    (lambda m: (m.w.sort().values * torch.tensor([2.0, -1.0, 1.0])).sum() + m.w.abs().sum(), [0.0, 0.0, 0.0]),
    (lambda m: (m.w.topk(2).values * torch.tensor([1.0, 3.0])).sum() + m.w.abs().sum(), [0.0, 0.0, 0.0]),
    (lambda m: m.w.kthvalue(2).values + m.w[:2].abs().sum() + r(m.w[2] - m.w[1]), [0.0, 0.0, 0.0, 1.0]),
    (lambda m: (m.w.cummax(0).values * torch.tensor([1.0, 2.0, -1.0])).sum() + m.w.abs().sum(), [0.0, 0.0, 0.0]),
]


@pytest.mark.parametrize(("loss", "w"), ORDERS)
def test_order_statistics(loss: Callable[[Any], Tensor], w: list[float]) -> None:
    """Autodiff takes 0 for |x| at 0 and one entry of every rank: a mean of the choices along some directions."""
    combined(Function(loss, w=w))


def test_an_order_statistic_that_autodiff_gets_wrong() -> None:
    """median(w) - median(-w) is 2 median(w); where it takes two entries its gradient is no convex combination."""
    model = Function(lambda m: m.w.median(0).values - (-m.w.flip(0)).median(0).values, w=[0.0, 0.0, 0.0])
    certificate = certified(model)
    assert (certificate.verdict is CERTIFIED) == bool(oracle.judge(model, model).member)


# ---- the certificate -------------------------------------------------------------------------------------------


def test_maxima_beside_a_tie() -> None:
    """One of two windows ties: what the other one passes on is not split."""
    a = nn.Parameter(torch.tensor([0.0, 2.0], dtype=torch.float64))
    b = nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64))

    def loss() -> torch.Tensor:
        return (torch.maximum(a, b) + torch.relu(a - b) + torch.relu(b - a)).sum()

    certificate = certify(loss, nn.ParameterList([a, b]))
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons
    certificate.verify()


def test_a_leaf_as_another_root_leaves_no_combination() -> None:
    """Its gradient adds up with the second root's: what is combined is the gradient of one number in one pass."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    monitor = adcert.Monitor(nn.ParameterList([w]))
    with monitor.step() as step:
        w.backward(torch.ones(1, dtype=torch.float64))
        (torch.relu(w) + torch.relu(-w)).sum().backward()
    assert step.certificate().system != "hull"


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = Function(extremes, w=[0.0, 0.0])
    certified(model).save(tmp_path / "hull.adcert")
    loaded = Certificate.load(tmp_path / "hull.adcert")
    loaded.verify()
    assert (loaded.system, loaded.claim, len(loaded.blocks)) == ("hull", "clarke", 3)
    assert loaded.combination is not None and loaded.combination.weights == (2, 1, 1)
    assert not loaded.directions["w"].any()
    assert loaded.replay(model, model).reason.startswith("not replayable")


def test_one_element_is_replayed() -> None:
    model = Function(lemma7, w=[0.0, 0.0])
    certificate = certified(model)
    assert certificate.claim == "bouligand" and len(certificate.blocks) == 1
    assert certificate.directions["w"].any()
    replayed = certificate.replay(model, model)
    assert replayed.replayable and replayed.converges


def _with(certificate: Certificate, **changes: Any) -> Certificate:
    assert certificate.combination is not None
    return dataclasses.replace(certificate, combination=dataclasses.replace(certificate.combination, **changes))


ALTERED: dict[str, Callable[[Certificate], Certificate]] = {
    "target": lambda c: _with(c, target=np.array([0.5])),
    "weights": lambda c: _with(c, weights=(1, 2)),
    "negative": lambda c: _with(c, weights=(-1, -1)),
    "no weight": lambda c: _with(c, weights=(0, 0)),
    "few weights": lambda c: _with(c, weights=(1,)),
    "elements": lambda c: _with(c, elements=np.array([[1.0], [1.0]])),
    "shape": lambda c: _with(c, elements=np.array([[1.0, 0.0], [-1.0, 0.0]])),
    "nan": lambda c: _with(c, target=np.array([np.nan])),
    "direction": lambda c: dataclasses.replace(
        c, blocks=(dataclasses.replace(c.blocks[0], direction=(0,)), *c.blocks[1:])
    ),
    "columns": lambda c: dataclasses.replace(c, blocks=(dataclasses.replace(c.blocks[0], columns=()), *c.blocks[1:])),
    "fewer blocks": lambda c: dataclasses.replace(c, blocks=c.blocks[:1]),
    "one element": lambda c: dataclasses.replace(c, claim="bouligand"),
    "theorem": lambda c: dataclasses.replace(c, theorem="Theorem E4"),
    "system": lambda c: dataclasses.replace(c, system="joint"),
    "missing": lambda c: dataclasses.replace(c, combination=None),
}


@pytest.mark.parametrize("name", ALTERED)
def test_altered(name: str) -> None:
    certificate = certified(Function(BOTH, w=[0.0]))
    with pytest.raises(CertificateError):
        ALTERED[name](certificate).verify()


def test_a_combination_elsewhere() -> None:
    certificate = certified(Function(lambda m: r(m.w), w=[0.0]))
    whole = Combination(np.zeros((1, 1)), np.zeros(1), (1,))
    with pytest.raises(CertificateError, match="belong together"):
        dataclasses.replace(certificate, combination=whole).verify()


# ---- random networks -------------------------------------------------------------------------------------------


def test_random_networks() -> None:
    """What only Theorem H certifies the exact oracle confirms; it finds some that the systems do not."""
    counts: Counter[str] = Counter()
    for seed in range(150):
        network = random_network(seed)
        certificate = certify(network.closure, adcert.convert(network.model))
        certificate.verify()
        counts[certificate.system if certificate.verdict is CERTIFIED else "none"] += 1
        if certificate.system == "hull":
            known = oracle.judge(network.closure, network.model, samples=100, budget=100).member
            assert known is not False, seed
            counts["confirmed"] += known is True
    print(dict(counts))
    assert counts["confirmed"] >= 4
