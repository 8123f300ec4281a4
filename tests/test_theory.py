"""docs/theory.md, executed: no hypothesis can be dropped, and adcert drops none."""

from __future__ import annotations

import importlib
import itertools
import math
import random
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from counterexamples import EXAMPLES, Example, Function, frozen_bias, normalised, opposite_samples, pool, removed_bias
from theory_programs import (
    Point,
    Rule,
    direction,
    limit_is,
    maximum_rows,
    partials_vanish,
    random_point,
)
from torch import Tensor
from torch.nn import functional as F

import adcert

TEXT = (Path(__file__).parents[1] / "docs" / "theory.md").read_text(encoding="utf-8")
examples = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.number)


def gradient(module: torch.nn.Module) -> tuple[float, ...]:
    parts = torch.autograd.grad(module(), [p for p in module.parameters() if p.requires_grad])
    return tuple(torch.cat([part.flatten() for part in parts]).tolist())


def verdict(module: torch.nn.Module, strict: bool = False) -> str:
    model = adcert.convert(module)
    try:
        return adcert.certify(model, model, strict=strict).verdict.value
    except adcert.AdcertError:
        return "refused"


def function(formula: Callable[[Function], Tensor], *point: float) -> Function:
    return Function(formula, point or (0.0,), None)


@examples
def test_autodiff_returns_what_the_text_says(example: Example) -> None:
    assert gradient(example.module()) == pytest.approx(example.autodiff, abs=1e-15)


@examples
def test_true_gradients_near_the_point_are_the_listed_ones(example: Example) -> None:
    """Smooth points nearby: each has one of the listed gradients, and each of these occurs."""
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        module = example.module()
        with torch.no_grad():
            for leaf in module.parameters():
                if leaf.requires_grad:
                    leaf += 1e-7 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        found = torch.tensor(gradient(module), dtype=torch.float64)
        distance = [float((found - torch.tensor(near, dtype=torch.float64)).abs().max()) for near in example.near]
        assert min(distance) < 2e-6
        seen.add(distance.index(min(distance)))
    assert seen == set(range(len(example.near)))


@examples
def test_autodiff_is_outside_the_clarke_subdifferential(example: Example) -> None:
    """With one or two true gradients dC is a point or a segment."""
    points = [torch.tensor(near, dtype=torch.float64) for near in (example.near[0], example.near[-1])]
    difference = points[1] - points[0]
    offset = torch.tensor(example.autodiff, dtype=torch.float64) - points[0]
    along = (
        0.0 if len(example.near) == 1 else min(1.0, max(0.0, float(offset @ difference / difference.square().sum())))
    )
    assert float((offset - along * difference).norm()) > 1e-10


@examples
@pytest.mark.parametrize("strict", [False, True])
def test_never_certified(example: Example, strict: bool) -> None:
    found = verdict(example.module(), strict)
    assert found != "certified"
    if example.covered:
        assert found == "uncertified"


def test_every_counterexample_of_the_text_is_here_and_in_its_table() -> None:
    """Those that need more than a function of a point have tests of their own below."""
    named = set(re.findall(r"\bX\d+\b", TEXT))
    tabled = set(re.findall(r"^\| (X\d+) \|", TEXT, re.MULTILINE))
    assert named == tabled == {example.number for example in EXAMPLES} | {"X20", "X21", "X23"}


def test_the_code_that_section_12_names_exists() -> None:
    """A rule that moves takes its line in the table with it."""
    lines = [line.split("|")[1] for line in TEXT.split("## 12.")[1].splitlines() if line.startswith("| `")]
    names = [name for line in lines for name in re.findall(r"`([\w.]+)`", line)]
    assert len(names) > 20
    for name in names:
        room, *parts = name.split(".")
        if not hasattr(adcert, room):
            importlib.import_module(f"adcert.{room}")
        found = getattr(adcert, room)
        for part in parts:
            assert hasattr(found, part) or part in getattr(found, "__dataclass_fields__", ()), name
            found = getattr(found, part, None)


def test_x20_each_loss_is_certified_and_the_sum_is_not() -> None:
    """relu(w) and -relu(-w) at 0: one step with two backward passes is about the sum, w."""
    losses = (lambda f: F.relu(f.w), lambda f: -F.relu(-f.w))
    for loss in losses:
        assert verdict(function(loss)) == "certified"
    model = adcert.convert(function(losses[0]))
    with adcert.Monitor(model, queue=0) as monitor, monitor.step() as step:
        for loss in losses:
            loss(model).sum().backward()
    assert float(model.w.grad) == 0.0
    assert step.summary["verdict"] == "uncertified"


@pytest.mark.parametrize(
    "formula",
    [
        lambda f: F.hardshrink(f.w, 0.5),
        lambda f: F.threshold(f.w, 0.5, 2.0),
        lambda f: f.w.round(),
        lambda f: f.w.sign(),
    ],
)
def test_x21_discontinuous_functions_are_not_certified(formula: Callable[[Function], Tensor]) -> None:
    assert verdict(function(formula, 0.5)) != "certified"


def test_x23_the_kink_is_where_backward_has_it() -> None:
    """softshrink(w, 0.1) - relu(k - w) at k = bfloat16(0.1): slope 1 on both sides, AD 0."""
    here = torch.tensor([0.1], dtype=torch.bfloat16)

    def at(point: Tensor) -> Function:
        module = function(lambda f: F.softshrink(f.w, 0.1) - F.relu(here - f.w))
        module.w = torch.nn.Parameter(point)
        return module

    step = 2.0**-11  # the spacing of bfloat16 there
    assert gradient(at(here + step)) == (1.0,)
    assert gradient(at(here - step)) == (1.0,)
    assert gradient(at(here)) == (0.0,)
    assert verdict(at(here)) != "certified"


