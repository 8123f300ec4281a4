"""T_j: every proof of equal gradients is right, and the structural ones are found."""

from __future__ import annotations

import itertools

import pytest
import torch
from core_helpers import Probe, Seen, autograd_rows, fill, integers, look, pairs, param, random_pairs
from hypothesis import given
from hypothesis import strategies as st
from networks import random_network
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert.choices import Window
from adcert.differences import Differences
from adcert.equality import follow, prove_zero, selected_inputs
from adcert.records import OpRecord


def proved(seen: Seen, record: OpRecord, differences: Differences) -> list[bool]:
    """What is proved; every True is confirmed by autograd, exactly."""
    answer = prove_zero(seen.graph, record, differences)
    truth = autograd_rows(seen.y(record), seen.parameters(), differences)
    zero = torch.stack([(row == 0).all(1) for row in truth.values()]).all(0)
    wrong = torch.nonzero(answer & ~zero).flatten().tolist()
    assert not wrong, [(int(differences.plus[k]), int(differences.minus[k])) for k in wrong]
    return answer.tolist()


def image(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def filters(*values: float, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64).reshape(shape))


# ---- congruent -----------------------------------------------------------------------------------


def test_identical_patches_in_the_first_layer():
    """Row 1 2 1 2 3 under a kernel of two: patches [1 2], [2 1], [1 2], [2 3]."""
    w = filters(1.0, 1.0, shape=(1, 1, 1, 2))
    seen = look(lambda probe: probe.relu(F.conv2d(image([1.0, 2.0, 1.0, 2.0, 3.0]), w)), w=w)
    assert proved(seen, seen.records[0], pairs((0, 2), (2, 0), (0, 0))) == [True, True, True]


def test_equal_values_from_different_patches_are_not_congruent():
    """[1 2] and [2 1] both give 3; so does the same patch in another channel with the same filter."""
    w = filters(1.0, 1.0, 1.0, 1.0, shape=(2, 1, 1, 2))
    seen = look(lambda probe: probe.relu(F.conv2d(image([1.0, 2.0, 1.0]), w)), w=w)
    y = seen.y(seen.records[0]).flatten()
    assert y.tolist() == [3.0] * 4
    assert proved(seen, seen.records[0], pairs((0, 1), (0, 2), (1, 3))) == [False, False, False]


def test_a_zero_patch_touches_with_a_zero_gradient():
    w = filters(1.0, 2.0, shape=(1, 1, 1, 2))
    seen = look(lambda probe: probe.relu(F.conv2d(image([0.0, 0.0, 1.0]), w)), w=w)
    assert proved(seen, seen.records[0], pairs((-1, 0), (-1, 1), (1, -1))) == [True, False, False]
    b = param([0.0])
    biased = look(lambda probe: probe.relu(F.conv2d(image([0.0, 0.0, 1.0]), w, b)), w=w, b=b)
    assert proved(biased, biased.records[0], pairs((-1, 0))) == [False]


def test_padding_equals_a_constant_zero():
    """0 1 0 padded to 0 0 1 0 0: the left patch [pad 0] equals the right one [0 pad]."""
    w = filters(1.0, 2.0, shape=(1, 1, 1, 2))
    seen = look(lambda probe: probe.relu(F.conv2d(image([0.0, 1.0, 0.0]), w, padding=(0, 1))), w=w)
    assert proved(seen, seen.records[0], pairs((0, 3), (-1, 0), (0, 1))) == [True, True, False]


def two_convolutions(x: Tensor, *, pool: bool, middle: float = 0.0) -> Seen:
    """convolution, relu, (pooling,) convolution: all filters of ones, kernel two along the row."""
    v = filters(1.0, 1.0, shape=(1, 1, 1, 2))
    w = filters(1.0, 1.0, shape=(1, 1, 1, 2))
    c = param([middle])

    def forward(probe: Probe) -> Tensor:
        h = probe.relu(F.conv2d(x, v, c), "first")
        if pool:
            h = probe.max_pool2d(h, "pool", Window((1, 2), (1, 2), (0, 0), (1, 1)))
        return probe.relu(F.conv2d(h, w), "last")

    return look(forward, v=v, w=w, c=c)


def test_congruence_through_two_convolutions():
    """Row 1 2 3 1 2 3: units 0 and 3 of the second convolution see 1 2 3 on both levels."""
    seen = two_convolutions(image([1.0, 2.0, 3.0, 1.0, 2.0, 3.0]), pool=False)
    assert proved(seen, seen.record("last"), pairs((0, 3), (0, 1), (0, 2))) == [True, False, False]


