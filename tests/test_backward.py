"""The partial backward engine: exact on integers, inside its radii on everything else, silent towards the user."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from core_helpers import (
    DIGITS,
    Probe,
    Scalar,
    Seen,
    autograd_rows,
    engine_rows,
    exact_batch_norm,
    exact_conv2d,
    exact_linear,
    fill,
    integers,
    look,
    outside,
    pairs,
    param,
    pin,
    random_pairs,
    scalars,
)
from hypothesis import given
from hypothesis import strategies as st
from networks import random_network
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert import backward, enclosures
from adcert.balls import Ball
from adcert.choices import Window
from adcert.differences import Differences
from adcert.records import OpRecord

Forward = Callable[[Probe], Tensor]


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(DIGITS):
        yield


def exactly(seen: Seen, record: OpRecord, differences: Differences) -> dict[str, Ball]:
    """The engine must equal float64 autograd on integer data, and know that it did not round."""
    found = engine_rows(seen, record, differences)
    truth = autograd_rows(seen.y(record), seen.parameters(), differences)
    for name, expected in truth.items():
        assert torch.equal(found[name].value, expected), name
        assert not bool(found[name].radius.any()), name
    return found


def last(forward: Forward, model: nn.Module, seed: int = 0, count: int = 10) -> Seen:
    """``exactly`` at the last record."""
    seen = look(forward, model)
    record = seen.records[-1]
    exactly(seen, record, random_pairs(seen.y(record).numel(), count, seed))
    return seen


# ---- literal cases -------------------------------------------------------------------------------


def test_a_hand_computed_row():
    """y = B relu(A x), A = [2; -1], x = 3, B = [[1 5], [4 7]]: hidden 6 and 0.

    Row y_0 - y_1: dB = [6 0 -6 0], dA = [(1 - 4) 3, 0].
    """
    a, b = param([[2.0], [-1.0]]), param([[1.0, 5.0], [4.0, 7.0]])
    x = torch.tensor([[3.0]], dtype=torch.float64)
    seen = look(lambda p: p.relu(F.linear(p.relu(F.linear(x, a)), b), "last"), a=a, b=b)
    found = engine_rows(seen, seen.record("last"), pairs((0, 1), (-1, 0), (1, 1)))
    assert found["b"].value.tolist() == [[6.0, 0.0, -6.0, 0.0], [-6.0, 0.0, 0.0, 0.0], [0.0] * 4]
    assert found["a"].value.tolist() == [[-9.0, 0.0], [-3.0, 0.0], [0.0, 0.0]]
    assert bool(found["a"].zero()[:, 1].all())


def test_a_constant_y_and_a_constant_edge():
    w = param([1.0, 2.0])
    seen = look(lambda probe: probe.relu(w), w=w)
    (batch,) = backward.gradients(seen.graph, seen.records[0].edge, pairs((0, 1)))
    assert (batch.start, batch.count) == (0, 1)
    assert batch.leaves["w"].value.tolist() == [[1.0, -1.0]]
    assert list(backward.gradients(seen.graph, seen.records[0].edge, pairs())) == []


def test_scalar_parameters():
    s = param(3.0)
    seen = look(lambda probe: probe.relu(s * torch.ones(2, dtype=torch.float64) + s), s=s)
    assert exactly(seen, seen.records[0], pairs((0, -1), (0, 1)))["s"].value.tolist() == [[2.0], [0.0]]
    alone = look(lambda probe: probe.relu(s * 2.0), s=s)
    assert exactly(alone, alone.records[0], pairs((0, -1)))["s"].value.tolist() == [[2.0]]


def test_a_unit_that_two_windows_select_gets_both():
    """1 5 2 with windows {0 1} and {1 2}: both select the 5; the sum of both is twice its derivative."""
    w = param([[[[1.0, 5.0, 2.0]]]])
    v = param([[[[1.0, 1.0]]]])

    def forward(probe: Probe) -> Tensor:
        z = probe.max_pool2d(w, "pool", Window((1, 2), (1, 1), (0, 0), (1, 1)))
        return probe.relu(F.conv2d(z, v), "last")

    seen = look(forward, w=w, v=v)
    assert exactly(seen, seen.record("last"), pairs((0, -1)))["w"].value.tolist() == [[0.0, 2.0, 0.0]]


# ---- every rule against autograd -----------------------------------------------------------------


@given(st.data())
def test_convolutions(data: st.DataObject):
    groups = data.draw(st.sampled_from([1, 2]))
    outputs = groups * data.draw(st.integers(1, 2))
    kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
    padding = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    dilation = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    seed = data.draw(st.integers(0, 1000))
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, dtype=torch.float64),
        nn.Conv2d(2, outputs, kernel, stride, padding, dilation, groups, data.draw(st.booleans()),
                  dtype=torch.float64),
    )  # fmt: skip
    fill(model, seed)
    last(lambda probe: probe.relu(model(integers((2, 1, 5, 6), seed))), model, seed)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 2), (2,)])
def test_linear_layers(bias: bool, shape: tuple[int, ...]):
    model = nn.Sequential(nn.Linear(2, 3, bias, dtype=torch.float64), nn.Linear(3, 2, bias, dtype=torch.float64))
    fill(model, 1)
    last(lambda probe: probe.relu(model(integers(shape, 1))), model)


def test_residual_sums():
    m = nn.ModuleDict({k: nn.Linear(2, 2, dtype=torch.float64) for k in "abc"})
    fill(m, 2)
    x = integers((3, 2), 2)

    def forward(probe: Probe) -> Tensor:
        r = probe.relu(m["a"](x))
        t = r + m["b"](r)
        return probe.relu(t - m["c"](probe.relu(t)))

    last(forward, m)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("window", [Window((2, 2), (1, 1), (0, 0), (1, 1)), Window((3, 2), (2, 1), (1, 1), (1, 1)),
                                    Window((2, 2), (2, 2), (0, 0), (2, 2))])  # fmt: skip
def test_poolings(relu: bool, window: Window):
    model = nn.ModuleList([nn.Conv2d(1, 2, 2, dtype=torch.float64), nn.Conv2d(2, 1, 2, dtype=torch.float64)])
    fill(model, 3)
    x = integers((2, 1, 6, 6), 3)
    last(lambda p: p.relu(model[1](p.max_pool2d(model[0](x), "pool", window, relu=relu))), model)
    unbatched = x[0]
    last(lambda p: p.relu(model[1](p.max_pool2d(model[0](unbatched), "pool", window, relu=relu))), model)


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda h: torch.cat([h, torch.ones_like(h), -h], 1),
    "stack": lambda h: torch.stack([h, h + 1.0], 1),
    "pad": lambda h: F.pad(h, (1, 0, 2, 1)),
    "permute": lambda h: h.permute(1, 3, 0, 2),
    "view": lambda h: h.reshape(-1, 4),
    "flatten": lambda h: h.flatten(),
    "slice": lambda h: h[:, :, 1:, ::2],
    "select": lambda h: h[:, 1],
    "flip": lambda h: h.flip(2),
    "roll": lambda h: h.roll(1, 3),
    "transpose": lambda h: h.transpose(0, 1),
    "unsqueeze": lambda h: h.unsqueeze(0).squeeze(0).unsqueeze(2),
    "expand": lambda h: h[:, :1].expand(-1, 3, -1, -1),
    "clone": lambda h: h.clone(),
    "cast": lambda h: h.to(torch.float32).to(torch.float64),
    "square": lambda h: h * h,
    "mul by a constant": lambda h: h * 3.0,
    "mul by a vector": lambda h: h * torch.arange(4.0, dtype=torch.float64),
    "mul across": lambda h: h[:, :1] * h,
    "neg": lambda h: -h,
    "rsub": lambda h: 1 - h,
    "add": lambda h: h + h.flip(0),
    "broadcast": lambda h: h + h[:1, :, :1],
    "sum": lambda h: h.sum((1, 3)),
    "total": lambda h: h.sum(),
    "mean of four": lambda h: h.mean((1, 2)),
    "avg_pool": lambda h: F.avg_pool2d(h, 2, 1),
    "adaptive": lambda h: F.adaptive_avg_pool2d(h, (2, 1)),
    "global": lambda h: F.adaptive_avg_pool2d(h, 1),
}
# The engine bounds a rounding of their kernels, whether there was one or not.
ROUNDED = {"expand", "sum", "total", "mean of four", "avg_pool", "adaptive", "global"}


@pytest.mark.parametrize("name", RULES)
def test_one_operation_against_autograd(name: str):
    model = fill(nn.Conv2d(1, 2, 2, dtype=torch.float64), 4)
    x = integers((2, 1, 3, 5), 4)  # h: [2, 2, 2, 4]
    seen = look(lambda probe: probe.relu(RULES[name](model(x))), model)
    record = seen.records[0]
    d = random_pairs(max(2, seen.y(record).numel()), 10, 4) if name != "total" else pairs((0, -1), (-1, 0))
    if name not in ROUNDED:
        exactly(seen, record, d)
        return
    found, truth = engine_rows(seen, record, d), autograd_rows(seen.y(record), seen.parameters(), d)
    for leaf, expected in truth.items():
        assert bool(((found[leaf].value - expected).abs() <= found[leaf].radius + 1e-14).all())
        assert float(found[leaf].radius.max()) < 1e-12
        assert not found[leaf].value.requires_grad  # no graph of the engine's own is kept alive


@pytest.mark.parametrize(
    "name",
    ["permute", "cat", "pad", "select", "slice", "flip", "roll", "stack", "expand", "sum", "mean of four", "square",
     "mul across", "avg_pool", "adaptive", "global"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_operation_in_low_precision(name: str, dtype: torch.dtype):
    """The offset network is the float64 one here (small integers are exact): same rows, or a refusal by name."""
    model = fill(nn.Conv2d(1, 2, 2, dtype=torch.float64), 4)
    low = nn.Conv2d(1, 2, 2, dtype=dtype)
    low.load_state_dict(model.state_dict())
    x = integers((2, 1, 3, 5), 4)
    seen = look(lambda probe: probe.relu(RULES[name](low(x.to(dtype)))), low)
    wide = look(lambda probe: probe.relu(RULES[name](model(x))), model)
    d = random_pairs(seen.y(seen.records[0]).numel(), 10, 5)
    truth = autograd_rows(wide.y(wide.records[0]), wide.parameters(), d)
    try:
        found = engine_rows(seen, seen.records[0], d)
    except backward.Unsupported as error:
        refused = str(error)
    else:
        refused = ""
    if refused:  # their kernels insist on the dtype of the forward pass
        assert name in ("avg_pool", "adaptive")
        assert "AvgPool2DBackward" in refused
        return
    for leaf, expected in truth.items():
        assert bool(((found[leaf].value - expected).abs() <= found[leaf].radius + 1e-14).all()), leaf
        assert float(found[leaf].radius.max()) < 1e-12


@given(st.integers(0, 2000))
def test_random_networks(seed: int):
    network = random_network(seed)
    model = adcert.convert(network.model)
    seen = look(lambda _: network.closure(), model)
    for record in seen.records:
        exactly(seen, record, random_pairs(seen.y(record).numel(), 6, seed))


def test_frozen_parameters_get_no_row():
    model = nn.Sequential(nn.Linear(2, 3, dtype=torch.float64), nn.ReLU(), nn.Linear(3, 2, dtype=torch.float64))
    adcert.convert(fill(model, 5))
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    seen = look(lambda probe: probe.relu(model(integers((3, 2), 5)), "last"), model)
    found = exactly(seen, seen.record("last"), random_pairs(6, 10, 5))
    assert set(found) == {"0.weight", "2.bias"}


# ---- batch normalisation and rounding: the exact value lies within the radius --------------------


def normalised_net(dtype: torch.dtype, train: bool, seed: int) -> tuple[nn.Sequential, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2)).train(train)
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        model[1].running_var.copy_(torch.rand(2, generator=generator) + 0.5)
    return model.to(dtype), torch.randn(2, 1, 3, 3, generator=generator).to(dtype)


def check_against_digits(
    seen: Seen, record: OpRecord, y: np.ndarray, leaves: dict[str, np.ndarray], d: Differences
) -> None:
    """Every entry of every row within its radius of the 120-digit derivative of the offset network."""
    found = engine_rows(seen, record, d)
    flat = y.ravel()
    for k, (plus, minus) in enumerate(zip(d.plus.tolist(), d.minus.tolist(), strict=True)):
        zero = Scalar(mpmath.mpf(0))
        target = (flat[plus] if plus >= 0 else zero) - (flat[minus] if minus >= 0 else zero)
        for name, array in leaves.items():
            assert outside(found[name], k, target.gradients(array.ravel())) == [], (name, k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_normalisation_within_radii(dtype: torch.dtype, train: bool):
    """Coupled rows: channels differ, values differ; the statistics are those of the recorded input."""
    model, x = normalised_net(dtype, train, 1)
    held: list[Tensor] = []

    def forward(probe: Probe) -> Tensor:
        h = model[0](x)
        held.append(h.detach())
        return probe.relu(model[1](h))

    running = None if train else (model[1].running_mean.clone(), model[1].running_var.clone())
    seen = look(forward, model)
    leaves = {name: scalars(p.detach()) for name, p in seen.parameters().items()}
    h = pin(exact_conv2d(scalars(x), leaves["0.weight"], leaves["0.bias"], 1, 0), held[0])
    y = exact_batch_norm(h, leaves["1.weight"], leaves["1.bias"], model[1].eps, running)
    d = random_pairs(16, 8, 1)
    check_against_digits(seen, seen.records[0], y, leaves, d)
    found = engine_rows(seen, seen.records[0], d)
    assert all(float(ball.radius.max()) < 1e-11 * (1 + float(ball.value.abs().max())) for ball in found.values())


@pytest.mark.parametrize("train", [True, False])
def test_normalisation_of_a_table(train: bool):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double().train(train)
    x = integers((4, 2), 8).add(0.1)
    seen = look(lambda probe: probe.relu(model(x)), model)
    found = engine_rows(seen, seen.records[0], random_pairs(8, 10, 8))
    for name, truth in autograd_rows(seen.y(seen.records[0]), seen.parameters(), random_pairs(8, 10, 8)).items():
        assert bool(((found[name].value - truth).abs() <= found[name].radius + 1e-11).all()), name


def test_normalisation_that_cancels_leaves_the_patch_difference_only():
    """Equal convolution outputs in one channel: gamma and beta get exactly zero; the filter's row does not."""
    model = nn.Sequential(nn.Conv2d(1, 2, (1, 2)), nn.BatchNorm2d(2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(2, 1, 1, 2))
    x = torch.tensor([[[[1.0, 2.0, 1.0, 5.0]]]], dtype=torch.float64)  # channel 0: 3 3 6
    seen = look(lambda probe: probe.relu(model(x)), model)
    found = engine_rows(seen, seen.records[0], pairs((0, 1), (0, 2)))
    for name in ("1.weight", "1.bias"):
        assert bool(found[name].zero()[0].all()), name
    assert not bool(found["0.bias"].nonzero()[0].any())
    row = found["0.weight"].value[0]
    assert bool(found["0.weight"].nonzero()[0, :2].all())
    assert row[0] == -row[1]
    assert bool(found["0.weight"].zero()[0, 2:].all())
    assert bool(found["1.weight"].nonzero()[1, 0])  # 3 against 6: the gamma column is there


def test_a_batch_of_cancelling_and_coupled_rows_keeps_their_places():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)).double()
    fill(model, 11, -1, 1)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0]))
    x = integers((2, 1, 4, 4), 11, 0, 1)
    seen = look(lambda probe: probe.relu(model[1](model[0](x))), model)
    d = random_pairs(36, 40, 11)
    found = engine_rows(seen, seen.records[0], d)
    truth = autograd_rows(seen.y(seen.records[0]), {n: p for n, p in seen.parameters().items() if n[0] != "2"}, d)
    easy = found["1.weight"].zero().all(1) & found["1.bias"].zero().all(1)
    assert 0 < int(easy.sum()) < 40
    for name, expected in truth.items():
        assert bool(((found[name].value - expected).abs() <= found[name].radius + 1e-11).all()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_rounded_network_within_radii(dtype: torch.dtype, seed: int):
    """Convolution, overlapping pooling, padded convolution, skip, linear: recorded values, exact derivatives."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Conv2d(1, 2, 2), "b": nn.Conv2d(2, 2, 3, padding=1), "c": nn.Linear(8, 2)})
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    model.to(dtype)
    x = torch.randn(1, 1, 4, 4, generator=generator).to(dtype)
    held: dict[str, Tensor] = {}

    def forward(probe: Probe) -> Tensor:
        held["a"] = model["a"](x)
        held["r"] = probe.relu(held["a"])
        held["z"] = probe.max_pool2d(held["r"], "pool", Window((2, 2), (1, 1), (0, 0), (1, 1)))
        held["b"] = model["b"](held["z"])
        held["s"] = held["z"] + held["b"]
        held["t"] = probe.relu(held["s"])
        return probe.relu(model["c"](held["t"].flatten(1)), "last")

    seen = look(forward, model)
    leaves = {name: scalars(p.detach()) for name, p in seen.parameters().items()}
    a = pin(exact_conv2d(scalars(x), leaves["a.weight"], leaves["a.bias"], 1, 0), held["a"].detach())
    r = pin(a, held["r"].detach(), relu=True)
    _, index = F.max_pool2d(held["r"].detach().to(torch.float64), 2, 1, return_indices=True)
    planes = r.reshape(2, -1)
    z = np.empty((1, 2, 2, 2), dtype=object)
    for cell in np.ndindex(z.shape):
        z[cell] = planes[cell[1], int(index[cell])]
    b = pin(exact_conv2d(z, leaves["b.weight"], leaves["b.bias"], 1, 1), held["b"].detach())
    t = pin(z + b, held["t"].detach(), relu=True)
    y = exact_linear(t.reshape(1, -1), leaves["c.weight"], leaves["c.bias"])
    check_against_digits(seen, seen.record("last"), y, leaves, pairs((0, 1), (1, -1), (-1, 0)))


def test_the_scale_of_a_normalisation_by_hand():
    """(4 +- 1)^(-1/2) reaches 3^(-1/2) and 5^(-1/2); 2^(-1/2) is irrational; (1/2 +- 1/2)^(-1/2) is unbounded."""
    found = enclosures.inverse_root(
        Ball(torch.tensor([4.0, 2.0, 0.5]).double(), torch.tensor([1.0, 0.0, 0.5]).double())
    )
    value, radius = ([mpmath.mpf(float(v)) for v in t] for t in (found.value, found.radius))
    for reached in (3, 5):
        assert abs(value[0] - 1 / mpmath.sqrt(reached)) <= radius[0]
    assert 0 < abs(value[1] - 1 / mpmath.sqrt(2)) <= radius[1] < 1e-15
    assert radius[2] == mpmath.inf


@given(st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=20))
def test_inverse_roots_lie_within_their_radii(entries: list[float]):
    found = enclosures.inverse_root(Ball(torch.tensor(entries, dtype=torch.float64)))
    for value, radius, entry in zip(found.value.tolist(), found.radius.tolist(), entries, strict=True):
        assert abs(mpmath.mpf(value) - 1 / mpmath.sqrt(mpmath.mpf(entry))) <= radius


def test_a_radius_is_there_when_float64_rounds():
    """0.1 times 0.1 plus more: the products of a float64 network cannot all be exact."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    adcert.convert(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(p.shape, dtype=torch.float64) * 0.1)
    x = torch.rand(2, 3, dtype=torch.float64)
    seen = look(lambda probe: probe.relu(model(x), "last"), model)
    leaves = {name: scalars(p.detach()) for name, p in seen.parameters().items()}
    hidden = seen.y(seen.records[0]).detach()
    h = pin(exact_linear(scalars(x), leaves["0.weight"], leaves["0.bias"]), hidden.clamp(min=0), relu=True)
    y = exact_linear(h, leaves["2.weight"], leaves["2.bias"])
    d = random_pairs(4, 8, 1)
    check_against_digits(seen, seen.record("last"), y, leaves, d)
    radius = engine_rows(seen, seen.record("last"), d)["0.weight"].radius
    assert 0 < float(radius.max()) < 1e-14


def test_the_digits_reference_can_tell():
    """The comparison above fails on a value that is off by more than its radius."""
    x = scalars(torch.tensor([3.0]))
    (slope,) = (x[0] * x[0]).gradients(x)
    assert slope == 6
    good, bad = Ball(torch.tensor([[6.0]])), Ball(torch.tensor([[6.5]]), torch.tensor([[0.25]]))
    assert outside(good, 0, [slope]) == []
    assert outside(bad, 0, [slope]) == [(0, 0.5, 0.25)]


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 5000, 20000])
@pytest.mark.parametrize("train", [True, False])
def test_a_small_budget_gives_the_same_result(budget: int, train: bool, monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2)).double().train(train)
    fill(model, 6)
    x = integers((2, 1, 4, 4), 6)
    seen = look(lambda probe: probe.relu(model(x)), model)
    d = random_pairs(36, 25, 6)
    whole = engine_rows(seen, seen.records[0], d)
    assert len(list(backward.gradients(seen.graph, seen.records[0].edge, d))) == 1
    monkeypatch.setattr(backward, "BUDGET", budget)
    batches = list(backward.gradients(seen.graph, seen.records[0].edge, d))
    assert len(batches) > 1
    for name, ball in engine_rows(seen, seen.records[0], d).items():
        tolerance = ball.radius + whole[name].radius
        assert bool(((ball.value - whole[name].value).abs() <= tolerance).all())
    if budget == 1:
        assert all(batch.count == 1 for batch in batches)


