"""Functions of balls and the table of derivatives: the exact value, by ball arithmetic, lies within the radius."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from flint import arb, ctx
from torch import Tensor
from torch.nn import functional as F

from adcert import enclosures
from adcert.balls import Ball, matmul, scattered
from adcert.layers import kind_of
from adcert.normalization import layer_eps
from adcert.vjp_attention import _from_logarithms, _from_results, softmax
from adcert.vjp_smooth import DERIVATIVES, power_slope


@pytest.fixture(autouse=True)
def _bits():
    held, ctx.prec = ctx.prec, 300
    yield
    ctx.prec = held


def far(ball: Ball, exact: list[arb]) -> list[tuple[int, float, float]]:
    """Entries whose exact value is not proved to lie within the radius."""
    radius = torch.zeros_like(ball.value) if ball.radius is None else ball.radius
    both = zip(ball.value.flatten().tolist(), radius.expand_as(ball.value).flatten().tolist(), exact, strict=True)
    return [
        (index, value, held)
        for index, (value, held, truth) in enumerate(both)
        if not (math.isinf(held) or bool(abs(arb(value) - truth) <= arb(held)))
    ]


POINTS = [0.0, 1e-300, -1e-12, 0.1, -0.3, 0.5, 1.0, -1.0, 1.7, -2.5, 3.0, -3.7, 5.5, -8.0, 11.0, -17.0, 23.5, -30.0,
          40.0, -90.0, 150.0, -400.0, 700.0, -745.0]  # fmt: skip
FUNCTIONS: dict[str, tuple[Callable[[Ball], Ball], Callable[[arb], arb]]] = {
    "exp": (enclosures.exp, lambda x: x.exp()),
    "sigmoid": (enclosures.sigmoid, lambda x: 1 / (1 + (-x).exp())),
    "logarithm": (enclosures.logarithm, lambda x: x.log()),
    "reciprocal": (enclosures.reciprocal, lambda x: 1 / x),
    "inverse_root": (enclosures.inverse_root, lambda x: 1 / x.sqrt()),
    "cube": (lambda a: enclosures.power(a, 3), lambda x: x**3),
    "fourth": (lambda a: a.divided(4), lambda x: x / 4),
    "third": (lambda a: a.divided(3), lambda x: x / 3),
}


@pytest.mark.parametrize("radius", [None, 0.0, 1e-9, 0.01])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_balls(name: str, radius: float | None) -> None:
    """At both ends of the argument's ball and in its middle."""
    function, exact = FUNCTIONS[name]
    only = [x for x in POINTS if name not in ("logarithm", "inverse_root", "reciprocal") or x > 0.02]
    value = torch.tensor(only, dtype=torch.float64)
    held = None if radius is None else torch.full_like(value, radius)
    found = function(Ball(value, held))
    for move in (0.0,) if radius is None else (0.0, radius, -radius):
        assert far(found, [exact(arb(x) + arb(move)) for x in only]) == []
    small = torch.tensor([abs(x) < 50 for x in only])
    if radius is None and found.radius is not None:
        assert bool((found.radius <= 1e-14 * (found.value.abs() + 1))[small].all())


def test_nothing_is_claimed_of_a_pole() -> None:
    a = Ball(torch.tensor([0.0, 1.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.7]).double())
    for function in (enclosures.reciprocal, enclosures.logarithm, enclosures.inverse_root):
        found = function(a)
        assert not bool(found.nonzero().any())
        assert not bool(found.zero().any())
    assert enclosures.reciprocal(Ball(torch.tensor([4.0, -0.25]).double())).radius is None


def test_minus_infinity_is_an_exact_zero() -> None:
    scores = torch.tensor([[0.0, -math.inf, 1.0]], dtype=torch.float64)
    found = softmax(Ball(scores, torch.tensor([[1e-16, 0.0, 1e-16]]).double()))
    assert found.zero().tolist() == [[False, True, False]]
    total = 1 + arb(1).exp()
    assert far(found, [1 / total, arb(0), arb(1).exp() / total]) == []


def test_products_of_balls_reach_their_corners() -> None:
    """(2 +- 1/2)(3 +- 1/4) + (1 +- 0)(-4 +- 1) reaches 2.5 * 3.25 - 3 = 5.125 and 1.5 * 2.75 - 5 = -0.875."""
    a = Ball(torch.tensor([[2.0, 1.0]]).double(), torch.tensor([[0.5, 0.0]]).double())
    b = Ball(torch.tensor([[3.0], [-4.0]]).double(), torch.tensor([[0.25], [1.0]]).double())
    found = matmul(a, b)
    assert found.value.item() == 2.0
    assert 3.125 <= found.radius.item() <= 3.125 * (1 + 1e-8)
    assert matmul(Ball(a.value), Ball(b.value)).radius is None


