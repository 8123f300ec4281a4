"""Steps that were certified once although autodiff is wrong, or that failed although plain torch does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from core_helpers import autograd_rows, engine_rows, look, pairs, param
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import adcert
from adcert import enclosures
from adcert.backward import Unsupported
from adcert.balls import Ball


class _Model(nn.Module):
    def __init__(self, *each: nn.Parameter) -> None:
        super().__init__()
        self.each = nn.ParameterList(each)


def certify(closure: Callable[[], Tensor], *each: nn.Parameter) -> adcert.Certificate:
    return adcert.certify(closure, _Model(*each))


def test_an_unknown_slope_is_felt() -> None:
    """sin at 2e6 has no error bound: infinite radii meet weights that are 0. h_1 - h_2 is w, autodiff says 0."""
    w, weight = param([[0.0]]), torch.tensor([[1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)

    def loss() -> Tensor:
        h = torch.relu(torch.cat([w, -w], 1))
        return torch.sin(F.linear(h, weight, torch.full((2,), 2e6, dtype=torch.float64))).sum()

    assert certify(loss, w).verdict == "uncertified"


def test_complex_factors_have_no_rule() -> None:
    """i i w is -w, and relu(w) - relu(-w) is w."""
    w = param([0.0])

    def loss() -> Tensor:
        turned = (w.to(torch.complex128) * 1j * 1j).to(torch.float64)
        return (torch.relu(w) - torch.relu(turned)).sum()

    certificate = certify(loss, w)
    assert certificate.verdict == "undecided"
    assert any("complex" in reason for reason in certificate.reasons)


def test_strides_that_leave_the_input() -> None:
    """Autograd drops the gradient of what a view by strides reads beside its input."""
    w = param([1.0, 2.0, 3.0, 4.0])
    beside = certify(lambda: (w * 1.0)[:2].as_strided((4,), (1,), 0).sum(), w)
    assert beside.verdict == "undecided"
    assert any("AsStrided" in reason for reason in beside.reasons)
    assert certify(lambda: (w * 1.0).as_strided((3, 2), (1, 1), 0).sum(), w).verdict == "certified"
    assert certify(lambda: (w[:2] * 1.0).expand(3, 2).as_strided((2,), (1,), 0).sum(), w).verdict == "certified"


@pytest.mark.parametrize("copies", [2, 3])
def test_strides_of_an_input_that_overlaps_itself(copies: int) -> None:
    """Autograd hands back the mean over what lies in one place: no movement, though a sum over it looks like one."""
    w = param([0.0])

    def loss() -> Tensor:
        h = torch.relu(w) - torch.relu(-w)
        weights = torch.zeros(copies, dtype=torch.float64)
        weights[-1] = 1
        return (h.expand(copies).as_strided((copies,), (0,)) * weights).sum()

    assert certify(loss, w).verdict != "certified"


def test_an_unsorted_topk_that_jumps_at_a_lasting_tie() -> None:
    """a is there twice, so that it ties near w as well: then nth_element takes a way that no strict order takes."""
    w = param([0.0, 0.0])

    def loss() -> Tensor:
        a = w[0] * 1.0
        return torch.stack([a * 0 + 3.0, a, a, w[1] * 1.0]).topk(3, 0, True, False)[0][0]

    certificate = certify(loss, w)
    assert certificate.verdict == "undecided"
    assert "Topk" in certificate.reasons[0]


def test_a_mean_over_more_targets_than_predictions() -> None:
    """ATen's own operation divides by the number of predictions; F.mse_loss makes them as many as the targets."""
    w, t = param([1.0, 2.0]), torch.zeros(3, 2, dtype=torch.float64)
    raw = certify(lambda: torch._C._nn.mse_loss(w * 1.0, t, 1), w)
    assert raw.verdict == "undecided"
    assert "MseLoss" in raw.reasons[0]
    assert certify(lambda: torch.nn.functional.mse_loss(w * 1.0, t), w).verdict == "certified"


