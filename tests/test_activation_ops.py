"""The kinked activations with their touches: literal answers, then torch's bits, values and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import kernel_cases as cases
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import INF, NAN, bits
from places import Place, opened
from torch import Tensor

from adcert import activations, ops, reference

CASES: tuple[tuple[str, tuple[float, ...]], ...] = (
    *(("hardtanh", p) for p in ((0, 6), (-1, 1), (-0.7, 0.1), (0, 1e-30), (-1e-30, 1e-30), (2, 2), (-INF, INF))),
    *(("leaky_relu", (p,)) for p in (0.01, -0.3, 0, 1, 3.7, 1e30, INF)),
    *(("threshold", (p,)) for p in (0, -0.0, 0.1, 0.7, -0.7, 1e-30, -1e-30, 6e4, INF, -INF)),
    *(("clamp", p) for p in ((0, 1), (-0.7, 0.1), (0.1, INF), (-INF, 0.7), (-INF, -0.0), (-0.0, INF), (1e-30, 6e4))),
    ("hardsigmoid", ()),
    ("hardswish", ()),
    ("abs", ()),
)
NAMES = [f"{kind}{parameters}" for kind, parameters in CASES]
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["cpu", "kernels", "cuda"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The CPU's kernels, the CUDA sources compiled for the CPU, and a GPU."""
    with opened(request.param) as place:
        yield place


def values(dtype: torch.dtype, kinks: tuple[float, ...] = (0.0,)) -> Tensor:
    """All there are of a half type; else many, with every kink and its neighbours, and what is special."""
    if dtype in HALVES:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    at = torch.tensor([*kinks, 0.0, 3.0, 6.0], dtype=torch.float64).to(dtype)
    near = torch.cat([at, torch.nextafter(at, at + INF), torch.nextafter(at, at - INF)])
    odd = torch.tensor([NAN, INF, -0.0, 5e-324, 1e-45, 1e-40, 1e-310, 1e30], dtype=torch.float64).to(dtype)
    some = torch.cat([near, -near, odd, -odd])
    many = torch.randn(3000, dtype=dtype) * torch.randint(-30, 30, (3000,)).to(dtype).exp2()
    # a value alone and in whole vectors, at the beginning, at an odd place, and in the rest
    return torch.cat([some, torch.stack([some] * 67, 1).flatten(), many, many.abs().clamp(max=8), some])


