"""Own-layer rows: hand-derived patch differences, then dense Jacobians by autograd on integer data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from core_helpers import (
    Probe,
    autograd_rows,
    dense_rows,
    fill,
    integers,
    look,
    pairs,
    param,
    random_pairs,
    rows_of,
)
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import CASES
from networks import random_network
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert import patches
from adcert.differences import Differences, groups_of, unique_pairs, unit_parts
from adcert.equality import prove_zero
from adcert.rows import expand

# 1 2 3
# 4 5 6
# 7 8 9
NINE = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(1, 1, 3, 3)


def only(forward: Callable[[Probe], Tensor], differences: Differences, **named: nn.Parameter) -> dict[str, list]:
    """Dense rows of the only record, which must have no hard difference."""
    seen = look(forward, **named)
    found, hard = rows_of(seen, seen.records[0], differences)
    assert not bool(hard.any())
    return {leaf: row.tolist() for leaf, row in found.items()}


# ---- literal cases: convolutions -----------------------------------------------------------------


def conv_rows(differences: Differences, x: Tensor = NINE, shape: tuple[int, ...] = (1, 1, 2, 2), **options) -> list:
    w = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    return only(lambda probe: probe.relu(F.conv2d(x, w, **options)), differences, w=w).get("w", [])


def test_patch_differences_of_a_three_by_three_image():
    """Patches in row-major order: [1 2 4 5], [2 3 5 6], [4 5 7 8], [5 6 8 9]."""
    assert conv_rows(pairs((0, 1), (3, 0), (2, 1))) == [[-1.0] * 4, [4.0] * 4, [2.0] * 4]
    assert conv_rows(pairs((-1, 0), (3, -1))) == [[-1.0, -2.0, -4.0, -5.0], [5.0, 6.0, 8.0, 9.0]]


def test_both_terms_of_a_difference_are_kept():
    """1 - 2^-60 is not a float64; the row is handed on as the exact pair (1, 2^-60)."""
    x = torch.tensor([[[[1.0, 2.0**-60]]]], dtype=torch.float64)
    w = nn.Parameter(torch.ones(1, 1, 1, 1, dtype=torch.float64))
    seen = look(lambda probe: probe.relu(F.conv2d(x, w)), w=w)
    (part,) = expand(seen.graph, seen.records[0].edge, pairs((0, 1))).parts
    assert (part.plus.tolist(), part.minus.tolist()) == ([[1.0]], [[2.0**-60]])
    assert not part.scaled
    assert part.radius is None


def test_identical_patches_leave_no_row():
    w = nn.Parameter(torch.ones(1, 1, 2, 2, dtype=torch.float64))
    seen = look(lambda probe: probe.relu(F.conv2d(torch.ones_like(NINE), w)), w=w)
    found = expand(seen.graph, seen.records[0].edge, pairs((0, 3), (0, -1)))
    assert found.own_nonzero().tolist() == [False, True]
    assert not bool(found.hard.any())


def test_stride():
    """Stride 2 on the padded image 0..0 / 0 1 2 3 / ...: patches [0 0 0 1], [0 0 2 3], [0 4 0 7], [5 6 8 9]."""
    assert conv_rows(pairs((0, -1), (1, -1), (2, -1), (3, 0)), stride=2, padding=1) == [
        [0.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 2.0, 3.0],
        [0.0, 4.0, 0.0, 7.0],
        [5.0, 6.0, 8.0, 8.0],
    ]


def test_rectangular_stride_and_padding():
    """Kernel (1, 2), stride (2, 1), padding (0, 1): y is 2 x 4; the patch of unit 4 = (1, 0) is [0 7]."""
    found = conv_rows(pairs((4, -1), (3, 7)), shape=(1, 1, 1, 2), stride=(2, 1), padding=(0, 1))
    assert found == [[0.0, 7.0], [3.0 - 9.0, 0.0]]


def test_dilation():
    assert conv_rows(pairs((0, -1)), dilation=2) == [[1.0, 3.0, 7.0, 9.0]]


def test_groups_and_channels():
    """Two groups of one channel: each filter has its own column group; different channels never cancel."""
    x = torch.cat([NINE, -NINE], 1)
    found = conv_rows(pairs((0, 1), (4, 5), (0, 4)), x, (2, 1, 2, 2), groups=2)
    assert found[0] == [-1.0] * 4 + [0.0] * 4
    assert found[1] == [0.0] * 4 + [1.0] * 4
    assert found[2] == [1.0, 2.0, 4.0, 5.0, 1.0, 2.0, 4.0, 5.0]  # minus times minus the image


def test_different_channels_over_one_patch_do_not_cancel():
    found = conv_rows(pairs((0, 4), (4, 0)), shape=(2, 1, 2, 2))
    assert found[0] == [1.0, 2.0, 4.0, 5.0, -1.0, -2.0, -4.0, -5.0]
    assert found[1] == [-v for v in found[0]]


def test_samples_are_only_another_index():
    x = torch.cat([NINE, 10 * NINE])
    assert conv_rows(pairs((4, 0)), x) == [[9.0, 18.0, 36.0, 45.0]]


def test_a_shared_bias_cancels_in_its_channel_only():
    w, b = nn.Parameter(torch.ones(2, 1, 2, 2, dtype=torch.float64)), param([0.0, 0.0])
    found = only(lambda p: p.relu(F.conv2d(NINE, w, b)), pairs((0, 1), (0, 4), (-1, 5)), w=w, b=b)
    assert found["b"] == [[0.0, 0.0], [1.0, -1.0], [0.0, -1.0]]


def test_a_frozen_filter_with_a_trainable_bias_over_a_constant_input():
    """Only the bias moves: the weight and the image are constants of the step."""
    w, b = nn.Parameter(torch.ones(2, 1, 2, 2, dtype=torch.float64), requires_grad=False), param([0.0, 0.0])
    found = only(lambda p: p.relu(F.conv2d(NINE, w, b)), pairs((0, 4), (0, 1), (-1, 5)), b=b)
    assert found["b"] == [[1.0, -1.0], [0.0, 0.0], [0.0, -1.0]]
    v = param([[1.0], [1.0]], trainable=False)
    x = torch.ones(3, 1, dtype=torch.float64)
    assert only(lambda p: p.relu(F.linear(x, v, b)), pairs((0, 3)), b=b)["b"] == [[1.0, -1.0]]


def test_convolutions_of_one_and_three_dimensions():
    w1 = nn.Parameter(torch.ones(1, 1, 2, dtype=torch.float64))
    line = torch.tensor([[[1.0, 4.0, 9.0]]], dtype=torch.float64)
    assert only(lambda p: p.relu(F.conv1d(line, w1)), pairs((1, 0)), w=w1)["w"] == [[3.0, 5.0]]
    w3 = nn.Parameter(torch.ones(1, 1, 1, 1, 2, dtype=torch.float64))
    block = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(1, 1, 2, 2, 2)
    assert only(lambda p: p.relu(F.conv3d(block, w3)), pairs((3, 0)), w=w3)["w"] == [[6.0, 6.0]]


def test_memory_format_does_not_matter():
    x = integers((2, 3, 4, 4), 1)
    d = random_pairs(2 * 2 * 9, 20, 1)
    assert conv_rows(d, x, (2, 3, 2, 2)) == conv_rows(d, x.to(memory_format=torch.channels_last), (2, 3, 2, 2))


def test_lower_precision_patches_are_exact():
    """bfloat16 0.1 is 0.10009765625; the row holds that number, not 0.1."""
    x = torch.tensor([[[[0.1, 1.0]]]], dtype=torch.bfloat16)
    w = nn.Parameter(torch.ones(1, 1, 1, 1, dtype=torch.bfloat16))
    assert only(lambda p: p.relu(F.conv2d(x, w)), pairs((0, -1)), w=w)["w"] == [[0.10009765625]]


def test_long_lists_are_gathered_in_chunks(monkeypatch: pytest.MonkeyPatch):
    d = random_pairs(4, 30, 3)
    whole = conv_rows(d)
    monkeypatch.setattr(patches, "CHUNK", 5)
    assert conv_rows(d) == whole


# ---- literal cases: linear layers and parameters themselves --------------------------------------


def test_rows_of_a_linear_layer_are_inputs():
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
    w, b = param([[1.0, 1.0], [1.0, 1.0]]), param([0.0, 0.0])
    found = only(lambda p: p.relu(F.linear(x, w, b)), pairs((2, 0), (0, 1), (-1, 3)), w=w, b=b)
    assert found["w"] == [[2.0, 3.0, 0.0, 0.0], [1.0, 2.0, -1.0, -2.0], [0.0, 0.0, -3.0, -5.0]]
    assert found["b"] == [[0.0, 0.0], [1.0, -1.0], [0.0, -1.0]]


def test_a_linear_layer_without_bias_and_with_positions():
    x = integers((2, 3, 2), 1)
    w = param([[1.0, 1.0]])
    found = only(lambda p: p.relu(F.linear(x, w)), pairs((5, 0)), w=w)
    assert found["w"] == [(x[1, 2] - x[0, 0]).tolist()]


def test_a_parameter_that_is_used_directly():
    w = param([1.0, 2.0, 3.0])
    assert only(lambda p: p.relu(w), pairs((0, 2), (-1, 1)), w=w)["w"] == [[1.0, 0.0, -1.0], [0.0, -1.0, 0.0]]
    matrix = param([[1.0, 2.0], [3.0, 4.0]])
    assert only(lambda p: p.relu(matrix), pairs((1, 2)), w=matrix)["w"] == [[0.0, 1.0, -1.0, 0.0]]
    scalar = param(0.0)
    assert only(lambda p: p.relu(scalar), pairs((-1, 0)), w=scalar)["w"] == [[-1.0]]


def test_constants_have_no_rows():
    w, x = param([1.0, 2.0]), torch.tensor([1.0, 5.0], dtype=torch.float64)
    assert only(lambda p: p.relu(w + x), pairs((0, 1)), w=w)["w"] == [[1.0, -1.0]]


# ---- literal cases: signs and movements ----------------------------------------------------------


def test_negation_and_subtraction():
    u, v = param([1.0, 2.0]), param([5.0, 7.0])
    assert only(lambda p: p.relu(-u), pairs((0, 1)), u=u)["u"] == [[-1.0, 1.0]]
    found = only(lambda p: p.relu(u - v), pairs((0, 1), (-1, 0)), u=u, v=v)
    assert found == {"u": [[1.0, -1.0], [-1.0, 0.0]], "v": [[-1.0, 1.0], [1.0, 0.0]]}
    assert only(lambda p: p.relu(3 - u), pairs((0, 1)), u=u)["u"] == [[-1.0, 1.0]]
    assert only(lambda p: p.relu(torch.rsub(u, v)), pairs((0, -1)), u=u, v=v) == {"u": [[-1.0, 0.0]], "v": [[1.0, 0.0]]}


def test_sums_with_broadcasting():
    u, v = param([[1.0], [2.0]]), param([5.0, 7.0])
    found = only(lambda p: p.relu(u + v), pairs((0, 3), (0, 1), (0, 2)), u=u, v=v)
    assert found["u"] == [[1.0, -1.0], [0.0, 0.0], [1.0, -1.0]]
    assert found["v"] == [[1.0, -1.0], [1.0, -1.0], [0.0, 0.0]]
    s, t = param(1.0), param([1.0, 2.0])
    found = only(lambda p: p.relu(s + t), pairs((0, 1), (0, -1)), s=s, t=t)
    assert found["t"] == [[1.0, -1.0], [1.0, 0.0]]
    assert found["s"] == [[0.0], [1.0]]


MATRIX = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
MOVES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, int], list[float]]] = {
    "view": (lambda w: w.view(3, 2), (0, 3), [1, 0, 0, -1, 0, 0]),
    "flatten": (lambda w: w.flatten(), (5, 0), [-1, 0, 0, 0, 0, 1]),
    "squeeze": (lambda w: w.unsqueeze(0).squeeze(0), (1, 2), [0, 1, -1, 0, 0, 0]),
    "permute": (lambda w: w.permute(1, 0), (1, 2), [0, -1, 0, 1, 0, 0]),  # 1 4 / 2 5 / 3 6
    "transpose": (lambda w: w.transpose(0, 1), (1, 2), [0, -1, 0, 1, 0, 0]),
    "t": (lambda w: w.t(), (1, 2), [0, -1, 0, 1, 0, 0]),
    "slice": (lambda w: w[:, 1:], (0, 3), [0, 1, 0, 0, 0, -1]),
    "step": (lambda w: w[:, ::2], (1, 2), [0, 0, 1, -1, 0, 0]),
    "select": (lambda w: w[1], (0, 2), [0, 0, 0, 1, 0, -1]),
    "flip": (lambda w: w.flip(1), (0, 4), [0, 0, 1, 0, -1, 0]),
    "roll": (lambda w: w.roll(1, 1), (0, 1), [-1, 0, 1, 0, 0, 0]),
    "cat": (lambda w: torch.cat([w, torch.zeros(1, 3, dtype=torch.float64), w]), (0, 9), [0, 0, 0, 0, 0, 0]),
    "cat with a constant": (lambda w: torch.cat([torch.ones(1, 3).double(), w]), (0, 4), [0, -1, 0, 0, 0, 0]),
    "stack": (lambda w: torch.stack([w, -w]), (1, 6), [1, 1, 0, 0, 0, 0]),
    "pad": (lambda w: F.pad(w, (1, 0)), (0, 7), [0, 0, 0, 0, 0, -1]),
    "expand": (lambda w: w.unsqueeze(0).expand(2, 2, 3), (0, 7), [1, -1, 0, 0, 0, 0]),
    "repeat": (lambda w: w.repeat(1, 2), (0, 3), [0, 0, 0, 0, 0, 0]),
    "split": (lambda w: w.split(2, 1)[1], (0, 1), [0, 0, 1, 0, 0, -1]),
    "unbind": (lambda w: w.unbind(1)[2], (0, 1), [0, 0, 1, 0, 0, -1]),
    "index": (lambda w: w[:, torch.tensor([2, 0])], (0, 1), [-1, 0, 1, 0, 0, 0]),
    "gather": (lambda w: w.gather(1, torch.tensor([[1], [2]])), (0, 1), [0, 1, 0, 0, 0, -1]),
    "embedding": (lambda w: F.embedding(torch.tensor([1, 0]), w), (0, 4), [0, -1, 0, 1, 0, 0]),
    "circular": (lambda w: F.pad(w[None], (1, 1), mode="circular"), (0, 1), [-1, 0, 1, 0, 0, 0]),  # 3 1 2 3 1
    "reflect": (lambda w: F.pad(w, (1, 0), mode="reflect"), (0, 1), [-1, 1, 0, 0, 0, 0]),  # 2 1 2 3
    "where": (lambda w: torch.where(torch.tensor([True, False, True]), w, -w), (0, 1), [1, 1, 0, 0, 0, 0]),
    "masked_fill": (lambda w: w.masked_fill(torch.tensor([True, False, False]), 0.0), (0, 1), [0, -1, 0, 0, 0, 0]),
    "nearest": (lambda w: F.interpolate(w[None], scale_factor=2), (1, 2), [1, -1, 0, 0, 0, 0]),  # 1 1 2 2 3 3
    "written": (lambda w: _written(w), (0, 3), [0, 0, 0, 0, 0, -1]),  # 0 4 5 6
    "add a number": (lambda w: 1.0 - (w + 2.0), (0, 1), [-1, 1, 0, 0, 0, 0]),
    "clone": (lambda w: w.clone(), (0, 1), [1, -1, 0, 0, 0, 0]),
    "cast": (lambda w: w.to(torch.float32), (0, 1), [1, -1, 0, 0, 0, 0]),
}


def _written(w: Tensor) -> Tensor:
    out = torch.zeros(4, dtype=w.dtype)
    out[1:] = w[1]
    return out


@pytest.mark.parametrize("name", MOVES)
def test_data_movement(name: str):
    move, pair, row = MOVES[name]
    w = param(MATRIX)
    found = only(lambda probe: probe.relu(move(w)), pairs(pair), w=w)
    assert found.get("w", [[0.0] * 6]) == [row]


def test_no_hook_fires_while_data_movements_are_followed():
    def shout(*_: object) -> None:
        raise AssertionError("a hook of the user fired")

    w = param(MATRIX)
    moved = torch.cat([w.flip(1), F.pad(w, (1, 1))[:, 1:4]]).t()
    for tensor in (w, moved):
        tensor.register_hook(shout)
    moved.grad_fn.register_prehook(shout)
    moved.grad_fn.next_functions[0][0].register_prehook(shout)
    assert only(lambda probe: probe.relu(moved), pairs((0, 2)), w=w)["w"] == [[-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    assert w.grad is None


def test_operations_without_an_exact_rule_are_hard():
    for forward in (lambda p, w: p.relu(w * w), lambda p, w: p.relu(torch.tanh(w)),
                    lambda p, w: p.relu(torch.add(w, w, alpha=2)), lambda p, w: p.relu(w.sum(0)),
                    lambda p, w: p.relu(F.layer_norm(w, (3,)))):  # fmt: skip
        w = param(MATRIX)
        seen = look(lambda probe, f=forward, w=w: f(probe, w), w=w)
        found = expand(seen.graph, seen.records[0].edge, pairs((0, 1), (1, 1)))
        assert found.hard.tolist() == [True, False]  # equal units need no rule


def test_a_constant_factor_scales_and_turns_differences():
    """y = (2 w_0, 2 w_1, -3 w_2, 0 w_3): equal factors keep a difference, a sign turns a touch, zero removes a unit."""
    w = param([1.0, 2.0, 3.0, 4.0])
    factor = torch.tensor([2.0, 2.0, -3.0, 0.0], dtype=torch.float64)
    seen = look(lambda probe: probe.relu(w * factor), w=w)
    found = expand(seen.graph, seen.records[0].edge, pairs((0, 1), (-1, 2), (0, 2), (1, 3), (3, -1)))
    assert found.hard.tolist() == [False, False, True, False, False]
    assert all(part.scaled for part in found.parts)
    rows = dense_rows(seen, found)["w"].tolist()
    assert rows == [[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0] * 4, [0.0, 1.0, 0.0, 0.0], [0.0] * 4]


def test_a_constant_divisor_scales_and_turns_differences():
    w = param([1.0, 2.0, 3.0])
    seen = look(lambda probe: probe.relu(w / torch.tensor([2.0, 2.0, -4.0], dtype=torch.float64)), w=w)
    found = expand(seen.graph, seen.records[0].edge, pairs((0, 1), (2, -1), (0, 2)))
    assert found.hard.tolist() == [False, False, True]
    assert dense_rows(seen, found)["w"].tolist()[:2] == [[1.0, -1.0, 0.0], [0.0, 0.0, -1.0]]


def test_a_computed_weight_is_hard_unless_its_patches_cancel():
    """Units 0 and 1 see equal rows, unit 2 another one: only the first difference is known, to be zero."""
    w = param([[1.0, 2.0]])
    x = torch.tensor([[3.0, 5.0], [3.0, 5.0], [3.0, 7.0]], dtype=torch.float64)
    seen = look(lambda probe: probe.relu(F.linear(x, w * w)), w=w)
    found = expand(seen.graph, seen.records[0].edge, pairs((0, 1), (0, 2), (-1, 0)))
    assert found.hard.tolist() == [False, True, True]
    assert not bool(found.own_nonzero()[0])


def test_a_computed_filter_is_hard_unless_its_patches_cancel():
    """Two channels over 1 2 1 2: positions 0 and 2 see [1 2], position 1 sees [2 1]."""
    w = param([[[1.0, 2.0]], [[1.0, 2.0]]])
    x = torch.tensor([[[1.0, 2.0, 1.0, 2.0]]], dtype=torch.float64)
    seen = look(lambda probe: probe.relu(F.conv1d(x, w * w)), w=w)
    found = expand(seen.graph, seen.records[0].edge, pairs((0, 2), (0, 1), (0, 3), (3, 5)))
    assert found.hard.tolist() == [False, True, True, False]


def test_a_patch_of_zeros_is_the_zero_function_under_any_computed_weight():
    """y = x (w w)^T: units 2 * row + channel, row 0 is zero; as in padding next to a black area."""
    w = param([[1.0, 2.0], [3.0, 4.0]])
    x = torch.tensor([[0.0, -0.0], [3.0, 4.0]], dtype=torch.float64)
    seen = look(lambda probe: probe.relu(F.linear(x, w * w)), w=w)
    found = expand(seen.graph, seen.records[0].edge, pairs((0, 1), (0, -1), (-1, 1), (0, 2), (0, 3), (2, -1)))
    assert found.hard.tolist() == [False, False, False, True, True, True]
    assert not found.parts


def test_equal_values_that_are_other_functions_are_left_to_the_record_below():
    w, v = param([[1.0, 2.0]]), param([[1.0, 2.0], [1.0, 2.0]])

    def forward(probe: Probe) -> Tensor:
        return probe.relu(F.linear(probe.relu(v, "below"), w * w), "above")

    seen = look(forward, w=w, v=v)
    found = expand(seen.graph, seen.record("above").edge, pairs((0, 1)))
    assert not bool(found.hard.any()) and not found.parts
    (item,) = found.boundary
    assert item.record is seen.record("below") and len(item.differences) == 2
    assert not bool(prove_zero(seen.graph, seen.record("above"), pairs((0, 1))).any())


# ---- batch normalisation -------------------------------------------------------------------------


def normalised(gamma: list[float], train: bool = True) -> tuple[nn.Sequential, Tensor]:
    """1x1 convolution with filters [1 0] and [0 1], then normalisation; equal outputs from different patches."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1, dtype=torch.float64), nn.BatchNorm2d(2, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2).reshape(2, 2, 1, 1))
        model[1].weight.copy_(torch.tensor(gamma))
    x = torch.tensor([[[[3.0, 3.0, 1.0]], [[5.0, 7.0, 7.0]]]], dtype=torch.float64)
    return model.train(train), x


