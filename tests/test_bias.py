"""The additive bias of a layer: found where y_i = (terms without b) + b[group(i)] exactly, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from core_helpers import Seen, autograd_rows, integers, look, pairs, param
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import CASES
from networks import random_network
from torch import Tensor, nn

import adcert
from adcert.bias import Bias, bias_of
from adcert.differences import Differences

IMAGE = integers((2, 2, 3, 3), 1)
TABLE = integers((3, 2), 2)


def conv(bias: bool = True, inputs: int = 2) -> nn.Conv2d:
    return nn.Conv2d(inputs, 2, 2, bias=bias, dtype=torch.float64)


def bias(seen: Seen, index: int = 0) -> Bias | None:
    record = seen.records[index]
    return bias_of(seen.graph, record, seen.order().own[record])


def groups(found: Bias, units: int) -> list[int]:
    return found.group(torch.arange(units)).tolist()


# ---- literal cases -------------------------------------------------------------------------------


def test_a_convolution_bias_is_shared_by_its_channel():
    m = conv()  # y: [2, 2, 2, 2]
    found = bias(look(lambda probe: probe.relu(m(IMAGE)), m))
    assert found is not None
    assert (found.leaf, found.kind) == ("bias", "shared")
    assert groups(found, 16) == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4


def test_a_linear_bias_is_distinct():
    m = nn.Linear(2, 3, dtype=torch.float64)  # y: [3, 3]
    found = bias(look(lambda probe: probe.relu(m(TABLE)), m))
    assert found is not None
    assert (found.leaf, found.kind) == ("bias", "distinct")
    assert groups(found, 9) == [0, 1, 2] * 3


def test_a_linear_bias_over_positions_is_shared():
    m = nn.Linear(2, 3, dtype=torch.float64)
    found = bias(look(lambda probe: probe.relu(m(integers((2, 4, 2), 3))), m))
    assert found is not None
    assert (found.leaf, found.kind) == ("bias", "shared")
    assert groups(found, 24) == [0, 1, 2] * 8


@pytest.mark.parametrize(
    "moved",
    [
        lambda y: y.transpose(1, 2),
        lambda y: y.transpose(-1, 0),
        lambda y: y.flatten(2).permute(2, 0, -2),
        lambda y: y.flatten(1).T,
        lambda y: y.flatten(2).transpose(1, 2).view(2, 2, 2, 2).permute(0, 3, 1, 2),
    ],
)
def test_axes_that_are_exchanged_take_the_bias_along(moved: Callable[[Tensor], Tensor]):
    m = conv()  # y: [2, 2, 2, 2]
    found = bias(look(lambda probe: probe.relu(moved(m(IMAGE))), m))
    assert found is not None and found.leaf == "bias"
    channels = torch.tensor([0.0] * 4 + [1.0] * 4 + [0.0] * 4 + [1.0] * 4).reshape(2, 2, 2, 2)
    assert groups(found, 16) == moved(channels).flatten().tolist()


def test_no_bias():
    m = conv(bias=False)
    assert bias(look(lambda probe: probe.relu(m(IMAGE)), m)) is None
    linear = nn.Linear(2, 3, bias=False, dtype=torch.float64)
    assert bias(look(lambda probe: probe.relu(linear(TABLE)), linear)) is None


def test_before_a_train_mode_normalisation_only_beta_is_a_bias():
    m = nn.Sequential(conv(), nn.BatchNorm2d(2, dtype=torch.float64))
    found = bias(look(lambda probe: probe.relu(m(IMAGE)), m))
    assert found is not None
    assert (found.leaf, found.kind) == ("1.bias", "shared")
    assert groups(found, 16) == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4


def test_before_an_eval_mode_normalisation_only_beta_is_a_bias():
    m = nn.Sequential(conv(), nn.BatchNorm2d(2, dtype=torch.float64)).eval()
    found = bias(look(lambda probe: probe.relu(m(IMAGE)), m))
    assert found is not None
    assert found.leaf == "1.bias"


def test_a_convolution_bias_before_a_normalisation_without_beta_is_none():
    for affine in (False, True):
        m = nn.Sequential(conv(), nn.BatchNorm2d(2, affine=affine, dtype=torch.float64))
        if affine:
            m[1].bias.requires_grad_(False)
        seen = look(lambda probe, m=m: probe.relu(m(IMAGE)), m)
        assert "0.bias" in seen.graph.tau(seen.records[0]).leaves
        assert bias(seen) is None


def test_a_normalisation_of_a_table_gives_a_distinct_bias():
    m = nn.Sequential(nn.Linear(2, 3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64))
    found = bias(look(lambda probe: probe.relu(m(TABLE)), m))
    assert found is not None
    assert (found.leaf, found.kind) == ("1.bias", "distinct")


def test_a_residual_sum_keeps_the_bias_of_its_branch():
    m = nn.ModuleDict({"a": conv(), "b": nn.Conv2d(2, 2, 1, dtype=torch.float64)})
    m["a"].bias.requires_grad_(False)

    def forward(probe):
        r = probe.relu(m["a"](IMAGE))
        return probe.relu(r + m["b"](r))

    found = bias(look(forward, m), 1)
    assert found is not None
    assert (found.leaf, found.kind) == ("b.bias", "shared")


def test_of_two_biases_in_a_sum_either_will_do_but_only_one_is_named():
    m = nn.ModuleDict({"a": conv(), "b": conv()})
    found = bias(look(lambda probe: probe.relu(m["a"](IMAGE) + m["b"](IMAGE)), m))
    assert found is not None
    assert found.leaf in ("a.bias", "b.bias")


def test_a_bias_that_is_used_twice_is_none():
    """y = (x A + b) + b moves by 2 when b does: no coefficient one."""
    w, b = param([[1.0, 2.0], [0.0, 1.0]]), param([1.0, -1.0])
    twice = look(lambda probe: probe.relu(torch.nn.functional.linear(TABLE, w, b) + b), w=w, b=b)
    assert bias(twice) is None
    m = conv()
    shared = look(lambda probe: probe.relu(m(IMAGE) + m(-IMAGE)), m)
    assert bias(shared) is None


def test_a_bias_that_reaches_y_on_two_paths_through_one_node_is_none():
    """t = a x + b, y = t + c t with c = -2: b enters t once, but y = -t moves down when b moves up."""
    m = nn.Sequential(nn.Conv2d(1, 1, 1, dtype=torch.float64), nn.Conv2d(1, 1, 1, bias=False, dtype=torch.float64))
    nn.init.constant_(m[1].weight, -2.0)

    def forward(probe):
        t = m[0](torch.ones(1, 1, 1, 1, dtype=torch.float64))
        return probe.relu(t + m[1](t))

    seen = look(forward, m)
    y = seen.y(seen.records[0])
    assert autograd_rows(y, seen.parameters(), pairs((0, -1)))["0.bias"].tolist() == [[-1.0]]
    assert bias(seen) is None


def test_lemma_2_behind_a_skip_connection_is_not_certified():
    """relu(t) - relu(t + c t) with c = -2 is t, so its gradient in t's bias is 1; AD says 0 at t = 0."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(1, 1, 1, dtype=torch.float64)
            self.c = nn.Conv2d(1, 1, 1, bias=False, dtype=torch.float64)
            self.relu = nn.ReLU()
            for tensor, value in ((self.a.weight, 0.0), (self.a.bias, 0.0), (self.c.weight, -2.0)):
                nn.init.constant_(tensor, value)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            t = self.a(x)
            return (self.relu(t) - self.relu(t + self.c(t))).sum()

    model = adcert.convert(Net())
    certificate = adcert.certify(lambda: model(torch.ones(1, 1, 1, 1, dtype=torch.float64)), model)
    assert model.a.bias.grad.item() == 0.0
    assert certificate.verdict != adcert.Verdict.CERTIFIED