def stock(x: Tensor, kind: str, parameters: tuple[float, ...], place: Place) -> Tensor:
    """torch's own output; where CUDA is only emulated, what it would be."""
    if place.name == "cuda":
        return reference.activation(place.to(x), kind, parameters).output.cpu()
    expected = reference.activation(x, kind, parameters).output
    return expected if place.name == "cpu" else cases.on_cuda(x, kind, parameters, expected)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape, strides and bits, wherever the actual tensor is."""
    actual = actual.detach().cpu()
    assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert torch.equal(*((bits(t.detach()) if t.is_floating_point() else t) for t in (actual, expected)))


# literal answers


def test_two_kinks_share_a_list(place: Place) -> None:
    x = place.to(torch.tensor([[6.0, -0.0, 1.0], [NAN, 6.0, 0.0]]))
    result = ops.activation(x, "hardtanh", (0, 6))
    assert result.touches.tolist() == [2 * 0 + 1, 2 * 1, 2 * 4 + 1, 2 * 5]
    assert result.counts.tolist() == [0, 4, 1]
    assert result.output.tolist()[0] == [6.0, 0.0, 1.0]


def test_a_kink_that_is_there_twice(place: Place) -> None:
    assert ops.activation(place.to(torch.tensor([1.0, 2.0])), "hardtanh", (2, 2)).touches.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("kind", "parameters", "x", "output", "touches"),
    [
        ("leaky_relu", (0.5,), [-2.0, 0.0, 2.0], [-1.0, 0.0, 2.0], [1]),
        ("hardsigmoid", (), [-3.0, 0.0, 3.0, 9.0], [0.0, 0.5, 1.0, 1.0], [0, 5]),
        ("hardswish", (), [-3.0, 0.0, 3.0, 9.0], [0.0, 0.0, 3.0, 9.0], [0, 5]),
        ("threshold", (1.0,), [0.0, 1.0, 2.0], [1.0, 1.0, 2.0], [1]),
        ("clamp", (-1.0, INF), [-2.0, -1.0, 2.0], [-1.0, -1.0, 2.0], [1]),
        ("clamp", (-INF, 1.0), [-2.0, 1.0, 2.0], [-2.0, 1.0, 1.0], [1]),
        ("abs", (), [-2.0, -0.0, 0.0], [2.0, 0.0, 0.0], [1, 2]),
    ],
)
def test_literal(place: Place, kind: str, parameters: Any, x: list[float], output: Any, touches: Any) -> None:
    result = ops.activation(place.to(torch.tensor(x)), kind, parameters)
    assert torch.allclose(result.output.cpu(), torch.tensor(output), rtol=1e-7)
    assert result.touches.tolist() == touches


def test_kinks_are_rounded_to_the_dtype(place: Place) -> None:
    # 0.1 is no bfloat16: its neighbours are 0.099609375 and 0.10009765625, the nearer one
    x = torch.tensor([0.099609375, 0.10009765625], dtype=torch.bfloat16)
    assert ops.activation(place.to(x), "threshold", (0.1,)).touches.tolist() == [1]
    assert ops.touches(place.to(x), (-0.1, 0.1)).touches.tolist() == [3]


def test_the_table_of_activations_has_the_same_kinks() -> None:
    for rho in (
        activations.hardtanh(0.0, 6.0),
        activations.clamp(None, 2.0),
        activations.clamp(-1.0, None),
        activations.clamp(-1.0, 2.0),
        activations.magnitude(),
        activations.leaky_relu(0.1),
        activations.hardsigmoid(),
        activations.hardswish(),
        activations.threshold(0.5),
    ):
        assert ops.kinks(rho.name, rho.arguments) == rho.kinks
        x = torch.tensor([*rho.kinks, 9.0, -9.0])
        assert_same(ops.activation(x, rho.name, rho.arguments).output, rho.compute(x))


def test_prelu_has_a_slope_for_each_channel(place: Place) -> None:
    x = torch.tensor([[[-1.0, -2.0], [-1.0, 0.0]]])
    result = ops.prelu(place.to(x), place.to(torch.tensor([0.5, 3.0])))
    assert result.output.tolist() == [[[-0.5, -1.0], [-3.0, 0.0]]]
    assert result.touches.tolist() == [3]


def test_two_kinks_in_place_of_one_pass_each(place: Place) -> None:
    x = place.to(torch.tensor([3.0, -3.0, 0.0, 3.0]))
    assert ops.touches(x, (-3.0, 3.0)).touches.tolist() == [1, 2, 7]
    assert ops.touches(x, [3.0]).touches.tolist() == [0, 3]


# torch's bits


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize(("kind", "parameters"), CASES, ids=NAMES)
def test_values_are_torchs(place: Place, kind: str, parameters: tuple[float, ...], dtype: torch.dtype) -> None:
    x = values(dtype, reference.kinks(kind, parameters))
    if place.name == "kernels":
        x = x[:: 37 if dtype in HALVES else 5]
    result, expected = ops.activation(place.to(x), kind, parameters), reference.activation(x, kind, parameters)
    assert_same(result.output, stock(x, kind, parameters, place))
    assert_same(result.touches, expected.touches)
    assert_same(result.counts, expected.counts)


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize(("kind", "parameters"), CASES, ids=NAMES)
def test_gradient_is_torchs(place: Place, kind: str, parameters: tuple[float, ...], dtype: torch.dtype) -> None:
    if place.name == "kernels":
        pytest.skip("torch's own backward, which is not emulated")
    x = values(dtype, reference.kinks(kind, parameters))
    seed = torch.randn_like(x)
    seed[::9], seed[1::99], seed[2::99] = -0.0, INF, NAN
    gradients = []
    for function in (ops.activation, reference.activation):
        leaf = place.to(x.clone()).requires_grad_()
        gradients += torch.autograd.grad(function(leaf, kind, parameters).output, leaf, place.to(seed))
    assert_same(gradients[0], gradients[1].cpu())


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize(("kind", "parameters"), CASES, ids=NAMES)
def test_away_from_its_touches_the_derivative_is_not_in_doubt(
    kind: str, parameters: tuple[float, ...], dtype: torch.dtype
) -> None:
    """What torch compares with may not be rounded: still only at listed units it can err in the side of a kink."""
    kinks = [float(torch.tensor(k, dtype=torch.float64).to(dtype)) for k in reference.kinks(kind, parameters)]
    x = values(dtype, reference.kinks(kind, parameters))
    x = x[x.isfinite()].requires_grad_()
    result = reference.activation(x, kind, parameters)
    (g,) = torch.autograd.grad(result.output.sum(), x)
    piece = sum(x.detach().double() > kink for kink in kinks)
    listed = torch.zeros(x.shape, dtype=torch.bool)
    listed[ops.activation(x, kind, parameters).touches // len(kinks)] = True
    at_least = torch.finfo(dtype).eps
    for k in range(len(kinks) + 1):
        slopes = g[(piece == k) & ~listed]
        if kind == "hardswish" and k == 1:
            slopes = slopes.double() - (x[(piece == k) & ~listed].detach().double() / 3 + 0.5)
        assert slopes.numel() == 0 or not (slopes.amax() - slopes.amin()).abs() > 4 * at_least, (k, kinks)


def test_a_sixth_of_half_types_is_the_same_both_ways() -> None:
    # on the CPU torch divides, on CUDA it multiplies; so do the kernels, but for half types, on the CPU
    for dtype, kind in itertools.product(HALVES, ("hardsigmoid", "hardswish")):
        x = values(dtype)
        expected = reference.activation(x, kind).output
        assert_same(cases.on_cuda(x, kind, (), expected), expected)


def layouts(dtype: torch.dtype) -> Iterator[Tensor]:
    x = torch.randint(-4, 5, (2, 6, 9, 14)).to(dtype)
    x[x == -4] = -0.0
    x[0, 0, 3, 4], x[0, 1, 2], x[1, 1, 5:8, 4:9] = NAN, INF, -INF
    yield from (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x.transpose(0, 1), x[0], x[:0])
    yield from (x[:, ::2, :, 1:], x[:, :, :1].expand(2, 6, 7, 14), x.flatten()[3:], x.flatten(1), x[0, 0, 0, 0])
    yield from (x.permute(3, 1, 0, 2), x[:, :1], x[None].contiguous(memory_format=torch.channels_last_3d))


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_any_strides(place: Place, dtype: torch.dtype) -> None:
    for x, (kind, parameters) in itertools.product(layouts(dtype), (("hardtanh", (0.0, 3.0)), ("leaky_relu", (0.5,)))):
        result, expected = ops.activation(place.to(x), kind, parameters), reference.activation(x, kind, parameters)
        for actual, other in zip(result, expected, strict=True):
            assert_same(actual, other)
        for actual, other in zip(ops.touches(place.to(x), (-1, 2)), reference.touches(x, (-1, 2)), strict=True):
            assert_same(actual, other)


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_prelu_is_torchs(place: Place, dtype: torch.dtype) -> None:
    for x in layouts(dtype):
        for count in {1, x.shape[1] if x.dim() > 1 else 1}:
            weight = torch.linspace(-0.4, 1.7, count).to(dtype)
            for actual, other in zip(ops.prelu(*map(place.to, (x, weight))), reference.prelu(x, weight), strict=True):
                assert_same(actual, other)


@pytest.mark.parametrize("weight", [torch.tensor(0.3), torch.tensor([0.3]), torch.linspace(-0.4, 1.7, 6)])
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_prelu_gradients_are_torchs(place: Place, dtype: torch.dtype, weight: Tensor) -> None:
    if place.name == "kernels":
        pytest.skip("torch's own backward, which is not emulated")
    for x in layouts(dtype):
        if weight.numel() > 1 and (x.dim() < 2 or x.shape[1] != weight.numel()):
            continue
        leaves = [place.to(t.detach().clone().to(dtype)).requires_grad_() for t in (x, weight)]
        seed = place.to(torch.randn(x.shape, dtype=dtype))
        ours = torch.autograd.grad(ops.prelu(*leaves).output, leaves, seed)
        theirs = torch.autograd.grad(F.prelu(*leaves), leaves, seed)
        for actual, other in zip(ours, theirs, strict=True):
            assert_same(actual, other.cpu())


def test_long_lines_by_several_threads() -> None:
    x = torch.randint(-3, 4, (3, 37, 41, 43)).float()
    weight = torch.randn(37)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            ours = (*ops.activation(y, "hardtanh", (-1, 2)), *ops.prelu(y, weight))
            theirs = (*reference.activation(y, "hardtanh", (-1, 2)), *reference.prelu(y, weight))
            for actual, other in zip(ours, theirs, strict=True):
                assert_same(actual, other)


# lists of fixed room, and what torch asks of an operator; opcheck is in test_ops.py


def test_capacity_bounds_the_list(place: Place) -> None:
    x, weight = place.to(torch.randint(-3, 4, (4, 5, 9, 9)).float()), place.to(torch.ones(5))
    for run in (
        lambda room: ops.activation(x, "hardswish", (), room),
        lambda room: ops.prelu(x, weight, room),
        lambda room: ops.touches(x, (-1, 2), room),
    ):
        exact = run(None)
        found = int(exact.counts[1])
        assert found > 9
        for room in (0, 9, found, found + 5):
            with place.no_waits():
                result = run(room)
            assert len(result.touches) == room
            assert torch.equal(result.counts.cpu(), exact.counts.cpu())
            if room >= found:
                assert_same(result.touches[:found].sort().values, exact.touches.cpu())


def test_nothing_waits_for_a_gpu(place: Place) -> None:
    x = place.to(torch.randn(2, 5, 4)).requires_grad_()
    weight = place.to(torch.ones(5)).requires_grad_()
    with place.no_waits():
        for kind, count in ops.ACTIVATIONS.items():
            ops.activation(x, kind, (0.5, 2.0)[:count], 99).output.sum().backward()
        ops.prelu(x, weight, 99).output.sum().backward()


def test_bad_parameters(place: Place) -> None:
    x = place.to(torch.zeros(2, 3))
    for kind, parameters in (
        ("hardtanh", (1.0, 0.0)),
        ("hardtanh", (0.0,)),
        ("clamp", (-INF, INF)),
        ("leaky_relu", (NAN,)),
        ("threshold", (1e300,)),
        ("abs", (1.0,)),
    ):
        with pytest.raises(RuntimeError, match=r"activation|overflow"):
            ops.activation(x, kind, parameters)
    with pytest.raises(ValueError, match="softplus"):
        ops.activation(x, "softplus")
    for kinks in ((), (1.0, 0.0), (NAN,), (0.0, 1.0, 2.0)):
        with pytest.raises(RuntimeError, match="touches"):
            ops.touches(x, kinks)
    for weight in (torch.zeros(2), torch.zeros(3, dtype=torch.float64), torch.zeros(1, 3)):
        with pytest.raises(RuntimeError, match="prelu"):
            ops.prelu(x, place.to(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_is_torchs(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 3, 5).to(dtype).requires_grad_(), torch.randn(3).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kind, count in ops.ACTIVATIONS.items():
            parameters = (0.5, 2.0)[:count]
            assert_same(ops.activation(x, kind, parameters).output, reference.activation(x, kind, parameters).output)
        if dtype != torch.float64:
            assert_same(ops.prelu(x, weight).output, F.prelu(x, weight))
            assert ops.prelu(x, weight).output.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ops.ACTIVATIONS)
def test_derivatives_again_and_in_batches(kind: str) -> None:
    x = (torch.randn(2, 3, 4, dtype=torch.float64) * 3).requires_grad_()
    parameters = (-0.5, 2.0)[: ops.ACTIVATIONS[kind]]

    def f(x: Tensor) -> Tensor:
        return ops.activation(x, kind, parameters).output ** 3

    assert torch.autograd.gradcheck(f, (x,))
    if kind != "hardsigmoid":  # torch has no second derivative of it
        assert torch.autograd.gradgradcheck(f, (x,))
    y = ops.activation(x, kind, parameters).output
    seeds = torch.randn(5, *y.shape, dtype=y.dtype)
    (batched,) = torch.autograd.grad(y, x, seeds, retain_graph=True, is_grads_batched=True)
    for seed, g in zip(seeds, batched, strict=True):
        assert torch.equal(g, torch.autograd.grad(y, x, seed, retain_graph=True)[0])


def test_prelu_derivatives_again_and_in_batches() -> None:
    leaves = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)

    def f(x: Tensor, weight: Tensor) -> Tensor:
        return ops.prelu(x, weight).output ** 3

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    y = ops.prelu(*leaves).output
    seeds = torch.randn(5, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, leaves, seeds, retain_graph=True, is_grads_batched=True)
    for k, seed in enumerate(seeds):
        for all_of_them, g in zip(batched, torch.autograd.grad(y, leaves, seed, retain_graph=True), strict=True):
            assert torch.equal(all_of_them[k], g)