@pytest.mark.parametrize("train", [True, False])
def test_through_a_normalisation_the_sign_of_gamma_decides(train: bool):
    """Channel 0 (units 0 1 2) is 3 3 1, channel 1 (units 3 4 5) is 5 7 7; equal pairs: (0, 1) and (4, 5)."""
    model, x = normalised([2.0, -1.0], train)
    seen = look(lambda probe: probe.relu(model(x)), model)
    expansion = expand(seen.graph, seen.records[0].edge, pairs((0, 1), (4, 5)))
    assert not bool(expansion.hard.any())
    assert all(part.scaled for part in expansion.parts)
    found = dense_rows(seen, expansion)
    assert set(found) == {"0.weight"}
    assert found["0.weight"].tolist() == [[0.0, -2.0, 0.0, 0.0], [0.0, 0.0, -2.0, 0.0]]


@pytest.mark.parametrize("train", [True, False])
def test_gamma_zero_leaves_no_row_for_equal_inputs(train: bool):
    model, x = normalised([0.0, 1.0], train)
    seen = look(lambda probe: probe.relu(model(x)), model)
    expansion = expand(seen.graph, seen.records[0].edge, pairs((0, 1), (0, 2)))
    assert expansion.hard.tolist() == [False, True]
    assert expansion.own_nonzero().tolist() == [False, False]
    rows_ = autograd_rows(seen.y(seen.records[0]), seen.parameters(), pairs((0, 1), (0, 2)))
    assert all(not bool(row[0].any()) for row in rows_.values())
    assert bool(rows_["1.weight"][1].any())  # the gamma column xhat_0 - xhat_2


