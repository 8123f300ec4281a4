"""The per-step driver: verdicts, the log, and defined behaviour for everything that goes wrong in a step."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert import Monitor, Verdict, certify
from adcert.recorder import active


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2))
    return adcert.convert(model)  # type: ignore[return-value]


X = torch.arange(2 * 36, dtype=torch.float32).reshape(2, 1, 6, 6) % 5
Y = torch.tensor([0, 1])


def run(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> adcert.Certificate:
    return certify(lambda: F.cross_entropy(model(x), y), model)


def after(monitor: Monitor) -> str:
    """A clean step on the same monitor: nothing may have leaked into it."""
    with monitor.step() as step:
        F.cross_entropy(monitor.model(X), Y).backward()
    return str(step.certificate().verdict.value)


def test_a_plain_step_is_certified() -> None:
    certificate = run(network())
    assert certificate.verdict is Verdict.CERTIFIED
    assert certificate.reasons == []
    assert certificate.claim == "bouligand"
    certificate.verify()


def test_gradients_are_those_of_plain_torch() -> None:
    model = network()
    F.cross_entropy(model(X), Y).backward()
    expected = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    run(model)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, g)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_activations_are_undecided(value: float) -> None:
    model = network()
    x = X.clone()
    x[0, 0, 0, 0] = value
    certificate = run(model, x)
    assert certificate.verdict is Verdict.UNDECIDED
    assert any("NaN or infinite" in reason for reason in certificate.reasons)
    model.zero_grad()
    assert run(model).verdict is Verdict.CERTIFIED


def test_empty_batch_is_certified_or_says_why() -> None:
    model = network()
    certificate = certify(lambda: model(X[:0]).sum(), model)
    assert certificate.verdict is Verdict.CERTIFIED  # the loss is the constant 0
    assert all(bool((p.grad == 0).all()) for p in model.parameters() if p.grad is not None)


def test_non_contiguous_input() -> None:
    model = network()
    wide = torch.stack([X, X], -1)[..., 0]
    assert not wide.is_contiguous()
    a, b = run(model), run(model, wide)
    assert a.verdict is b.verdict is Verdict.CERTIFIED
    assert [layer.ties for layer in a.layers] == [layer.ties for layer in b.layers]


def test_loss_without_grad_is_an_error() -> None:
    model = network()
    with pytest.raises(adcert.AdcertError, match="does not require grad"), torch.no_grad():
        run(model)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(adcert.AdcertError, match="does not require grad"):
        run(model)
    assert active() is None


def test_no_grad_forward_inside_a_step_records_nothing() -> None:
    monitor = Monitor(network())
    with monitor.step() as step:
        with torch.no_grad():
            monitor.model(X)
        F.cross_entropy(monitor.model(X), Y).backward()
    certificate = step.certificate()
    assert certificate.verdict is Verdict.CERTIFIED
    assert [layer.name for layer in certificate.layers] == ["2"]


def test_an_input_without_grad_has_nothing_to_record() -> None:
    """ReLU and pooling of constants are constants: no touch, no tie, whatever their values."""
    linear = nn.Linear(9, 2)
    pooling = adcert.convert(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    certificate = certify(lambda: linear(pooling(torch.zeros(1, 1, 6, 6)).flatten(1)).sum(), linear)
    assert certificate.verdict is Verdict.CERTIFIED
    assert certificate.layers == ()


def test_eval_mode() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)
    )
    adcert.convert(model).eval()
    certificate = run(model)
    assert certificate.verdict is Verdict.CERTIFIED
    assert not model.training


def test_a_step_without_backward_is_undecided() -> None:
    monitor = Monitor(network())
    with monitor.step() as step:
        monitor.model(X)
    assert step.certificate().verdict is Verdict.UNDECIDED
    assert "no backward pass" in step.certificate().reasons[0]
    assert after(monitor) == "certified"


def test_step_loss_names_a_root() -> None:
    monitor = Monitor(network())
    with monitor.step() as step:
        loss = step.loss(F.cross_entropy(monitor.model(X), Y))
    assert step.certificate().verdict is Verdict.CERTIFIED
    with pytest.raises(adcert.AdcertError, match="after the step"):
        step.loss(loss)


def test_two_backwards_accumulate_and_join() -> None:
    """GALLERY row 19: two samples that are certified alone and contradict each other together."""
    conv = nn.Conv2d(1, 1, (1, 2), (1, 2), bias=False, dtype=torch.float64)
    conv.weight.data = torch.tensor([[[[1.0, 1.0]]]], dtype=torch.float64)
    model = adcert.convert(nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d((1, 2))))
    first = torch.tensor([[[[1.0, 2.0, 2.0, 1.0]]]], dtype=torch.float64)
    second = first.flip(3)
    second = torch.tensor([[[[2.0, 1.0, 1.0, 2.0]]]], dtype=torch.float64)
    for x in (first, second):
        assert certify(lambda x=x: model(x).sum(), model).verdict is Verdict.CERTIFIED
    monitor = Monitor(model)
    with monitor.step() as step:
        model(first).sum().backward()
        model(second).sum().backward()
    certificate = step.certificate()
    assert certificate.verdict is Verdict.UNCERTIFIED
    certificate.verify()


def test_second_backward_through_one_graph() -> None:
    monitor = Monitor(network())
    with monitor.step() as step:
        loss = F.cross_entropy(monitor.model(X), Y)
        loss.backward(retain_graph=True)
        loss.backward()
    assert step.certificate().verdict is Verdict.CERTIFIED


def test_an_exception_inside_the_step_leaves_nothing_behind() -> None:
    monitor = Monitor(network())
    with pytest.raises(ZeroDivisionError), monitor.step() as step:
        monitor.model(X)
        1 / 0  # noqa: B018
    with pytest.raises(adcert.AdcertError, match="no certificate"):
        step.certificate()
    assert active() is None
    assert after(monitor) == "certified"
    assert (monitor.report().steps, monitor.report().aborted, monitor.report().certified) == (2, 1, 1)


def test_a_module_called_twice() -> None:
    """Siamese use: one layer, two records of the same weights, joined."""
    model = network()
    certificate = certify(lambda: F.cross_entropy(model(X) + model(X.flip(3)), Y), model)
    assert certificate.verdict is Verdict.CERTIFIED
    assert len(certificate.layers) == 1
    single = run(model).layers[0].windows
    assert certificate.layers[0].windows == 2 * single


def test_weight_tying_along_the_depth_has_no_layers() -> None:
    linear = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    linear.weight.data.zero_()
    x = torch.ones(1, 2, dtype=torch.float64)

    def loss() -> Tensor:
        return torch.relu(linear(torch.relu(linear(x)) + 1)).sum()

    certificate = certify(loss, linear, strict=True)
    assert certificate.verdict is Verdict.UNDECIDED
    assert "weight tying" in certificate.reasons[0]
    assert certify(loss, linear).system == "joint"


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda z: (z - z).median(), "median"),
        (lambda z: F.hardshrink(z - z + 0.5), "hardshrink"),
        (lambda z: F.threshold(z, 1.0, 2.0), "threshold"),
        (lambda z: torch.clamp(z - z, min=torch.zeros(2, dtype=z.dtype)), "clamp"),
        (lambda z: torch.aminmax(z - z, dim=0).max, "aminmax"),
        (lambda z: z.norm(p=1), "norm"),
    ],
)
def test_unsupported_operations_are_named(function: Callable[[Tensor], Tensor], name: str) -> None:
    model = network()
    certificate = certify(lambda: function(model(X)).sum(), model)
    assert certificate.verdict is Verdict.UNDECIDED
    assert any(name in reason and "test_monitor.py" in reason for reason in certificate.reasons), certificate.reasons


def test_raise_mode() -> None:
    w = nn.Parameter(torch.zeros(1))
    monitor = Monitor(nn.ParameterList([w]), on_fail="raise")
    with pytest.raises(adcert.UncertifiedError, match="step 1 is uncertified"), monitor.step():
        (torch.relu(w) - torch.relu(-w)).sum().backward()
    with pytest.raises(adcert.UncertifiedError, match="undecided"), monitor.step():
        (2 * torch.relu(w) - w - w.abs()).sum().backward()


def test_refusals() -> None:
    model = network()
    with pytest.raises(adcert.AdcertError, match="repair"):
        Monitor(model, on_fail="repair")
    with pytest.raises(adcert.AdcertError, match="on_fail"):
        Monitor(model, on_fail="ignore")
    with pytest.raises(adcert.AdcertError, match=r"torch\.nn\.Module"):
        Monitor(lambda x: x)  # type: ignore[arg-type]
    with Monitor(model).step(), pytest.raises(adcert.AdcertError, match="do not nest"), Monitor(model).step():
        pass
    with pytest.raises(adcert.AdcertError, match="cannot write the log"), Monitor(model, log="/nowhere/at/all.jsonl"):
        pass
    with pytest.raises(adcert.AdcertError, match="one element"):
        certify(lambda: model(X), model)


def test_the_log(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Monitor(network(), log=path) as monitor:
        after(monitor)
        with monitor.step():
            pass
    first, second, last = [json.loads(line) for line in path.read_text().splitlines()]
    assert (first["step"], first["verdict"], first["layers"][0]["name"]) == (1, "certified", "2")
    assert first["ties"] == sum(layer["ties"] for layer in first["layers"])
    assert (second["step"], second["verdict"]) == (2, "undecided")
    assert (last["report"]["steps"], last["report"]["certified"], last["report"]["undecided"]) == (2, 1, 1)
    assert list(last["report"]["reasons"].values()) == [1]


def test_nothing_of_a_step_outlives_it() -> None:
    monitor = Monitor(network())
    with monitor.step() as step:
        F.cross_entropy(monitor.model(X), Y).backward()
        record = weakref.ref(step._recorder.records[0])
    gc.collect()
    assert record() is None
    assert step.certificate().verdict is Verdict.CERTIFIED


def test_activations_are_let_go_before_backward_runs() -> None:
    monitor = Monitor(network())
    alive: list[bool] = []
    with monitor.step():
        z = monitor.model[:3](X)
        kept = weakref.ref(z.untyped_storage())
        loss = F.cross_entropy(monitor.model[3:](z), Y)
        del z
        loss.backward()
        alive.append(kept() is not None)
    assert alive == [False]


def test_user_hooks_do_not_fire_in_the_analysis() -> None:
    model = network()
    fired: list[int] = []
    for p in model.parameters():
        p.register_hook(lambda g: fired.append(1))  # type: ignore[arg-type]
    run(model)
    assert len(fired) == len(list(model.parameters()))


def test_random_state_is_not_touched() -> None:
    model = network()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(model)
    assert torch.equal(torch.rand(3), expected)


def test_parameters_changed_between_backwards_are_undecided() -> None:
    model = network()
    monitor = Monitor(model)
    with monitor.step() as step:
        F.cross_entropy(model(X), Y).backward()
        with torch.no_grad():
            model[0].weight.mul_(2)
        F.cross_entropy(model(X), Y).backward()
    assert step.certificate().verdict is Verdict.UNDECIDED
    assert "modified after its first use" in step.certificate().reasons[0]
    assert after(monitor) == "certified"


@pytest.mark.parametrize("strict", [False, True])
def test_a_bias_that_reaches_y_twice_is_no_bias(strict: bool) -> None:
    """relu(h) - relu(h + L h) with L = -2 is h: AD 0, truth 1. The bias has two paths to y."""
    first, second = nn.Linear(1, 1), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        for p, value in ((first.weight, 0.0), (first.bias, 0.0), (second.weight, -2.0)):
            p.fill_(value)

    def loss() -> Tensor:
        h = first(torch.ones(1, 1))
        return (torch.relu(h) - torch.relu(h + second(h))).sum()

    certificate = certify(loss, nn.ModuleList([first, second]), strict=strict)
    assert certificate.verdict is not Verdict.CERTIFIED


def test_losses_are_analysed_where_they_are_named() -> None:
    monitor = Monitor(network())
    with monitor.step() as step:
        step.loss(F.cross_entropy(monitor.model(X), Y)).backward()
    assert step.certificate().verdict is Verdict.CERTIFIED
    with monitor.step() as step:
        losses = [F.cross_entropy(monitor.model(x), Y) for x in (X, X.flip(3))]
        for loss in losses:
            loss.backward()
    assert step.certificate().verdict is Verdict.CERTIFIED


def test_restricted_backward_is_undecided() -> None:
    model = network()
    monitor = Monitor(model)
    with monitor.step() as step:
        loss = F.cross_entropy(model(X), Y)
        torch.autograd.grad(loss, [model[0].weight])
    assert step.certificate().verdict is Verdict.UNDECIDED
    with monitor.step() as step:
        torch.autograd.grad(F.cross_entropy(model(X), Y), list(model.parameters()))
    assert step.certificate().verdict is Verdict.CERTIFIED


def test_a_step_whose_exact_rows_contradict_needs_no_partial_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Low precision: thousands of rounded ties beside exact ones. One provably empty block decides the step."""
    from adcert import analysis, backward

    class Negated(nn.Module):  # no stage of the native resolver: the general rules and the engine have to see to it
        def forward(self, x: Tensor) -> Tensor:
            return x.neg().neg()

    def refuse(*args: object, **kwargs: object) -> object:
        raise AssertionError("the partial backward engine ran")

    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), Negated(), nn.ReLU(), nn.MaxPool2d(2))
    adcert.convert(model).bfloat16()
    nn.init.ones_(model[0].weight)  # patches of equal sums tie exactly, neighbouring sums tie after rounding
    nn.init.constant_(model[1].bias, 100.0)
    x = torch.randint(0, 3, (16, 1, 16, 16), generator=generator).bfloat16()
    certificate = certify(lambda: model(x).float().sum(), model)
    assert certificate.verdict is Verdict.UNCERTIFIED
    certificate.verify()
    monkeypatch.setattr(backward, "gradients", refuse)
    assert certify(lambda: model(x).float().sum(), model).verdict is Verdict.UNCERTIFIED
    monkeypatch.setattr(analysis, "CHEAP", 10**9)
    assert certify(lambda: model(x).float().sum(), model).verdict is Verdict.UNDECIDED


def test_partial_backward_passes_are_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from adcert import partial

    monkeypatch.setattr(partial, "SECONDS", -1.0)
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2, affine=False), nn.ReLU()).double()
    x = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    certificate = certify(lambda: model(x).sum(), model)
    assert certificate.verdict is Verdict.UNDECIDED
    assert any("partial backward passes" in reason for reason in certificate.reasons)


def test_a_failing_analysis_leaves_the_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from adcert.analysis import StepAnalysis

    def fail(*args: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(StepAnalysis, "_audit", fail)
    model = network()
    certificate = run(model)
    assert certificate.verdict is Verdict.UNDECIDED
    assert any("KeyError" in reason for reason in certificate.reasons)
    assert all(p.grad is not None for p in model.parameters())