def test_scattered_sums() -> None:
    a = Ball(torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([[0.0, 0.5, 0.25]]).double())
    once = scattered(Ball(a.value), torch.tensor([1, -1, 0]), 3)
    assert once.value.tolist() == [[3.0, 1.0, 0.0]]
    assert once.radius is None
    twice = scattered(a, torch.tensor([1, 1, -1]), 2)
    assert twice.value.tolist() == [[0.0, 3.0]]
    assert 0.5 <= float(twice.radius[0, 1]) < 0.5000001
    tenth = scattered(Ball(torch.tensor([[0.1, 0.2]], dtype=torch.float64)), torch.tensor([0, 0]), 1)
    assert far(tenth, [arb(0.1) + arb(0.2)]) == []
    assert float(tenth.radius) > 0


# ---- derivatives -----------------------------------------------------------------------------------------------


def _sigmoid(x: arb) -> arb:
    return 1 / (1 + (-x).exp())


def _gelu(x: arb) -> arb:
    below = ((-x / arb(2).sqrt()).erfc()) / 2
    return below + x * (-x * x / 2).exp() / (2 * arb.pi()).sqrt()


def _tanh_gelu(x: arb) -> arb:
    root, cubic = (2 / arb.pi()).sqrt(), arb(0.044715)
    u = root * (x + cubic * x**3)
    return _sigmoid(2 * u) + x / (2 * u.cosh() ** 2) * root * (1 + 3 * cubic * x * x)


def _mish(x: arb) -> arb:
    t = (1 + x.exp()).log().tanh()
    return t + x * (1 - t * t) * _sigmoid(x)


SLOPES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[arb], arb]]] = {
    "tanh": (torch.tanh, lambda x: 1 - x.tanh() ** 2),
    "sigmoid": (torch.sigmoid, lambda x: _sigmoid(x) * (1 - _sigmoid(x))),
    "exp": (torch.exp, lambda x: x.exp()),
    "expm1": (torch.expm1, lambda x: x.exp()),
    "exp2": (torch.exp2, lambda x: (x * arb(2).log()).exp() * arb(2).log()),
    "sqrt": (torch.sqrt, lambda x: 1 / (2 * x.sqrt())),
    "rsqrt": (torch.rsqrt, lambda x: -1 / (2 * x * x.sqrt())),
    "reciprocal": (torch.reciprocal, lambda x: -1 / (x * x)),
    "tan": (torch.tan, lambda x: 1 + x.tan() ** 2),
    "log": (torch.log, lambda x: 1 / x),
    "log1p": (torch.log1p, lambda x: 1 / (1 + x)),
    "log2": (torch.log2, lambda x: 1 / (x * arb(2).log())),
    "log10": (torch.log10, lambda x: 1 / (x * arb(10).log())),
    "sin": (torch.sin, lambda x: x.cos()),
    "cos": (torch.cos, lambda x: -x.sin()),
    "atan": (torch.atan, lambda x: 1 / (1 + x * x)),
    "erf": (torch.erf, lambda x: 2 * (-x * x).exp() / arb.pi().sqrt()),
    "erfc": (torch.erfc, lambda x: -2 * (-x * x).exp() / arb.pi().sqrt()),
    "sinh": (torch.sinh, lambda x: x.cosh()),
    "cosh": (torch.cosh, lambda x: x.sinh()),
    "logsigmoid": (F.logsigmoid, lambda x: _sigmoid(-x)),
    "silu": (F.silu, lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x)))),
    "gelu": (F.gelu, _gelu),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), _tanh_gelu),
    "mish": (F.mish, _mish),
    "softplus": (lambda x: F.softplus(x, 2.0, 15.0), lambda x: _sigmoid(2 * x) if 2 * x < 15 else arb(1)),
    "elu": (lambda x: F.elu(x, 1.5), lambda x: arb(1) if x > 0 else 1.5 * x.exp()),
    "selu": (F.selu, lambda x: arb(_SCALE) if x > 0 else arb(_SCALE) * arb(_ALPHA) * x.exp()),
    "celu": (lambda x: F.celu(x, 3.0), lambda x: arb(1) if x > 0 else (x / 3).exp()),
}
_ALPHA, _SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
_ABOVE_ZERO = ("sqrt", "rsqrt", "reciprocal", "log", "log2", "log10")
_POLE = {"elu": 0.0, "log1p": -1.0}


def _data(name: str, dtype: torch.dtype) -> list[float]:
    generator = torch.Generator().manual_seed(len(name))
    x = torch.cat([torch.randn(150, generator=generator) * 3, torch.randn(40, generator=generator) * 0.01,
                   torch.randn(30, generator=generator) * 30, torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])])  # fmt: skip
    x = x.to(dtype)
    if name in _ABOVE_ZERO or name == "log1p":
        x = x.abs() + torch.tensor(1e-3, dtype=dtype)
    if name == "sin" or name == "cos":
        x = torch.cat([x, torch.tensor([1e5, -12345.678], dtype=dtype)])
    return x.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SLOPES)
