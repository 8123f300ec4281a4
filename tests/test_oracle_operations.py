"""The oracle's reading of torch's operations: hand-derived subdifferentials first, then torch's own gradients."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction as Q
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adcert import oracle
from adcert.oracle.subdifferential import Evidence

DOUBLE = torch.float64


def at(*point: float) -> Tensor:
    return torch.tensor(point, dtype=DOUBLE, requires_grad=True)


def elements(closure: Callable[[], Tensor], *parameters: Tensor) -> list[list[Q]]:
    known = oracle.subdifferential(closure, list(parameters), samples=0)
    assert known.complete
    assert not known.possible
    return sorted(map(list, known.matrix.tolist()))


# ---- one function of a point: all elements of dB, and whether torch's gradient is in dC ------------------

# name -> (function, point, elements of dB in order, is torch's gradient in dC); rows of the gallery by number
KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], Sequence[float], list, bool]] = {
    "1": (lambda w: w.relu() - (-w).relu(), [0], [[1]], False),
    "3": (lambda w: w.relu() - w.clamp(min=0), [0], [[0]], False),
    "6": (lambda w: (-w.clamp(min=0)).clamp(min=0), [0], [[0]], False),
    "8": (lambda w: w.relu() + w.clamp(min=0) - w.clamp(min=0), [0], [[0], [1]], True),
    "9": (lambda w: F.hardsigmoid(3 + w) + F.hardsigmoid(w - 3), [0], [[Q(1, 6)]], False),
    "9b, hardtanh": (lambda w: F.hardtanh(1 + w) + F.hardtanh(w - 1), [0], [[1]], False),
    "9b, relu6": (lambda w: F.relu6(6 + w) + F.relu6(w), [0], [[1]], False),
    "10b": (lambda w: torch.maximum(w[0] + w[1], w[1]) - torch.maximum(w[1] - w[0], w[1]), [0, 0], [[1, 0]], True),
    "11": (lambda w: w.clamp(min=0) + w.clamp(max=0), [0], [[1]], False),
    "12": (lambda w: 2 * w.relu() - w - w.abs(), [0], [[0]], False),
    "13": (lambda w: F.max_pool1d(w.view(1, 1, 2), 2).view(()) - w.amax(), [1, 1], [[0, 0]], False),
    "17": (
        lambda w: torch.maximum(torch.minimum(w[0], -w[1]), w[1] - w[0]),
        [0, 0],
        [[-1, 1], [0, -1], [1, 0]],
        True,
    ),
    "18": (lambda w: w.relu() + (-w).relu(), [0], [[-1], [1]], True),
    "leaky": (lambda w: F.leaky_relu(w, 0.25), [0], [[Q(1, 4)], [1]], True),
    "leaky, slope above 1": (lambda w: F.leaky_relu(w, 3.0), [0], [[1], [3]], True),
    "leaky, slope 0.1": (lambda w: F.leaky_relu(w, 0.1), [0], [[Q(0.1)], [1]], True),
    "rrelu": (lambda w: F.rrelu(w, 0.25, 0.75), [0], [[Q(1, 2)], [1]], True),
    "softshrink": (
        lambda w: F.softshrink(w, 0.5),
        [0.5, -0.5, 0.25],
        [[a, b, 0] for a in (0, 1) for b in (0, 1)],
        True,
    ),
    "hardshrink": (lambda w: F.hardshrink(w, 0.5), [0.75, 0.25, -1], [[1, 0, 1]], True),
    "threshold": (lambda w: F.threshold(w, 1.0, 1.0), [1], [[0], [1]], True),
    "threshold with a jump": (lambda w: F.threshold(w, 1.0, 5.0), [2, 0], [[1, 0]], True),
    # x clip(x + 3, 0, 6) / 6: slopes 0 and -1/2 at -3, 3/2 and 1 at 3
    "hardswish": (F.hardswish, [-3, 3], [[a, b] for a in (Q(-1, 2), 0) for b in (1, Q(3, 2))], True),
    "clamp above and below": (
        lambda w: w.clamp(-1, 2),
        [-1, 2, 0, 3],
        [[a, b, 1, 0] for a in (0, 1) for b in (0, 1)],
        True,
    ),
    "clamp, bounds crossed": (lambda w: w.clamp(3, 1), [2], [[0]], True),
    "clamp by tensors": (lambda w: torch.clamp(w[:1], w[1:2], w[2:]), [1, 1, 2], [[0, 1, 0], [1, 0, 0]], None),
    "hard bounds": (lambda w: F.hardtanh(w, 0.0, 0.5), [0, 0.5], [[a, b] for a in (0, 1) for b in (0, 1)], True),
    "minimum of three": (lambda w: w.amin(), [1, 1, 1], [[0, 0, 1], [0, 1, 0], [1, 0, 0]], True),
    "median": (lambda w: w.median(0)[0], [1, 1, 3], [[0, 1, 0], [1, 0, 0]], True),
    "median of equals": (lambda w: w.median(0)[0], [1, 1, 1], [[0, 0, 1], [0, 1, 0], [1, 0, 0]], True),
    "kthvalue": (lambda w: w.kthvalue(2)[0], [2, 0, 2], [[0, 0, 1], [1, 0, 0]], True),
    "sort": (lambda w: w.sort()[0] @ torch.tensor([1.0, 10.0], dtype=DOUBLE), [0, 0], [[1, 10], [10, 1]], True),
    "sum of sorted": (lambda w: w.sort()[0].sum(), [0, 0, 0], [[1, 1, 1]], True),
    "topk": (lambda w: w.topk(2)[0].sum(), [1, 1, 1], [[0, 1, 1], [1, 0, 1], [1, 1, 0]], True),
    "topk, ordered": (lambda w: w.topk(2)[0][1], [2, 1, 1], [[0, 0, 1], [0, 1, 0]], True),
    "cummax": (lambda w: w.cummax(0)[0][1:], [1, 1, 0], [[0, 2, 0], [2, 0, 0]], True),
    "cummin": (lambda w: w.cummin(0)[0][1:], [1, 1, 2], [[0, 2, 0], [2, 0, 0]], True),
    "max and its index": (lambda w: w.view(2, 2).max(1)[0], [0, 0, 0, 1], [[0, 1, 0, 1], [1, 0, 0, 1]], True),
    "aminmax": (lambda w: w.aminmax()[1] - w.aminmax()[0], [0, 0], [[-1, 1], [1, -1]], True),
    "l1": (lambda w: F.l1_loss(w, torch.ones_like(w)), [1, 3], [[Q(-1, 2), Q(1, 2)], [Q(1, 2), Q(1, 2)]], True),
    # products of parameters: relu(u) v at (0, 3)
    "product": (lambda w: w[0].relu() * w[1], [0, 3], [[0, 0], [3, 0]], True),
    "power": (lambda w: (w**3).relu() + w**2, [0], [[0]], True),
    # the zero sets of u v and of v u are the same: no phantom between them
    "the same product twice": (
        lambda w: (w[0] * w[1] + w[0]).relu() - (w[1] * w[0] + w[0]).relu(),
        [0, 0],
        [[0, 0]],
        True,
    ),
    "pool after pool": (
        lambda w: F.max_pool1d(F.max_pool1d(w.view(1, 1, 4), 2, 1), 2, 1),
        [1, 1, 1, 0],
        [[0, 0, 2, 0], [0, 2, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]],
        True,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_hand_derived(name: str) -> None:
    function, point, expected, clarke = KNOWN[name]
    w = at(*point)
    closure = lambda: function(w).sum()  # noqa: E731
    assert elements(closure, w) == sorted(expected)
    judgement = oracle.judge(closure, [w])
    if clarke is not None:
        assert judgement.member is clarke
    for element in oracle.subdifferential(closure, [w]).elements:
        assert_is_limit(function, w, element)


def assert_is_limit(function: Callable[[Tensor], Tensor], w: Tensor, element: oracle.Element) -> None:
    """torch's gradient a little way along the element's arc is the element."""
    t = 2.0**-20
    moved = w.detach().clone()
    for power, step in enumerate(element.arc, 1):
        moved += torch.tensor([float(x) for x in step], dtype=DOUBLE).view_as(w) * t**power / 1000
    moved.requires_grad_()
    (gradient,) = torch.autograd.grad(function(moved).sum(), moved)
    assert np.allclose(gradient.flatten().numpy(), [float(x) for x in element.gradient], atol=1e-4)


def test_prelu_at_zero() -> None:
    """max(x, 0) + a min(x, 0) at x = 0: (1, 0) on the right, (a, 0) on the left; the slope's own derivative is 0."""
    x, layer = at(0), nn.PReLU(init=0.25, dtype=DOUBLE)
    assert elements(lambda: layer(x).sum(), x, layer.weight) == [[Q(1, 4), 0], [1, 0]]
    # a slope per channel; a touch in the second only
    x, layer = at(-2, 0), nn.PReLU(2, init=0.5, dtype=DOUBLE)
    assert elements(lambda: layer(x.view(1, 2)).sum(), x, layer.weight) == [
        [Q(1, 2), Q(1, 2), -2, 0],
        [Q(1, 2), 1, -2, 0],
    ]


