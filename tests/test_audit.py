"""The audit: values that leave the autograd graph and come back, roots, functional calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adcert
from adcert import Verdict, certify


def verdict(function: Callable[[Tensor], Tensor], value: float = 0.0) -> adcert.Certificate:
    w = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    return certify(lambda: function(w).sum(), nn.ParameterList([w]))


def buffer_write(w: Tensor) -> Tensor:
    buffer = torch.zeros(1, dtype=torch.float64)
    buffer[0] = (w > 0).double()[0]
    return w * buffer


def alias_write(w: Tensor) -> Tensor:
    buffer = torch.zeros(1, dtype=torch.float64)
    view = buffer.view(1)
    view.copy_((w > 0).double())
    return w * buffer


def out_with_earlier_view(w: Tensor) -> Tensor:
    buffer = torch.zeros(1, dtype=torch.bool)
    view = buffer.view(-1)
    torch.gt(w, 0, out=buffer)
    return w * view


def laundered_by_no_grad(w: Tensor) -> Tensor:
    mask = w > 0
    with torch.no_grad():
        factor = mask.double()
    return w * factor


def buffer_data(w: Tensor) -> Tensor:
    buffer = torch.zeros(1, dtype=torch.float64)
    buffer.data = (w > 0).double()
    return w * buffer


HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "mask": lambda w: w * (w > 0) - (-w) * (-w > 0),
    "boolean index": lambda w: w[w > 0].sum() - (-w)[-w > 0].sum(),
    "where": lambda w: torch.where(w == 0, torch.zeros_like(w), w),
    "sign of a detached value": lambda w: w * torch.sign(w.detach()),
    "data": lambda w: w * (w.data > 0),
    "argmax": lambda w: torch.cat([w, -w])[torch.cat([w, -w]).argmax()],
    "transposed mask": lambda w: w.view(1, 1) * (w.view(1, 1) > 0).T,
    "cast mask": lambda w: w * (w > 0).to(torch.float64),
    "written buffer": buffer_write,
    "written alias": alias_write,
    "detached leaf": lambda w: w + w.detach().requires_grad_() * w,
    "out": lambda w: w * torch.gt(w, 0, out=torch.empty(1, dtype=torch.bool)),
    "out, earlier view": out_with_earlier_view,
    "laundered by no_grad": laundered_by_no_grad,
    "buffer.data": buffer_data,
    "slice": lambda w: torch.cat([w, w])[: (w > 0).sum()].sum() + w,
    "aten overload": lambda w: w * torch.ops.aten.gt.Scalar(w, 0),
    "Python function with a branch": lambda w: nn.functional.gumbel_softmax(torch.cat([w, w]), hard=True).sum() * w,
    "gather": lambda w: torch.cat([w, -w]).gather(0, torch.cat([w, -w]).argsort()[:1]),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_branches_are_undecided(name: str) -> None:
    certificate = verdict(HIDDEN[name])
    assert certificate.verdict is Verdict.UNDECIDED
    assert any("autograd does not see" in reason for reason in certificate.reasons), certificate.reasons


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * (x > 0).double()


class Clone(torch.autograd.Function):
    """Named like an operation that is allowed."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
        return 0 * g


def in_thread(w: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: w * (w > 0)).result()


def write_through_data(w: Tensor) -> Tensor:
    h = w * 1.0
    h.data.clamp_(min=0)
    return h * h


def write_through_detach(w: Tensor) -> Tensor:
    h = w * 1.0
    h.detach().view(-1).clamp_(min=0)
    return h + 1


def replace_data(w: Tensor) -> Tensor:
    h = w * 1.0
    h.data = h.data.clamp(min=0)
    return h + 1


def write_under_no_grad(w: Tensor) -> Tensor:
    h = w * 1.0
    with torch.no_grad():
        h.clamp_(min=0)
    return h + 1