WRITERS: dict[str, Callable[[torch.nn.Parameter, Tensor], object]] = {
    "fused": lambda w, c: torch.optim.SGD([w], lr=1.0, fused=True).step(),
    "fused, averaged": lambda w, c: torch.optim.Adam([w], lr=1.0, fused=True).step(),
    "apply_": lambda w, c: c.apply_(lambda x: 5 * x),
    "map_": lambda w, c: c.map_(torch.full_like(c, 5.0), lambda x, y: y),
    "data": lambda w, c: setattr(c, "data", torch.full_like(c, 5.0)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_writes_without_a_new_version(name: str) -> None:
    """Between forward and backward, or between two passes, they change what autograd goes on to use."""
    w, c = param([1.0, 1.0]), torch.ones(2, dtype=torch.float64)
    model = torch.nn.ParameterList([w])
    w.grad = torch.ones_like(w)
    with adcert.Monitor(model) as monitor, monitor.step() as step:
        loss = (torch.relu(w) * c).sum()
        with torch.no_grad():
            WRITERS[name](w, c)
        loss.backward()
    assert step.summary["verdict"] == "undecided"
    assert any("version" in reason for reason in step.summary["reasons"]), step.summary["reasons"]
    with monitor.step() as step:  # after backward they are nobody's concern
        (torch.relu(w) * c).sum().backward()
        with torch.no_grad():
            WRITERS[name](w, c)
    assert not any("version" in reason for reason in step.summary["reasons"])


def test_statistics_that_were_read_before_they_are_written() -> None:
    norm = torch.nn.BatchNorm1d(2).double()
    w = param([1.0, 2.0])

    def loss() -> Tensor:
        read = (torch.relu(w) * norm.running_var).sum()
        norm(torch.randn(8, 2, dtype=torch.float64))
        return read + norm(w.expand(3, 2) * torch.tensor([[1.0], [2.0], [4.0]])).sum()

    assert certify(loss, w).verdict == "undecided"


def test_a_generator_under_a_checkpoint() -> None:
    w, generator = param([1.0]), torch.Generator()

    def region(x: Tensor) -> Tensor:
        return x * torch.rand(1, generator=generator, dtype=torch.float64)

    found = certify(lambda: torch.utils.checkpoint.checkpoint(region, w, use_reentrant=False).sum(), w)
    assert found.verdict == "undecided"
    assert any("generator" in reason for reason in found.reasons)


@pytest.mark.parametrize("by_name", [True, False])
def test_an_embedding_that_shortens_its_rows(by_name: bool) -> None:
    """At norm 1 = max_norm the function is w on one side and a constant on the other."""
    w, at = param([[1.0]]), torch.tensor([0])

    def loss() -> Tensor:
        e = F.embedding(at, w, max_norm=1.0) if by_name else F.embedding(at, w, None, 1.0)
        return F.leaky_relu(1.0 - e).sum() + 2.0 * e.sum()

    assert certify(loss, w).verdict == "undecided"
    assert certify(lambda: F.embedding(at, w, None, None).sum(), w).verdict == "certified"


def test_losses_that_branch_on_their_targets() -> None:
    w = param([1.0])
    one = torch.ones(1, dtype=torch.float64)
    assert certify(lambda: torch.poisson_nll_loss(one, w * 1.0, True, True, 1e-8, 2), w).verdict == "undecided"
    assert certify(lambda: torch.hinge_embedding_loss(w * 3.0, w * 1.0, 1.0, 2), w).verdict == "undecided"


_TOKENS = [[[1.0, 2.0, 4.0], [1.0, 3.0, -5.0]]]


def test_equal_entries_of_different_tokens() -> None:
    """gamma_0 = 0 ties the tokens; their entries 0 are equal, but not their normalised ones. The loss is 0."""
    x, gamma = param(_TOKENS), param([0.0, 1.0, 1.0])

    def loss() -> Tensor:
        h = F.layer_norm(x * 1.0, (3,), gamma)[:, :, 0]
        return h.max(1)[0].sum() - h.flip(1).max(1)[0].sum()

    assert certify(loss, x, gamma).verdict != "certified"


def test_the_gradient_of_a_scale_over_tokens() -> None:
    x, gamma = param(_TOKENS), param([0.0, 1.0, 1.0])
    seen = look(lambda probe: probe.relu(F.layer_norm(x * 1.0, (3,), gamma)), x=x, gamma=gamma)
    d = pairs((0, 3))
    found, truth = (
        engine_rows(seen, seen.records[-1], d)["gamma"],
        autograd_rows(seen.y(seen.records[-1]), seen.parameters(), d)["gamma"],
    )
    assert abs(float(truth[0, 0])) > 0.1
    assert bool(((found.value - truth).abs() <= found.radius + 1e-14).all())


def test_one_sample_of_a_constant() -> None:
    gamma = param([[1.0, 2.0, 3.0]])
    x = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    seen = look(lambda probe: probe.relu(F.layer_norm(x, (1, 3), gamma)), gamma=gamma)
    d = pairs((0, -1), (2, 1))
    found = engine_rows(seen, seen.records[-1], d)["gamma"]
    truth = autograd_rows(seen.y(seen.records[-1]), seen.parameters(), d)["gamma"]
    assert bool(((found.value - truth).abs() <= found.radius + 1e-14).all())


def test_exponentials_that_are_flushed_to_zero() -> None:
    """e^a is 0 in float64 for a = -800, but not at a + 790."""
    a = Ball(torch.tensor([-800.0]).double(), torch.tensor([790.0]).double())
    for function, truth in ((enclosures.exp, 4.5e-5), (enclosures.sigmoid, 4.5e-5)):
        found = function(a)
        assert found.radius is not None
        assert float(found.value + found.radius) > truth
    found = enclosures.sigmoid(-a)
    assert found.radius is not None
    assert float(found.value - found.radius) < 1 - 4.5e-5


def test_transforms_and_forward_mode_run() -> None:
    """Operators that record have no rules for them: torch's own run, and the step is undecided."""
    w = param([-1.0, 0.0, 2.0])

    def inner() -> Tensor:
        return torch.func.grad(lambda v: (torch.relu(v) ** 2).sum())(w).sum()

    def forward() -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(w, torch.ones_like(w))
            return forward_ad.unpack_dual(torch.relu(dual).abs()).tangent.sum() + w.sum()

    for loss in (inner, forward, lambda: torch.vmap(torch.relu)(w).sum()):
        assert certify(loss, w).verdict == "undecided"


def test_hooks_after_accumulation_are_an_assumption() -> None:
    w = param([1.0])
    w.register_post_accumulate_grad_hook(lambda p: None)
    assert any("hooks on" in text for text in certify(lambda: (w * w).sum(), w).assumptions)


def test_slopes_that_were_computed_are_felt() -> None:
    """The slope relu(w) - relu(-w) is w, and the loss -3 w."""
    x, w = param([[-1.0], [-2.0]]), param([0.0])
    certificate = certify(lambda: F.prelu(x, torch.relu(w) - torch.relu(-w)).sum(), x, w)
    assert certificate.verdict != "certified"


def test_outputs_whose_gradient_is_dropped() -> None:
    """The mean that group normalisation hands out depends on x; torch gives it no gradient."""
    x = param([[1.0, 2.0, 4.0, 8.0]])
    for number, verdict in ((0, "certified"), (1, "undecided"), (2, "undecided")):
        loss = certify(lambda k=number: torch.native_group_norm(x * 1.0, None, None, 1, 4, 1, 2, 1e-5)[k].sum(), x)  # type: ignore[misc]
        assert loss.verdict == verdict
    one = param([[3.0]])
    assert certify(lambda: torch.native_group_norm(one, None, None, 1, 1, 1, 1, 1e-5)[1], one).verdict == "undecided"
    assert certify(lambda: sum(torch.var_mean(x, 1)).sum() + x.split(2, 1)[1].sum(), x).verdict == "certified"


def test_padding_by_name() -> None:
    """torch keeps one number of padding="valid" for all dimensions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2, padding="valid"), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 1, 1, padding="valid"), nn.ReLU()
    )
    x = torch.ones(1, 1, 3, 3)
    x[0, 0, 0, 0] = 2.0
    assert adcert.certify(lambda: model(x).sum(), model).verdict == "certified"
    w, kernel = param([[[[1.0, 2.0], [3.0, 4.0]]]]), param([[[[1.0, 0.0], [0.0, -1.0]]]])
    seen = look(lambda probe: probe.relu(F.conv2d(w * 1.0, kernel, padding="valid")), w=w, kernel=kernel)
    found = engine_rows(seen, seen.records[-1], pairs((0, -1)))
    assert {leaf: ball.value.tolist() for leaf, ball in found.items()} == {
        "w": [[1.0, 0.0, 0.0, -1.0]], "kernel": [[1.0, 2.0, 3.0, 4.0]],
    }  # fmt: skip


def test_negative_padding_and_rules_that_fail() -> None:
    w = param([[1.0, 2.0, 4.0, 3.0]])
    seen = look(lambda probe: probe.relu(F.pad(w * 1.0, (1, -1), mode="reflect")), w=w)
    found = engine_rows(seen, seen.records[-1], pairs((0, 2)))
    assert found["w"].value.tolist() == [[0.0, 0.0, 0.0, 0.0]]
    assert found["w"].radius.tolist() == [[0.0, 0.0, 0.0, 0.0]]
    scalar = param(2.0)
    seen = look(lambda probe: probe.relu(torch.logsumexp(scalar * 1.0, 0) - 2.0), scalar=scalar)
    with pytest.raises(Unsupported, match="Logsumexp"):
        engine_rows(seen, seen.records[-1], pairs((0, -1)))