def test_prelu_minus_prelu_is_linear() -> None:
    """prelu(x) - prelu(-x) = (1 + a) x: torch says 2 a at 0."""
    x, layer = at(0), nn.PReLU(init=0.25, dtype=DOUBLE)
    closure = lambda: (layer(x) - layer(-x)).sum()  # noqa: E731
    assert elements(closure, x, layer.weight) == [[Q(5, 4), 0]]
    assert oracle.judge(closure, {"x": x, "a": layer.weight}).member is False


def test_jumps_and_unknown_operations_are_errors() -> None:
    w = at(0.5)
    for function, match in (
        (lambda: F.hardshrink(w, 0.5), "hardshrink is not continuous"),
        (lambda: F.threshold(w, 0.5, 0.0), "threshold is not continuous"),
    ):
        with pytest.raises(oracle.OracleError, match=match):
            oracle.trace(lambda function=function: function().sum(), [w])
    for function, match in (
        (lambda: w * (w > 0), "comparisons of computed values"),
        (lambda: w[w > 0], "comparisons of computed values"),
        (lambda: torch.lgamma(w), "lgamma"),
        (lambda: torch.fft.fft(w).real, "fft"),
        (lambda: w.view(1, 1, 1).expand(1, 1, 2).gather(2, w.view(1, 1, 1).argmax(2, keepdim=True)), "computed values"),
    ):
        with pytest.raises(oracle.OracleError, match=match):
            oracle.trace(lambda function=function: function().sum(), [w])
    with pytest.raises(oracle.OracleError, match="finite"):
        oracle.trace(lambda: (w / 0).sum(), [w])
    with pytest.raises(oracle.OracleError, match="scalar"):
        oracle.trace(lambda: torch.stack([w, w]), [w])


