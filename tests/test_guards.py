"""Guards: a node is let through where its saved values keep away from singular points and kinks, nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_cases import CASES
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert import certify
from adcert.audit import ANALYTIC, GUARDED
from adcert.guards import KINKS, clear
from adcert.layers import kind_of
from adcert.rules import NUMBERED, RULES

NAN = float("nan")


def guard(function: Callable[[Tensor], Tensor], *values: float, dtype: torch.dtype = torch.float64) -> bool:
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    node = function(x).grad_fn
    return bool(GUARDED[kind_of(node)](node))


# (function, values where it is smooth, values one of which is not)
TWO_SIDES: dict[str, tuple[Callable[[Tensor], Tensor], list[float], list[float]]] = {
    "abs": (torch.abs, [-1.0, 1e-30], [1.0, 0.0]),
    "abs of -0": (torch.abs, [1.0], [-0.0]),
    "clamp": (lambda x: x.clamp(-1.0, 2.0), [0.0, 3.0, -2.0], [2.0, 0.0]),
    "clamp, lower": (lambda x: x.clamp(-1.0, 2.0), [0.0], [-1.0]),
    "clamp by tensors": (lambda x: torch.clamp(x, torch.zeros(1), torch.ones(1)), [0.5, 2.0], [0.5, 1.0]),
    "clamp_min": (lambda x: x.clamp_min(0.5), [0.4], [0.5]),
    "clamp_max": (lambda x: x.clamp_max(0.5), [0.4], [0.5]),
    "leaky_relu": (F.leaky_relu, [-1.0, 1.0], [0.0]),
    "relu6": (F.relu6, [5.0, 7.0], [6.0]),
    "hardtanh": (F.hardtanh, [0.0, 2.0], [-1.0]),
    "hardsigmoid": (F.hardsigmoid, [2.0, 4.0], [-3.0]),
    "hardswish": (F.hardswish, [2.0, 4.0], [3.0]),
    "hardshrink": (F.hardshrink, [0.4, 0.6], [-0.5]),
    "softshrink": (F.softshrink, [0.4, 0.6], [0.5]),
    "threshold": (lambda x: F.threshold(x, 1.0, 1.0), [0.0, 2.0], [1.0]),
    "rrelu": (lambda x: F.rrelu(x, training=True), [1.0, -1.0], [0.0]),
    "prelu": (lambda x: F.prelu(x, torch.ones(1).double()), [1.0, -1.0], [0.0]),
    "maximum": (lambda x: torch.maximum(x, torch.ones(1)), [0.0, 2.0], [0.0, 1.0]),
    "minimum": (lambda x: torch.minimum(x, torch.ones(1)), [0.0, 2.0], [0.0, 1.0]),
    "fmax": (lambda x: torch.fmax(x, -x), [1.0], [0.0]),
    "amax": (lambda x: x.amax(0), [1.0, 2.0, 1.0], [2.0, 1.0, 2.0]),
    "amin": (lambda x: x.amin(0), [1.0, 2.0, 2.0], [1.0, 2.0, 1.0]),
    "elu 2": (lambda x: F.elu(x, 2.0), [1.0, -1.0], [0.0]),
    "division": (lambda x: 1.0 / x * torch.ones(1) / x, [1.0], [0.0]),
    "sqrt": (torch.sqrt, [1.0], [0.0]),
    "rsqrt": (torch.rsqrt, [1.0], [-1.0]),
    "log": (torch.log, [1.0], [0.0]),
    "log1p": (torch.log1p, [-0.5], [-1.0]),
    "asin": (torch.asin, [0.5], [1.0]),
    "acosh": (torch.acosh, [1.5], [1.0]),
    "pow -2": (lambda x: x**-2, [-1.0], [0.0]),
    "pow 1.5": (lambda x: x**1.5, [1.0], [0.0]),
    "norm": (lambda x: x.norm(), [0.0, 1.0], [0.0, 0.0]),
    "norm of order 1": (lambda x: x.norm(), [1.0], [0.0]),
    "vector norm": (lambda x: torch.linalg.vector_norm(x), [0.0, 1.0], [0.0, 0.0]),
    "std": (lambda x: x.std(), [0.0, 1.0], [2.0, 2.0]),
    "softplus": (lambda x: F.softplus(x, 2.0, 10.0), [0.0, 4.0, 6.0], [5.0]),
    "probability": (lambda x: F.binary_cross_entropy(x, torch.ones_like(x)), [0.5, 1e-9], [1.0]),
}


@pytest.mark.parametrize("name", TWO_SIDES)
def test_both_sides_of_a_guard(name: str) -> None:
    function, smooth, singular = TWO_SIDES[name]
    assert guard(function, *smooth)
    assert not guard(function, *singular)


@pytest.mark.parametrize("name", [name for name, case in TWO_SIDES.items() if name not in ("fmax",)])
def test_nan_counts_as_touching(name: str) -> None:
    function, smooth, _ = TWO_SIDES[name]
    if name == "probability":
        with pytest.raises(RuntimeError):
            guard(function, NAN)
        return
    if name in ("division", "std", "norm", "vector norm") or name == "amax":
        return  # not a kink: NaN is seen elsewhere
    assert not guard(function, *smooth[:-1], NAN)


def test_a_kink_that_is_no_float_counts_in_every_precision() -> None:
    """0.1 is one number in float64 and another in float32 and bfloat16: whichever the kernel took is a touch."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([0.1], dtype=dtype)
        assert not clear(x, 0.1)
        assert clear(x * 2, 0.1)
    assert clear(torch.tensor([0.2]).double(), 0.1)
    assert not clear(None, 0.0)