def test_derivatives_lie_within_their_radii(name: str, dtype: torch.dtype) -> None:
    """Of the function at the recorded input, whether the node keeps that or its rounded result."""
    function, slope = SLOPES[name]
    entries = [x for x in _data(name, dtype) if _POLE.get(name) != x]
    x = torch.tensor(entries, dtype=dtype, requires_grad=True)
    node = function(x).grad_fn
    saved = lambda key: getattr(node, f"_saved_{key}").detach()  # noqa: E731
    found = DERIVATIVES[kind_of(node)](node, saved)
    found = Ball(found.value.expand(x.shape), None if found.radius is None else found.radius.expand(x.shape))
    assert far(found, [slope(arb(entry)) for entry in entries]) == []
    if dtype is torch.float64:
        moderate = torch.tensor([abs(entry) < 20 for entry in entries])
        assert float((found.radius / (1 + found.value.abs()))[moderate].max()) < 1e-13


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 5.0, -1.0, -3.0, 0.5, 1.7, -0.1, 20.0, 1e-3])
def test_slopes_of_powers(exponent: float) -> None:
    entries = [1e-3, 0.3, 1.0, 2.5, 700.0] + ([-2.0, -0.7] if exponent.is_integer() and abs(exponent) < 16 else [])
    found = power_slope(Ball(torch.tensor(entries, dtype=torch.float64)), exponent)
    n = arb(exponent)
    whole = exponent.is_integer()
    exact = [n * (arb(x) ** int(exponent - 1) if whole else (arb(x).log() * (n - 1)).exp()) for x in entries]
    assert far(found, exact) == []


def test_what_every_16_bit_number_gives() -> None:
    """All finite bfloat16 and float16 inputs: the float64 value lies within the radius of the 16-bit one."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype)
        x = x[torch.isfinite(x)]
        for function, domain in ((torch.tanh, x), (torch.sigmoid, x), (torch.exp, x), (torch.expm1, x), (torch.exp2, x),
                                 (torch.sqrt, x[x > 0]), (torch.rsqrt, x[x > 0]),
                                 (torch.reciprocal, x[x != 0])):  # fmt: skip
            found, truth = function(domain), function(domain.double())
            finite = torch.isfinite(found)
            ball = enclosures.computed(found[finite])
            assert bool(((ball.value - truth[finite]).abs() <= ball.radius).all()), (function.__name__, dtype)


def test_what_many_float32_numbers_give() -> None:
    x = torch.arange(-(1 << 31), 1 << 31, 6151, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = x[torch.isfinite(x)]
    for function, domain in ((torch.tanh, x), (torch.sigmoid, x), (torch.exp, x), (torch.expm1, x), (torch.exp2, x),
                             (torch.sqrt, x[x > 0]), (torch.rsqrt, x[x > 0]), (torch.reciprocal, x[x != 0]),
                             (torch.tan, x[x.abs() < 1e4])):  # fmt: skip
        found, truth = function(domain), function(domain.double())
        finite = torch.isfinite(found)
        ball = enclosures.computed(found[finite])
        assert bool(((ball.value - truth[finite]).abs() <= ball.radius).all()), function.__name__


# ---- softmax and normalisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("length", [2, 17, 300])
def test_probabilities_lie_within_their_radii(dtype: torch.dtype, spread: float, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x = (torch.randn(length, generator=generator) * spread).to(dtype)
    weights = [arb(entry).exp() for entry in x.tolist()]
    total = sum(weights, arb(0))
    exact = [weight / total for weight in weights]
    for table, dim in ((x[None], 1), (x[:, None].expand(-1, 3), 0)):  # the last dimension and another one
        for function, read in ((torch.softmax, _from_results), (torch.log_softmax, _from_logarithms)):
            found = function(table, dim)
            ball = read(found[0] if dim else found[:, 1], length)
            assert far(ball, exact) == []
            if dtype is torch.float64:
                assert float(ball.radius.max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-5, 1e-12, 0.0, 0.3, 1e-3])
def test_the_eps_of_a_layer_normalisation_is_found(dtype: torch.dtype, eps: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for shape, weighted in (((5, 33), True), ((5, 33), False), ((1, 8), True)):
        x = (torch.randn(shape, generator=generator) * 0.5 + 2).to(dtype).requires_grad_()
        weight = torch.ones(shape[1:], dtype=dtype) if weighted else None
        node = F.layer_norm(x, shape[1:], weight, None, eps).grad_fn
        found = layer_eps(node)
        assert abs(float(found.value) - eps) <= float(found.radius)
        width = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.05}[dtype]
        assert float(found.radius) <= width * (1 + eps)
