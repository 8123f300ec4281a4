"""The specification against literal answers and against torch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from adcert import reference

NAN, INF = float("nan"), float("inf")


def test_relu_touches_both_zeros() -> None:
    result = reference.relu(torch.tensor([[-1.0, 0.0, NAN], [2.0, -0.0, INF]]))
    assert result.touches.tolist() == [1, 4]
    assert result.counts.tolist()[2] == 2
    assert torch.signbit(result.output).tolist() == [[False, False, False], [False, True, False]]


def test_kink_other_than_zero() -> None:
    result = reference.touches(torch.tensor([6.0, 5.0, 6.0]), 6.0)
    assert result.touches.tolist() == [0, 2]


def test_members_of_a_tie() -> None:
    # windows: {1, 3, 3, 0} -> members 1 and 2; {5, 5, 5, 5} -> all; {2, 1, 0, -1} -> no tie
    x = torch.tensor([[[1.0, 3.0, 5.0, 5.0, 2.0, 1.0], [3.0, 0.0, 5.0, 5.0, 0.0, -1.0]]])
    result = reference.max_pool2d(x, 2)
    assert result.output.tolist() == [[[3.0, 5.0, 2.0]]]
    assert result.offsets.tolist() == [[[1, 0, 0]]]
    assert result.windows.tolist() == [0, 1]
    assert result.members.tolist() == [[0b0110], [0b1111]]


def test_padding_is_no_member() -> None:
    # one window of 3 x 3 over 2 x 2 cells: taps 4, 5, 7, 8
    result = reference.max_pool2d(torch.full((1, 2, 2), -INF), 3, padding=1)
    assert result.offsets.tolist() == [[[4]]]
    assert result.members.tolist() == [[(1 << 4) | (1 << 5) | (1 << 7) | (1 << 8)]]


def test_two_words() -> None:
    # 9 x 9 equal cells: bits 0..63, then 64..80
    result = reference.max_pool2d(torch.ones(1, 9, 9), 9)
    assert result.members.tolist() == [[-1, (1 << 17) - 1]]


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_pooling_is_torchs(dtype: torch.dtype) -> None:
    geometries = itertools.product([2, (2, 3)], [None, (3, 1)], [0, 1], [1, 2], [False, True], [False, True])
    for kernel, stride, padding, dilation, ceil_mode, relu in geometries:
        x = torch.randint(-3, 3, (2, 3, 9, 8)).to(dtype)
        x[0, 0, 2, 3], x[1, 1, 4:7, 4:6] = NAN, -INF
        args = (kernel, stride, padding, dilation, ceil_mode)
        result = reference.max_pool2d(x, *args, relu=relu)
        output, indices = F.max_pool2d(F.relu(x) if relu else x, *args, return_indices=True)
        assert torch.equal(result.output.nan_to_num(99), output.nan_to_num(99))
        assert torch.equal(reference.pool_indices(result.offsets, x.shape, *args[:4]), indices)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((4, 4), {}),
        ((1, 0, 4, 4), {}),
        ((1, 1, 4, 4), {"stride": 0}),
        ((1, 1, 4, 4), {"padding": 2}),
        ((1, 1, 4, 4), {"dilation": 0}),
        ((1, 1, 1, 4), {}),
        ((1, 1, 1, 1), {"dilation": 3, "padding": 2}),  # torch reads beyond the image here
    ],
)
def test_bad_geometry(shape: tuple[int, ...], arguments: dict[str, int]) -> None:
    with pytest.raises(RuntimeError, match="max_pool2d"):
        reference.max_pool2d(torch.zeros(shape), 2, **arguments)


def test_bad_dtype() -> None:
    with pytest.raises(RuntimeError, match="float16"):
        reference.relu(torch.zeros(3, dtype=torch.int64))