def test_unequal_inputs_channels_and_touches_are_hard_in_a_normalisation():
    model, x = normalised([1.0, 1.0])
    seen = look(lambda probe: probe.relu(model(x)), model)
    expansion = expand(seen.graph, seen.records[0].edge, pairs((0, 2), (1, 4), (-1, 0), (0, 1)))
    assert expansion.hard.tolist() == [True, True, True, False]


@given(st.integers(0, 200), st.booleans())
def test_normalised_rows_are_positive_multiples_of_the_derivative(seed: int, train: bool):
    model = nn.Sequential(nn.Conv2d(1, 2, 2, dtype=torch.float64), nn.BatchNorm2d(2, dtype=torch.float64))
    fill(model, seed, -1, 1)
    with torch.no_grad():
        model[1].running_mean.copy_(integers((2,), seed))
        model[1].running_var.copy_(integers((2,), seed + 1, 1, 3))
    model.train(train)
    seen = look(lambda probe: probe.relu(model(integers((2, 1, 3, 3), seed, -1, 1))), model)
    d = random_pairs(16, 12, seed)
    expansion = expand(seen.graph, seen.records[0].edge, d)
    found = dense_rows(seen, expansion)
    expected = autograd_rows(seen.y(seen.records[0]), seen.parameters(), d)
    for k in torch.nonzero(~expansion.hard).flatten().tolist():
        mine = torch.cat([found.get(name, torch.zeros_like(row))[k] for name, row in expected.items()])
        truth = torch.cat([row[k] for row in expected.values()])
        scale = truth.abs().max() / mine.abs().max() if bool(mine.any()) else truth.new_ones(())
        assert scale > 1e-6
        assert torch.allclose(mine * scale, truth, atol=1e-9)