def test_a_frozen_bias_is_none():
    m = conv()
    m.bias.requires_grad_(False)
    assert bias(look(lambda probe: probe.relu(m(IMAGE)), m)) is None


def test_the_bias_of_an_earlier_layer_is_none():
    """t = a x + b skips over relu(t): b belongs to the first layer, although it enters y with coefficient one."""
    m = nn.ModuleDict({"a": conv(), "b": nn.Conv2d(2, 2, 1, bias=False, dtype=torch.float64)})

    def forward(probe):
        t = m["a"](IMAGE)
        return probe.relu(t + m["b"](probe.relu(t)))

    seen = look(forward, m)
    first = bias(seen, 0)
    assert first is not None
    assert first.leaf == "a.bias"
    assert bias(seen, 1) is None


def test_a_scaled_or_negated_or_moved_bias_is_none():
    """Only coefficient one and the identity of units count."""
    b = param([0.0, 1.0])
    x = TABLE * param([1.0, 1.0])
    for forward in (lambda p: p.relu(x + 2.0 * b), lambda p: p.relu(x - b), lambda p: p.relu(-(x + b)),
                    lambda p: p.relu(torch.add(x, b, alpha=2)), lambda p: p.relu((x + b) * 3.0)):  # fmt: skip
        assert bias(look(forward, b=b)) is None


def test_a_parameter_added_by_hand_with_broadcasting():
    w, rows, everything = param([[1.0, 2.0]]), param([[1.0], [2.0], [3.0]]), param(0.0)
    per_sample = bias(look(lambda probe: probe.relu(TABLE * w + rows), w=w, rows=rows))
    assert per_sample is not None
    assert per_sample.leaf == "rows"
    assert groups(per_sample, 6) == [0, 0, 1, 1, 2, 2]
    scalar = bias(look(lambda probe: probe.relu(TABLE * w + everything), w=w, everything=everything))
    assert scalar is not None
    assert (scalar.leaf, scalar.kind) == ("everything", "shared")
    assert groups(scalar, 6) == [0] * 6


