"""What crosses between a device and the host, when, and who waits for it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from device_networks import EXACT, FEW, X, integers, plain, residual, steps, total, unbiased
from places import Place, content, opened
from torch import Tensor, nn

import adcert
from adcert import Monitor, Verdict, certify, lists
from adcert.certificate import Certificate
from adcert.lists import LEAST, Rooms
from adcert.transfer import Arrival, Batch, host, pick, take

# ---- waits ---------------------------------------------------------------------------------------


def _quiet() -> tuple[nn.Module, Tensor]:
    """No tie and no touch: powers of two under a filter of ones and a bias of one half."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2))
    nn.init.constant_(model[0].weight, 1.0)
    nn.init.constant_(model[0].bias, 0.5)
    x = 2.0 ** torch.arange(25, dtype=torch.float64).reshape(1, 1, 5, 5) / 4096
    return model.double(), x


def test_one_wait_in_a_step_without_ties(gpu: Place) -> None:
    model, x = _quiet()
    model, x = gpu.to(model), gpu.to(x)
    with Monitor(adcert.convert(model), queue=0) as monitor:
        for number in range(3):
            context = monitor.step()
            step = context.__enter__()
            if number == 0:
                loss = total(model, x)
            else:
                with gpu.no_waits():
                    loss = total(model, x)
            before = gpu.waits()
            step.loss(loss)
            assert gpu.waits() - before == (1 if gpu.emulation else 0)
            with gpu.no_waits():
                loss.backward()
            context.__exit__(None, None, None)
            assert step.certificate().verdict is Verdict.CERTIFIED
            assert sum(layer.ties + layer.touches for layer in step.certificate().layers) == 0


@pytest.mark.parametrize("build", EXACT, ids=lambda build: build.__name__)
def test_no_wait_in_forward_and_backward(gpu: Place, build: Callable[[], nn.Module]) -> None:
    model, x = gpu.to(adcert.convert(integers(build()))), gpu.to(X)
    with Monitor(model) as monitor:
        for number in range(3):
            context = monitor.step()
            step = context.__enter__()
            if number == 0:
                loss = total(model, x)
            else:
                with gpu.no_waits():
                    loss = total(model, x)
            step.loss(loss)
            with gpu.no_waits():
                loss.backward()
                context.__exit__(None, None, None)
        monitor.flush()
        assert [c.verdict for c in monitor.certificates] == [step.certificate().verdict] * 3


def test_the_number_of_waits_does_not_grow_with_the_ties(gpu: Place) -> None:
    def waits(x: Tensor) -> int:
        model, x = gpu.to(adcert.convert(integers(plain()))), gpu.to(x)
        with Monitor(model, queue=0) as monitor:
            for _ in range(2):
                with monitor.step() as step:
                    loss = total(model, x)
                    before = gpu.waits()
                    step.loss(loss)
                    found = gpu.waits() - before
                    loss.backward()
        return found

    assert waits(X) <= waits(FEW) + 1 < 25  # tied windows are asked for, all at once


# ---- what arrives late ---------------------------------------------------------------------------


def test_a_copy_is_not_there_before_it_was_waited_for() -> None:
    with opened("emulated") as gpu:
        x = torch.arange(6.0)
        sent = gpu.to(x)
        arrival = Arrival([sent, x])
        assert not torch.equal(arrival.tensors[0], x)
        assert arrival.tensors[1] is x
        del sent
        for _ in range(2):
            assert torch.equal(arrival.wait()[0], x)
        assert arrival.wait()[0].is_pinned()


def test_rows_arrive_while_training_goes_on() -> None:
    """The patches of a step's rows are still on their way when its block ends; the worker waits for them."""
    from adcert import hull
    from adcert import monitor as driver

    seen: list[tuple[Tensor, Tensor]] = []
    submit = driver.Desk.submit
    with opened("emulated") as gpu, pytest.MonkeyPatch.context() as patch:
        model, x = gpu.to(adcert.convert(integers(unbiased()))), gpu.to(X)

        def look(desk: object, job: tuple[driver.Step, driver.Observed], nbytes: int) -> None:
            for rowset in job[1].rowsets:
                if rowset.arrival is not None:
                    seen.append((rowset.parts[0].plus, rowset.parts[0].plus.clone()))
            submit(desk, job, nbytes)  # type: ignore[arg-type]

        patch.setattr(driver.Desk, "submit", look)
        patch.setattr(hull, "DECISIONS", 0)  # of a tiny network the rows are looked at right away
        with Monitor(model) as monitor, monitor.step() as step:
            total(model, x).backward()
        assert step.certificate().layers[0].rows > 0
    assert seen
    assert all(torch.isnan(early).all() and not torch.isnan(late).any() for late, early in seen)