def test_continuous_derivatives_pass_at_the_seam() -> None:
    assert guard(F.elu, 0.0)
    assert not guard(F.selu, 0.0)
    assert guard(F.celu, 0.0)
    assert guard(lambda x: F.smooth_l1_loss(x, torch.zeros(1).double()), 1.0)
    assert guard(lambda x: F.huber_loss(x, torch.zeros(1).double()), 1.0)


def test_norms_of_another_order_are_refused() -> None:
    assert not guard(lambda x: torch.linalg.vector_norm(x, 1), 1.0)
    assert not guard(lambda x: torch.linalg.vector_norm(x, float("inf")), 1.0)


def test_in_place_forms_that_keep_only_their_result_are_refused() -> None:
    assert not guard(lambda x: F.elu_(x * 1.0, 2.0), 1.0)
    assert not guard(lambda x: F.leaky_relu_(x * 1.0), 1.0)


def test_embeddings() -> None:
    table, at = nn.Parameter(torch.ones(3, 2)), torch.tensor([[0, 1]])

    def passes(result: Tensor) -> bool:
        return bool(GUARDED[kind_of(result.grad_fn)](result.grad_fn))

    assert passes(F.embedding(at, table))
    assert not passes(F.embedding(at, table, padding_idx=1))
    assert not passes(F.embedding(at, table, scale_grad_by_freq=True))
    assert passes(F.embedding_bag(at, table, mode="sum"))
    assert passes(F.embedding_bag(at, table, mode="mean"))
    assert not passes(F.embedding_bag(at, table, mode="max"))
    assert not passes(F.embedding_bag(at, table, mode="sum", padding_idx=0))


def test_writes_to_one_place_twice_are_refused() -> None:
    """Of two values written to one place only the last one counts, but autograd gives both a gradient."""
    w = nn.Parameter(torch.ones(2))
    for index, plain in ((torch.tensor([0, 2]), True), (torch.tensor([1, 1]), False)):
        for result in (torch.zeros(3).index_put((index,), w), torch.zeros(3).scatter(0, index, w)):
            assert bool(GUARDED[kind_of(result.grad_fn)](result.grad_fn)) is plain
    added = torch.zeros(3).index_put((torch.tensor([1, 1]),), w, accumulate=True)
    assert bool(GUARDED[kind_of(added.grad_fn)](added.grad_fn))


def test_a_recurrent_layer_of_mkldnn() -> None:
    out = nn.LSTM(2, 2)(torch.ones(1, 1, 2))[0]
    kinds = {kind_of(out.grad_fn)}
    assert all(kind in ANALYTIC or bool(GUARDED[kind](out.grad_fn)) for kind in kinds)


# ---- through the audit -----------------------------------------------------------------------------------------


def verdict(function: Callable[[Tensor], Tensor], *values: float) -> adcert.Certificate:
    w = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    return certify(lambda: function(w).sum(), nn.ParameterList([w]))


def _written(w: Tensor) -> Tensor:
    out = torch.zeros(4, dtype=w.dtype)
    out[1:3] = w
    return torch.relu(out)


def _written_twice(w: Tensor) -> Tensor:
    out = torch.zeros(2, 2, dtype=w.dtype)
    out[0][torch.tensor([1, 1])] = w
    return torch.relu(out)


def _rectified_in_a_part(w: Tensor) -> Tensor:
    out = w * 1.0
    out[:1].clamp_(min=0)
    return out


def test_writes_into_parts() -> None:
    assert verdict(_written, 1.0, -1.0).verdict is adcert.Verdict.CERTIFIED
    circular = verdict(lambda w: torch.relu(F.pad(w[None], (1, 1), mode="circular")), 1.0, -1.0)
    assert circular.verdict is adcert.Verdict.CERTIFIED
    for function in (_written_twice, _rectified_in_a_part):
        refused = verdict(function, 1.0, -1.0)
        assert refused.verdict is adcert.Verdict.UNDECIDED
        assert any("CopySlices" in reason or "IndexPut" in reason for reason in refused.reasons), refused.reasons


def test_singular_points_are_undecided_by_name() -> None:
    assert verdict(lambda w: w.norm(), 3.0, 4.0).verdict is adcert.Verdict.CERTIFIED
    refused = verdict(lambda w: w.norm(), 0.0, 0.0)
    assert refused.verdict is adcert.Verdict.UNDECIDED
    assert any("LinalgVectorNorm" in reason for reason in refused.reasons)


def test_the_static_analysis_does_not_believe_one_example() -> None:
    """hardshrink is smooth at this example, and not everywhere."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            return torch.relu(F.hardshrink(h, 0.1))

    found = adcert.analyze(Model(), torch.randn(4, 2))
    assert all(theorem.holds == "no" for theorem in found.theorems)
    assert "HardshrinkBackward0" in str(found.theorems)


def test_every_rule_is_for_something_the_audit_lets_through() -> None:
    """A rule for a node the audit refuses anyhow would never be used: a wrong name."""
    known = ANALYTIC | GUARDED.keys() | {"torch::autograd::CopySlices"}
    assert {*RULES, *NUMBERED} - known == set()
    assert KINKS.keys() <= RULES.keys()


@pytest.mark.parametrize("name", CASES)
def test_every_layer_kind_is_let_through(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    module = case.make()
    model = nn.ModuleDict({} if module is None else {"layer": module}).double()
    x = nn.Parameter(torch.randn(case.shape, dtype=torch.float64).abs() + 0.5 if case.positive else
                     torch.randn(case.shape, dtype=torch.float64))  # fmt: skip
    model.register_parameter("x", x)
    certificate = certify(lambda: case.call(module, x * 1.0).sum(), model)
    named = [reason for reason in certificate.reasons if "Backward" in reason or "CopySlices" in reason]
    assert named == []