def test_constants_of_the_step() -> None:
    """Detached values, values read into Python, and what is computed under no_grad."""
    w = at(3)
    assert elements(lambda: (w.detach() * w).sum(), w) == [[3]]
    assert elements(lambda: (w.detach().item() * w).sum(), w) == [[3]]
    with_views = at(1, 2)

    def closure() -> Tensor:
        with torch.no_grad():
            half = (with_views * 2)[0]
            view = with_views[1]
        return half * with_views[0] + view * with_views[1]

    assert elements(closure, with_views) == [[2, 2]]


def test_memory_is_followed() -> None:
    """Views, writes through views, in-place operations, and a parameter used in two shapes."""
    w = at(0, 2)

    def closure() -> Tensor:
        table = torch.zeros(2, 2, dtype=DOUBLE)
        table[0] = w
        table[:, 1] += w[1]
        table.t()[0].relu_()
        table.mul_(2).add_(1)
        return table.flatten() @ torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=DOUBLE)

    # table = [[relu(w0), 2 w1], [0, w1]] * 2 + 1
    assert elements(closure, w) == [[0, 2040], [2, 2040]]


def test_frozen_parameters_are_constants() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).to(DOUBLE)
    for parameter, value in zip(model.parameters(), (1, 0, 2, 0), strict=True):
        nn.init.constant_(parameter, value)
    model[2].requires_grad_(False)
    known = oracle.subdifferential(lambda: model(torch.zeros(1, 1, dtype=DOUBLE)).sum(), model)
    assert list(known.slices) == ["0.weight", "0.bias"]
    assert sorted(map(list, known.matrix.tolist())) == [[0, 0], [0, 2]]


def test_rounding_is_a_constant() -> None:
    """In float32 0.1 w + 0.2 w rounds; the derivative is that of the numbers as they are, the values torch's."""
    w = torch.ones(1, requires_grad=True)
    closure = lambda: (w * 0.1 + w * 0.2 - 0.3).sum()  # noqa: E731
    program = oracle.trace(closure, [w])
    assert not program.exact
    assert float(program.value(program.output)) == closure().item()
    assert oracle.judge(closure, [w]).member is True


def test_the_oracle_is_independent() -> None:
    """It can accuse adcert only as long as it shares nothing with it."""
    sources = sorted(Path(oracle.__file__).parent.glob("*.py"))
    assert len(sources) > 8
    for source in sources:
        imported = re.findall(
            r"^\s*(?:from|import) +(\S+)", re.sub(r'""".*?"""', "", source.read_text(), flags=re.S), re.M
        )
        assert imported
        for name in imported:
            root = name.split(".")[0]
            assert root != "adcert"
            assert not name.startswith(".."), f"{source.name} imports {name}"


def test_a_maximum_of_many() -> None:
    """40 ties have 40 winners; the median of 40 has too many orders to look at all, and says so."""
    w = at(*[1.0] * 40)
    assert len(elements(lambda: w.max(), w)) == 40
    assert not oracle.subdifferential(lambda: w.median(), [w], samples=0).complete


def test_following_directions_through_a_median() -> None:
    """Where slopes are floats elements are found along directions: through ties that are neither first nor last."""
    w = at(1, 1, 1)
    evidence = Evidence(oracle.trace(lambda: w.exp().median(), [w]))
    evidence.sample(60, (), 0)
    assert np.allclose(sorted(evidence.known().matrix.astype(float).tolist()), np.e * np.eye(3)[::-1])
