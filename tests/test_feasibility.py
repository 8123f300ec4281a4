"""Decisions of A p > 0: answers by hand first, an independent exact solver second, planted systems third."""

from __future__ import annotations

import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import highspy
import numpy as np
import pytest
from degenerate import case
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import fourier_motzkin, integers, planted

from adcert import _highs, minnorm, search
from adcert.errors import AdcertError
from adcert.exact import System, decode, integer_rows, relation
from adcert.feasibility import Decision, Proof, check_direction, check_proof, decide
from adcert.minnorm import minimum_norm
from adcert.scaling import distinct_lines
from adcert.signs import exact_sign, exact_values, first_failure, signs

TINY = 5e-324
HUGE = 1.7976931348623157e308

LITERAL: list[tuple[str, list[list[float]], bool]] = [
    ("one row", [[1.0]], True),
    ("one negative row", [[-3.0]], True),
    ("zero row", [[0.0]], False),
    ("minus zero row", [[-0.0, 0.0]], False),
    ("opposite rows: a column without zeros is not enough", [[1.0], [-1.0]], False),
    ("opposite multiples", [[1.0, 2.0], [-3.0, -6.0]], False),
    ("opposite but for one unit in the last place", [[1.0, 1.0], [-1.0, -1.0000000000000002]], True),
    ("zero row that is not the first", [[1.0, 0.0], [0.0, 0.0]], False),
    ("the first row is not the zero row", [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], False),
    ("tiny entry", [[1e-30]], True),
    ("subnormal entry", [[TINY]], True),
    ("subnormal opposite", [[TINY], [-TINY]], False),
    ("largest and smallest", [[HUGE], [TINY]], True),
    ("largest against smallest", [[HUGE], [-TINY]], False),
    ("huge and tiny columns", [[HUGE, TINY], [-HUGE, TINY]], True),
    ("triangle around the origin", [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], False),
    ("triangle beside the origin", [[1.0, 0.0], [0.0, 1.0], [-1.0, 2.0]], True),
    ("half plane boundary", [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], False),
    ("simplex with irrational looking weights", [[0.1, 0.2], [-0.1, 0.3], [0.0, -0.7]], False),
    ("0.1 + 0.2 is not 0.3", [[0.1, 1.0, 0.0], [0.2, 0.0, 1.0], [-0.3, -1.0, -1.0]], True),
    ("0.5 + 0.25 is 0.75", [[0.5, 1.0, 0.0], [0.25, 0.0, 1.0], [-0.75, -1.0, -1.0]], False),
    ("weights that no float holds", [[0.1, 1.0], [0.2, -1.0], [-0.3, 0.0]], False),
    (
        "sphere points with the origin inside",
        [[1.0, 1.0, 1.0], [-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, -1.0]],
        False,
    ),
]


@pytest.mark.parametrize(("name", "rows", "nonempty"), LITERAL, ids=[case[0] for case in LITERAL])
def test_answers_by_hand(name: str, rows: list[list[float]], nonempty: bool) -> None:
    decision = decide(rows)
    assert decision.nonempty is nonempty
    assert_sound(np.array(rows), decision)


def assert_sound(
    rows: np.ndarray[Any, Any],
    decision: Decision,
    minus: np.ndarray[Any, Any] | None = None,
    radius: Any = None,
) -> None:
    """The answer's evidence, recomputed with fractions."""
    second = np.zeros_like(rows) if minus is None else minus
    exact = [
        [Fraction(float(x)) - Fraction(float(y)) for x, y in zip(r, s, strict=True)]
        for r, s in zip(rows, second, strict=True)
    ]
    slack = np.zeros(rows.shape) if radius is None else np.abs(radius)
    if decision.nonempty is True:
        assert decision.proof is None
        p = decision.direction
        assert p is not None
        assert len(p) == rows.shape[1]
        assert all(type(x) is int for x in p)
        for row, wide in zip(exact, slack, strict=True):
            value = sum(a * x for a, x in zip(row, p, strict=True))
            assert value > sum(Fraction(float(r)) * abs(x) for r, x in zip(wide, p, strict=True))
    elif decision.nonempty is False:
        assert decision.direction is None
        assert decision.proof is not None
        proof = decision.proof
        assert proof.weights
        assert len(proof.rows) == len(set(proof.rows)) == len(proof.weights)
        assert all(type(w) is int and w > 0 for w in proof.weights)
        assert not any(slack[k].any() for k in proof.rows)
        for j in range(rows.shape[1]):
            assert sum(w * exact[k][j] for k, w in zip(proof.rows, proof.weights, strict=True)) == 0
    else:
        assert decision.direction is None
        assert decision.proof is None
        assert decision.reason


