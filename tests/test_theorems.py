"""What holds whatever the values are: theorems and failing hypotheses on networks derived by hand, and at run time."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from core_helpers import integers, param
from networks import random_network
from torch import Tensor, nn

import adcert
from adcert.coverage import Kink
from adcert.errors import AdcertError
from adcert.independence import independent
from adcert.models import BasicBlock
from adcert.theorems import Analysis, Theorem

BATCH = integers((4, 3), 1)
ONE = integers((1, 3), 1)
IMAGES = integers((2, 2, 6, 6), 2)


def linear(inputs: int = 3, outputs: int = 2, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)


def conv(inputs: int = 2, outputs: int = 2, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, bias=bias, dtype=torch.float64)


def norm(**options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(2, dtype=torch.float64, **options)


def theorem(found: Analysis, number: str) -> Theorem:
    return {t.name: t for t in found.theorems}[f"Theorem {number}"]


def fails(found: Analysis, number: str) -> set[tuple[str, str]]:
    """(operation, reason) of every condition that fails."""
    result = theorem(found, number)
    assert (result.holds == "no") == bool(result.failing)
    return {(failure.operation, failure.reason) for failure in result.failing}


def always(found: Analysis) -> set[str]:
    return {t.name.removeprefix("Theorem ") for t in found.theorems if t.holds == "always"}


def at_zero(model: nn.Module, x: Tensor) -> adcert.Certificate:
    """A step at the worst point there is: every parameter 0, every unit on its kink."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    certificate = adcert.certify(lambda: model(x).sum(), adcert.convert(model))
    certificate.verify()
    return certificate


# ---- Theorems 1 and 4: distinct bias -------------------------------------------------------------


def test_theorem_1_one_sample() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), linear(2, 2), nn.ReLU(), linear(2, 1))
    found = adcert.analyze(model, ONE)
    assert (found.theorem, found.claim) == ("Theorem 1", "bouligand")
    assert always(found) == {"1", "4", "6"}
    assert [(op.name, op.bias, op.parameter, op.left) for op in found.operations] == [
        ("1", "distinct", "0.bias", ()),
        ("3", "distinct", "2.bias", ()),
    ]
    certificate = at_zero(model, ONE)
    assert (certificate.verdict, certificate.theorem) == (adcert.Verdict.CERTIFIED, "Theorem 1")


def test_theorem_4_any_batch() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), linear(2, 1))
    found = adcert.analyze(model, BATCH)
    assert always(found) == {"4", "6"}
    assert found.theorem == "Theorem 4"
    assert fails(found, "1") == {("1", "several units or samples share an entry of its bias")}
    certificate = at_zero(model, BATCH)
    assert (certificate.verdict, certificate.theorem, certificate.claim) == ("certified", "Theorem 4", "bouligand")
    assert certificate.layers[0].touches == 8


def test_theorem_1_needs_a_bias_of_its_own_for_each_operation() -> None:
    """Two operations that add one bias are two samples: relu(x A + b) and relu(x C + b)."""
    model = nn.ModuleDict({"a": linear(bias=False), "c": linear(bias=False)})
    model.register_parameter("b", param([0, 0]))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            one = torch.relu(self.parts["a"](x) + self.parts.b)
            return one + torch.relu(self.parts["c"](x) + self.parts.b)

    found = adcert.analyze(Net(), ONE)
    assert always(found) == {"4", "6"}
    assert len(fails(found, "1")) == 2
    certificate = at_zero(Net(), ONE)
    assert (certificate.verdict, certificate.theorem) == ("certified", "Theorem 4")