# ---- the user's graph is only read ---------------------------------------------------------------


class _FiredError(Exception):
    pass


def test_no_hook_fires_and_no_gradient_is_touched():
    def shout(*_: object) -> None:
        raise _FiredError

    model = nn.Sequential(
        nn.Conv2d(1, 2, 2, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(2, 2, 2),
        nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(18, 3),
    ).double()  # fmt: skip
    adcert.convert(model)
    kept: list[Tensor] = []

    def forward(probe: Probe) -> Tensor:
        h: Tensor = integers((2, 1, 5, 5), 7)
        for module in model:
            h = module(h)
            h.register_hook(shout)
            kept.append(h)
        h = torch.cat([h.flip(1).roll(1, 1), F.pad(-h, (1, 0)).t().t()], 1)[:, :4] * 2.0 - h.mean()
        h.register_hook(shout)
        h.grad_fn.register_prehook(shout)
        for source, _ in h.grad_fn.next_functions:
            if source is not None:
                source.register_hook(shout)
        return probe.relu(h, "last")

    seen = look(forward, model)
    for parameter in model.parameters():
        parameter.register_hook(shout)
        parameter.register_post_accumulate_grad_hook(shout)
        parameter.grad = torch.full_like(parameter, 7.0)
    for module in model:
        module.register_full_backward_hook(shout)
        module.register_full_backward_pre_hook(shout)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = engine_rows(seen, seen.record("last"), random_pairs(8, 6, 7))
    assert any(bool(ball.value.any()) for ball in found.values())
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, torch.full_like(parameter, 7.0))
        assert torch.equal(parameter.detach(), old)
    with pytest.raises(_FiredError):
        seen.loss.backward()  # the hooks are real
    assert all(t.grad_fn is not None for t in kept)