def test_no_rows_and_no_columns() -> None:
    assert decide(np.zeros((0, 3))) == Decision(True, (0, 0, 0), None, "no rows")
    assert decide(np.zeros((0, 0))).nonempty is True
    assert decide(np.zeros((2, 0))).proof == Proof((0,), (1,))


def test_stages_are_named() -> None:
    assert decide([[2.0, -1.0]]).reason == "single row"
    assert decide([[2.0, -1.0], [1.0, 1.0]]).reason == "column"
    assert decide([[2.0], [0.0]]).reason == "zero row"
    assert decide([[2.0, 1.0], [-4.0, -2.0], [0.0, 1.0]]).reason == "opposite rows"
    assert decide([[1.0, -1.0], [-1.0, 2.0]], warm=(3, 2)) == Decision(True, (3, 2), None, "warm direction")


def test_warm_direction_is_only_a_guess() -> None:
    rows = [[1.0, -1.0], [-1.0, 2.0]]
    for warm in ((1, 1), (-3, -2), (0, 0), (1,), (0.5, 0.3), (math.nan, 1.0), (10**400, 1)):
        decision = decide(rows, warm=warm)
        assert decision.nonempty is True
        assert_sound(np.array(rows), decision)
    assert decide([[1.0], [-1.0]], warm=(1,)).nonempty is False


def test_difference_is_never_rounded() -> None:
    # 1 + 2^-60 does not fit a float64; with the second term it is exact.
    a = np.array([[1.0, 1.0], [-1.0, -1.0]])
    minus = np.array([[0.0, -(2.0**-60)], [0.0, 0.0]])
    assert decide(a).nonempty is False
    decision = decide(a, minus)
    assert decision.nonempty is True
    assert_sound(a, decision, minus)
    assert check_direction(a, (-1, 1), minus) is False
    # The rounded rows would be opposite; the true ones are not, and the proof must not pass.
    assert check_proof(a, Proof((0, 1), (1, 1)), minus) is False


def test_difference_that_overflows() -> None:
    a, minus = np.array([[HUGE, 1.0], [-HUGE, 1.0]]), np.array([[-HUGE, 0.0], [HUGE, 0.0]])
    decision = decide(a, minus)
    assert decision.nonempty is True
    assert_sound(a, decision, minus)
    empty = decide(a, np.array([[-HUGE, 1.0], [HUGE, 1.0]]))
    assert empty.proof == Proof((0, 1), (1, 1))


def test_row_whose_floating_point_value_is_not_a_number_is_checked_exactly() -> None:
    # The difference overflows to infinity, and infinity times 0 is NaN: <row, (0, -1)> is -1 all the same.
    a, minus = [[HUGE, 1.0]], [[-HUGE, 0.0]]
    assert check_direction(a, (0, -1), minus) is False
    assert check_direction(a, (0, 1), minus) is True
    assert signs(System.read(a, minus), (0, -1)).tolist() == [-1]


def test_equal_terms_make_a_zero_row_and_nearly_equal_ones_do_not() -> None:
    a = np.array([[1e-310, 3.0]])
    assert decide(a, a.copy()).reason == "zero row"
    near = decide(a, np.array([[1e-310 - TINY, 3.0]]))
    assert near.nonempty is True


def test_radius_certifies_only_with_margin() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0]])
    wide = np.full((2, 2), 0.25)
    decision = decide(rows, radius=wide)
    assert decision.nonempty is True
    assert_sound(rows, decision, radius=wide)
    assert decide(rows, radius=np.full((2, 2), 0.75)).nonempty is None
    # <a, p> = <r, |p|> exactly: the true row may be zero along p.
    assert decide([[1.0]], radius=[[1.0]]).nonempty is None
    assert check_direction([[1.0]], (1,), radius=[[1.0]]) is False
    assert check_direction([[1.0]], (1,), radius=[[-0.9999999999999999]]) is True


def test_rounded_rows_never_prove_emptiness() -> None:
    rows = [[1.0], [-1.0]]
    assert decide(rows, radius=[[0.0], [1e-300]]).nonempty is None
    assert decide([[0.0]], radius=[[1e-300]]).nonempty is None
    assert check_proof(rows, Proof((0, 1), (1, 1)), radius=[[0.0], [1e-300]]) is False
    # The rows without a radius may.
    decision = decide([[1.0], [5.0], [-2.0]], radius=[[0.0], [9.0], [0.0]])
    assert decision.proof == Proof((0, 2), (2, 1))