def test_a_bias_per_sample_is_not_distinct() -> None:
    """[N, C] + [N, 1] with N = C: as many entries as units of a sample, but all of a sample share one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = param([[1.0, 0.0], [0.0, 1.0]]), param([[0.0], [0.0]])

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.a + self.b)

    found = adcert.analyze(Net(), integers((2, 2), 3))
    assert found.operations[0].bias == "shared"
    assert always(found) == {"6"}


# ---- Theorem 6: shared bias ----------------------------------------------------------------------


def test_theorem_6_convolutions_with_bias_or_normalisation() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv(bias=False), norm(), nn.ReLU(), nn.Flatten())
    found = adcert.analyze(model, IMAGES)
    assert always(found) == {"6"}
    assert [(op.bias, op.parameter) for op in found.operations] == [("shared", "0.bias"), ("shared", "3.bias")]
    assert fails(found, "4") == {("1", "its bias is shared"), ("4", "its bias is shared")}
    certificate = at_zero(model, IMAGES)
    assert (certificate.verdict, certificate.theorem) == ("certified", "Theorem 6")


def test_a_residual_network_without_pooling() -> None:
    blocks = [BasicBlock(2, 2), BasicBlock(2, 4, 2)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1)).double()
    found = adcert.analyze(model, IMAGES)
    assert found.theorem == "Theorem 6"
    assert at_zero(model, IMAGES).theorem == "Theorem 6"


def test_a_trivial_pooling_is_none() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(1))
    assert adcert.analyze(model, IMAGES).theorem == "Theorem 6"
    assert at_zero(model, IMAGES).verdict == "certified"


# ---- hypotheses that fail ------------------------------------------------------------------------

NO_BIAS = "no trainable bias of its own is added to its input (Lemma 2)"
POOLED = "a choice among several units (Lemma 7)"


def frozen(module: nn.Module) -> nn.Module:
    assert isinstance(module.bias, nn.Parameter)
    module.bias.requires_grad_(False)
    return module


FAILING = {
    "no bias": (lambda: nn.Sequential(conv(bias=False), nn.ReLU()), IMAGES, {("1", NO_BIAS)}),
    "a frozen bias is a constant": (lambda: nn.Sequential(frozen(conv()), nn.ReLU()), IMAGES, {("1", NO_BIAS)}),
    "train-mode normalisation removes a bias": (
        lambda: nn.Sequential(conv(), frozen(norm()), nn.ReLU()),
        IMAGES,
        {("2", NO_BIAS)},
    ),
    "normalisation without beta": (
        lambda: nn.Sequential(conv(), norm(affine=False), nn.ReLU()),
        IMAGES,
        {("2", NO_BIAS)},
    ),
    "no parameter between two operations": (
        lambda: nn.Sequential(conv(), nn.ReLU(), nn.ReLU()),
        IMAGES,
        {("2", NO_BIAS)},
    ),
    "one of two layers has none": (
        lambda: nn.Sequential(conv(), nn.ReLU(), conv(bias=False), nn.ReLU()),
        IMAGES,
        {("3", NO_BIAS)},
    ),
    "pooling": (lambda: nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)), IMAGES, {("2", POOLED)}),
    "pooling without an activation": (lambda: nn.Sequential(conv(), nn.MaxPool2d(2)), IMAGES, {("1", POOLED)}),
}


@pytest.mark.parametrize(("make", "x", "expected"), FAILING.values(), ids=FAILING)
def test_theorem_6_fails(make: Any, x: Tensor, expected: set[tuple[str, str]]) -> None:
    found = adcert.analyze(make(), x)
    assert fails(found, "6") == expected
    assert expected <= fails(found, "4") and expected <= fails(found, "1")
    assert found.theorem == ""
    certificate = at_zero(make(), x)
    assert certificate.theorem in ("", "Theorem E4")


class Lemma2(nn.Module):
    """relu(w) - relu(-w): no bias, AD 0 at 0 where the gradient is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = param([0.0])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x * self.w) - torch.relu(-x * self.w)


def test_lemma_2() -> None:
    found = adcert.analyze(Lemma2(), torch.ones(1, dtype=torch.float64))
    assert {reason for _, reason in fails(found, "6")} == {NO_BIAS}
    assert at_zero(Lemma2(), torch.ones(1, dtype=torch.float64)).verdict == "uncertified"


