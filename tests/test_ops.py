"""The native operators: literal ties, then reference and torch, then what PyTorch asks of an operator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import INF, NAN, bits
from places import Place, opened
from torch import Tensor

from adcert import ops, reference

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "3d", "empty")


@pytest.fixture(params=["cpu", "kernels", "cuda"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The CPU's kernels, the CUDA sources compiled for the CPU, and a GPU."""
    with opened(request.param) as place:
        yield place


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape, strides and bits, wherever the actual tensor is."""
    actual = actual.cpu()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    if actual.is_floating_point():
        actual, expected = bits(actual), bits(expected)
    assert torch.equal(actual, expected)


def image(dtype: torch.dtype, layout: str = "contiguous", special: bool = True) -> Tensor:
    """Small integers (ties), both zeros (touches) and, if special, NaN and infinities."""
    x = torch.randint(-3, 3, (2, 5, 20, 22)).to(dtype)
    x[x == -3] = -0.0
    x[1, 2] = -1
    if special:
        x[0, 0, 3, 4], x[0, 1, 2], x[1, 1, 5:8, 4:9] = NAN, INF, -INF
    return {
        "contiguous": lambda: x,
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(2, 3),
        "sliced": lambda: x[:, ::2, :, 1:],
        "3d": lambda: x[0],
        "empty": lambda: x[:0],
    }[layout]()


def geometries() -> Iterator[tuple[Any, ...]]:
    """kernel, stride, padding, dilation, ceil_mode; 2 x 2 and 3 x 3 and rectangles and two mask words."""
    yield from itertools.product([2, 3, (2, 3)], [None, (3, 1)], [0, 1], [1, 2], [False, True])
    yield from [(9, 1, 4, 1, False), (9, 3, 0, 2, True), ((1, 5), 2, (0, 2), 1, True), (16, 1, 2, 1, False)]
    yield from [(17, 2, 1, 1, False), (1, 3, 0, 1, False), (2, 2, 0, 1, False), (3, 2, 1, 1, False)]


def plain(x: Tensor, *geometry: Any, relu: bool) -> Tensor:
    return F.max_pool2d(F.relu(x) if relu else x, *geometry)


def unsigned(result: Any, place: Place, relu: bool = True) -> Any:
    """torch.relu keeps -0.0 on the CPU and makes it +0.0 on CUDA."""
    return result if place.name == "cpu" or not relu else result._replace(output=result.output + 0.0)


def torchs_gradient(x: Tensor, seed: Tensor, *geometry: Any, relu: bool, place: Place) -> Tensor:
    """Of the plain operators, on the host: on CUDA sums run in float and are rounded once."""
    wide = x.dtype if place.name == "cpu" else torch.promote_types(x.dtype, torch.float32)
    leaf = x.detach().to(wide).requires_grad_()
    (g,) = torch.autograd.grad(plain(leaf, *geometry, relu=relu), leaf, seed.to(wide))
    return g.to(x.dtype)


def moved(arguments: Iterable[Any], place: Place) -> list[Any]:
    """Tensors, and those in lists, on the device."""
    return [
        place.to(a) if isinstance(a, Tensor) else [place.to(t) for t in a] if isinstance(a, list) else a
        for a in arguments
    ]


def kernels_gradient(x: Tensor, seed: Tensor, *geometry: Any, relu: bool, place: Place) -> Tensor:
    leaf = place.to(x.detach()).requires_grad_()
    (g,) = torch.autograd.grad(ops.max_pool2d(leaf, *geometry, relu=relu).output, leaf, place.to(seed))
    return g


# literal answers


def test_relu_touches_both_zeros(place: Place) -> None:
    result = ops.relu(place.to(torch.tensor([[-1.0, 0.0, NAN], [2.0, -0.0, INF]])))
    assert result.touches.tolist() == [1, 4]
    assert result.counts.tolist() == [0, 2, 2]
    assert torch.signbit(result.output).tolist() == [[False] * 3, [False, place.name == "cpu", False]]


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tie_literal(place: Place, dtype: torch.dtype, layout: torch.memory_format) -> None:
    # channel 0: {1, 3, 3, 0}, {5, 5, 5, 5}, {2, 1, 0, -1}
    # channel 1: {0, -0, -1, -2}, {NaN, NaN, 1, 2}, {-1, -1, -2, -2}
    rows = [
        [[1.0, 3.0, 5.0, 5.0, 2.0, 1.0], [3.0, 0.0, 5.0, 5.0, 0.0, -1.0]],
        [[0.0, -0.0, NAN, NAN, -1.0, -1.0], [-1.0, -2.0, 1.0, 2.0, -2.0, -2.0]],
    ]
    x = place.to(torch.tensor([rows], dtype=dtype).contiguous(memory_format=layout))
    pool = ops.max_pool2d(x, 2)
    assert pool.offsets.tolist() == [[[[1, 0, 0]], [[0, 1, 0]]]]
    assert pool.windows.tolist() == [0, 1, 3, 5]
    assert pool.members.tolist() == [[0b0110], [0b1111], [0b0011], [0b0011]]
    assert pool.touches.tolist() == []
    assert pool.counts.tolist() == [4, 0, 2]
    fused = ops.max_pool2d(x, 2, relu=True)
    assert fused.offsets.tolist() == [[[[1, 0, 0]], [[0, 1, 0]]]]
    assert fused.windows.tolist() == [0, 1]
    assert fused.touches.tolist() == [7, 10, 12, 13]
    assert fused.counts.tolist() == [2, 4, 2]


def test_negative_zero_ties_with_zero_and_stays(place: Place) -> None:
    result = ops.max_pool2d(place.to(torch.tensor([[[-0.0, 0.0], [-1.0, 0.0]]])), 2)
    assert result.members.tolist() == [[0b1011]]
    assert torch.signbit(result.output).item()


def test_members_need_two_words(place: Place) -> None:
    result = ops.max_pool2d(place.to(torch.ones(1, 9, 9)), 9)
    assert result.members.tolist() == [[-1, (1 << 17) - 1]]


def test_overlapping_windows_share_a_member(place: Place) -> None:
    # windows 3 wide, stride 1, of [1, 2, 2, 1]: {1, 2, 2} and {2, 2, 1}; the gradient of both reaches cell 1
    x = place.to(torch.tensor([[[1.0, 2.0, 2.0, 1.0]]])).requires_grad_()
    result = ops.max_pool2d(x, (1, 3), 1)
    assert result.members.tolist() == [[0b110], [0b011]]
    result.output.backward(place.to(torch.tensor([[[10.0, 1.0]]])))
    assert x.grad is not None
    assert x.grad.tolist() == [[[0.0, 11.0, 0.0, 0.0]]]


def test_gradient_stops_where_relu_is_flat(place: Place) -> None:
    x = place.to(torch.tensor([[[-1.0, -2.0, 1.0, 3.0]]])).requires_grad_()
    ops.max_pool2d(x, (1, 2), relu=True).output.backward(place.to(torch.tensor([[[10.0, 1.0]]])))
    assert x.grad is not None
    assert x.grad.tolist() == [[[0.0, 0.0, 0.0, 1.0]]]


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_three_by_three_literal(place: Place, dtype: torch.dtype, layout: torch.memory_format) -> None:
    # the first window holds padding, both zeros and -1; the second two fives
    rows = [[-0.0, 0.0, 5.0, 1.0], [-1.0, 0.0, 2.0, 5.0]]
    x = place.to(torch.tensor([[rows, rows]], dtype=dtype).contiguous(memory_format=layout))
    pool, fused = ops.max_pool2d(x, 3, 2, 1), ops.max_pool2d(x, 3, 2, 1, relu=True)
    for result in (pool, fused):
        assert result.output.tolist() == [[[[0.0, 5.0]]] * 2]
        signed = result is pool or place.name == "cpu"
        assert torch.signbit(result.output).tolist() == [[[[signed, False]]] * 2]
        assert result.offsets.tolist() == [[[[4, 4]]] * 2]
    assert pool.windows.tolist() == [0, 1, 2, 3]
    assert pool.members.tolist() == [[1 << 4 | 1 << 5 | 1 << 8], [1 << 4 | 1 << 8]] * 2
    assert fused.windows.tolist() == [1, 3]
    assert fused.touches.tolist() == [0, 1, 5, 8, 9, 13]


def test_minus_infinity_does_not_tie_with_padding(place: Place) -> None:
    x = torch.full((1, 1, 2, 2), -INF)
    x[0, 0, 1, 1] = 1.0
    result = ops.max_pool2d(place.to(x), 3, 2, 1)
    assert (result.offsets.item(), result.windows.tolist()) == (8, [])
    result = ops.max_pool2d(place.to(torch.full((1, 1, 1, 1), -INF)), 3, 2, 1)
    assert (result.output.item(), result.offsets.item(), result.windows.tolist()) == (-INF, 4, [])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_overlapping_gradients_are_added_in_the_order_of_the_windows(layout: torch.memory_format) -> None:
    # the middle cell wins all four windows; only in their order does bfloat16 sum these to 1 + 2^-7
    x = torch.zeros(1, 2, 5, 5, dtype=torch.bfloat16)
    x[..., 2, 2] = 1.0
    x = x.contiguous(memory_format=layout).requires_grad_()
    seed = torch.tensor([[1.0, 2**-8], [2**-8, 2**-7]], dtype=torch.bfloat16).expand(1, 2, 2, 2)
    (g,) = torch.autograd.grad(ops.max_pool2d(x, 3, 2).output, x, seed)
    assert g[..., 2, 2].tolist() == [[1 + 2**-7] * 2]
    assert g.count_nonzero() == 2


def test_touch_outside_every_window(place: Place) -> None:
    # the last column is in no window, but its unit is on the kink all the same
    x = torch.tensor([[[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]]])
    assert ops.max_pool2d(place.to(x), 2, relu=True).touches.tolist() == [2]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_dilation_may_step_far_outside(place: Place, layout: torch.memory_format) -> None:
    # the first and the third tap are 2^31 lines away from the second, the only one inside
    far, x = 2**31 - 2, torch.randint(-3, 3, (1, 4, 3, 3)).float().contiguous(memory_format=layout)
    result = ops.max_pool2d(place.to(x), (3, 1), 1, (far, 0), (far, 1))
    assert_same(result.output, x)
    assert bool((result.offsets == 1).all())


def test_gradient_of_taps_far_outside(place: Place) -> None:
    far, x = 2**31 - 2, place.to(torch.ones(1, 3, 3)).requires_grad_()
    seed = torch.arange(9.0).view(1, 3, 3)
    ops.max_pool2d(x, (3, 1), 1, (far, 0), (far, 1)).output.backward(place.to(seed))
    assert x.grad is not None
    assert_same(x.grad, seed)


def test_windows_that_only_ceil_mode_has_need_no_cell(place: Place) -> None:
    # window 0 looks at cells -5, 0, 5; with ceil_mode there would be another, at -3, 2, 7 of 0 .. 1
    x = place.to(torch.tensor([[[3.0, 4.0]]])).requires_grad_()
    ops.max_pool2d(x, (1, 3), (1, 2), (0, 5), (1, 5)).output.backward(place.to(torch.tensor([[[7.0]]])))
    assert x.grad is not None
    assert x.grad.tolist() == [[[7.0, 0.0]]]


def test_bytes_route_into_the_first_taps_of_a_large_window(place: Place) -> None:
    # route 3 is tap 3, not also tap 3 + 256
    arguments = (torch.ones(1, 1, 1), torch.full((1, 1, 1), 3, dtype=torch.uint8))
    geometry = (1, 300, (1, 300), (1, 300), (0, 0), (1, 1), False)
    grad = torch.ops.adcert.max_pool2d_backward(*moved(arguments, place), *geometry)
    assert grad.cpu().nonzero().tolist() == [[0, 0, 3]]


@pytest.mark.parametrize("dtype", [torch.uint8, *reference.DTYPES])
def test_rows_may_begin_anywhere(place: Place, dtype: torch.dtype) -> None:
    # rows of 8 bytes whose first one does not lie at a multiple of 8: on a GPU a wide load of it would be an error
    width = 8 // dtype.itemsize
    flat = place.to(torch.tensor([9] + [1] * width + [2] * width + [1] * width).to(dtype))
    assert ops.distinct_rows(flat[1:].view(3, width)).tolist() == [0, 1]


ANY = (*reference.DTYPES, torch.uint8, torch.int64, torch.complex64, torch.complex128)


@pytest.mark.parametrize("dtype", ANY)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "3d", "empty"])
def test_fingerprints(place: Place, dtype: torch.dtype, layout: str) -> None:
    x = image(torch.float32, layout).nan_to_num(3, 5, 7).to(dtype)
    flat = torch.arange(700).to(dtype)
    tensors = [x, flat[:0], flat[1:2], flat[1:], flat[:513], flat[3:].reshape(-1, 17), flat[0]]  # from odd places
    assert_same(ops.fingerprints([place.to(t) for t in tensors]), reference.fingerprints(tensors))


def test_fingerprints_of_many_tensors(place: Place) -> None:
    """More than one launch takes, of all dtypes in turn, and one that many blocks share."""
    tensors = [torch.arange(k, 3 * k).to(dtype) for k in range(60) for dtype in reference.DTYPES]
    tensors.insert(100, torch.arange(70_000, dtype=torch.float32))
    assert_same(ops.fingerprints([place.to(t) for t in tensors]), reference.fingerprints(tensors))


@pytest.mark.parametrize("size", [1, 2, 7, 64, 509, 9000])
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_fingerprints_notice_any_entry_and_any_exchange_of_two(place: Place, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    t = torch.randint(-2, 3, (size,), generator=generator).to(dtype)
    changed, exchanged = [], []
    for i, j in torch.randint(0, size, (50, 2), generator=generator).tolist():
        changed.append(t.clone())
        changed[-1][i] += 1
        exchanged.append(t.clone())
        exchanged[-1][i], exchanged[-1][j] = t[j], t[i]
    found = ops.fingerprints([place.to(each) for each in (t, *changed, *exchanged)]).cpu()
    same = (found == found[0]).tolist()
    assert not any(same[1:51])
    assert same[51:] == [torch.equal(each, t) for each in exchanged]


@pytest.mark.parametrize("bits", [0x3F800000, 0x3F800000 << 32, 0x40000000, 1 << 31, 1, 0x3F80, 0x3FF << 52])
def test_fingerprints_tell_the_places_of_one_value_apart(bits: int) -> None:
    """An embedding's gradient: one entry that is not zero, at each of 2048 places of a table."""
    tables = torch.diag(torch.full((2048,), bits))
    found = ops.fingerprints(list(tables))
    assert len(found.unique()) == 2048
    assert len((found & 0xFFFFFFFF).unique()) > 2040  # not even half of the bits are alike more often than by chance


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_capacity_bounds_the_lists(place: Place, layout: str) -> None:
    x = place.to(image(torch.float32, layout))
    exact, touched = ops.max_pool2d(x, 2, relu=True), ops.relu(x)
    windows, touches, _ = exact.counts.tolist()
    assert windows > 9
    assert touches > windows
    for room in (0, 9, windows, touches + 5):
        pool, relu = ops.max_pool2d(x, 2, relu=True, capacity=room), ops.relu(x, capacity=room)
        assert_same(pool.output, exact.output.cpu())
        assert_same(relu.output, touched.output.cpu())
        assert torch.equal(pool.counts, exact.counts)
        assert torch.equal(relu.counts, touched.counts)
        assert [len(pool.windows), len(pool.members), len(pool.touches), len(relu.touches)] == [room] * 4
        kept = min(room, windows)
        if room >= windows:
            assert torch.equal(pool.windows[:kept].sort().values, exact.windows)
            assert torch.equal(pool.members[:kept][pool.windows[:kept].argsort()], exact.members)
        if room >= touches:
            assert torch.equal(pool.touches[:touches].sort().values, exact.touches)
            assert torch.equal(relu.touches[:touches].sort().values, touched.touches)