def test_check_direction_rejects_anything_else() -> None:
    rows = [[1.0, 0.0], [0.0, 1.0]]
    assert check_direction(rows, (1, 1))
    for bad in ((1, 0), (1, -1), (0, 0), (1,), (1, 1, 1), (1.0, 1.0), (True, True), (), ("1", "1")):
        assert check_direction(rows, bad) is False  # type: ignore[arg-type]


def test_check_proof_rejects_anything_else() -> None:
    rows = [[1.0, 2.0], [-2.0, -4.0], [1.0, 0.0]]
    assert check_proof(rows, Proof((0, 1), (2, 1)))
    bad = [
        Proof((0, 1), (1, 1)),
        Proof((0, 1), (4, 3)),
        Proof((), ()),
        Proof((0, 1), (2,)),
        Proof((0, 1), (0, 0)),
        Proof((0, 1), (-2, -1)),
        Proof((0, 1, 2), (2, 1, 0)),
        Proof((0, -2), (2, 1)),
        Proof((0, 3), (2, 1)),
        Proof((0, 0, 1), (1, 1, 1)),
        Proof((0, 1), (2.0, 1.0)),
        Proof((0.0, 1), (2, 1)),
        Proof((0, 1), (True, True)),  # type: ignore[arg-type]
    ]
    for proof in bad:
        assert check_proof(rows, proof) is False


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_entries_are_refused(bad: float) -> None:
    for arguments in (([[1.0, bad]],), ([[1.0, 1.0]], [[bad, 0.0]]), ([[1.0, 1.0]], None, [[0.0, bad]])):
        with pytest.raises(AdcertError, match="row 0"):
            decide(*arguments)
        with pytest.raises(AdcertError):
            check_direction(arguments[0], (1, 1), *arguments[1:])
        with pytest.raises(AdcertError):
            check_proof(arguments[0], Proof((0,), (1,)), *arguments[1:])


def test_bad_shapes_and_dtypes_are_refused() -> None:
    for arguments in (
        ([1.0, 2.0],),
        ([[1.0]], [[1.0, 2.0]]),
        ([[1.0]], None, [1.0]),
        ([["a"]],),
        ([[2**60 + 1]],),
    ):
        with pytest.raises(AdcertError):
            decide(*arguments)


def test_torch_tensors_and_integers_are_read() -> None:
    torch = pytest.importorskip("torch")
    assert decide(torch.tensor([[1.0], [-1.0]])).nonempty is False
    assert decide([[1, 0], [-1, 2]]).nonempty is True
    with pytest.raises(AdcertError):
        decide(torch.zeros(1, 1, dtype=torch.bfloat16))


def test_flushed_subnormals_are_refused() -> None:
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(AdcertError, match="flush"):
            decide([[1.0]])
    finally:
        torch.set_flush_denormal(False)


def test_near_cancellation_is_decided_exactly() -> None:
    # <row, p> = 2^29 * 2^-24 - 2^5 + tiny: far below the float64 error bound of its terms.
    system = System.read([[2.0**29, -(2.0**29), TINY], [1.0, -1.0, 0.0]])
    assert signs(system, (2**28, 2**28, 1)).tolist() == [1, 0]
    assert first_failure(system, (2**28, 2**28, 1)) == 1
    assert exact_sign(system, 0, (2**28, 2**28, -1)) == -1
    assert signs(system, (2**2000, 2**2000, 1)).tolist() == [1, 0]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6))
def test_decode_is_exact(values: list[float]) -> None:
    mantissa, exponent = decode(np.array(values))
    for x, m, e in zip(values, mantissa.tolist(), exponent.tolist(), strict=True):
        assert Fraction(x) == Fraction(m) * Fraction(2) ** e
        assert m % 2 == 1 or m == 0
    (rows,), (scale,) = integer_rows(np.array([values]))
    assert [Fraction(x) * Fraction(2) ** scale for x in rows[0]] == [Fraction(x) for x in values]