def test_a_parameter_of_the_units_shape_is_distinct():
    b = param([[[0.0, 1.0], [2.0, 3.0]]])
    w = param([1.0])
    x = integers((2, 1, 2, 2), 4)
    found = bias(look(lambda probe: probe.relu(x * w + b), w=w, b=b))
    assert found is not None
    assert (found.leaf, found.kind) == ("b", "distinct")
    assert groups(found, 8) == [0, 1, 2, 3] * 2


def test_views_and_casts_keep_the_bias():
    m = nn.Linear(2, 4, dtype=torch.float32)
    x = TABLE.to(torch.float32)
    found = bias(look(lambda probe: probe.relu(m(x).to(torch.bfloat16).view(3, 1, 2, 2).clone()), m))
    assert found is not None
    assert (found.leaf, found.kind) == ("bias", "distinct")
    assert groups(found, 12) == [0, 1, 2, 3] * 3


def test_a_bias_below_another_record_is_none():
    m = conv()
    seen = look(lambda probe: probe.max_pool2d(probe.relu(m(IMAGE))), m)
    assert bias(seen, 1) is None


# ---- property ------------------------------------------------------------------------------------


@given(st.integers(0, 300))
def test_a_found_bias_has_coefficient_one_in_every_unit(seed: int):
    """autograd: the derivative of y_i in b is exactly the unit vector of group(i)."""
    network = random_network(seed)
    model = adcert.convert(network.model)
    seen = look(lambda _: network.closure(), model)
    order = seen.order()
    for record in seen.records:
        found = bias_of(seen.graph, record, order.own[record])
        if found is None:
            continue
        units = seen.y(record).numel()
        touches = Differences(torch.arange(units), torch.full((units,), -1))
        rows = autograd_rows(seen.y(record), {"b": seen.leaves.tensor(found.leaf)}, touches)["b"]
        expected = torch.zeros_like(rows)
        expected[torch.arange(units), found.group(torch.arange(units))] = 1.0
        assert torch.equal(rows, expected)


# ---- other layers --------------------------------------------------------------------------------


def test_normalisations_inside_samples_add_their_shift():
    group = nn.GroupNorm(1, 2, dtype=torch.float64)  # y: [2, 2, 3, 3]
    found = bias(look(lambda probe: probe.relu(group(IMAGE)), group))
    assert found is not None
    assert (found.leaf, found.kind) == ("bias", "shared")
    assert groups(found, 36) == ([0] * 9 + [1] * 9) * 2
    layer = nn.LayerNorm(2, dtype=torch.float64)  # y: [3, 2]
    found = bias(look(lambda probe: probe.relu(layer(TABLE)), layer))
    assert found is not None
    assert (found.leaf, found.kind) == ("bias", "distinct")
    assert groups(found, 6) == [0, 1] * 3
    instance = nn.InstanceNorm2d(2, affine=True, dtype=torch.float64)
    found = bias(look(lambda probe: probe.relu(instance(IMAGE)), instance))
    assert found is not None
    assert (found.leaf, found.kind) == ("bias", "shared")
    assert groups(found, 36) == ([0] * 9 + [1] * 9) * 2
    plain = nn.Sequential(conv(), nn.GroupNorm(1, 2, affine=False, dtype=torch.float64))
    assert bias(look(lambda probe: probe.relu(plain(IMAGE)), plain)) is None


def test_a_bias_is_followed_through_permutations():
    """Layer normalisation of channels [2, 3, 3, 2], seen as [2, 2, 3, 3]; a linear layer, transposed."""
    m = nn.LayerNorm(2, dtype=torch.float64)
    found = bias(look(lambda probe: probe.relu(m(IMAGE.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()), m))
    assert found is not None
    assert groups(found, 36) == ([0] * 9 + [1] * 9) * 2
    linear = nn.Linear(2, 3, dtype=torch.float64)
    found = bias(look(lambda probe: probe.relu(linear(TABLE).t()), linear))
    assert found is not None
    assert groups(found, 9) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_bias_of_every_layer_kind_is_one():
    """Wherever a bias is found, every unit's derivative with respect to it is one in its group and zero elsewhere."""
    found = 0
    for name, case in CASES.items():
        torch.manual_seed(0)
        module = case.make()
        if module is None:
            continue
        module = module.double()
        x = torch.randn(case.shape, dtype=torch.float64)
        if not case.call(module, x).requires_grad:
            continue
        seen = look(lambda probe, c=case, m=module, x=x: probe.relu(c.call(m, x)), module)
        if len(seen.records) != 1 or (held := bias(seen)) is None:
            continue
        found += 1
        units = torch.arange(seen.y(seen.records[0]).numel())
        d = Differences(units, torch.full_like(units, -1))
        rows = autograd_rows(seen.y(seen.records[0]), seen.parameters(), d)[held.leaf]
        assert torch.equal(rows, torch.eye(rows.shape[1]).double()[held.group(units)]), name
    assert found > 20