# ---- the boundary: what is left for the layers below ---------------------------------------------


def test_the_boundary_holds_differences_of_recorded_outputs():
    w, v = param([1.0, 2.0, 3.0]), param([[1.0]])

    def forward(probe: Probe) -> Tensor:
        r = probe.relu(w, "below")
        return probe.relu(F.linear(r.view(3, 1), v), "above")

    seen = look(forward, w=w, v=v)
    expansion = expand(seen.graph, seen.record("above").edge, pairs((0, 2), (1, 1), (-1, 1)))
    (boundary,) = expansion.boundary
    assert boundary.record is seen.record("below")
    found = {
        k: (int(plus), int(minus))
        for plus, minus, owner in zip(
            boundary.differences.plus, boundary.differences.minus, boundary.owner.tolist(), strict=True
        )
        for k in torch.nonzero(boundary.inverse == owner).flatten().tolist()
    }
    assert found == {0: (0, 2), 2: (-1, 1)}


def test_small_helpers():
    assert groups_of((4, 3, 2, 2)) == (4, 12)
    assert groups_of((5,)) == (5, 1)
    assert groups_of(()) == (1, 1)
    table, inverse = unique_pairs(torch.tensor([3, -1, 3]), torch.tensor([-1, 2, -1]))
    assert table[inverse].tolist() == [[3, -1], [-1, 2], [3, -1]]
    assert len(table) == 2
    assert [t.shape for t in unique_pairs(torch.zeros(0), torch.zeros(0))] == [(0, 2), (0,)]
    plus, minus = unit_parts("w", (2, 2), pairs((3, 0)), torch.tensor([0]))
    assert (plus.group.tolist(), plus.plus.tolist()) == ([1], [[0.0, 1.0]])
    assert (minus.group.tolist(), minus.minus.tolist()) == ([0], [[1.0, 0.0]])
    assert expand(look(lambda p: p.relu(param([1.0]))).graph, (None, 0), pairs((0, -1))).parts == []