finite = st.floats(allow_nan=False, allow_infinity=False)
narrow = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=300)
@given(st.data(), st.booleans(), st.integers(1, 5), st.sampled_from([2, 29, 70, 1500]))
def test_signs_agree_with_fractions(data: st.DataObject, wide: bool, columns: int, bits: int) -> None:
    entries = finite if wide else narrow
    dtype = np.float64 if wide else np.float32
    arrays = [np.array([[data.draw(entries) for _ in range(columns)] for _ in range(3)], dtype=dtype) for _ in range(3)]
    p = [data.draw(st.integers(-(2**bits), 2**bits)) for _ in range(columns)]
    system = System.read(arrays[0], arrays[1], arrays[2])
    for k, sign in enumerate(signs(system, p).tolist()):
        exact = sum(
            (Fraction(float(a)) - Fraction(float(m))) * x - abs(Fraction(float(r)) * x)
            for a, m, r, x in zip(*(array[k] for array in arrays), p, strict=True)
        )
        assert sign == (exact > 0) - (exact < 0)
        assert sign == exact_sign(system, k, p)


@settings(max_examples=300)
@given(st.data(), st.sampled_from([np.float32, np.float64]), st.integers(1, 5), st.sampled_from([0, 2, 29, 70, 400]))
def test_digits_agree_with_fractions(data: st.DataObject, dtype: Any, columns: int, bits: int) -> None:
    """Signs exactly, values to nearly a float64, also where all but the last digits cancel."""
    entries = st.one_of(finite if dtype == np.float64 else narrow, st.floats(-4, 4, width=32), st.integers(-3, 3))
    arrays = [np.array([[data.draw(entries) for _ in range(columns)] for _ in range(3)], dtype=dtype) for _ in range(3)]
    p = [data.draw(st.integers(-(2**bits), 2**bits)) for _ in range(columns)]
    if data.draw(st.booleans()):  # opposite entries: cancellation
        arrays[0][:, 0], arrays[0][:, -1] = arrays[0][:, -1], -arrays[0][:, 0]
    system = System.read(arrays[0], arrays[1], arrays[2])
    found = exact_values(system, np.arange(3), p)
    for k, (sign, mantissa, exponent) in enumerate(zip(*(x.tolist() for x in found), strict=True)):
        exact = sum(
            (Fraction(float(a)) - Fraction(float(m))) * x - abs(Fraction(float(r)) * x)
            for a, m, r, x in zip(*(array[k] for array in arrays), p, strict=True)
        )
        assert sign == (exact > 0) - (exact < 0)
        assert abs(Fraction(mantissa) * Fraction(2) ** exponent - exact) <= abs(exact) / 2**50


@settings(max_examples=300)
@given(st.data(), st.integers(1, 4), st.sampled_from([1, 2, 70]), st.booleans())
def test_check_direction_agrees_with_fractions(data: st.DataObject, columns: int, bits: int, radius: bool) -> None:
    """Also directions with one entry, and differences that underflow or overflow."""
    entries = st.one_of(finite, st.sampled_from([0.0, TINY, -TINY, HUGE, -HUGE, 1.0, -1.0]))
    arrays = [np.array([[data.draw(entries) for _ in range(columns)] for _ in range(2)]) for _ in range(3)]
    p = [data.draw(st.one_of(st.just(0), st.integers(-(2**bits), 2**bits))) for _ in range(columns)]
    wide = arrays[2] if radius else np.zeros((2, columns))
    smallest = min(
        sum(
            (Fraction(float(a)) - Fraction(float(m))) * x - abs(Fraction(float(r)) * x)
            for a, m, r, x in zip(*rows, p, strict=True)
        )
        for rows in zip(arrays[0], arrays[1], wide, strict=True)
    )
    assert check_direction(arrays[0], p, arrays[1], wide) is (smallest > 0)


@settings(max_examples=300)
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 8, 55, 62, 64, 200]), st.booleans())
def test_check_proof_agrees_with_integers(data: st.DataObject, count: int, columns: int, bits: int, wide: bool) -> None:
    """Weights and entries on either side of what int64 holds."""
    entry = st.integers(-(2**50), 2**50) if wide else st.integers(-2, 2)
    rows = [[data.draw(entry) for _ in range(columns)] for _ in range(count)]
    if data.draw(st.booleans()):
        rows.append([-sum(column) for column in zip(*rows, strict=True)])
    weights = (
        [1 << bits] * len(rows) if data.draw(st.booleans()) else [data.draw(st.integers(1, 1 << bits)) for _ in rows]
    )
    vanishes = not any(sum(w * x for w, x in zip(weights, column, strict=True)) for column in zip(*rows, strict=True))
    array = np.array(rows, dtype=np.float64)
    assert check_proof(array, Proof(tuple(range(len(rows))), tuple(weights))) is vanishes
    minus = np.array([[data.draw(st.integers(-(2**51), 2**51)) for _ in row] for row in rows], dtype=np.float64)
    assert check_proof(array + minus, Proof(tuple(range(len(rows))), tuple(weights)), minus) is vanishes