def gradient_hook(w: Tensor) -> Tensor:
    h = 2 * w
    h.register_hook(lambda g: 0 * g)
    return h


def relu_inplace_under_no_grad(w: Tensor) -> Tensor:
    h = w * 1.0
    with torch.no_grad():
        nn.functional.relu(h, inplace=True)
    return h + 1


@torch.jit.script
def write(x: Tensor) -> None:
    x.clamp_(min=0)


def scripted_write(w: Tensor) -> Tensor:
    h = w * 1.0
    with torch.no_grad():
        write(h)
    return h + 1


def changed_between_uses(w: Tensor) -> Tensor:
    first = torch.relu(w + 1)
    with torch.no_grad():
        w.add_(1)
    return first - torch.relu(w)


def data_under_no_grad(w: Tensor) -> Tensor:
    h = w * 1.0
    with torch.no_grad():
        view = h.data.view(-1)
        view.clamp_(min=0)
    return h + 1


def data_under_no_grad_written_later(w: Tensor) -> Tensor:
    h = w * 1.0
    with torch.no_grad():
        held = h.data
    held.clamp_(min=0)
    return h + 1


UNSEEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "TorchScript": (scripted, "out of adcert's sight"),
    "thread": (in_thread, "out of adcert's sight"),
    "custom function": (lambda w: Clone.apply(w), "not recorded"),
    "data": (write_through_data, "detached alias"),
    "detach": (write_through_detach, "detached alias"),
    "replaced data": (replace_data, "__set__"),
    "no_grad": (write_under_no_grad, "under no_grad"),
    "in-place module function": (relu_inplace_under_no_grad, "without autograd"),
    "scripted write": (scripted_write, "written to out of sight"),
    "parameter": (changed_between_uses, "after its first use"),
    "data under no_grad": (data_under_no_grad, "detached alias"),
    "data held from no_grad": (data_under_no_grad_written_later, "detached alias"),
    "hook": (gradient_hook, "hook"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_cannot_be_followed_is_undecided(name: str) -> None:
    function, message = UNSEEN[name]
    certificate = verdict(function, -1.0)
    assert certificate.verdict is Verdict.UNDECIDED
    assert any(message in reason for reason in certificate.reasons), certificate.reasons


def test_a_forward_before_the_step_is_undecided() -> None:
    w = nn.Parameter(torch.zeros(1))
    loss = (w * (w > 0)).sum()
    with adcert.Monitor(nn.ParameterList([w])).step() as step:
        loss.backward()
    assert step.certificate().verdict is Verdict.UNDECIDED
    assert "out of adcert's sight" in step.certificate().reasons[0]


def test_a_hidden_gradient_argument_is_undecided() -> None:
    w = nn.Parameter(torch.zeros(2))
    with adcert.Monitor(nn.ParameterList([w])).step() as step:
        y = 2 * w
        y.backward(gradient=(y > 0).float())
    assert step.certificate().verdict is Verdict.UNDECIDED


HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": lambda w: w * torch.zeros_like(w) + w.new_ones(1),
    "constant mask": lambda w: w * (torch.arange(1) >= 0),
    "integer index": lambda w: w[torch.tensor([0, 0])],
    "constant where": lambda w: torch.where(torch.tensor([True]), w, 2 * w),
    "logging": lambda w: w * 2 + 0 * float((w > 0).sum() * 0),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_uses_are_certified(name: str) -> None:
    assert verdict(HARMLESS[name]).verdict is Verdict.CERTIFIED


def test_statistics_that_do_not_reach_the_loss_are_harmless() -> None:
    def loss(w: Tensor) -> Tensor:
        hits = ((w > 0) * 1.0).sum()  # an accuracy, say
        hits += 1
        return w * 3

    assert verdict(loss).verdict is Verdict.CERTIFIED


def test_branches_and_no_grad_values_are_listed_as_assumptions() -> None:
    def branch(w: Tensor) -> Tensor:
        with torch.no_grad():
            scale = w.abs() + 1
        return w * scale if bool((w >= 0).all()) else -w

    certificate = verdict(branch)
    assert certificate.verdict is Verdict.CERTIFIED
    assert any("__bool__" in line for line in certificate.assumptions)
    assert any("no_grad" in line for line in certificate.assumptions)


def test_numpy_round_trip_is_an_assumption() -> None:
    def detour(w: Tensor) -> Tensor:
        return w * torch.from_numpy(np.sign(w.detach().numpy()))

    assert any("numpy" in line for line in verdict(detour).assumptions)


SINGULAR: dict[str, Callable[[Tensor], Tensor]] = {
    "SqrtBackward0": lambda w: torch.sqrt(w**2),
    "PowBackward0": lambda w: (w**2) ** 0.5,
    "LogBackward0": lambda w: torch.log(1 + w * 0 - 1 + w * w),
    "DivBackward0": lambda w: 1 / (1 + 1 / w),
    "RsqrtBackward0": lambda w: torch.rsqrt(w * w),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_singular_points_are_undecided(name: str) -> None:
    assert verdict(SINGULAR[name]).verdict is Verdict.UNDECIDED
    assert verdict(SINGULAR[name], 1.5).verdict is Verdict.CERTIFIED


@pytest.mark.parametrize(
    "function",
    [torch.relu, Tensor.relu, nn.functional.relu, lambda w: torch.relu_(w * 1), lambda w: (w * 1).relu_(), nn.ReLU()],
)
def test_functional_relus_are_recorded(function: Callable[[Tensor], Tensor]) -> None:
    certificate = verdict(lambda w: function(w) + 1)
    assert certificate.verdict is Verdict.CERTIFIED
    assert [layer.touches for layer in certificate.layers] == [1]


@pytest.mark.parametrize(
    "function",
    [
        lambda w: torch.max_pool2d(w, 2),
        lambda w: nn.functional.max_pool2d(w, (2, 2), stride=None),
        lambda w: nn.functional.max_pool2d(input=w, kernel_size=2, stride=2, padding=0),
        nn.MaxPool2d(2),
    ],
)
def test_functional_poolings_are_recorded(function: Callable[[Tensor], Tensor]) -> None:
    w = nn.Parameter(torch.ones(1, 1, 2, 2, dtype=torch.float64))
    certificate = certify(lambda: function(w).sum(), nn.ParameterList([w]))
    assert certificate.verdict is Verdict.CERTIFIED
    assert [layer.ties for layer in certificate.layers] == [1]
    assert certificate.directions["0"].flatten().argmax() == 0  # the first maximiser must win


def test_return_indices_is_recorded() -> None:
    w = nn.Parameter(torch.ones(1, 1, 2, 2))
    certificate = certify(lambda: nn.functional.max_pool2d(w, 2, return_indices=True)[0].sum(), nn.ParameterList([w]))
    assert certificate.verdict is Verdict.CERTIFIED
    assert (certificate.layers[0].ties, certificate.layers[0].rows) == (1, 3)


def test_custom_functions_are_named() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * g

    certificate = verdict(lambda w: Twice.apply(w))
    assert certificate.verdict is Verdict.UNDECIDED
    assert "TwiceBackward" in certificate.reasons[0]


def test_gradients_that_are_not_the_functions_are_undecided() -> None:
    table = nn.Embedding(3, 2, padding_idx=0)
    certificate = certify(lambda: table(torch.tensor([0, 1])).sum(), table)
    assert certificate.verdict is Verdict.UNDECIDED
    assert "EmbeddingBackward0" in certificate.reasons[0]
    plain = nn.Embedding(3, 2)
    assert certify(lambda: plain(torch.tensor([0, 1])).sum(), plain).verdict is Verdict.CERTIFIED
    assert verdict(lambda w: torch.div(w, 2, rounding_mode="floor") + w).verdict is Verdict.UNDECIDED


def test_foreign_leaves_and_hooks_are_listed() -> None:
    w, x = nn.Parameter(torch.ones(1)), torch.ones(1, requires_grad=True)
    w.register_hook(lambda g: 2 * g)
    certificate = certify(lambda: (w * x).sum(), nn.ParameterList([w]))
    assert certificate.verdict is Verdict.CERTIFIED
    assert any("leaf0" in line for line in certificate.assumptions)
    assert any("hooks on 0" in line for line in certificate.assumptions)


def test_running_statistics_of_the_same_step_are_hidden_values() -> None:
    def loss(model: nn.BatchNorm1d, evaluated: bool) -> Tensor:
        x = torch.arange(6.0).reshape(3, 2)
        first = model(model(x)).sum()
        return first + model.train(not evaluated)(x).sum()

    for evaluated in (False, True):
        model = nn.BatchNorm1d(2)
        certificate = certify(lambda model=model, evaluated=evaluated: loss(model, evaluated), model)
        assert (certificate.verdict is Verdict.CERTIFIED) is not evaluated


def test_writing_views_of_parameters_under_no_grad_does_not_break_the_program() -> None:
    layer = nn.Linear(2, 2)

    def loss() -> Tensor:
        with torch.no_grad():
            layer.weight[0].fill_(0)
        return layer(torch.ones(1, 2)).sum()

    assert certify(loss, layer).verdict in (Verdict.CERTIFIED, Verdict.UNDECIDED)
    assert layer.weight[0].tolist() == [0.0, 0.0]


def test_clipping_weights_before_their_first_use_is_harmless() -> None:
    def clipped(w: Tensor) -> Tensor:
        w.data.clamp_(min=0)
        return 2 * w

    assert verdict(clipped, -1.0).verdict is Verdict.CERTIFIED


# ---- in-place ReLU -------------------------------------------------------------------------------


IN_PLACE: dict[str, Callable[[], nn.Sequential]] = {
    "after a convolution": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3)),
    "after a normalisation, pooled": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Identity(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 1)
    ),
    "after a pooling": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Flatten()),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_modules_are_decided_as_the_others(name: str) -> None:
    torch.manual_seed(0)
    model = IN_PLACE[name]().double()
    for parameter in model.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    x = torch.randint(0, 3, (2, 1, 8, 8)).double()
    apart = copy.deepcopy(model)
    for module in apart.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    seen = []
    for each in (model, apart):
        adcert.convert(each)
        certificate = certify(lambda each=each: each(x).sum(), each)
        certificate.verify()
        assert not any("place" in reason or "out of sight" in reason for reason in certificate.reasons)
        counts = [(layer.ties, layer.touches, layer.differing, layer.rows) for layer in certificate.layers]
        seen.append((certificate.verdict, counts, certificate.fingerprints))
    assert seen[0] == seen[1]
    assert sum(ties + touches for ties, touches, *_ in seen[0][1]) > 0


def test_a_write_out_of_sight_is_not_forgotten_by_an_in_place_relu() -> None:
    def before(w: Tensor) -> Tensor:
        h = 2 * w
        with torch.no_grad(), torch._C.DisableTorchFunction():
            h.detach().mul_(3)
        return torch.nn.functional.relu(h, inplace=True)

    certificate = verdict(before, 1.0)
    assert certificate.verdict is Verdict.UNDECIDED
    assert any("out of sight" in reason for reason in certificate.reasons)


def test_a_module_that_writes_in_place_into_a_view_is_undecided() -> None:
    model = adcert.convert(nn.Sequential(nn.ReLU(inplace=True)))
    w = nn.Parameter(torch.tensor([1.0, -1.0, 0.0]))

    def loss() -> Tensor:
        h = 2 * w
        model(h[:2])
        return h.sum()

    assert certify(loss, nn.ParameterList([w])).verdict is Verdict.UNDECIDED