def test_the_users_backward_still_runs_afterwards():
    model = adcert.convert(fill(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), 1, 1, 2).double())
    seen = look(lambda probe: probe.relu(model(torch.ones(2, 2, dtype=torch.float64)), "last"), model)
    engine_rows(seen, seen.record("last"), pairs((0, 1)))
    assert all(parameter.grad is None for parameter in model.parameters())
    seen.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (torch.lgamma, "LgammaBackward"),
        (lambda h: h.prod(1), "ProdBackward"),
        (lambda h: F.interpolate(h.view(1, 1, 2, 3), scale_factor=2, mode="bicubic"), "UpsampleBicubic2DBackward"),
        (lambda h: torch.div(h, 2.0, rounding_mode="floor"), "DivBackward"),
        (lambda h: h.cummax(1)[0], "CummaxBackward"),
        (lambda h: torch.linalg.vector_norm(h, 3), "LinalgVectorNormBackward"),
        (lambda h: torch.cdist(h, h), "Cdist"),
        (lambda h: F.max_pool1d(h.unsqueeze(0), 2), "MaxPool"),
    ],
)
def test_an_operation_without_a_rule_is_named(operation: Callable[[Tensor], Tensor], name: str):
    model = fill(nn.Linear(2, 3, dtype=torch.float64), 1)
    seen = look(lambda probe: probe.relu(operation(model(integers((2, 2), 1)))), model)
    with pytest.raises(backward.Unsupported, match=name):
        list(backward.gradients(seen.graph, seen.records[0].edge, pairs((0, -1))))