def test_rows_too_wide_for_digits_go_to_integers() -> None:
    rows = np.repeat([[HUGE, TINY, -1.0]], 20, axis=0)
    system = System.read(rows)
    sign, mantissa, exponent = exact_values(system, np.arange(20), (0, 1, 0))
    assert sign.tolist() == [1] * 20
    assert (np.ldexp(mantissa, exponent) == TINY).all()
    assert signs(system, (0, 1, 0)).tolist() == [1] * 20
    assert signs(System.read(np.repeat([[0.1, 1.0], [0.5, -0.5]], 20, axis=0)), (1, 1)).tolist() == [1] * 20 + [0] * 20


def test_relation_is_unique_or_none() -> None:
    assert relation([[1, 0], [0, 1], [-2, -3]]) == [2, 3, 1]
    assert relation([[1, 0], [0, 1]]) is None
    assert relation([[1], [2], [3]]) is None
    assert relation([[3, 0, 0, 0, 0], [-2, 0, 0, 0, 0]]) == [2, 3]


small = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=6)
)


@settings(max_examples=500, deadline=None)
@given(small)
def test_agrees_with_fourier_motzkin(rows: list[list[int]]) -> None:
    decision = decide(np.array(rows, dtype=np.float32))
    assert decision.nonempty is fourier_motzkin(rows)
    assert_sound(np.array(rows, dtype=np.float32), decision)


@settings(max_examples=200, deadline=None)
@given(small)
def test_exact_algorithm_agrees_with_fourier_motzkin(rows: list[list[int]]) -> None:
    kept = [row for row in rows if any(row)]
    if not kept:
        return
    system = System.read(np.array(kept, dtype=np.float64))
    direction, proof = minimum_norm(system, list(range(len(kept))), [1] * len(kept), math.inf)
    assert (direction is not None) is fourier_motzkin(kept)
    if direction is not None:
        assert check_direction(kept, direction)
    else:
        assert proof is not None
        assert check_proof(kept, Proof(tuple(proof), tuple(proof.values())))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(finite, min_size=2, max_size=2), min_size=1, max_size=4))
def test_any_floats_are_decided(rows: list[list[float]]) -> None:
    array = np.array(rows)
    decision = decide(array, seconds=60)
    assert decision.nonempty is fourier_motzkin(integers(array))
    assert_sound(array, decision)


@settings(max_examples=150, deadline=None)
@given(small, st.data())
def test_splitting_rows_into_two_terms_changes_nothing(rows: list[list[int]], data: st.DataObject) -> None:
    array = np.array(rows, dtype=np.float64)
    minus = np.array([[data.draw(st.integers(-(2**40), 2**40)) for _ in row] for row in rows], dtype=np.float64)
    decision = decide(array + minus, minus)
    assert decision.nonempty is fourier_motzkin(rows)
    assert_sound(array + minus, decision, minus)


@settings(max_examples=150, deadline=None)
@given(small, st.data())
def test_radius_answers_are_sound(rows: list[list[int]], data: st.DataObject) -> None:
    array = np.array(rows, dtype=np.float64)
    radius = np.array([[data.draw(st.sampled_from([0.0, 0.0, 0.125, 1.0])) for _ in row] for row in rows])
    decision = decide(array, radius=radius)
    assert_sound(array, decision, radius=radius)
    if decision.nonempty is not None:
        assert decision.nonempty is fourier_motzkin(rows)
    exact = [row for row, wide in zip(rows, radius, strict=True) if not wide.any()]
    if not fourier_motzkin(exact):
        assert decision.nonempty is False


def campaign(count: int, seed: int) -> Counter[tuple[str, str]]:
    """Decides ``count`` planted systems; every answer must be there, be right and carry its evidence."""
    rng = np.random.default_rng(seed)
    seen: Counter[tuple[str, str]] = Counter()
    for number in range(count):
        case = planted(rng)
        decision = decide(case.rows, seconds=60)
        assert decision.nonempty is case.nonempty, f"system {number} of seed {seed} ({case.kind}): {decision}"
        if number % 10 == 0:
            assert_sound(case.rows, decision)
        seen[case.kind, decision.reason] += 1
    return seen