class Lemma2Biased(nn.Module):
    """relu(x w + b) - relu(-x w - b): the bias enters the second operation with coefficient -1."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = param([0.0]), param([0.0])

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.w + self.b
        return torch.relu(y) - torch.relu(-y)


def test_a_bias_that_another_operation_reads_in_another_way() -> None:
    x = torch.ones(1, dtype=torch.float64)
    found = adcert.analyze(Lemma2Biased(), x)
    assert any("another way" in reason for _, reason in fails(found, "6"))
    assert found.theorem == ""
    assert at_zero(Lemma2Biased(), x).verdict == "uncertified"


def test_lemma_7() -> None:
    """max(u + b, b) - max(-u + b, b): a shared bias, poolings, AD (2, 0) where the truth is (1, 0)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.b = param([0.0]), param([0.0])

        def forward(self, x: Tensor) -> Tensor:
            zero = torch.zeros(1, dtype=torch.float64)
            pairs = [torch.stack([sign * self.u + self.b, zero + self.b]).reshape(1, 1, 1, 2) for sign in (x, -x)]
            return nn.functional.max_pool2d(pairs[0], (1, 2)) - nn.functional.max_pool2d(pairs[1], (1, 2))

    x = torch.ones(1, dtype=torch.float64)
    found = adcert.analyze(Net(), x)
    assert {reason for _, reason in fails(found, "6")} == {POOLED}
    certificate = adcert.certify(lambda: Net()(x).sum(), Net())
    assert certificate.verdict == "uncertified"


def test_a_parameter_of_two_layers() -> None:
    """One Linear used twice, its bias too: weight tying."""
    layer = linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU())
    found = adcert.analyze(model, BATCH)
    assert any("weight tying" in reason for _, reason in fails(found, "6"))
    assert theorem(found, "8").holds == "no"
    assert theorem(found, "E4").holds == "per step"
    assert at_zero(model, BATCH).theorem == "Theorem E4"


def test_operations_that_nobody_records() -> None:
    found = adcert.analyze(nn.Sequential(linear(), nn.LogSigmoid(), Sine()), BATCH)
    assert found.operations == ()
    assert not found.problems and found.theorem == "Theorem 1"
    found = adcert.analyze(nn.Sequential(linear(), nn.ReLU(), Indicator()), BATCH)
    assert found.problems and found.theorem == "" and found.conclusion.startswith("no step can be certified")
    assert all(t.holds == "no" for t in found.theorems)
    assert found.operations[0].theorem == ""


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Indicator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x > 0)