@pytest.mark.parametrize("name", ["distinct_rows", "opposite_rows", "conv_patches", "resolve_ties"])
@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bulk_operators_are_the_cpus(place: Place, dtype: torch.dtype, layout: str, name: str) -> None:
    arguments = bulk_arguments(name, image(dtype, layout, special=False))
    actual, expected = getattr(ops, name)(*moved(arguments, place)), getattr(ops, name)(*arguments)
    if isinstance(expected, Tensor):
        assert_same(actual, expected)
    else:
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)


def test_a_gpu_wants_a_capacity(place: Place) -> None:
    if place.name == "cpu":
        pytest.skip("only here lists may have the length of what was found")
    x = place.to(image(torch.float32))
    with pytest.raises(RuntimeError, match="capacity"):
        torch.ops.adcert.relu(x)
    with pytest.raises(RuntimeError, match="capacity"):
        torch.ops.adcert.max_pool2d(x, (2, 2), (2, 2), (0, 0), (1, 1), False, True)


def test_nothing_waits_for_a_gpu(place: Place) -> None:
    x = place.to(image(torch.float32)).requires_grad_()
    with place.no_waits():
        pool, relu = ops.max_pool2d(x, 2, relu=True, capacity=99), ops.relu(x, capacity=99)
        ops.touches(x, capacity=99)
        (pool.output.sum() + relu.output.sum()).backward()