def test_planted_systems() -> None:
    seen = campaign(2000, seed=20240501)
    assert {kind for kind, _ in seen} == {
        "feasible",
        "empty",
        "near feasible",
        "near empty",
        "thin",
        "scaled empty",
    }
    assert {"highs", "minimum norm", "opposite rows", "column"} <= {reason for _, reason in seen}


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(5))
def test_planted_systems_campaign(seed: int) -> None:
    campaign(2000, seed)


def test_planting_is_right() -> None:
    """The generator itself, against Fourier-Motzkin where that is affordable."""
    rng = np.random.default_rng(7)
    checked = 0
    while checked < 150:
        case = planted(rng)
        if case.rows.shape[1] <= 3 and case.rows.shape[0] <= 7:
            assert fourier_motzkin(integers(case.rows)) is case.nonempty, case
            checked += 1


def large(rows: int, columns: int, nonempty: bool, seed: int = 0) -> np.ndarray[Any, Any]:
    """float32 Gaussian rows, turned to one side of a hidden vector if ``nonempty``."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns)).astype(np.float32)
    if nonempty:
        matrix[matrix.astype(np.float64) @ rng.standard_normal(columns) < 0] *= -1
    return matrix


@pytest.mark.parametrize("nonempty", [True, False])
def test_many_rows(nonempty: bool) -> None:
    rows = large(5000, 60, nonempty)
    decision = decide(rows, seconds=60)
    assert decision.nonempty is nonempty
    assert decision.reason == "highs"
    assert check_direction(rows, decision.direction) if nonempty else check_proof(rows, decision.proof)


def test_many_columns() -> None:
    rows = np.random.default_rng(0).standard_normal((30, 4000)).astype(np.float32)
    decision = decide(rows)
    assert decision.nonempty is True
    assert check_direction(rows, decision.direction)
    combined = np.round(rows[:5] * 64)
    empty = np.vstack([rows, combined, -combined.sum(axis=0)])
    decision = decide(empty, seconds=60)
    assert decision.nonempty is False
    assert check_proof(empty, decision.proof)


def test_dependent_rows_are_proved_empty_without_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    rows = rng.integers(-9, 10, size=(40, 200)).astype(np.float32)
    rows[17] = -(rng.integers(1, 4, size=39) @ np.delete(rows, 17, axis=0))
    monkeypatch.setattr(_highs.MarginProgram, "solve", lambda self: pytest.fail("not needed"))
    decision = decide(rows)
    assert decision.reason == "dependent rows"
    assert_sound(rows, decision)


def test_threads_do_not_share_a_solver() -> None:
    systems = [large(300, 12, nonempty=k % 2 == 0, seed=k) for k in range(16)]
    with ThreadPoolExecutor(4) as pool:
        decisions = list(pool.map(decide, systems))
    for k, decision in enumerate(decisions):
        assert decision.nonempty is (k % 2 == 0)
    assert decisions == [decide(rows) for rows in systems]


def test_a_thread_constructs_one_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_highs, "_local", threading.local())
    real, made = highspy.Highs, Counter[int]()

    def construct() -> Any:
        made[threading.get_ident()] += 1
        return real()

    monkeypatch.setattr(highspy, "Highs", construct)
    for seed in range(3):
        assert decide(large(300, 12, nonempty=False, seed=seed)).reason == "highs"
    assert made == {threading.get_ident(): 1}
    with ThreadPoolExecutor(1) as pool:
        for seed in range(3):
            assert pool.submit(decide, large(300, 12, nonempty=False, seed=seed)).result().reason == "highs"
    assert list(made.values()) == [1, 1]


def test_four_threads_decide_different_systems_at_once() -> None:
    """Every stage: planted systems, thin cones that need the exact stages, and large ones."""
    rng = np.random.default_rng(3)
    problems = [case(rng) for _ in range(120)]
    barrier = threading.Barrier(4)

    def work(share: int) -> list[Decision]:
        barrier.wait()
        return [decide(problem.a, problem.minus, problem.radius, seconds=60) for problem in problems[share::4]]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for share in range(4):
        for problem, decision in zip(problems[share::4], found[share], strict=True):
            assert decision.nonempty is problem.nonempty
            assert decision == decide(problem.a, problem.minus, problem.radius, seconds=60)
    assert len({decision.reason for share in found for decision in share}) >= 6


def test_a_few_rows_contradict_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = large(3000, 12, nonempty=False)
    monkeypatch.setattr(search.Search, "sum_of_rows", lambda self: pytest.fail("not needed"))
    decision = decide(rows)
    assert decision.reason == "highs"
    assert_sound(rows, decision)


def test_repeated_rows_among_others() -> None:
    rows = large(400, 12, nonempty=True)
    kept, opposite = distinct_lines(System.read(np.vstack([rows, 2 * rows[5:7], rows[7:8] / 4])))
    assert kept.tolist() == list(range(400))
    assert opposite == []
    kept, opposite = distinct_lines(System.read(np.vstack([rows, -2 * rows[5:6], rows[5:6]])))
    assert kept.tolist() == list(range(401))
    assert [sorted(pair) for pair in opposite] == [[5, 400]]


@pytest.mark.parametrize("relative", [1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize(("rows", "columns"), [(4000, 12), (1500, 60)])
def test_thin_cones_of_many_rows(rows: int, columns: int, relative: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs refined around exact values find the cone; the exact algorithm would take minutes."""
    monkeypatch.setattr(search, "minimum_norm", lambda *arguments: pytest.fail("not needed"))
    rng = np.random.default_rng(columns)
    hidden = rng.standard_normal(columns)
    hidden /= np.linalg.norm(hidden)
    matrix = rng.standard_normal((rows, columns))
    matrix -= np.outer(matrix @ hidden - relative * (1 + 9 * rng.random(rows)), hidden)
    decision = decide(matrix, seconds=60)
    assert decision.nonempty is True
    assert check_direction(matrix, decision.direction or ())