def test_small_tensors_travel_together(place: Place) -> None:
    values = [torch.tensor([k, k + 1]) for k in range(4)]
    mixed = [place.to(values[0]), values[1], place.to(values[2]), place.to(values[3].int())]
    assert [t.tolist() for t in Batch(mixed).wait()] == [t.tolist() for t in values]
    assert Batch([]).wait() == []


def test_doors(place: Place) -> None:
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    index = torch.tensor([23, 0, 5])
    for layout in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 1)):
        assert take(place.to(layout), index).equal(layout.reshape(-1)[index])
        assert pick(place.to(layout), torch.tensor([1, 0]), 1).equal(layout[:, [1, 0]])
        assert host(place.to(layout)).equal(layout)


# ---- room ----------------------------------------------------------------------------------------


def test_rooms() -> None:
    rooms = Rooms()
    assert rooms.of("a", 10**6) is None  # exact lists
    rooms.saw("a", 3)
    assert (rooms.of("a", 10**6), rooms.of("a", 100), rooms.of("b", 100)) == (LEAST, 100, None)
    rooms.saw("a", 1000)
    rooms.saw("a", 2)
    assert rooms.of("a", 10**6) == 2048
    rooms.saw("a", 1025)
    assert (rooms.of("a", 10**6), rooms.of("a", 4095)) == (4096, 4095)


@pytest.mark.parametrize(("build", "what"), [(plain, "ties"), (residual, "touches")])
def test_an_overflow_is_undecided_and_the_next_step_has_room(
    gpu: Place, build: Callable[[], nn.Module], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "LEAST", 8)
    few, many = FEW[:1], torch.zeros_like(FEW)

    def network() -> nn.Module:
        model = integers(build())
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.constant_(parameter, 1.0 if what == "ties" else 0.0)
        return model

    expected = steps(network(), [few, few, many, many])[0]
    found = steps(gpu.to(network()), [gpu.to(x) for x in (few, few, many, many)])[0]
    assert [content(found[k]) for k in (0, 1, 3)] == [content(expected[k]) for k in (0, 1, 3)]
    third = found[2]
    third.verify()
    assert third.verdict is Verdict.UNDECIDED
    assert any(f"{what}, more than the" in reason and "the next step has more" in reason for reason in third.reasons)
    full = {reason.split(":")[0] for reason in third.reasons}
    assert full and third.fingerprints.keys() == expected[2].fingerprints.keys() - full
    assert all(expected[2].fingerprints[name] == print_ for name, print_ in third.fingerprints.items())


def test_one_step_alone_never_overflows(gpu: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "LEAST", 1)
    model, x = gpu.to(adcert.convert(integers(plain()))), gpu.to(torch.zeros_like(FEW))
    assert certify(lambda: total(model, x), model).verdict is not Verdict.UNDECIDED


# ---- what a step may refuse ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite(place: Place, value: float) -> None:
    model = place.to(adcert.convert(integers(plain())))
    with Monitor(model) as monitor:
        with monitor.step() as step:
            total(model, place.to(X)).backward()
            with torch.no_grad():
                model[3].weight.grad[0, 0, 0, 0] = value
                model[3].bias.grad[0] = value
        model.zero_grad()
        with monitor.step() as after:
            total(model, place.to(X)).backward()
    assert step.certificate().reasons == ["the gradient of 3.weight is not finite"]
    assert after.certificate().verdict is not Verdict.UNDECIDED


def test_large_gradients_are_finite(place: Place) -> None:
    """Their sum overflows."""
    w = nn.Parameter(place.to(torch.full((8,), 1e-3)))
    certificate = certify(lambda: (torch.relu(w) * 3e38).sum(), nn.ParameterList([w]))
    assert certificate.verdict is Verdict.CERTIFIED
    assert math.isinf(float(w.grad.sum()))