def test_partial_bias() -> None:
    """relu(cat(x A + b, x C)): some units have a bias, some none."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = linear(), linear(bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.cat([self.a(x), self.c(x)], 1))

    found = adcert.analyze(Net(), BATCH)
    assert [op.bias for op in found.operations] == ["partial"]
    assert found.theorem == ""


# ---- Theorem 5 -----------------------------------------------------------------------------------


def test_theorem_5_without_bias() -> None:
    """y = x A^T, rows (1, -1) and (1, -2): at A = (1, 1) one sample touches, at A = 0 both, independently."""
    model = nn.Sequential(linear(2, 1, bias=False), nn.ReLU())
    x = torch.tensor([[1.0, -1.0], [1.0, -2.0]], dtype=torch.float64)
    found = adcert.analyze(model, x)
    assert found.theorem == ""
    assert theorem(found, "5").holds == "per step" and theorem(found, "5").left
    assert (found.operations[0].theorem, found.operations[0].left) == ("Theorem 5", ("touches",))
    certificate = at_zero(model, x)
    assert (certificate.verdict, certificate.theorem, certificate.layers[0].touches) == ("certified", "Theorem 5", 2)


def test_theorem_5_fails_where_the_strict_system_does_not() -> None:
    """Rows (1, -1) and (2, -2) are dependent, and p = (-1, 0) satisfies both: the rank condition adds nothing."""
    model = nn.Sequential(linear(2, 1, bias=False), nn.ReLU())
    x = torch.tensor([[1.0, -1.0], [2.0, -2.0]], dtype=torch.float64)
    assert at_zero(model, x).theorem == "Theorem E4"
    opposite = torch.tensor([[1.0, -1.0], [-2.0, 2.0]], dtype=torch.float64)
    assert at_zero(model, opposite).theorem == "Theorem H"  # no direction, but 0 is a mean of 1 and -2


def test_theorem_5_cannot_hold_for_more_columns_than_features() -> None:
    found = adcert.analyze(nn.Sequential(linear(bias=False), nn.ReLU()), BATCH)
    assert fails(found, "5") == {("1", "4 columns of 3 entries are never independent")}
    found = adcert.analyze(nn.Sequential(conv(bias=False), nn.ReLU()), IMAGES)
    assert fails(found, "5") == {("1", "its input is not z A^T (+ b) with a trainable matrix A of its own")}


def test_theorem_5_wants_a_matrix_of_its_own() -> None:
    a = linear(2, 2, bias=False)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = a

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x)) + torch.relu(self.a(-x))

    found = adcert.analyze(Twice(), integers((2, 2), 4))
    assert {reason for _, reason in fails(found, "5")} == {"its matrix is used by several operations"}
    nested = nn.Sequential(a, a, nn.ReLU())  # y = A (A x)
    assert "of its own" in next(iter(fails(adcert.analyze(nested, integers((2, 2), 4)), "5")))[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_independent_rows(dtype: Any) -> None:
    tiny, huge = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    cases: list[tuple[list[list[float]], bool]] = [
        ([[1, 0], [0, 1]], True),
        ([[1, 2], [2, 4]], False),
        ([[0, 0]], False),
        ([[tiny, 0]], True),
        ([[1, 1], [1, 1 + np.finfo(dtype).eps]], True),
        ([[huge, 0], [0, tiny]], True),
        ([[huge, tiny], [huge, tiny]], False),
        ([[1, 0, 0], [0, 1, 0], [1, 1, 0]], False),
        ([[1, 0], [0, 1], [1, 1]], False),
        ([[2.0**24, 1], [1, 2.0**-24]], False),
        ([[2.0**23, 1], [1, 2.0**-24]], True),
    ]
    for rows, expected in cases:
        assert independent(np.array(rows, dtype=dtype)) is expected, rows
    assert independent(np.zeros((0, 3), dtype=dtype))


def test_independent_differences_are_not_rounded() -> None:
    """1 + 2^-60 is no float64: the rows (1, 1 + 2^-60) and (1, 1) are independent all the same."""
    a = np.array([[1.0, 1.0], [1.0, 1.0]])
    minus = np.array([[0.0, -(2.0**-60)], [0.0, 0.0]])
    assert not independent(a)
    assert independent(a, minus)
    assert not independent(a, minus, np.full((2, 2), 1e-300))


def test_independence_against_the_rational_rank() -> None:
    rng = np.random.default_rng(0)
    seen = Counter()
    for _ in range(300):
        count, width = rng.integers(1, 6, 2)
        rows = rng.integers(-1, 2, (count, width)).astype(float)
        exact = int(np.linalg.matrix_rank(rows)) == count  # integers this small
        seen[exact] += 1
        assert independent(rows) == exact
    assert min(seen.values()) > 50


# ---- proxies -------------------------------------------------------------------------------------


def test_proxies_are_measured() -> None:
    (op,) = adcert.analyze(nn.Sequential(linear(), nn.ReLU()), BATCH).operations
    assert [(k.at, k.below, k.above, k.proxy, k.side) for k in op.kinks] == [(0.0, 0.0, 1.0, 0.0, -1)]
    assert op.weights == (1.0,)


@pytest.mark.parametrize(
    ("kink", "weight"),
    [
        (Kink(0.0, 0.0, 1.0, 0.0, -1), Fraction(1)),
        (Kink(0.0, 0.0, 1.0, 1.0, 1), Fraction(0)),
        (Kink(0.0, 0.0, 1.0, 0.25, 0), Fraction(3, 4)),
        (Kink(0.0, -1.0, 1.0, 0.0, 0), Fraction(1, 2)),
        (Kink(0.0, 1.0, 0.0, 0.25, 0), Fraction(1, 4)),
        (Kink(0.0, 0.0, 1.0, 2.0, 0), None),
        (Kink(0.0, 0.0, 1.0, -1.0, 0), None),
        (Kink(0.0, 1.0, 1.0, 1.5, 0), None),
        (Kink(0.0, 0.0, 1.0, float("nan"), 0), None),
    ],
)
def test_lambda(kink: Kink, weight: Fraction | None) -> None:
    assert kink.weight == weight


# ---- what is left --------------------------------------------------------------------------------


def test_what_is_left_where_no_theorem_holds() -> None:
    """conv + bias + ReLU + pooling, conv + bias + ReLU, a linear layer without bias: ties, nothing, touches."""
    head = [nn.Flatten(), linear(18, 2, False), nn.ReLU()]
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2, 1), nn.ZeroPad2d(1), conv(), nn.ReLU(), *head)
    found = adcert.analyze(model, IMAGES)
    assert [(op.name, op.left) for op in found.operations] == [("2", ("ties",)), ("5", ()), ("8", ("touches",))]
    assert [op.theorem for op in found.operations] == ["Theorem 8", "Theorem 6", "Theorem 8"]


def test_distinct_biases_in_one_window() -> None:
    """Units with biases of their own meet in a window of their layer: touches and ties have one system."""
    model = nn.Sequential(linear(3, 4), nn.ReLU(), nn.Unflatten(1, (1, 2, 2)), nn.MaxPool2d(2))
    found = adcert.analyze(model, BATCH)
    assert [op.left for op in found.operations] == [(), ("ties",)]
    model = nn.Sequential(linear(3, 4), nn.Unflatten(1, (1, 2, 2)), nn.ReLU(), nn.MaxPool2d(2))
    found = adcert.analyze(model, BATCH)
    assert [op.left for op in found.operations] == [("touches", "ties")]


# ---- the model and the world stay as they are ----------------------------------------------------


def test_the_model_is_not_touched() -> None:
    model = nn.Sequential(conv(), norm(), nn.ReLU(), nn.Dropout())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    adcert.analyze(model, IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model[2]) is nn.ReLU
    assert all(parameter.grad is None for parameter in model.parameters())


def test_arguments_come_as_a_tensor_a_sequence_or_a_mapping() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = linear()

        def forward(self, x: Tensor, scale: float) -> dict[str, list[Tensor]]:
            return {"out": [torch.relu(self.a(x)) * scale]}

    for example in ((BATCH, 2.0), [BATCH, 2.0], {"x": BATCH, "scale": 2.0}):
        assert adcert.analyze(Net(), example).theorem == "Theorem 4"


def test_a_loss_is_part_of_the_question() -> None:
    model = nn.Sequential(linear(), nn.ReLU())
    assert adcert.analyze(model, BATCH).assumptions[1] == "the loss is smooth in the model's output"
    found = adcert.analyze(model, BATCH, loss=lambda y: nn.functional.l1_loss(y, torch.zeros_like(y)))
    assert found.theorem == ""
    found = adcert.analyze(model, BATCH, loss=lambda y: (y**2).sum())
    assert found.theorem == "Theorem 4" and len(found.assumptions) == 1


def test_what_cannot_be_analysed() -> None:
    with pytest.raises(AdcertError, match=r"torch\.nn\.Module"):
        adcert.analyze(lambda x: x, BATCH)  # type: ignore[arg-type]
    with pytest.raises(AdcertError, match="does not run"):
        adcert.analyze(linear(), IMAGES)
    with pytest.raises(AdcertError, match="no trainable parameter"):
        adcert.analyze(linear().requires_grad_(False), BATCH)
    model = linear()
    with adcert.Monitor(model).step(), pytest.raises(AdcertError, match="step is running"):
        adcert.analyze(model, BATCH)


def test_an_analysis_is_text_and_json() -> None:
    found = adcert.analyze(nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)), IMAGES)
    text = str(found)
    assert text.startswith("no theorem holds at every step")
    assert "relu + max pooling  shared (0.bias)  0: 0 (1)" in text
    assert f"  fails: 2: {POOLED}" in text
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["operations"][0]["left"] == ["ties"]
    assert plain["theorems"][0]["failing"][0] == {"operation": "2", "reason": POOLED}
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.theorem = "Theorem 6"  # type: ignore[misc]


# ---- agreement with run time ---------------------------------------------------------------------


def test_what_holds_always_holds_at_run_time() -> None:
    """No step of a network under Theorem 1, 4 or 6 is anything but certified; what needs no check never fails one."""
    names: Counter[str] = Counter()
    for seed in range(300):
        network = random_network(seed)
        found = adcert.analyze(network.model, network.inputs)
        certificate = adcert.certify(network.closure, adcert.convert(network.model))
        names[found.theorem] += 1
        if found.theorem:
            assert (certificate.verdict, certificate.theorem) == ("certified", found.theorem), seed
        elif certificate.verdict is adcert.Verdict.CERTIFIED:
            assert certificate.theorem in ("Theorem 5", "Theorem E4", "Theorem H"), seed
        settled = {op.name for op in found.operations if not op.left}
        strict = adcert.certify(network.closure, network.model, strict=True)
        empty = {block.layer for block in strict.blocks if block.proof is not None}
        assert not settled & empty, seed
        names["settled"] += bool(settled) and not found.theorem
    assert min(names[key] for key in ("Theorem 1", "Theorem 4", "", "settled")) >= 5, names


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def unpooled(seed: int) -> tuple[nn.Module, Tensor]:
    """A small network without pooling, some of its parts without bias, frozen or shared; integers, zeros above all."""
    draw = random.Random(seed)

    def block(channels: int) -> nn.Sequential:
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=draw.random() < 0.8, dtype=torch.float64)
        parts: list[nn.Module] = [layer]
        if draw.random() < 0.5:
            parts.append(nn.BatchNorm2d(channels, affine=draw.random() < 0.9, dtype=torch.float64))
        return nn.Sequential(*parts)

    body = [block(2)]
    for _ in range(draw.randrange(3)):
        inner = draw.choice([block(2), nn.Sequential(nn.ReLU(), block(2)), body[0]]) if draw.random() < 0.9 else body[0]
        body += [nn.Sequential(nn.ReLU(), Residual(inner) if draw.random() < 0.5 else inner)]
    model = nn.Sequential(*body, nn.ReLU(), nn.Flatten(), linear(18, 2, draw.random() < 0.8), nn.ReLU())
    with torch.no_grad():
        for parameter in model.parameters():
            values = [draw.choice((-1, 0, 0, 0, 1)) for _ in range(parameter.numel())]
            parameter.copy_(torch.tensor(values).view_as(parameter))
            parameter.requires_grad_(draw.random() < 0.95)
    return model, integers((draw.choice((1, 2)), 2, 3, 3), seed, -1, 1)


def test_networks_without_pooling_at_run_time() -> None:
    """The same on convolutional and residual networks at points full of touches."""
    names: Counter[str] = Counter()
    for seed in range(250):
        model, x = unpooled(seed)
        found = adcert.analyze(model, x)
        certificate = adcert.certify(lambda model=model, x=x: model(x).sum(), adcert.convert(model))
        touched = any(report.touches for report in certificate.layers)
        if found.theorem:
            assert (certificate.verdict, certificate.theorem) == ("certified", found.theorem), seed
        names[found.theorem] += touched
    assert min(names[key] for key in ("Theorem 6", "")) >= 20, names


def test_several_passes_of_one_step_are_covered_together() -> None:
    model = adcert.convert(nn.Sequential(linear(), nn.ReLU(), linear(2, 1)))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    monitor = adcert.Monitor(model)
    with monitor.step() as step:
        for x in BATCH.split(1):
            model(x).sum().backward()
    assert step.summary["theorem"] == "Theorem 4"  # four samples: not Theorem 1
    assert monitor.report().theorems == {"Theorem 4": 1}


def test_strict_steps_rest_on_theorem_8() -> None:
    model = adcert.convert(nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)))
    certificate = adcert.certify(lambda: model(torch.zeros_like(IMAGES)).sum(), model, strict=True)
    assert (certificate.verdict, certificate.theorem) == ("certified", "Theorem 8")


# ---- every activation ----------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[Any, tuple[float, ...], tuple[float, ...]]] = {  # module, kinks, lambdas
    "relu": (nn.ReLU, (0.0,), (1.0,)),
    "leaky_relu": (nn.LeakyReLU, (0.0,), (1.0,)),
    "prelu": (lambda: nn.PReLU(dtype=torch.float64), (0.0,), (1.0,)),
    "rrelu": (nn.RReLU, (0.0,), (1.0,)),
    "relu6": (nn.ReLU6, (0.0, 6.0), (1.0, 0.0)),
    "hardtanh": (nn.Hardtanh, (-1.0, 1.0), (1.0, 0.0)),
    "hardsigmoid": (nn.Hardsigmoid, (-3.0, 3.0), (1.0, 0.0)),
    "hardswish": (nn.Hardswish, (-3.0, 3.0), (1.0, 0.0)),
    "softshrink": (nn.Softshrink, (-0.5, 0.5), (0.0, 1.0)),
    "elu": (lambda: nn.ELU(2.0), (0.0,), (1.0,)),
    "selu": (nn.SELU, (0.0,), (1.0,)),
    "threshold": (lambda: nn.Threshold(1.0, 1.0), (1.0,), (1.0,)),
    "half": (lambda: adcert.nn.ReLU(proxy=0.5), (0.0,), (0.5,)),
    "hardtanh of one side": (lambda: adcert.nn.Hardtanh(proxy=(0.0, 1.0)), (-1.0, 1.0), (1.0, 1.0)),
}


def on_the_kinks(activation: Any, kinks: tuple[float, ...], samples: int) -> tuple[nn.Module, Tensor]:
    """Linear layer of weight 1 and bias 0, activation, sum; sample k lies on the (k mod K)-th kink."""
    model = nn.Sequential(linear(1, 1), activation(), linear(1, 1))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1)
            layer.bias.zero_()
    return model, torch.tensor(kinks, dtype=torch.float64).repeat(samples)[:samples, None]


@pytest.mark.parametrize(("make", "kinks", "weights"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_every_activation(make: Any, kinks: tuple[float, ...], weights: tuple[float, ...]) -> None:
    """Theorem 1 for one sample, Theorem 4 where all kinks have one lambda; else (Lemma 3) each step is looked at."""
    for samples in (1, 2):
        model, x = on_the_kinks(make, kinks, samples)
        found = adcert.analyze(model, x)
        (op,) = found.operations
        assert tuple(kink.at for kink in op.kinks) == kinks
        assert op.weights == weights
        certificate = adcert.certify(lambda model=model, x=x: model(x).sum(), adcert.convert(model))
        certificate.verify()
        assert certificate.layers[0].touches == samples
        expected = "Theorem 1" if samples == 1 else "Theorem 4" if len(set(weights)) == 1 else ""
        assert found.theorem == expected
        if expected:
            assert (certificate.verdict, certificate.theorem, certificate.claim) == ("certified", expected, found.claim)
        else:
            assert {reason for _, reason in fails(found, "4")} == {"proxies from different sides (Lemma 3)"}


def test_lemma_3() -> None:
    """hardsigmoid(3 + b) + hardsigmoid(-3 + b) at 0: a bias and two samples, AD 0, truth 1/6."""
    model, x = on_the_kinks(nn.Hardsigmoid, (-3.0, 3.0), 2)
    model[0].weight.requires_grad_(False)
    assert adcert.analyze(model, x).theorem == ""
    assert adcert.certify(lambda: model(x).sum(), adcert.convert(model)).verdict == "uncertified"
    model[0].weight.requires_grad_(True)  # the weight tells the samples apart: x = -3 and 3
    assert adcert.certify(lambda: model(x).sum(), model).verdict == "certified"


def test_abs_and_even_splits() -> None:
    """abs has lambda 1/2: in dC by Theorem 4, not by Theorem 8. amax splits evenly: only equal gradients admit that."""

    class Net(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.a, self.function = linear(), function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(self.a(x))

    found = adcert.analyze(Net(torch.abs), BATCH)
    assert (found.theorem, found.claim, found.operations[0].weights) == ("Theorem 4", "clarke", (0.5,))
    assert theorem(found, "8").holds == "no" and theorem(found, "E5").holds == "per step"
    found = adcert.analyze(Net(lambda y: y.amax(1)), BATCH)
    assert found.theorem == "" and theorem(found, "8").holds == "no"
    found = adcert.analyze(Net(lambda y: y.max(1)[0]), BATCH)
    assert found.theorem == "" and theorem(found, "8").holds == "per step"
    assert found.operations[0].left == ("ties",)


def test_an_empty_batch() -> None:
    model = adcert.convert(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    assert adcert.certify(lambda: model(torch.ones(0, 2)).sum(), model).verdict == "certified"