def test_the_same_hidden_values_from_different_patches_are_not_congruent():
    """Row 1 2 1 5 2 1 2: hidden 3 3 6 7 3 3; the last units 0 and 4 are both 3 + 3, of [1 2 1] and [2 1 2]."""
    seen = two_convolutions(image([1.0, 2.0, 1.0, 5.0, 2.0, 1.0, 2.0]), pool=False)
    y = seen.y(seen.record("last")).flatten()
    assert y[0] == y[4] == 6.0
    assert proved(seen, seen.record("last"), pairs((0, 4))) == [False]


def test_congruence_through_convolutions_and_pooling():
    """Period four: 1 2 3 4 1 2 3 4 1: hidden 3 5 7 5 3 5 7 5, pooled 5 7 5 7; last units 0 and 2 agree, 1 does not."""
    x = image([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 1.0])
    seen = two_convolutions(x, pool=True)
    assert seen.y(seen.record("last")).flatten().tolist() == [12.0, 12.0, 12.0]
    assert proved(seen, seen.record("last"), pairs((0, 2), (0, 1))) == [True, False]


def test_pooling_selects_different_cells_of_the_same_patches():
    """Hidden 3 3 | 3 3 (row 1 2 1 2 1): windows select their first cell, [1 2] in both."""
    seen = two_convolutions(image([1.0, 2.0, 1.0, 2.0, 1.0]), pool=True)
    pool = seen.record("pool")
    assert proved(seen, pool, pairs((0, 2), (1, 3), (0, 1))) == [True, True, False]


def test_padding_of_a_hidden_layer_is_a_constant():
    """All-zero hidden values next to the border: padding (0, no gradient) equals a unit that is switched off."""
    v = filters(1.0, shape=(1, 1, 1, 1))
    w = filters(1.0, 2.0, shape=(1, 1, 1, 2))
    x = image([-1.0, 3.0, -1.0])  # hidden 0 3 0, padded . 0 3 0 .

    def forward(probe: Probe) -> Tensor:
        return probe.relu(F.conv2d(probe.relu(F.conv2d(x, v)), w, padding=(0, 1)), "last")

    seen = look(forward, v=v, w=w)
    assert proved(seen, seen.record("last"), pairs((0, 3), (0, -1), (1, -1))) == [True, True, False]


def test_padding_is_not_a_live_zero():
    """Without a relu below, a hidden 0 has a gradient: [pad h0] differs from the zero function."""
    v, w = filters(1.0, shape=(1, 1, 1, 1)), filters(1.0, 2.0, shape=(1, 1, 1, 2))

    def forward(probe: Probe) -> Tensor:
        pooled = probe.max_pool2d(F.conv2d(image([0.0, 0.0]) + x, v), "pool", Window((1, 1), (1, 1), (0, 0), (1, 1)))
        return probe.relu(F.conv2d(pooled, w, padding=(0, 1)), "last")

    x = param([[[[0.0, 0.0]]]])
    seen = look(forward, v=v, w=w, x=x)
    assert proved(seen, seen.record("last"), pairs((0, -1), (0, 2), (1, -1))) == [False, False, False]


def test_dead_units():
    """Hidden units that are all switched off: the next linear layer (no bias) is the zero function, its bias is not."""
    a = param([[-1.0], [-2.0]])
    b = param([[1.0, 2.0], [3.0, 4.0]])
    x = torch.ones(2, 1, dtype=torch.float64)
    seen = look(lambda p: p.relu(F.linear(p.relu(F.linear(x, a)), b), "last"), a=a, b=b)
    assert proved(seen, seen.record("last"), pairs((-1, 0), (0, 1), (0, 3))) == [True, True, True]
    c = param([0.0, 0.0])
    seen = look(lambda p: p.relu(F.linear(p.relu(F.linear(x, a)), b, c), "last"), a=a, b=b, c=c)
    assert proved(seen, seen.record("last"), pairs((-1, 0), (0, 1), (0, 2))) == [False, False, True]


def test_a_touching_hidden_unit_is_switched_off():
    """relu at 0 has AD slope 0: both sides vanish, whatever is above."""
    w, v = param([0.0, 0.0]), param([[1.0]])
    seen = look(lambda p: p.relu(F.linear(p.relu(w).view(2, 1), v), "last"), w=w, v=v)
    assert proved(seen, seen.record("last"), pairs((0, 1), (-1, 0))) == [True, True]
    assert proved(seen, seen.records[0], pairs((0, 1))) == [False]


def test_normalisation_with_equal_inputs():
    model = nn.Sequential(nn.Conv2d(1, 1, (1, 2), dtype=torch.float64), nn.BatchNorm2d(1, dtype=torch.float64))
    fill(model, 1, 1, 2)
    seen = look(lambda probe: probe.relu(model(image([1.0, 2.0, 1.0, 2.0, 2.0]))), model)
    answer = prove_zero(seen.graph, seen.records[0], pairs((0, 2), (0, 1), (-1, 0)))
    assert answer.tolist() == [True, False, False]