def test_a_row_that_vanishes_before_an_unknown_operation_needs_no_rule():
    """relu switches the row off; lgamma below it is never met."""
    w = param([1.5, 4.0])
    v = param([[1.0]])
    seen = look(lambda p: p.relu(F.linear(p.relu(torch.lgamma(w)).view(2, 1), v), "last"), w=w, v=v)
    found = engine_rows(seen, seen.record("last"), pairs((0, -1)))
    assert bool(found["w"].zero().all())
    with pytest.raises(backward.Unsupported, match="LgammaBackward"):
        list(backward.gradients(seen.graph, seen.record("last").edge, pairs((1, -1))))


# ---- the own layer alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_local_pass_agrees_with_the_full_one_on_the_own_layer(dtype: torch.dtype, affine: bool):
    """Rows of one channel through train-mode normalisation take a shorter way; the balls must meet, and be small."""
    generator = torch.Generator().manual_seed(4)
    first, norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3, affine=affine)
    model = nn.ModuleList([nn.Conv2d(1, 2, 3), first, norm]).to(dtype)
    x = torch.randn(4, 1, 8, 8, generator=generator).to(dtype)
    seen = look(lambda probe: probe.relu(norm(first(probe.relu(model[0](x), "below"))), "own").sum(), model)
    record = seen.record("own")
    own = {name for name in seen.leaves.trainable() if name.startswith(("1.", "2."))}
    plus = torch.tensor([5, 36 + 7, 72 + 1, -1])
    minus = torch.tensor([9, 36 + 30, 108 * 2 + 72 + 3, 36 + 11])
    d = Differences(plus, minus)
    (full,) = backward.gradients(seen.graph, record.edge, d)
    (local,) = backward.gradients(seen.graph, record.edge, d, local=True)
    assert set(local.leaves) == own & set(full.leaves)
    for name in local.leaves:
        a, b = local.leaves[name], full.leaves[name]
        slack = sum((0 if ball.radius is None else ball.radius for ball in (a, b)), torch.zeros(1))
        assert bool(((a.value - b.value).abs() <= slack).all()), name
        assert float(slack.max()) < 1e-8
    assert any(bool(ball.nonzero().any(1).all()) for ball in local.leaves.values())