def test_negative_capacity() -> None:
    with pytest.raises(ValueError, match="capacity"):
        ops.relu(torch.zeros(3), capacity=-2)


# reference and torch


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_pool_is_the_reference(place: Place, dtype: torch.dtype, layout: str, relu: bool) -> None:
    x = image(dtype, layout)
    for geometry in geometries():
        actual = ops.max_pool2d(place.to(x), *geometry, relu=relu)
        expected = unsigned(reference.max_pool2d(x, *geometry, relu=relu), place, relu)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
        if place.name != "kernels":
            assert_same(actual.output, plain(place.to(x), *geometry, relu=relu).cpu())


USUAL = tuple(itertools.product([(2, 2, 0), (3, 2, 0), (3, 2, 1)], [1], [False, True]))
SHAPES = (
    *((2, 3, h, w) for h, w in ((1, 1), (1, 9), (2, 3), (3, 2), (4, 5), (5, 4), (6, 7), (7, 8), (8, 6), (9, 9))),
    *((1, 2, h, w) for h, w in ((7, 16), (3, 17), (4, 31), (5, 32), (6, 33), (17, 34), (2, 511), (3, 530))),
    *((2, c, 5, 6) for c in (1, 16, 33, 64, 70, 300)),
    (0, 3, 8, 8),
)