def test_gamma_zero_makes_equal_inputs_congruent():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, dtype=torch.float64), nn.BatchNorm2d(1, dtype=torch.float64))
    with torch.no_grad():
        model[1].weight.zero_()
        model[0].weight.zero_()
    seen = look(lambda probe: probe.relu(model(image([1.0, 2.0, 3.0]))), model)
    assert proved(seen, seen.records[0], pairs((0, 1), (0, 2))) == [True, True]


def test_siamese_copies_of_one_sample_are_congruent():
    m = fill(nn.Linear(2, 2, dtype=torch.float64), 1)
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    seen = look(lambda probe: probe.relu(m(x)), m)
    assert proved(seen, seen.records[0], pairs((0, 2), (1, 3), (0, 4), (0, 3))) == [True, True, False, False]


# ---- not congruent -------------------------------------------------------------------------------


def test_two_outputs_of_one_place_where_the_place_is_a_live_zero():
    """y = (w, -w) by a linear map of w = 0: no weight row is left (its entries are w), the rows in w are 1 and -1."""
    w, a = param([[0.0]]), param([[1.0], [-1.0]])
    seen = look(lambda probe: probe.relu(F.linear(w, a)), w=w, a=a)
    assert proved(seen, seen.records[0], pairs((0, 1))) == [False]


def test_two_outputs_of_one_place_with_a_frozen_weight():
    """y = (w, -w) by a constant map: no weight row at all."""
    w, a = param([[3.0]]), param([[1.0], [-1.0]], trainable=False)
    seen = look(lambda probe: probe.relu(F.linear(w, a)), w=w, a=a)
    assert proved(seen, seen.records[0], pairs((0, 1))) == [False]
    r = look(lambda probe: probe.relu(F.linear(probe.relu(w), a), "last"), w=w, a=a)
    assert proved(r, r.record("last"), pairs((0, 1))) == [False]


def test_two_channels_of_congruent_places_with_a_frozen_filter():
    """Hidden 2 2 (congruent), filters 1 and -1: units (place 0, channel 0) and (place 1, channel 1) are 2 and -2."""
    v, a = filters(2.0, shape=(1, 1, 1, 1)), nn.Parameter(torch.tensor([1.0, -1.0]).double().reshape(2, 1, 1, 1))
    a.requires_grad_(False)
    x = image([1.0, 1.0])
    seen = look(lambda p: p.relu(F.conv2d(p.relu(F.conv2d(x, v)), a), "last"), v=v, a=a)
    assert proved(seen, seen.record("last"), pairs((0, 1), (0, 3), (0, 2))) == [True, False, False]


def test_two_channels_over_a_live_zero():
    """Hidden 0 from a pooling (not a relu): channel differences live in the layer below."""
    v = filters(0.0, shape=(1, 1, 1, 1))
    a = nn.Parameter(torch.tensor([1.0, -1.0]).double().reshape(2, 1, 1, 1))

    def forward(probe: Probe) -> Tensor:
        h = probe.max_pool2d(F.conv2d(image([1.0, 1.0]), v), "pool", Window((1, 1), (1, 1), (0, 0), (1, 1)))
        return probe.relu(F.conv2d(h, a), "last")

    seen = look(forward, v=v, a=a)
    assert proved(seen, seen.record("last"), pairs((0, 1), (0, 2), (0, 3))) == [True, False, False]


def test_equal_filters_do_not_make_trainable_channels_congruent():
    x = torch.ones(1, 2, dtype=torch.float64)
    a = param([[1.0, 2.0], [1.0, 2.0]])
    seen = look(lambda probe: probe.relu(F.linear(x, a)), a=a)
    assert proved(seen, seen.records[0], pairs((0, 1))) == [False]


