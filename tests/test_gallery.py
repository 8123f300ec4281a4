"""Every row of the gallery: stock autodiff's value, membership in dC, and adcert's verdict."""

from __future__ import annotations

import math

import pytest
import torch

from adcert import certify, convert
from adcert.gallery import OUTSIDE, ROWS, Case, Measurement, Row, autodiff, contains, measure, same

BY_NUMBER = {row.number: row for row in ROWS}
# Which of the table's gradients are in dC; the values are the table's last column.
RIGHT = {"3b", "6b", "7", "8", "10b", "17", "18", "19.1", "19.2"}

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.number)


def test_the_table_is_complete() -> None:
    plain = {row.number.split(".")[0] for row in ROWS}
    assert plain == {str(k) for k in range(1, 20)} | {"3b", "6b", "9b", "10b", "16b", "16c"}
    assert len(BY_NUMBER) == len(ROWS)


@rows
def test_autodiff_returns_what_the_table_says(row: Row) -> None:
    assert same(autodiff(row), row.autodiff)


@rows
def test_right_column(row: Row) -> None:
    assert row.right == (row.number in RIGHT)


@rows
def test_verdict_is_what_the_theory_says(row: Row) -> None:
    result = measure(row)
    assert result.contradiction == ""
    assert result.verdict in row.allowed
    assert bool(result.reasons) == (result.verdict != "certified")


@rows
def test_strict_never_certifies_more(row: Row) -> None:
    model = convert(row.build())
    verdict = certify(model, model, strict=True).verdict.value
    assert verdict != "certified" or "certified" in row.allowed


@rows
def test_true_gradients_nearby_are_in_the_clarke_set(row: Row) -> None:
    """At random points near the kink everything is smooth and autodiff right, so its value must lie near dC:
    checks the column dC itself.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        case = row.build()
        with torch.no_grad():
            for leaf in case.parameters():
                leaf += 1e-6 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(case(), list(case.parameters()))])
        if row.number == "16":  # sqrt of a negative number: nan on the branch that is not taken
            assert math.isnan(float(gradient))
            continue
        assert contains(row.vertices, tuple(gradient.tolist()), tolerance=1e-4)


@pytest.mark.parametrize("number", [row.number for row in ROWS if row.allowed == OUTSIDE])
def test_reason_names_an_operation(number: str) -> None:
    """A reader must learn what was not covered: some name of an operation, not a bare refusal."""
    names = {
        "3": "clamp", "6": "clamp", "8": "clamp", "9": "hardsigmoid", "9b.1": "hardtanh",
        "9b.2": "relu6|tanh",
        "10b": "max", "11": "clamp", "12": "abs", "13": "max", "14": "sqrt", "15": "where|eq|==",
        "16": "where|gt|sqrt", "16b": "gt|lt|>", "16c": "gt|index|>", "17": "max|min",
    }  # fmt: skip
    reasons = " ".join(measure(BY_NUMBER[number]).reasons).lower()
    assert any(name in reasons for name in names[number].split("|")), reasons


def test_row_19_tied_patches_are_swapped() -> None:
    """By hand: patches (1,2) and (2,1), filter (1,1): both pre-activations are 3, in either order."""
    case = BY_NUMBER["19"].build()
    assert case().item() == 0.0
    assert autodiff(BY_NUMBER["19"]) == (-1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("vertices", "point", "inside"),
    [
        (((0,), (1,)), (0.5,), True),
        (((0,), (1,)), (1.5,), False),
        (((1, 0), (0, -1), (-1, 1)), (-0.25, 0.25), True),
        (((1, 0), (0, -1), (-1, 1)), (0.5, 0.5), False),
        (((0, 0, 0),), (-1, 1, 0), False),
        (((1 / 6,),), (1 / 6,), True),
        (((1,),), (math.inf,), False),
    ],
)
def test_contains(vertices: tuple[tuple[float, ...], ...], point: tuple[float, ...], inside: bool) -> None:
    assert contains(vertices, point) is inside


def result(row: Row, gradient: float, verdict: str, *reasons: str) -> Measurement:
    return Measurement(row, (gradient,), contains(row.vertices, (gradient,)), verdict, reasons)


def test_contradictions() -> None:
    wrong, right = BY_NUMBER["1"], BY_NUMBER["7"]
    assert "not in dC" in result(wrong, 0.0, "certified").contradiction
    assert result(wrong, 0.0, "uncertified", "empty").contradiction == ""
    assert "without a reason" in result(wrong, 0.0, "uncertified").contradiction
    assert "theory says certified" in result(right, 0.0, "undecided", "?").contradiction
    assert result(wrong, 1.0, "certified").contradiction == ""  # another release, another proxy: now right


def test_case_is_its_own_closure_and_fresh_every_time() -> None:
    first, second = BY_NUMBER["1"].build(), BY_NUMBER["1"].build()
    assert isinstance(first, Case)
    assert all(leaf.dtype == torch.float64 for leaf in first.parameters())
    assert first().shape == ()
    assert first.w is not second.w
