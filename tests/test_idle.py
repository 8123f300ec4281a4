"""E6: units that no way leads from to the loss without a factor that is exactly zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert import Verdict, certify, idle, layers
from adcert.recorder import Recorder, recording


class Two(nn.Module):
    def __init__(self, x: float = 0.0, v: float = 0.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([x], dtype=torch.float64))
        self.v = nn.Parameter(torch.tensor([v], dtype=torch.float64))


def odd(x: Tensor) -> Tensor:
    """x, written so that autodiff is wrong at 0."""
    return torch.relu(x) - torch.relu(-x)


IDLE: list[tuple[str, Callable[[Two], Tensor]]] = [
    ("zero weight", lambda m: odd(m.x) * m.v + m.x),
    ("constant zero", lambda m: odd(m.x) * torch.zeros(1, dtype=torch.float64) + m.x),
    ("flat piece above a smooth map", lambda m: torch.relu(odd(m.x) - 1) + m.x),
    ("loser above a smooth map", lambda m: torch.stack([2 * odd(m.x), m.x + 1]).max(0).values + m.x),
    ("gamma 0", lambda m: F.layer_norm(torch.cat([odd(m.x), m.x + 1]), (2,), m.v.expand(2)) + m.x),
    ("gamma 0 over data", lambda m: F.layer_norm(torch.ones_like(m.x)[None], (1,), None, odd(m.x)) * m.v + m.x),
    ("linear layer of zeros", lambda m: F.linear(odd(m.x), m.v[:, None]) + m.x),
    ("cross entropy", lambda m: F.cross_entropy(torch.stack([odd(m.x) * m.v, m.x], 1), torch.zeros(1).long())),
]


@pytest.mark.parametrize(("name", "function"), IDLE)
def test_idle_units_need_no_rows(name: str, function: Callable[[Two], Tensor]) -> None:
    model = Two()
    certificate = certify(lambda: function(model).sum(), model)
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons
    assert sum(layer.exemptions.get("irrelevant", 0) for layer in certificate.layers) >= 2
    strict = certify(lambda: function(model).sum(), model, strict=True)
    assert strict.verdict is not Verdict.CERTIFIED


FELT: list[tuple[str, Callable[[Two], Tensor]]] = [
    ("used", lambda m: odd(m.x)),
    ("used by cross entropy", lambda m: F.cross_entropy(torch.stack([odd(m.x), m.x], 1), torch.zeros(1).long())),
    ("slope of a PReLU", lambda m: F.prelu(m.v - 1, odd(m.x))),
    ("slope of a PReLU over data", lambda m: F.prelu(torch.full((1,), -1.0, dtype=torch.float64), odd(m.x)) + m.v),
    ("overflow", lambda m: torch.eye(2, 1, dtype=torch.float64) @ odd(m.x)[:, None] * 1e200 * 1e200 + m.v),
    ("weight of one", lambda m: odd(m.x) * (m.v + 1)),
    ("behind a touched kink: a zero backward gradient", lambda m: torch.relu(odd(m.x) - m.x / 2) - torch.relu(-m.x)),
    ("cancelling ways to one relu", lambda m: torch.relu(2 * odd(m.x) - m.x + 1) - torch.relu(m.x + 1)),
    ("a tie that it may win", lambda m: torch.stack([odd(m.x), m.x]).max(0).values),
]


@pytest.mark.parametrize(("name", "function"), FELT)
def test_felt_units_do(name: str, function: Callable[[Two], Tensor]) -> None:
    model = Two()
    certificate = certify(lambda: function(model).sum(), model)
    assert certificate.verdict is not Verdict.CERTIFIED


def masks(function: Callable[[], Tensor], model: nn.Module) -> list[list[bool]]:
    recorder = Recorder()
    with recording(recorder):
        loss = function()
    graph = layers.Graph([loss.grad_fn], recorder.records, layers.Leaves(model))
    found = idle.felt(graph)
    assert found is not None
    return [found[record].tolist() if record in found else [] for record in recorder.records]


def test_masks_by_hand() -> None:
    """Two hidden units; the second layer reads the first one only, and pools it against a larger constant part."""
    first, second = nn.Linear(1, 2, dtype=torch.float64), nn.Linear(2, 2, dtype=torch.float64)
    with torch.no_grad():
        second.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        second.bias.copy_(torch.tensor([0.0, 100.0]))
    relu = adcert.nn.ReLU()
    pool = adcert.nn.MaxPool2d((1, 2))
    model = nn.ModuleList([first, second])
    x = torch.ones(1, 1, dtype=torch.float64)

    def loss() -> Tensor:
        return pool(second(relu(first(x)))[None, None]).sum()

    assert masks(loss, model) == [[True, False], [True]]


def test_sums_of_opposite_ways_do_not_cancel() -> None:
    """z - z is 0, but it is felt: absolute values are added up."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    relu = adcert.nn.ReLU()

    def loss() -> Tensor:
        z = relu(w)
        return (z - z).sum()

    assert masks(loss, nn.ParameterList([w])) == [[True]]


def test_an_operation_without_a_rule_feels_all_that_it_reads() -> None:
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    recorder, relu = Recorder(), adcert.nn.ReLU()
    with recording(recorder):
        loss = torch.special.i0(relu(w)).sum()
    graph = layers.Graph([loss.grad_fn], recorder.records, layers.Leaves(nn.ParameterList([w])))
    felt = idle.felt(graph)
    assert felt is not None
    assert [mask.tolist() for mask in felt.values()] == [[True]]