# ---- dense Jacobians -----------------------------------------------------------------------------


@given(st.data())
def test_convolution_rows_equal_autograd(data: st.DataObject):
    groups = data.draw(st.sampled_from([1, 2]))
    inputs, outputs = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))
    kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
    padding = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    dilation = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    seed = data.draw(st.integers(0, 1000))
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, dtype=torch.float64)
    fill(conv, seed)
    x = integers((2, inputs, 5, 6), seed)
    if data.draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    seen = look(lambda probe: probe.relu(conv(x)), conv)
    y = seen.y(seen.records[0])
    d = random_pairs(y.numel(), 12, seed)
    found, hard = rows_of(seen, seen.records[0], d)
    assert not bool(hard.any())
    for name, truth in autograd_rows(y, seen.parameters(), d).items():
        assert torch.equal(found.get(name, torch.zeros_like(truth)), truth)


@given(st.integers(0, 2000))
def test_rows_of_random_networks_equal_autograd(seed: int):
    """Only w_l is compared: its leaves occur nowhere upstream, so the whole derivative is the own-layer one."""
    network = random_network(seed)
    model = adcert.convert(network.model)
    seen = look(lambda _: network.closure(), model)
    order = seen.order()
    for record in seen.records:
        y = seen.y(record)
        d = random_pairs(y.numel(), 8, seed)
        found, hard = rows_of(seen, record, d)
        if network.kind in ("mlp", "conv"):
            assert not bool(hard.any())
        mine = {name: leaf for name, leaf in seen.parameters().items() if name in order.own[record]}
        if not mine:
            continue
        for name, truth in autograd_rows(y, mine, d).items():
            row = found.get(name, torch.zeros_like(truth))
            assert torch.equal(row[~hard], truth[~hard])