@pytest.mark.parametrize("value", [1.0, math.inf])
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_sparse_gradients(name: str, value: float) -> None:
    with opened(name) as place:
        embedding = place.to(nn.Embedding(5, 3, sparse=True))
        factor, words = place.to(torch.tensor(value)), place.to(torch.tensor([0, 2, 0]))
        with Monitor(embedding) as monitor, monitor.step() as step:
            (2 * torch.relu(embedding(words))).sum().backward(factor)
        assert embedding.weight.grad is not None and embedding.weight.grad.is_sparse
        assert any("the gradient of weight" in reason for reason in step.certificate().reasons) == math.isinf(value)


@pytest.mark.parametrize("size", [1, 2000])
def test_a_loss_that_is_not_finite(place: Place, size: int) -> None:
    w = nn.Parameter(place.to(torch.ones(size)))
    factor = place.to(torch.ones(size))
    factor[-1] = math.inf
    monitor = Monitor(nn.ParameterList([w]))
    with monitor.step() as step:
        (torch.relu(w) * factor).backward(torch.zeros_like(w))
    assert "the loss is not finite" in step.certificate().reasons


@pytest.mark.parametrize("value", [0.0, 4.0])
@pytest.mark.parametrize(
    "function",
    [torch.sqrt, torch.rsqrt, torch.log, torch.reciprocal, lambda t: 1 / t, lambda t: t / t, lambda t: t**0.5],
    ids=["sqrt", "rsqrt", "log", "reciprocal", "over", "div", "pow"],
)
def test_guarded_operations_answer_late(place: Place, function: Callable[[Tensor], Tensor], value: float) -> None:
    def look(w: nn.Parameter) -> Certificate:
        return certify(lambda: function(w).sum(), nn.ParameterList([w]))

    w = torch.tensor([1.0, value])
    found, expected = look(nn.Parameter(place.to(w))), look(nn.Parameter(w))
    assert found.reasons == expected.reasons
    assert (found.verdict is Verdict.CERTIFIED) == (value > 0)


def test_checkpoints_are_undecided_and_training_goes_on(place: Place) -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = place.to(adcert.convert(integers(plain()))), place.to(X)
    total(model, x).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for reentrant in (False, True):
        model.zero_grad()
        seen = x.clone().requires_grad_(reentrant)
        with Monitor(model) as monitor, monitor.step() as step:
            total(lambda x: checkpoint(model, x, use_reentrant=reentrant), seen).backward()  # type: ignore[arg-type]  # noqa: B023
        assert step.certificate().verdict is Verdict.UNDECIDED
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_a_captured_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monitor = Monitor(plain())
    with pytest.raises(adcert.AdcertError, match="CUDA graph"), monitor.step():
        pass
    assert monitor.report().steps == 0


# ---- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [False, True], ids=["backward on it", "backward outside"])
def test_forward_on_a_stream_of_the_users(gpu: Place, outside: bool) -> None:
    expected = steps(integers(unbiased()), [X] * 3)[0]
    model, x = gpu.to(adcert.convert(integers(unbiased()))), gpu.to(X)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with Monitor(model) as monitor:
        for _ in range(3):
            with monitor.step():
                with torch.cuda.stream(stream):
                    loss = total(model, x)
                    if not outside:
                        loss.backward()
                if outside:
                    torch.cuda.current_stream().wait_stream(stream)
                    loss.backward()
            torch.cuda.current_stream().wait_stream(stream)
            model.zero_grad()
            stream.wait_stream(torch.cuda.current_stream())
        monitor.flush()
        assert [content(c) for c in monitor.certificates] == [content(c) for c in expected]


def test_every_part_of_a_step_on_a_stream_of_its_own(gpu: Place) -> None:
    """The gradients are accumulated where the layers ran; only backward's caller is made to wait for them."""
    layers, kink, back = (torch.cuda.Stream() for _ in range(3))
    w = nn.Parameter(gpu.to(torch.arange(1.0, 5.0)))
    with Monitor(nn.ParameterList([w])) as monitor, monitor.step() as step:
        layers.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(layers):
            y = 2 * w
        kink.wait_stream(layers)
        with torch.cuda.stream(kink):
            loss = torch.relu(y).sum()
        y.record_stream(kink)
        back.wait_stream(kink)
        with torch.cuda.stream(back):
            loss.backward()
    assert step.certificate().verdict is Verdict.CERTIFIED
    torch.cuda.current_stream().wait_stream(back)
    assert host(w.grad).tolist() == [2.0] * 4
