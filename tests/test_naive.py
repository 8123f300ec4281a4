"""The naive Algorithm 2 of the benchmarks: hand-made answers, then adcert's records and strict verdicts."""

from __future__ import annotations

import copy
import doctest

import naive
import pytest
import torch
from torch import Tensor, nn

import adcert
from adcert.recorder import Recorder, recording


def one_filter(weight: list[float]) -> nn.Sequential:
    """A 1 x 2 filter with bias over 1 x 3 images, ReLU, one window over both positions."""
    conv = nn.Conv2d(1, 1, (1, 2), dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(weight).reshape(1, 1, 1, 2))
        conv.bias.zero_()
    return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d((1, 2)), nn.Flatten())


def images(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 1, 1, -1)


def checked(model: nn.Module, x: Tensor, limit: int | None = None) -> list[naive.Checked]:
    walk = naive.Walk()
    walk.run(model, x)
    return naive.check(model, x, walk.pooled, limit)


def strict(model: nn.Module, x: Tensor) -> adcert.Certificate:
    model = adcert.convert(copy.deepcopy(model))
    return adcert.certify(lambda: model(x).sum(), model, strict=True)


# Weight (1, 1): patches (1, 0) and (0, 1) tie; their difference is a row, and the mirrored image has the opposite one.
BY_HAND = [
    ([[1.0, 1.0, 1.0]], 1, 0, True),  # equal patches: the other member is in T_j
    ([[1.0, 0.0, 1.0]], 1, 1, True),
    ([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], 2, 2, False),
    ([[1.0, 0.0, 2.0]], 0, 0, True),  # 1 < 2: no tie
    ([[-1.0, 0.0, -1.0]], 0, 0, True),  # tied below zero: ReLU is flat there
]


@pytest.mark.parametrize(("rows", "windows", "differing", "nonempty"), BY_HAND)
def test_by_hand(rows: list[list[float]], windows: int, differing: int, nonempty: bool) -> None:
    (layer,) = checked(one_filter([1.0, 1.0]), images(*rows))
    assert (layer.windows, layer.pairs, layer.settled) == (windows, windows, windows)
    assert (layer.differing, layer.rows, layer.nonempty) == (differing, differing, nonempty)
    assert strict(one_filter([1.0, 1.0]), images(*rows)).verdict.value == ("certified" if nonempty else "uncertified")


def test_equal_own_rows_with_different_earlier_gradients_leave_nothing() -> None:
    """Layer 2 sees two equal values, which layer 1 made from the different patches (1, 0) and (0, 1)."""
    first = nn.Conv2d(1, 1, (1, 2), dtype=torch.float64)
    second = nn.Conv2d(1, 1, 1, dtype=torch.float64)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d((1, 2)), nn.Flatten())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    x = images([1.0, 0.0, 1.0])
    (layer,) = checked(model, x)
    assert (layer.rows, layer.nonempty) == (1, False)
    assert strict(model, x).verdict.value == "uncertified"


def network(seed: int) -> tuple[nn.Sequential, Tensor]:
    """Two pooled convolutions with small integers, so that ties abound and gradients are exact."""
    generator = torch.Generator().manual_seed(seed)
    overlapping = nn.MaxPool2d(3, 2, 1) if seed % 2 else nn.MaxPool2d(2)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), overlapping),
        nn.Sequential(nn.Conv2d(2, 2, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-1, 3, parameter.shape, generator=generator))
    x = torch.randint(0, 3, (2, 1, 7, 7), generator=generator).double()
    return model.double(), x


@pytest.mark.parametrize("seed", range(24))
def test_same_ties_as_the_records(seed: int) -> None:
    model, x = network(seed)
    walk = naive.Walk()
    walk.run(model, x)
    recorder = Recorder()
    with recording(recorder):
        adcert.convert(copy.deepcopy(model))(x)
    assert len(walk.pooled) == len(recorder.records) == 2
    for pooled, record in zip(walk.pooled, recorder.records, strict=True):
        ties = naive.find_ties(pooled)
        seen = record.ties.windows[record.output.flatten()[record.ties.windows] > 0]
        assert ties.windows.sort().values.tolist() == seen.sort().values.tolist()
        a = pooled.y.flatten()
        assert torch.equal(a[ties.selected], a[ties.other])


def test_same_answers_as_strict() -> None:
    answers = []
    for seed in range(60):
        model, x = network(seed)
        verdict = strict(model, x).verdict.value
        if verdict != "undecided":
            answers.append((verdict == "certified", all(layer.nonempty for layer in checked(model, x))))
    assert all(ours == theirs for ours, theirs in answers)
    assert len(answers) >= 40 and {ours for ours, _ in answers} == {True, False}


def test_limit_is_reported() -> None:
    model, x = network(0)
    step = naive.trainer(model, torch.optim.SGD(model.parameters(), lr=0.0), limit=2)
    y = torch.zeros(len(x), dtype=torch.int64)
    part, whole = step(x, y), naive.trainer(model, torch.optim.SGD(model.parameters(), lr=0.0))(x, y)
    pairs = sum(layer.pairs for layer in whole.layers)
    run = sum(min(2, layer.pairs) for layer in whole.layers)
    assert part.note == f"extrapolated from {run} of {pairs} pairs" and whole.note == f"all {pairs} pairs run"
    assert part.seconds > part.measured and whole.seconds == whole.measured


def test_batch_normalisation_keeps_the_batch_together() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2))
    x = torch.rand(4, 1, 8, 8)
    x[1] = 0.5
    (layer,) = checked(model, x)
    assert layer.windows > 0 and layer.settled == layer.pairs


def test_examples() -> None:
    assert doctest.testmod(naive).attempted > 0 and doctest.testmod(naive).failed == 0
