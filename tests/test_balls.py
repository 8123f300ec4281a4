"""Balls: the exact result, in Fractions, lies within the radius; "exact" means exact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adcert import balls
from adcert.balls import Ball, exact_additions, exact_linear, exact_products, exact_sum, gamma, linear, quantum

DENORMAL = 5e-324


def f64(*values: object) -> Tensor:
    return torch.tensor(*values, dtype=torch.float64)


def interval(ball: Ball, index: tuple[int, ...]) -> tuple[Fraction, Fraction] | None:
    """The exact interval of an entry; None if the radius bounds nothing (overflow)."""
    value = float(ball.value[index])
    radius = 0.0 if ball.radius is None else float(ball.radius[index])
    if not math.isfinite(radius):
        return None
    assert math.isfinite(value)
    return Fraction(value) - Fraction(radius), Fraction(value) + Fraction(radius)


def contains(ball: Ball, index: tuple[int, ...], exact: Fraction) -> bool:
    held = interval(ball, index)
    return held is None or held[0] <= exact <= held[1]


def ends(ball: Ball, index: tuple[int, ...]) -> tuple[Fraction, Fraction]:
    held = interval(ball, index)
    assert held is not None
    return held


# ---- literal cases -------------------------------------------------------------------------------


def test_a_rounded_sum_is_covered_and_an_exact_one_has_no_radius():
    one, half_ulp = Ball(f64([1.0])), Ball(f64([2.0**-53]))
    rounded = one + half_ulp  # the tie goes to even: the float64 sum is 1
    assert rounded.value.item() == 1.0
    assert rounded.radius is not None
    assert rounded.radius.item() >= 2.0**-53
    exact = one + Ball(f64([2.0**-50]))
    assert exact.radius is None
    assert Fraction(exact.value.item()) == 1 + Fraction(2) ** -50


def test_a_rounded_product_is_covered_and_an_exact_one_has_no_radius():
    x = 1.0 + 2.0**-52
    rounded = Ball(f64([x])) * Ball(f64([x]))
    assert rounded.radius is not None
    assert contains(rounded, (0,), Fraction(x) ** 2)
    assert Fraction(rounded.value.item()) != Fraction(x) ** 2
    assert (Ball(f64([3.0])) * Ball(f64([-5.0]))).radius is None


def test_radii_of_a_product_by_hand():
    """(2 +- 1/2)(3 +- 1/4) reaches 2.5 * 3.25 = 8.125, that is 6 + 2.125 = 6 + 3/2 + 1/2 + 1/8."""
    product = Ball(f64([2.0]), f64([0.5])) * Ball(f64([3.0]), f64([0.25]))
    assert product.value.item() == 6.0
    assert 2.125 <= product.radius.item() <= 2.125 * (1 + 2e-9)


def test_difference_and_negation_keep_radii():
    a, b = Ball(f64([1.0]), f64([0.25])), Ball(f64([1.0]), f64([0.5]))
    difference = a - b
    assert difference.value.item() == 0.0
    assert 0.75 <= difference.radius.item() <= 0.75 * (1 + 2e-9)
    assert not bool(difference.zero())
    assert not bool(difference.nonzero())
    assert (-a).value.item() == -1.0
    assert (-a).radius.item() == 0.25
    assert (a - Ball(f64([1.0]))).radius.item() >= 0.25


def test_sum_by_hand():
    """2^53 + 1 + 1 rounds for some orders of summation; 1 + 2 + 3 does not."""
    assert Ball(f64([1.0, 2.0, 3.0])).sum((0,)).radius is None
    long = Ball(f64([2.0**53, 1.0, 1.0, -(2.0**53)])).sum((0,))
    assert long.radius is not None
    assert contains(long, (), Fraction(2))
    table = Ball(f64([[1.0, 2.0], [3.0, 4.0]]), f64([[0.5, 0.0], [0.25, 0.0]])).sum((0,), keepdim=True)
    assert table.value.tolist() == [[4.0, 6.0]]
    assert 0.75 <= table.radius[0, 0].item() <= 0.75 * (1 + 2e-9)
    assert table.radius[0, 1].item() == 0.0


def test_sum_over_no_dimension_changes_nothing():
    ball = Ball(f64([1.0, 2.0, 4.0]))
    assert ball.sum(()).value.tolist() == [1.0, 2.0, 4.0]


def test_zero_and_nonzero_are_proofs():
    ball = Ball(f64([0.0, 0.0, 1.0, 1.0, -1.0, -1.0]), f64([0.0, 0.5, 1.0, 0.5, 0.0, 2.0]))
    assert ball.zero().tolist() == [True, False, False, False, False, False]
    assert ball.nonzero().tolist() == [False, False, False, True, True, False]
    assert Ball(f64([0.0, -0.0, DENORMAL])).zero().tolist() == [True, True, False]
    assert Ball(f64([0.0, -0.0, DENORMAL])).nonzero().tolist() == [False, False, True]


def test_a_radius_that_overflows_or_is_nan_proves_nothing():
    huge = Ball(f64([1e308])) + Ball(f64([1e308]))
    assert not bool(huge.nonzero()) or math.isinf(huge.value.item())
    assert not bool((huge - huge).zero())
    assert not bool((huge - huge).nonzero())
    product = Ball(f64([1e200])) * Ball(f64([1e200]))
    assert not bool((product - product).zero())
    assert not bool((product * Ball(f64([0.0]))).nonzero())


@pytest.mark.parametrize(
    ("entries", "exponent"),
    [
        ([1.0], 0),
        ([0.0, -0.0], None),
        ([], None),
        ([6.0, -4.0], 1),
        ([0.75, 8.0], -2),
        ([-(2.0**53) + 1], 0),
        ([2.0**1023], 1023),
        ([1.7976931348623157e308], 971),
        ([2.0**-1022], -1022),
        ([DENORMAL], -1074),
        ([3 * DENORMAL, 1.0], -1074),
        ([12 * DENORMAL], -1072),
        ([2.0**-1022 + DENORMAL], -1074),
        ([0.1], -55),
    ],
)
def test_quantum_by_hand(entries: list[float], exponent: int | None):
    assert quantum(f64(entries)) == exponent


def test_quantum_of_lower_precisions_is_that_of_the_same_numbers():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([0.1, 3.5], dtype=dtype)
        assert quantum(x.to(torch.float64)) == quantum(f64([float(v) for v in x]))


def test_exact_linear_by_hand():
    small, big = f64([1.0, -2.0]), f64([2.0**52, 1.0])
    assert exact_linear(small, f64([3.0]), f64([9.0]))
    assert not exact_linear(small, big, f64([2.0**53 + 2]))
    assert not exact_linear(f64([2.0**-600]), f64([2.0**-600]), f64([0.0]))  # underflows to 0
    assert exact_linear(f64([0.0]), f64([0.1]), f64([0.0]))
    assert exact_linear(f64([1.0]), f64([1.0]), f64([]))


def test_an_underflowing_product_is_not_called_zero():
    """2^-600 squared is 2^-1200, not 0."""
    tiny = Ball(f64([2.0**-600]))
    product = tiny * tiny
    assert product.value.item() == 0.0
    assert not bool(product.zero())
    assert not bool(product.nonzero())
    assert contains(product, (0,), Fraction(2) ** -1200)
    line = linear(lambda t, w: t * w, tiny, f64([2.0**-600]), 1)
    assert contains(line, (0,), Fraction(2) ** -1200)
    assert not bool(line.zero())


def test_zero_times_anything_stays_exactly_zero():
    rough = Ball(f64([1e-300, 5.0]), f64([1e-310, 0.1]))
    assert (Ball(f64([0.0, 0.0])) * rough).zero().tolist() == [True, True]
    assert linear(lambda t, w: t * w, Ball(f64([0.0, 0.0])), f64([0.1, 1e-300]), 1).zero().tolist() == [True, True]


def test_a_tiny_radius_does_not_vanish_in_a_linear_map():
    """A number within 1e-290 of 0, times a float32 denormal 1e-40, need not be 0."""
    rough = Ball(f64([0.0]), f64([1e-290]))
    through = linear(lambda t, w: t * w, rough, f64([1e-40]), 1)
    assert not bool(through.zero())
    assert contains(through, (0,), Fraction(1e-290) * Fraction(1e-40))
    assert not bool((rough * Ball(f64([1e-40]))).zero())


def test_gamma_bounds_a_worst_case_sum():
    assert gamma(1) >= 2.0**-53
    assert gamma(1000) >= 1000 * 2.0**-53
    assert gamma(10) < gamma(11)


def test_empty_balls():
    empty = Ball(torch.zeros(0, 3, dtype=torch.float64))
    assert (empty + empty).value.shape == (0, 3)
    assert (empty * empty).zero().shape == (0, 3)
    assert empty.sum((1,)).value.shape == (0,)
    assert empty.sum((0,)).value.tolist() == [0.0, 0.0, 0.0]
    assert (empty + Ball(f64([1.0, 2.0, 3.0]))).value.shape == (0, 3)


def test_map_moves_value_and_radius_together():
    ball = Ball(f64([1.0, 2.0]), f64([0.0, 0.5])).map(lambda t: t.flip(0))
    assert ball.value.tolist() == [2.0, 1.0]
    assert ball.radius.tolist() == [0.5, 0.0]
    assert Ball(f64([1.0])).map(torch.neg).radius is None


# ---- properties ----------------------------------------------------------------------------------

LITERALS = [0.0, -0.0, 1.0, -1.0, 0.1, 3.0, 1 / 3, 2.0**53, 2.0**53 - 1, -(2.0**-53), 1e-290, 1e-300, 2.0**-1022,
            DENORMAL, -3 * DENORMAL, 1e300, -1.7976931348623157e308, 2.0**-540, 1e16, 2.0**900]  # fmt: skip
NUMBERS = st.one_of(
    st.sampled_from(LITERALS),
    st.integers(-8, 8).map(float),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-1, 1),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
RADII = st.one_of(st.just(0.0), st.sampled_from([DENORMAL, 1e-300, 1e-290, 2.0**-53, 0.5, 1e10]), st.floats(0, 1))


@st.composite
def a_ball(draw: st.DrawFn, size: int, numbers: st.SearchStrategy[float] = NUMBERS) -> Ball:
    value = f64(draw(st.lists(numbers, min_size=size, max_size=size)))
    if draw(st.booleans()):
        return Ball(value)
    return Ball(value, f64(draw(st.lists(RADII, min_size=size, max_size=size))))


OPERATIONS = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}


@pytest.mark.parametrize("name", OPERATIONS)
@given(data=st.data())
def test_elementwise_operations_contain_every_exact_result(name: str, data: st.DataObject):
    size = data.draw(st.integers(1, 4))
    a, b = data.draw(a_ball(size)), data.draw(a_ball(size))
    operation: Callable = OPERATIONS[name]
    result = operation(a, b)
    for k in range(size):  # add, sub and mul take their extremes at the ends
        for x, y in itertools.product(ends(a, (k,)), ends(b, (k,))):
            assert contains(result, (k,), operation(x, y)), (name, a, b, k)


@pytest.mark.parametrize("name", OPERATIONS)
@given(data=st.data())
def test_elementwise_operations_broadcast(name: str, data: st.DataObject):
    a, b = data.draw(a_ball(2)), data.draw(a_ball(3))
    wide = Ball(a.value[:, None], None if a.radius is None else a.radius[:, None])
    operation: Callable = OPERATIONS[name]
    result = operation(wide, b)
    assert result.value.shape == (2, 3)
    assert result.radius is None or result.radius.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        for x, y in itertools.product(ends(a, (i,)), ends(b, (j,))):
            assert contains(result, (i, j), operation(x, y))


@pytest.mark.parametrize("name", OPERATIONS)
@given(a=st.lists(NUMBERS, min_size=1, max_size=4), b=st.lists(NUMBERS, min_size=1, max_size=4))
def test_no_radius_means_no_rounding(name: str, a: list[float], b: list[float]):
    size = min(len(a), len(b))
    operation: Callable = OPERATIONS[name]
    result = operation(Ball(f64(a[:size])), Ball(f64(b[:size])))
    for k in range(size):
        if result.radius is None or result.radius[k] == 0:
            assert Fraction(result.value[k].item()) == operation(Fraction(a[k]), Fraction(b[k]))


@given(data=st.data())
def test_sums_contain_every_exact_sum(data: st.DataObject):
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    flat = data.draw(a_ball(rows * columns))
    ball = flat.map(lambda t: t.reshape(rows, columns))
    cells = [[ends(flat, (i * columns + j,)) for j in range(columns)] for i in range(rows)]
    by_row, everything = ball.sum((1,)), ball.sum((0, 1), keepdim=True)
    for side in (0, 1):
        totals = [sum((cell[side] for cell in row), Fraction(0)) for row in cells]
        assert all(contains(by_row, (i,), total) for i, total in enumerate(totals))
        assert contains(everything, (0, 0), sum(totals, Fraction(0)))
    if by_row.radius is None:
        assert flat.radius is None
        assert [Fraction(v) for v in by_row.value.tolist()] == [
            sum((cell[0] for cell in row), Fraction(0)) for row in cells
        ]


@given(data=st.data())
def test_linear_maps_contain_every_exact_result(data: st.DataObject):
    """A matrix-vector product: the extremes are at x_k = value_k +- radius_k sign(w_k)."""
    inner, outer = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    x = data.draw(a_ball(inner))
    weight = f64([data.draw(st.lists(NUMBERS, min_size=inner, max_size=inner)) for _ in range(outer)])
    result = linear(lambda t, w: w @ t, x, weight, inner)
    for i in range(outer):
        for side in (0, 1):
            exact = Fraction(0)
            for k in range(inner):
                w = Fraction(weight[i, k].item())
                exact += w * ends(x, (k,))[side if w > 0 else 1 - side]
            assert contains(result, (i,), exact), (x, weight, result)
        if result.radius is None:
            pairs = zip(weight[i].tolist(), x.value.tolist(), strict=True)
            assert Fraction(result.value[i].item()) == sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))


@given(st.lists(NUMBERS, max_size=5))
def test_quantum_divides_and_is_the_largest(entries: list[float]):
    exponent = quantum(f64(entries))
    whole = [Fraction(v) for v in entries if v != 0]
    if exponent is None:
        assert not whole
        return
    quotients = [v / Fraction(2) ** exponent for v in whole]
    assert all(q.denominator == 1 for q in quotients)
    assert any(q.numerator % 2 for q in quotients)


@given(st.lists(NUMBERS, min_size=1, max_size=4), st.lists(NUMBERS, min_size=1, max_size=4))
def test_exactness_claims_are_true(a: list[float], b: list[float]):
    size = min(len(a), len(b))
    x, y = f64(a[:size]), f64(b[:size])
    rows = list(zip(x.tolist(), y.tolist(), strict=True))
    if exact_products(x, y):
        assert [Fraction(v) for v in (x * y).tolist()] == [Fraction(p) * Fraction(q) for p, q in rows]
    if exact_additions(x, y):
        assert [Fraction(v) for v in (x + y).tolist()] == [Fraction(p) + Fraction(q) for p, q in rows]
    if exact_sum(x, x.abs().sum()):
        total = sum((Fraction(p) for p in x.tolist()), Fraction(0))
        for order in itertools.permutations(x.tolist()):
            running = 0.0
            for v in order:
                running += v
            assert Fraction(running) == total
    if exact_linear(x, y, (x.abs() * y.abs()).sum()):
        assert Fraction((x @ y).item()) == sum((Fraction(p) * Fraction(q) for p, q in rows), Fraction(0))


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=6), st.integers(-30, 30))
def test_integers_at_any_scale_stay_exact(entries: list[int], scale: int):
    """What the engine lives on: with small integer data nothing has a radius."""
    ball = Ball(f64([math.ldexp(float(v), scale) for v in entries]))
    assert (ball + ball).radius is None
    assert (ball * ball).radius is None
    assert ball.sum((0,)).radius is None
    assert linear(lambda t, w: t @ w, ball, ball.value, len(entries)).radius is None


def test_exactness_is_not_claimed_above_the_size_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(balls, "_LARGE", 2)
    three = f64([1.0, 2.0, 3.0])
    assert not exact_additions(three, three)
    assert not exact_sum(three, three.sum())
    assert not exact_products(three, three)
    big = Ball(three) * Ball(three)
    assert big.radius is not None
    assert all(contains(big, (k,), Fraction(k + 1) ** 2) for k in range(3))