@pytest.mark.parametrize("nonempty", [True, False])
@pytest.mark.parametrize("columns", [27, 60])
def test_one_unit_in_the_last_place_decides_along_a_face(
    columns: int, nonempty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five rows of a plane all but cancel, thousands lie on one side of it: no float separates them."""
    monkeypatch.setattr(search, "minimum_norm", lambda *arguments: pytest.fail("not needed"))
    rng = np.random.default_rng(columns)
    hidden = np.append(rng.integers(1, 50, size=columns - 1), 1)  # all positive: the sign of a nudge is its side
    base = rng.integers(-512, 512, size=(4, columns))
    base[:, -1] -= base @ hidden
    last = -(rng.integers(1, 4, size=4) @ base).astype(np.float64)
    last[0] = np.nextafter(last[0], np.inf)
    others = rng.integers(-(2**20), 2**20, size=(40 * columns, columns))
    others *= np.sign(others @ hidden)[:, None]
    rows = np.vstack([others, base, last[None]])
    if not nonempty:  # the sum of the five is a positive multiple of e_0
        rows = np.vstack([rows, -np.eye(columns)[:1]])
    decision = decide(rows, seconds=60)
    assert decision.nonempty is nonempty
    assert check_direction(rows, decision.direction or ()) is nonempty
    assert nonempty or check_proof(rows, decision.proof or Proof((), ()))


def test_exact_work_beyond_the_budget_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "exact_seconds", lambda rows: math.inf)
    monkeypatch.setattr(minnorm, "exact_seconds", lambda rows: math.inf)
    decision = decide([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    assert decision.nonempty is None
    assert "time" in decision.reason


@pytest.mark.parametrize("columns", [8, 40])
def test_one_unit_in_the_last_place_among_many_rows(columns: int) -> None:
    """The last row is all but minus a combination of the others; many rows are combinations that no float separates."""
    rng = np.random.default_rng(columns)
    rows = rng.integers(-4096, 4096, size=(columns - 1, columns)).astype(np.float64)
    last = -(rng.integers(1, 100, size=columns - 1) @ rows)
    last[0] = np.nextafter(last[0], np.inf)
    others = rng.integers(0, 3, size=(200, columns - 1)) @ rows
    system = np.vstack([others, rows, last])
    decision = decide(system, seconds=60)
    assert decision.nonempty is True
    assert_sound(system, decision)
    last[0] = np.nextafter(last[0], -np.inf)
    assert decide(np.vstack([others, rows, last]), seconds=60).nonempty is False


def test_duplicates_do_not_hide_anything() -> None:
    rows = np.repeat(np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=np.float32), 500, axis=0)
    decision = decide(rows)
    assert decision.nonempty is False
    assert_sound(rows, decision)
    assert decide(rows[:1000]).nonempty is True


def test_out_of_time_is_undecided() -> None:
    decision = decide(large(400, 40, nonempty=False), seconds=0.0)
    assert decision.nonempty is None
    assert "time" in decision.reason
    assert_sound(large(1, 1, True), decision)


HARD = [[1.0, 0.0, 2.0], [0.0, 1.0, -3.0], [-1.0, -1.0, 1.5], [2.0, -1.0, 4.0], [-3.0, 1.0, -5.0]]


@pytest.mark.parametrize("method", ["passModel", "run", "setOptionValue"])
def test_bad_statuses_are_never_accepted(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_highs, "_local", type(_highs._local)())
    real = highspy.Highs

    class Broken(real):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            if name == method:
                return lambda *arguments: highspy.HighsStatus.kError
            return super().__getattribute__(name)

    monkeypatch.setattr(highspy, "Highs", Broken)
    with pytest.raises(_highs.SolverError):
        _highs.MarginProgram(np.array(HARD), None).solve()
    decision = decide(HARD)  # the exact algorithm answers all the same
    assert decision.nonempty is fourier_motzkin(integers(np.array(HARD)))
    assert decision.reason == "minimum norm"


@pytest.mark.parametrize("status", ["kUnknown", "kTimeLimit", "kInfeasible", "kUnbounded", "kNotset"])
def test_only_an_optimum_is_accepted(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(highspy.Highs, "getModelStatus", lambda self: getattr(highspy.HighsModelStatus, status))
    with pytest.raises(_highs.SolverError, match=status):
        _highs.MarginProgram(np.array(HARD), None).solve()


@pytest.mark.parametrize("lie", ["margin", "duals", "nan"])
def test_lying_solver_is_caught(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def solve(self: _highs.MarginProgram) -> _highs.Guess:
        count = self.solver.getNumRow()
        value = math.nan if lie == "nan" else 1.0
        return _highs.Guess(1.0 if lie == "margin" else 0.0, np.full(self.columns, value), np.ones(count))

    monkeypatch.setattr(_highs.MarginProgram, "solve", solve)
    for rows in (
        HARD,
        [[1.0, 0.0], [0.0, 1.0], [-1.0, -2.0]],
        [[1.0, 0.0, 0.0], [-1.0, 5.0, 2.0], [0.5, -1.0, 1.0], [-0.1, 0.0, 3.0]],
    ):
        decision = decide(rows)
        assert decision.nonempty is fourier_motzkin(integers(np.array(rows)))
        assert_sound(np.array(rows), decision)


def test_solver_really_optimises() -> None:
    guess = _highs.MarginProgram(np.array([[1.0, 0.0], [0.0, 0.5]]), None).solve()
    assert guess.margin == pytest.approx(0.5)
    guess = _highs.MarginProgram(np.array([[1.0], [-1.0]]), None).solve()
    assert guess.margin == pytest.approx(0.0)
    assert (guess.duals > 0).all()
    with_radius = _highs.MarginProgram(np.array([[1.0, 0.0]]), np.array([[0.25, 0.5]])).solve()
    assert with_radius.margin == pytest.approx(0.75)
    assert with_radius.direction.tolist() == pytest.approx([1.0, 0.0])


def test_a_stalled_program_is_solved_with_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = _highs.MarginProgram._run, []

    def impatient(self: _highs.MarginProgram, scaling: int, iterations: int) -> Any:
        calls.append(scaling)
        return run(self, scaling, iterations if scaling else 1)

    monkeypatch.setattr(_highs.MarginProgram, "_run", impatient)
    rows = large(40, 12, nonempty=True).astype(np.float64)
    guess = _highs.MarginProgram(rows, None).solve()
    assert calls == [0, 1]
    assert (rows @ guess.direction > 0.99 * guess.margin).all()
    assert guess.margin > 0


def test_empty_model_is_refused_by_highs() -> None:
    """Why statuses are checked: a refused model leaves ``run`` reporting success with objective 0."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    one = np.ones(1)
    args = (
        1,
        1,
        1,
        2,
        -1,
        0.0,
        one,
        0 * one,
        one,
        0 * one,
        one,
        np.zeros(1, np.int32),
        np.zeros(1, np.int32),
        one,
    )
    assert solver.passModel(*args, np.zeros(0, np.int32)) == highspy.HighsStatus.kError
    assert solver.passModel(*args, np.zeros(1, np.int32)) == highspy.HighsStatus.kOk


def test_decide_is_deterministic_and_leaves_the_random_state_alone() -> None:
    rows = large(300, 12, nonempty=True)
    np.random.seed(5)
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    assert decide(rows) == decide(rows)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index, union-attr]