def usual(shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """The geometries of the specialised kernels that fit."""
    for (kernel, stride, padding), dilation, ceil in USUAL:
        if min(shape[2:]) + 2 * padding >= kernel:
            yield kernel, stride, padding, dilation, ceil


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_usual_windows(place: Place, dtype: torch.dtype, layout: torch.memory_format, special: bool) -> None:
    # special: NaN and infinities in a few places, so that tiles with and without them follow each other
    for shape in SHAPES:
        x = torch.randint(-3, 3, shape).to(dtype)
        x[x == -3] = -0.0
        if special:
            odd = torch.rand(shape) < 4 / (1 + x.numel())
            x[odd] = torch.tensor([NAN, -NAN, INF, -INF], dtype=dtype)[torch.randint(4, (int(odd.sum()),))]
            x[:1, :1, -1] = -INF
        x = x.contiguous(memory_format=layout)
        for geometry, relu in itertools.product(usual(shape), (False, True)):
            actual = ops.max_pool2d(place.to(x), *geometry, relu=relu)
            expected = unsigned(reference.max_pool2d(x, *geometry, relu=relu), place, relu)
            for a, e in zip(actual, expected, strict=True):
                assert_same(a, e)
            if place.name != "kernels":
                assert_same(actual.output, plain(place.to(x), *geometry, relu=relu).cpu())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_usual_gradients(place: Place, dtype: torch.dtype, layout: torch.memory_format, relu: bool) -> None:
    # a few cells above the rest, so that many windows send their gradients to one; an infinity meets its negative
    for shape in SHAPES:
        x = torch.randint(-1, 4, shape).to(dtype).contiguous(memory_format=layout)
        for geometry in [*usual(shape), (3, 1, 1, 1, False), ((2, 3), (1, 2), 0, (1, 2), True)]:
            if min(shape[2:]) < 5 and geometry[:2] == ((2, 3), (1, 2)):
                continue
            seed = torch.randn_like(plain(x, *geometry, relu=relu))
            seed.flatten()[::5] = -0.0
            seed[..., ::7] = INF
            seed[..., 3::7] = -INF
            g = kernels_gradient(x, seed, *geometry, relu=relu, place=place)
            assert_same(g, torchs_gradient(x, seed, *geometry, relu=relu, place=place))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_pool_gradient_is_torchs(place: Place, dtype: torch.dtype, layout: str, relu: bool) -> None:
    for geometry in geometries():
        x = image(dtype, layout, special=False)
        seed = torch.randn_like(plain(x, *geometry, relu=relu))
        seed[..., ::5] = -0.0
        g = kernels_gradient(x, seed, *geometry, relu=relu, place=place).cpu()
        h = torchs_gradient(x, seed, *geometry, relu=relu, place=place)
        assert torch.equal(bits(g), bits(h)), geometry
        if layout in ("contiguous", "channels_last"):
            assert g.stride() == h.stride()


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded", "scalar"])
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_relu_is_the_reference(place: Place, dtype: torch.dtype, layout: str) -> None:
    if layout == "expanded":
        x = image(dtype)[:, :, :1].expand(2, 5, 7, 22)
    elif layout == "scalar":
        x = torch.zeros((), dtype=dtype)
    else:
        x = image(dtype, layout)
    for a, e in zip(ops.relu(place.to(x)), unsigned(reference.relu(x), place), strict=True):
        assert_same(a, e)
    for kinks in (0.0, -2.0, 0.1, (-1.0, 1.0), (0.0, INF), (1.0, 1.0)):
        for a, e in zip(ops.touches(place.to(x), kinks), reference.touches(x, kinks), strict=True):
            assert_same(a, e)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_relu_gradient_is_torchs(place: Place, dtype: torch.dtype, layout: str) -> None:
    x = image(dtype, layout)
    ours, theirs, seed = place.to(x.detach()).requires_grad_(), x.detach().requires_grad_(), torch.randn_like(x)
    (g,) = torch.autograd.grad(ops.relu(ours).output, ours, place.to(seed))
    (h,) = torch.autograd.grad(torch.relu(theirs), theirs, seed)
    assert_same(g, h)


def test_long_rows_and_many_channels(place: Place) -> None:
    # more lanes than one tile holds, in both formats, with a remainder
    for shape in ((1, 2, 5, 1201), (1, 601, 4, 5)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randint(-2, 3, shape).float().contiguous(memory_format=layout)
            for geometry in ((2,), (3, 2, 1)):
                for a, e in zip(
                    ops.max_pool2d(place.to(x), *geometry, relu=True),
                    unsigned(reference.max_pool2d(x, *geometry, relu=True), place),
                    strict=True,
                ):
                    assert_same(a, e)


def test_pool_indices_are_torchs(place: Place) -> None:
    x = image(torch.float32)
    for geometry in geometries():
        offsets = ops.max_pool2d(place.to(x), *geometry).offsets
        _, indices = F.max_pool2d(x, *geometry, return_indices=True)
        assert torch.equal(ops.pool_indices(offsets, x.shape, *geometry[:4]).cpu(), indices)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_order_does_not_depend_on_threads(layout: torch.memory_format) -> None:
    x = torch.randint(-2, 3, (9, 33, 30, 31)).float().contiguous(memory_format=layout)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        prints = ops.fingerprints([torch.arange(300_000.0), x])
        results.append([*ops.max_pool2d(x, 3, 2, 1, relu=True), *ops.relu(x), *ops.max_pool2d(x, 2), prints])
    for result in results[1:]:
        for a, e in zip(result, results[0], strict=True):
            assert_same(a, e)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_cuda_sources_do_not_depend_on_the_order_of_threads(
    order: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randint(-2, 3, (3, 24, 14, 16)).float().contiguous(memory_format=layout)
    x[:, 5:9] = x[:1, 5:6]
    bulk = ("distinct_rows", "opposite_rows", "conv_patches", "resolve_ties")

    def results() -> list[Tensor]:
        y = place.to(x)
        found = [*ops.max_pool2d(y, 3, 2, 1, relu=True), *ops.max_pool2d(y, 2), *ops.relu(y), *ops.touches(y, 1.0)]
        for name in bulk:
            result = getattr(ops, name)(*moved(bulk_arguments(name, x), place))
            found += [result] if isinstance(result, Tensor) else [*result]
        found.append(ops.fingerprints([y, y[0, 0], y[1]]))
        return [t.cpu() for t in found]

    with opened("kernels") as place:
        monkeypatch.setenv("ADCERT_EMULATION_ORDER", "0")
        expected = results()
        monkeypatch.setenv("ADCERT_EMULATION_ORDER", str(order))
        raw = ops.relu(place.to(x), capacity=4096).touches.cpu()
        for a, e in zip(results(), expected, strict=True):
            assert_same(a, e)
    assert not torch.equal(raw[: len(expected[13])], expected[13])  # the order in which they are found is another


# bad input


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((4, 4), {}),
        ((1, 0, 4, 4), {}),
        ((1, 1, 4, 4), {"stride": 0}),
        ((1, 1, 4, 4), {"padding": 2}),
        ((1, 1, 4, 4), {"padding": -1}),
        ((1, 1, 4, 4), {"dilation": 0}),
        ((1, 1, 1, 4), {}),
        ((1, 1, 1, 1), {"dilation": 3, "padding": 2}),  # torch reads beyond the image here
    ],
)
def test_bad_geometry(place: Place, shape: tuple[int, ...], arguments: dict[str, int]) -> None:
    with pytest.raises(RuntimeError, match="max_pool2d"):
        ops.max_pool2d(place.to(torch.zeros(shape)), 2, **arguments)


@pytest.mark.parametrize("op", [ops.relu, ops.touches, lambda x: ops.max_pool2d(x, 2)])
def test_bad_dtype(place: Place, op: Callable[[Tensor], object]) -> None:
    with pytest.raises(RuntimeError, match="float16"):
        op(place.to(torch.zeros(1, 4, 4, dtype=torch.int32)))


def test_fingerprints_of_nothing() -> None:
    with pytest.raises(RuntimeError, match="at least one"):
        ops.fingerprints([])


def test_routes_that_do_not_fit(place: Place) -> None:
    grad, routes = place.to(torch.zeros(1, 1, 2, 2)), place.to(torch.zeros(1, 1, 3, 2, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="routes"):
        torch.ops.adcert.max_pool2d_backward(grad, routes, 4, 4, (2, 2), (2, 2), (0, 0), (1, 1), False)


def test_in_place_on_the_output_keeps_the_gradient() -> None:
    x = image(torch.float32, special=False)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ops.max_pool2d(ours, 2, relu=True).output.mul_(2).sum().backward()
    plain(theirs, 2, relu=True).mul_(2).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert_same(ours.grad, theirs.grad)


# what PyTorch asks of an operator


PARAMETERS = ([], [0.5], [-1.0, 2.0])


def samples(name: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of every operator, for opcheck."""
    for dtype, layout, grad in itertools.product(
        (torch.float32, torch.bfloat16), ("contiguous", "channels_last", "3d"), (False, True)
    ):
        x = image(dtype, layout, special=False).detach().requires_grad_(grad)
        pairs = ((3, 3), (2, 2), (1, 1), (1, 1))
        if name == "relu":
            yield from ((x,), (x, 7))
        elif name == "touches":
            yield from ((x.detach(), [1.0]), (x.detach(), [-1.0, 1.0], 0))
        elif name == "activation":
            yield from ((x, kind, PARAMETERS[count]) for kind, count in enumerate(reference.ACTIVATIONS.values()))
            yield (x, 0, [0.0, 6.0], 7)
        elif name == "prelu":
            weight = torch.linspace(-0.5, 2, x.shape[1], dtype=dtype).requires_grad_(grad)
            yield from ((x, weight), (x, weight[:1], 7))
        elif name == "window_ties":
            if not grad:
                yield from ((*window_arguments(x),), (*window_arguments(x), 3))
        elif name == "max_pool2d":
            yield from ((x, *pairs, True, False), (x, *pairs, True, True, 5))
            yield (x, (2, 2), (2, 2), (0, 0), (1, 1), False, True)
            yield (x, (9, 9), (4, 4), (0, 0), (1, 1), False, True)
        elif name in ("resolve_ties", "conv_patches", "distinct_rows", "opposite_rows"):
            if layout != "3d" and not grad:
                yield bulk_arguments(name, x)
        elif name == "fingerprints":
            yield ([x.detach(), x.detach()[0]],)
        else:
            routes = torch.ops.adcert.max_pool2d(x.detach(), *pairs, False, True)[6]
            if name == "max_pool2d_gather":
                yield (x, routes, *pairs)
            else:
                seed = torch.randn(routes.shape, dtype=dtype).requires_grad_(grad)
                yield (seed, routes, *x.shape[-2:], *pairs, layout == "channels_last")


def window_arguments(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A pooling of 2 x 3 windows, one place apart, with one window for each plane of its own along the width."""
    output = F.max_pool2d(x, (2, 3), 1)
    rows, columns = (torch.arange(n)[:, None] + torch.arange(k) for n, k in zip(output.shape[-2:], (2, 3), strict=True))
    planes = output.shape[:-2].numel()
    return x, output, [rows, columns.expand(planes, *columns.shape).contiguous()]


def bulk_arguments(name: str, x: Tensor) -> tuple[Any, ...]:
    """What the certificates' own operators take: x is the output of a 1 x 1 convolution of itself, pooled 2 x 2."""
    if name == "distinct_rows":
        return (x.flatten(1).contiguous(),)
    if name == "opposite_rows":
        rows = x.float().flatten(0, 2).contiguous()
        return rows, -rows, torch.arange(len(rows)) % 3
    n, c, h, w = x.shape
    conv = (5, 0, 0, -1, c, 1, c, h, 1, 1, 0, 1, h, w, 1, 1, 0, 1, w)
    if name == "conv_patches":
        return x, torch.arange(0, n * c * h * w, 7), conv
    pool = ops.max_pool2d(x, 2)
    axes = (h, 2, 2, 0, 1, h // 2, w, 2, 2, 0, 1, w // 2)
    return pool.windows, pool.members, pool.offsets, axes, (*conv, *(0,) * ops.STAGE_INTS), [x]


FORWARD = ("relu", "activation", "prelu", "touches", "max_pool2d", "max_pool2d_backward", "max_pool2d_gather")
OPERATORS = (*FORWARD, "window_ties", "resolve_ties", "conv_patches", "distinct_rows", "opposite_rows", "fingerprints")


def test_every_operator_is_listed() -> None:
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    assert {n.removeprefix("adcert::") for n in names if n.startswith("adcert::")} == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    for arguments in samples(name):
        torch.library.opcheck(getattr(torch.ops.adcert, name).default, arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3d"])
@pytest.mark.parametrize("relu", [False, True])
def test_batched_gradient_is_the_loop(place: Place, layout: str, relu: bool) -> None:
    x = place.to(image(torch.float64, layout, special=False)).requires_grad_()
    y = ops.max_pool2d(x, 3, 2, 1, relu=relu).output
    seeds = place.to(torch.randn(4, *y.shape, dtype=torch.float64))
    (batched,) = torch.autograd.grad(y, x, seeds, retain_graph=True, is_grads_batched=True)
    for seed, g in zip(seeds, batched, strict=True):
        assert torch.equal(g, torch.autograd.grad(y, x, seed, retain_graph=True)[0])


@pytest.mark.parametrize("shape", [(5, 4, 4), (2, 5, 4, 4)])
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 2)])
def test_vmap_of_the_backward_ops(shape: tuple[int, ...], in_dims: tuple[int | None, int | None]) -> None:
    geometry = ((2, 2), (2, 2), (0, 0), (1, 1))
    xs, size = torch.randn(3, *shape), shape[-2:]
    routes = torch.stack([ops.max_pool2d(x, 2).offsets for x in xs])
    seeds = torch.randn(routes.shape)

    def scatter(g: Tensor, r: Tensor) -> Tensor:
        return torch.ops.adcert.max_pool2d_backward(g, r, *size, *geometry, False)  # type: ignore[no-any-return]

    def gather(x: Tensor, r: Tensor) -> Tensor:
        return torch.ops.adcert.max_pool2d_gather(x, r, *geometry)  # type: ignore[no-any-return]

    for op, values in ((scatter, seeds), (gather, xs)):
        both = list(zip((values, routes), in_dims, strict=True))
        parts = [[t[0]] * 3 if d is None else list(t) for t, d in both]
        expected = torch.stack([op(v, r) for v, r in zip(*parts, strict=True)])
        args = [t[0] if d is None else t.movedim(0, d) for t, d in both]
        assert torch.equal(torch.vmap(op, in_dims)(*args), expected)


def test_second_derivative() -> None:
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return ops.max_pool2d(x, 3, 2, 1, relu=True).output ** 3 + ops.relu(x).output.sum() ** 2

    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_cast(dtype: torch.dtype) -> None:
    x = image(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.relu(x).dtype == dtype
        assert ops.relu(x).output.dtype == dtype
        assert ops.max_pool2d(x, 2, relu=True).output.dtype == F.max_pool2d(x, 2).dtype == dtype


def test_no_gradient_wanted() -> None:
    x = image(torch.float32)
    assert not ops.max_pool2d(x, 2).output.requires_grad
    with torch.no_grad():
        assert not ops.relu(x.requires_grad_()).output.requires_grad
    result = ops.max_pool2d(x, 2, relu=True)
    assert [t.requires_grad for t in result] == [True, False, False, False, False, False]


def test_compiles_into_one_graph() -> None:
    def f(x: Tensor) -> Tensor:
        return ops.max_pool2d(x, 2, relu=True).output.sum() + ops.relu(x).output.mean()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    ours, theirs = (image(torch.float32, special=False).requires_grad_() for _ in range(2))
    theirs = ours.detach().clone().requires_grad_()
    compiled(ours).backward()
    f(theirs).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert_same(ours.grad, theirs.grad)