@given(st.integers(0, 200))
def test_rows_of_a_mixed_layer_equal_autograd(seed: int):
    """Convolution, negation, flip, pad, cat, permute, difference and a parameter, all inside one tau."""
    conv = fill(nn.Conv2d(1, 2, 2, bias=True, dtype=torch.float64), seed)
    p = nn.Parameter(integers((2, 3, 2), seed))
    model = nn.Module()
    model.conv, model.p = conv, p
    x = integers((2, 1, 3, 3), seed)

    def forward(probe: Probe) -> Tensor:
        h = conv(x)  # [2, 2, 2, 2]
        h = torch.cat([-h.flip(3), F.pad(h[:, :1], (0, 0, 0, 0))], 1)  # [2, 3, 2, 2]
        return probe.relu(h.permute(0, 2, 1, 3) - p)

    seen = look(forward, model)
    d = random_pairs(24, 12, seed)
    found, hard = rows_of(seen, seen.records[0], d)
    assert not bool(hard.any())
    for name, truth in autograd_rows(seen.y(seen.records[0]), seen.parameters(), d).items():
        assert torch.equal(found.get(name, torch.zeros_like(truth)), truth)


# ---- every layer kind ----------------------------------------------------------------------------


class _Layer(nn.Module):
    """Integer data, so that ties of the layer's input are frequent."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.case = CASES[name]
        self.layer = self.case.make()
        self.x = nn.Parameter(torch.zeros(self.case.shape))
        fill(self, 3, -1, 1)
        self.x.requires_grad_(not name.startswith("conv"))  # the input of a layer is no parameter of it
        if self.case.positive:
            nn.init.constant_(self.x, 2.0)

    def forward(self, probe: Probe) -> Tensor:
        return probe.relu(self.case.call(self.layer, self.x + 0.0), "last")


# Kinds with exact rows for some of the random differences, at least.
_EXACT = ("conv", "group norm", "instance norm", "layer norm without weight")
_NEVER = "group norm of vectors"  # every unit is a channel of its own


@pytest.mark.parametrize("name", CASES)
def test_rows_of_every_layer_kind(name: str):
    """What is not hard is exact, or a positive multiple of the exact row."""
    model = _Layer(name).double()
    seen = look(model, model)
    y = seen.y(seen.records[-1])
    drawn = random_pairs(max(2, y.numel()), 40, 2)
    beside = torch.arange(min(40, y.numel() - 1))
    d = Differences(torch.cat([drawn.plus, beside]), torch.cat([drawn.minus, beside + 1]))
    found = expand(seen.graph, seen.records[-1].edge, d)
    marks = {kind: torch.zeros(len(d), dtype=torch.bool) for kind in (False, True)}
    for part in found.parts:
        marks[part.scaled][part.owner] = True
    scaled = marks[True]
    easy = ~(found.hard | scaled & marks[False])  # decisions give up rows with parts of both kinds
    if name.startswith(_EXACT) and name != _NEVER:
        assert bool(easy.any())
    if name.startswith("conv"):
        assert bool(easy.all())
    if not bool(easy.any()):
        return
    rows, truth = dense_rows(seen, found), autograd_rows(y, seen.parameters(), d)
    for leaf, expected in truth.items():
        row = rows.get(leaf, torch.zeros_like(expected))
        plain = easy & ~scaled
        if name.startswith(_EXACT[1:]):  # autograd rounds what cancels
            assert torch.allclose(row[plain], expected[plain], atol=1e-12), leaf
        else:
            assert torch.equal(row[plain], expected[plain]), leaf
        turned = torch.nonzero(easy & scaled).flatten()
        size, want = row[turned].abs().amax(1), expected[turned].abs().amax(1)
        factor = torch.where(size > 0, want / size.clamp(min=1e-300), 0.0)
        assert bool(((size > 0) | (want < 1e-12)).all()), leaf
        assert torch.allclose(row[turned] * factor[:, None], expected[turned], rtol=1e-9, atol=1e-12), leaf