def test_max_of_w_and_minus_w_is_not_certified():
    """max(w, -w) - max(-w, w) is 0 everywhere; AD's gradient at 0 is 1 + 1."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = param([[0.0]])
            self.register_buffer("a", torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
            self.pool = nn.MaxPool2d((1, 2))

        def forward(self) -> Tensor:
            y = F.linear(self.w, self.a).view(1, 1, 1, 2)
            return (self.pool(y) - self.pool(y.flip(3))).sum()

    model = adcert.convert(Net())
    certificate = adcert.certify(lambda: model(), model)
    assert model.w.grad.item() == 2.0
    assert certificate.verdict != adcert.Verdict.CERTIFIED


def test_operations_without_a_rule_prove_nothing():
    w = param([1.0, 1.0])
    seen = look(lambda probe: probe.relu(torch.tanh(w * 0.0)), w=w)
    assert proved(seen, seen.records[0], pairs((0, 1), (0, 0))) == [False, True]


# ---- selection and cells -------------------------------------------------------------------------


def test_cells_selected_units_and_members_by_hand():
    """5 5 2 / 1 5 2 with windows 2x2, stride 1: both windows tie at 5; the first selects cell 0, the second cell 0."""
    y = param([[[[5.0, 5.0, 2.0], [1.0, 5.0, 2.0]]]])
    seen = look(lambda p: p.max_pool2d(y, "pool", Window((2, 2), (1, 1), (0, 0), (1, 1))), y=y)
    (record,) = seen.records
    assert selected_inputs(record, torch.tensor([0, 1])).tolist() == [0, 1]
    assert record.ties is not None
    assert [t.tolist() for t in record.ties.pairs()] == [[0, 0, 1], [0, 0, 1], [1, 4, 4]]
    assert record.ties.maximisers(torch.tensor([1])).tolist() == [1, 4]
    below, good = follow(record, pairs((0, 1), (-1, 0)))
    assert good.all()
    assert (below.plus.tolist(), below.minus.tolist()) == ([0, -1], [1, 0])


def test_follow_through_a_relu_and_a_fused_pooling():
    w = param([-1.0, 0.0, 2.0])
    seen = look(lambda probe: probe.relu(w), w=w)
    below, _ = follow(seen.records[0], pairs((0, 2), (2, 1), (-1, 2)))
    assert (below.plus.tolist(), below.minus.tolist()) == ([-1, 2, -1], [2, -1, 2])
    y = param([[[[-3.0, -1.0, 0.0, -1.0, 4.0, 4.0]]]])
    window = Window((1, 2), (1, 2), (0, 0), (1, 1))
    fused = look(lambda probe: probe.max_pool2d(y, "pool", window, relu=True), y=y)
    below, _ = follow(fused.records[0], pairs((0, 2), (1, 2)))
    assert (below.plus.tolist(), below.minus.tolist()) == ([-1, -1], [4, 4])


def test_selected_units_agree_with_torch():
    for geometry in itertools.product([(2, 2), (3, 2)], [(1, 1), (2, 3)], [(0, 0), (1, 1)], [(1, 1), (1, 2)]):
        y = nn.Parameter(integers((2, 2, 6, 7), 3))
        seen = look(lambda p, y=y, g=geometry: p.max_pool2d(y, "pool", Window(*g)), y=y)
        out, index = F.max_pool2d(y, *geometry, return_indices=True)
        plane = (torch.arange(out.numel()) // out[0, 0].numel()) * 42
        selected = selected_inputs(seen.records[0], torch.arange(out.numel()))
        assert torch.equal(selected, plane + index.flatten())


# ---- properties: every True is confirmed ---------------------------------------------------------


def all_pairs(units: int, seed: int, limit: int = 40) -> Differences:
    table = torch.tensor([(i, j) for i in range(-1, units) for j in range(units) if i != j])
    picked = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:limit]
    return Differences(table[picked, 0], table[picked, 1])


@given(st.integers(0, 2000))
def test_random_networks(seed: int):
    network = random_network(seed)
    model = adcert.convert(network.model)
    seen = look(lambda _: network.closure(), model)
    for record in seen.records:
        proved(seen, record, all_pairs(seen.y(record).numel(), seed))


@given(st.integers(0, 2000))
def test_random_networks_with_frozen_parameters(seed: int):
    """Freezing removes rows: what the weights told apart must be told apart below."""
    network = random_network(seed)
    model = adcert.convert(network.model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(bool(torch.randint(0, 2, (), generator=generator)))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return
    loss = network.closure()
    if loss.grad_fn is None:
        return
    seen = look(lambda _: network.closure(), model)
    for record in seen.records:
        proved(seen, record, all_pairs(seen.y(record).numel(), seed))


@pytest.mark.parametrize("seed", range(12))
def test_a_two_layer_image_network_with_few_values(seed: int):
    """Pixels from {0, 1}: many equal patches; counts keep the property from being empty."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2, padding=1, dtype=torch.float64), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(2, 2, 2, padding=1, bias=False, dtype=torch.float64), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
    adcert.convert(fill(model, seed, -1, 1))
    x = integers((2, 1, 5, 5), seed, 0, 1)
    seen = look(lambda _: model(x), model)
    found = 0
    for record in seen.records:
        if record.ties is not None and len(record.ties.windows):
            _, chosen, members = record.ties.pairs()
            found += sum(proved(seen, record, Differences(chosen, members)))
        found += sum(proved(seen, record, random_pairs(seen.y(record).numel(), 60, seed)))
    assert found > 0
