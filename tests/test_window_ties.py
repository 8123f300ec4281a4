"""Ties of poolings over any windows: literals, the reference, torch's three-dimensional and adaptive ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import kernel_cases as cases
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import INF, NAN
from places import Place, opened
from torch import Tensor

from adcert import ops, reference


@pytest.fixture(params=["cpu", "kernels", "cuda"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with opened(request.param) as place:
        yield place


def found(place: Place, x: Tensor, output: Tensor, axes: Sequence[Tensor]) -> ops.WindowTies:
    """Compared with the reference."""
    result = ops.window_ties(place.to(x), place.to(output), [place.to(axis) for axis in axes])
    for actual, expected in zip(result, reference.window_ties(x, output, axes), strict=True):
        assert torch.equal(actual.cpu(), expected)
    return result


def share(size: int, count: int) -> Tensor:
    """The windows of an adaptive pooling along an axis."""
    starts = [i * size // count for i in range(count)]
    ends = [-(-(i + 1) * size // count) for i in range(count)]
    most = max(end - start for start, end in zip(starts, ends, strict=True))
    rows = [[*range(a, b), *[-1] * (most - b + a)] for a, b in zip(starts, ends, strict=True)]
    return torch.tensor(rows)


def sliding(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return torch.arange(count)[:, None] * stride - padding + torch.arange(kernel) * dilation  # may be outside


def test_literal(place: Place) -> None:
    # windows {2, 2}, {2, NaN}, {-0, 0}; the last is tied though the bits differ
    x = torch.tensor([2.0, 2.0, NAN, -0.0, 0.0])
    result = found(place, x, torch.tensor([2.0, NAN, 0.0]), [torch.tensor([[0, 1], [1, 2], [3, 4]])])
    assert result.owner.tolist() == [0, 0, 2, 2]
    assert result.member.tolist() == [0, 1, 3, 4]
    assert result.counts.tolist() == [2, 4, 1, 0]


def test_every_plane_may_have_windows_of_its_own(place: Place) -> None:
    x = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    tables = torch.tensor([[[0, 1]], [[2, -1]]])
    result = found(place, x, torch.ones(2, 1), [tables])
    assert (result.owner.tolist(), result.member.tolist()) == ([0, 0], [0, 1])


def test_members_ascend_whatever_the_order_of_the_table(place: Place) -> None:
    result = found(place, torch.ones(4), torch.ones(1), [torch.tensor([[3, -1, 0, 99]])])
    assert result.member.tolist() == [0, 3]


def test_an_output_from_nowhere_is_counted(place: Place) -> None:
    result = found(place, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]), [torch.tensor([[0, 1], [0, 1]])])
    assert result.counts.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_torchs_poolings(place: Place, dtype: torch.dtype) -> None:
    x = torch.randint(-2, 3, (2, 3, 5, 6, 7)).to(dtype)
    x[0, 0, 0, 0, 0], x[0, 1, 4], x[1, 0, :, 2] = NAN, INF, -INF
    x[1, 2] = x[1, 2] * 0.0
    pooled = F.max_pool3d(x, 3, (2, 1, 2), 1, (1, 2, 1))
    axes = [sliding(n, 3, s, 1, d) for n, s, d in zip(x.shape[2:], (2, 1, 2), (1, 2, 1), strict=True)]
    assert found(place, x, pooled, axes).counts[0] > 0
    axes = [share(*sizes) for sizes in ((5, 2), (6, 6), (7, 3))]
    assert found(place, x, F.adaptive_max_pool3d(x, (2, 6, 3)), axes).counts[3] == 0
    y = x[0].transpose(1, 3)
    assert found(place, y, F.adaptive_max_pool2d(y, (4, 2)), [share(6, 4), share(5, 2)]).counts[3] == 0
    y = x[:, :, 0, 0]
    assert found(place, y, F.max_pool1d(y, 3, 1), [sliding(7, 3, 1, 0, 1)]).counts[3] == 0
    found(place, x[:0], pooled[:0], [torch.zeros(n, 1, dtype=torch.int64) for n in pooled.shape[2:]])


@pytest.mark.parametrize("seed", range(40))
def test_random_tables(place: Place, seed: int) -> None:
    found(place, *cases.windows(cases.Dice(seed)))


def test_room(place: Place) -> None:
    x, output, axes = torch.ones(6, 9), torch.ones(6, 2), [torch.arange(8).view(2, 4)]
    there = [place.to(t) for t in (x, output, axes[0])]
    expected = reference.window_ties(x, output, axes)
    for room in (0, 5, 48, 60):
        with place.no_waits():
            result = ops.window_ties(there[0], there[1], there[2:], room)
        assert len(result.owner) == len(result.member) == room
        assert torch.equal(result.counts.cpu(), expected.counts)
        if room >= 48:
            pairs = sorted(zip(result.owner[:48].tolist(), result.member[:48].tolist(), strict=True))
            assert pairs == list(zip(expected.owner.tolist(), expected.member.tolist(), strict=True))


def test_more_pairs_than_a_list_has_at_first(place: Place) -> None:
    result = found(place, torch.ones(5000), torch.ones(1), [torch.arange(5000)[None]])
    assert len(result.member) == 5000


def test_order_does_not_depend_on_threads() -> None:
    x = torch.randint(-2, 3, (7, 11, 40, 50)).float()
    axes = [sliding(n, 3, 2, 1, 1) for n in x.shape[2:]]
    results = []
    for threads in (1, 3, 7):
        torch.set_num_threads(threads)
        results.append(ops.window_ties(x, F.max_pool2d(x, 3, 2, 1), axes))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    native = ops.max_pool2d(x, 3, 2, 1)
    assert torch.equal(results[0].owner.unique(), native.windows)


def test_what_does_not_fit(place: Place) -> None:
    x, output, table = place.to(torch.zeros(2, 4)), place.to(torch.zeros(2, 2)), place.to(torch.zeros(2, 2).long())
    for arguments in (
        (x, output, []),
        (x, output, [table] * 4),
        (x, output, [table[:1]]),
        (x, output, [table.int()]),
        (x, output, [table[None].repeat(3, 1, 1)]),
        (x, output[:1], [table]),
        (x, output.double(), [table]),
        (x.long(), output.long(), [table]),
    ):
        with pytest.raises(RuntimeError, match="window_ties"):
            ops.window_ties(*arguments)
