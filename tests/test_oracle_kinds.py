"""The oracle on every kind of operation, against torch's own gradients near the point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle_cases import Case, case, names
from torch import nn

from adcert import oracle
from adcert.oracle.subdifferential import Evidence

Array = np.ndarray
STEP = 2.0**-20
SEEDS = 8


def gradient_at(problem: Case, shift: Array) -> Array:
    """torch's gradient at w + shift."""
    start = [p.detach().clone() for p in problem.model.parameters()]
    parts = np.split(shift, np.cumsum([p.numel() for p in start])[:-1])
    try:
        with torch.no_grad():
            for p, part in zip(problem.model.parameters(), parts, strict=True):
                p.add_(torch.tensor(part).view_as(p))
        return flat(oracle.ad_gradient(problem.closure, problem.model))
    finally:
        with torch.no_grad():
            for p, value in zip(problem.model.parameters(), start, strict=True):
                p.copy_(value)


def flat(gradient: dict[str, torch.Tensor]) -> Array:
    return np.concatenate([g.flatten().numpy() for g in gradient.values()])


@pytest.mark.parametrize("name", names())
def test_cells_are_what_torch_sees_nearby(name: str) -> None:
    """Every element is torch's gradient a little way along its direction, and torch's gradient anywhere near is close
    to some element. Random arcs in rational arithmetic meet no other elements either."""
    several = 0
    for seed in range(SEEDS):
        problem = case(name, seed)
        known = oracle.subdifferential(problem.closure, problem.model, samples=0, budget=1000)
        elements, possible = (x.astype(np.float64) * float(known.unit) for x in (known.scaled, known.scaled_possible))
        several += len(elements) > 1
        room = 2e-3 * (1 + np.abs(elements).max(initial=0.0))
        for element, arc in list(zip(elements, known.arcs, strict=True))[:20]:
            step = np.array(arc[0], dtype=np.float64)
            near = gradient_at(problem, STEP * step / max(1.0, np.abs(step).max()))
            assert np.abs(near - element).max() < room, f"{name}, case {seed}: an element that torch does not meet"
        if known.complete:
            rng = np.random.default_rng(seed)
            everything = np.concatenate([elements, possible])
            # not sparse where torch rounds: a variance that stays 0 is noise to it
            for sparse in (0.3 if known.exact else 1.0, 1.0) * 6:
                step = rng.integers(-9, 10, elements.shape[1]) * (rng.random(elements.shape[1]) < sparse)
                near = gradient_at(problem, STEP * (step + rng.integers(-99, 99, elements.shape[1]) * 2.0**-9))
                assert np.abs(everything - near).max(axis=1).min() < room, f"{name}, case {seed}: a cell was missed"
            if known.exact:
                evidence = Evidence(oracle.trace(problem.closure, problem.model))
                evidence.sample(60, (), 0)
                met = set(map(tuple, evidence.known().matrix.tolist()))
                assert met <= set(map(tuple, known.matrix.tolist())) | set(known.possible)
    assert several or name in ("activation: elu", "activation: celu"), "no kink was touched: these cases test nothing"


@pytest.mark.parametrize("name", names())
def test_interpretation_at_generic_points(name: str) -> None:
    """Where no kink is touched there is one element, and it is torch's gradient."""
    problem = case(name, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(torch.randint(-(2**20), 2**20, p.shape, generator=generator).to(p.dtype) * 2.0**-21)
    known = oracle.subdifferential(problem.closure, problem.model)
    assert known.differentiable
    assert known.contains(oracle.ad_gradient(problem.closure, problem.model)) is True


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)


SMOOTH = {
    **{
        type(m).__name__: m
        for m in (nn.GELU(), nn.SiLU(), nn.Mish(), nn.Softplus(), nn.Sigmoid(), nn.Tanh(), nn.CELU())
    },
    **{type(m).__name__: m for m in (nn.Softmax(1), nn.LogSoftmax(1), nn.Softmin(1), nn.GLU(1), nn.Softsign())},
    **{type(m).__name__: m for m in (nn.BatchNorm1d(4), nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4))},
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_pieces(name: str) -> None:
    """Slopes of smooth operations, and that a kink before and after them is still seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), SMOOTH[name]).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    weights = torch.randn(model(x).shape, dtype=torch.float64)
    closure = lambda: (weights * model(x)).sum()  # noqa: E731
    known = oracle.subdifferential(closure, model)
    assert known.differentiable
    assert not known.exact
    assert known.contains(oracle.ad_gradient(closure, model)) is True
    off = {n: g + 1e-3 for n, g in oracle.ad_gradient(closure, model).items()}
    assert known.contains(off) is False
    kink = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    known = oracle.subdifferential(lambda: closure() + 3 * (kink.relu() - (-kink).relu()).sum(), {"kink": kink})
    assert known.matrix.astype(np.float64).tolist() == [[3.0]]


def test_attention_with_relu_at_a_kink() -> None:
    """A transformer layer whose first hidden unit is exactly 0 for every token: all sign patterns of 3 tokens occur."""
    torch.manual_seed(0)
    model = attention().double()
    with torch.no_grad():
        model.linear1.weight[0] = 0
        model.linear1.bias[0] = 0
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    closure = lambda: (model(x) * torch.arange(12.0).view(1, 3, 4)).sum()  # noqa: E731
    known = oracle.subdifferential(closure, {"w": model.linear1.weight, "b": model.linear1.bias})
    assert known.complete
    assert len(known.scaled) == 8
    assert known.contains(oracle.ad_gradient(closure, {"w": model.linear1.weight, "b": model.linear1.bias})) is True