PIXELS = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64).view(1, 2, 1, 3)


def losing() -> torch.nn.Module:
    """Units w1, -w1, w2 at (0, 1), ReLU, one window: the two that touch lose strictly, and their rows are opposite."""
    conv = torch.nn.Conv2d(2, 1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
    return torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.MaxPool2d((1, 3)))


@pytest.mark.parametrize("proxy", [0.5, 0.25])
def test_x12_with_proxies_of_ones_own(proxy: float) -> None:
    """relu(relu(w)) - relu(w) is 0; with one lambda for both AD returns lambda^2 - lambda."""
    net = torch.nn.ModuleList([adcert.nn.ReLU(proxy=proxy), adcert.nn.ReLU(proxy=proxy)])
    module = Function(lambda f: f.net[1](f.net[0](f.w)) - f.net[0](f.w), (0.0,), net)
    assert gradient(module) == (proxy**2 - proxy,)
    assert verdict(module) != "certified"


CONTROLS = {
    "one ReLU": lambda: function(lambda f: F.relu(f.w)),
    "X16 with a trained beta": lambda: Function(removed_bias, None, normalised(affine=True)),
    "X17 with a trained bias": lambda: Function(opposite_samples, None, frozen_bias(trainable=True)),
    "E1": lambda: function(lambda f: F.relu(-F.relu(f.w))),
    "E2": lambda: Function(lambda f: f.net(PIXELS), None, losing()),
    "E3": lambda: function(lambda f: F.relu(pool(f.w, -f.w) - 1)),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_with_the_hypothesis_it_is_certified(name: str) -> None:
    assert verdict(CONTROLS[name]()) == "certified"


Ignores = Callable[[Point, int, int], bool]


def backward_is_zero(point: Point, reader: int, number: int) -> bool:
    """Wrong (X6): AD hands nothing on, though another active branch might."""
    places = [k for k, i in enumerate(point.program.elements[reader].inputs) if i == number]
    return all(point.local[reader][k] == 0 for k in places)


def certified(count: int, ignores: Ignores = partials_vanish, rule: Rule | None = None) -> tuple[int, int, int]:
    """Of random programs: certified by E4; of these with an idle selection; of these AD is not the limit along p."""
    rng = random.Random(0)
    found = idle = wrong = 0
    for _ in range(count):
        point = random_point(rng)
        spared = point.idle(ignores)
        rows = point.rows(spared, rule)
        p = None if rows is None else direction(rows, point.program.parameters, rng)
        if p is not None:
            found += 1
            idle += any(len(point.branches[number]) > 1 for number in spared)
            wrong += not limit_is(point, p, rng)
    return found, idle, wrong


def test_theorem_e4_on_random_programs() -> None:
    """Kinks with any proxies, maxima, order statistics, products, zero weights; parameters used at will."""
    found, idle, wrong = certified(1000)
    assert wrong == 0
    assert found > 600
    assert idle > 200
    without = certified(1000, ignores=lambda *_: False)
    assert without[2] == 0
    assert without[0] < found  # idle elements matter


def test_weaker_hypotheses_are_refuted_by_the_same_programs() -> None:
    assert certified(1500, ignores=backward_is_zero)[2] > 0
    assert certified(300, rule=maximum_rows)[2] > 0


def test_theorem_r_on_random_programs() -> None:
    """Branches chosen along one generic direction give a limit of true gradients."""
    rng = random.Random(1)
    selections = 0
    for _ in range(600):
        drawn = random_point(rng)
        p = tuple(Fraction(rng.randint(-(10**5), 10**5)) for _ in range(drawn.program.parameters))
        point = Point(drawn.program, drawn.w, p)
        selections += any(len(branches) > 1 for branches in point.branches)
        assert limit_is(point, p, rng)
    assert selections > 400


def test_theorem_m_on_random_programs() -> None:
    """Mixed proxies with a class for each selection: AD's gradient is the combination of the one-hot ones."""
    rng = random.Random(2)
    mixed = 0
    for _ in range(150):
        point = random_point(rng)
        numbers = [n for n, branches in enumerate(point.branches) if len(branches) > 1][:4]
        weights = {n: [Fraction(rng.randint(1, 5)) for _ in point.branches[n]] for n in numbers}
        weights = {n: [x / sum(each) for x in each] for n, each in weights.items()}
        average = {
            n: tuple(
                sum((m * x for m, x in zip(weights[n], part, strict=True)), Fraction(0))
                for part in zip(*point.branches[n], strict=True)
            )
            for n in numbers
        }
        found = Point(point.program, point.w, forced=average).g[-1]
        total = [Fraction(0)] * len(found)
        for choice in itertools.product(*(range(len(weights[n])) for n in numbers)):
            taken = {n: point.branches[n][i] for n, i in zip(numbers, choice, strict=True)}
            vertex = Point(point.program, point.w, forced=taken).g[-1]
            weight = math.prod(weights[n][i] for n, i in zip(numbers, choice, strict=True))
            total = [t + weight * x for t, x in zip(total, vertex, strict=True)]
        assert tuple(total) == found
        mixed += len(numbers) > 1
    assert mixed > 75
