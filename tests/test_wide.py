"""Systems of few rows and very many columns: what is kept of them, and that it says enough."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adcert import wide
from adcert.differences import Part, RowSet
from adcert.feasibility import check_direction, check_proof
from adcert.systems import System, solve
from adcert.wide import decide_wide, glance_wide, is_wide

COLUMNS = 5000


def spread(columns: np.ndarray, direction: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The direction on all columns, 0 on those that were not kept."""
    full = np.zeros(width, dtype=object)
    full[columns] = direction
    return tuple(int(x) for x in full)


def blank(rows: int) -> np.ndarray:
    return np.zeros((rows, COLUMNS))


def test_what_is_wide() -> None:
    assert is_wide(20, 1_000_000) and not is_wide(20, 2048) and not is_wide(20_000, 2100)


def test_two_rows_that_agree_on_their_largest_entries() -> None:
    """(3, 1) and (-3, 1): opposite where they are largest, so a proof there fails and names the other column."""
    a = blank(2)
    a[:, 17], a[:, 4321] = (3.0, -3.0), 1.0
    columns, answer = decide_wide(a)
    assert answer.nonempty and columns.tolist() == [17, 4321]
    assert check_direction(a, spread(columns, answer.direction, COLUMNS))


def test_a_single_row_rests_on_its_largest_entry() -> None:
    """The farthest from zero, beyond the radii."""
    a, minus, radius = blank(1), blank(1), blank(1)
    a[0, 100], a[0, 200], minus[0, 300] = 2.0, -9.0, 1.0
    columns, answer = decide_wide(a, minus)
    assert columns.tolist() == [200] and answer.direction == (-1,)
    radius[0, 200], radius[0, 100] = 8.0, 1.5
    columns, answer = decide_wide(a, minus, radius)
    assert columns.tolist() in ([200], [300]) and answer.nonempty
    radius[0, 200], radius[0, 300] = 9.0, 2.0
    columns, answer = decide_wide(a, minus, radius)
    assert columns.tolist() == [100] and answer.direction == (1,)
    radius[0, 100] = 2.0
    assert glance_wide(a, minus, radius) is None
    assert glance_wide(blank(1)) is None
    assert glance_wide(np.ones((2, COLUMNS))) is None and glance_wide(a[:0]) is None


def test_opposite_rows() -> None:
    """All their columns are kept: the proof's check is one of the whole rows."""
    a = blank(3)
    a[0, 100:200], a[1, 100:200], a[2, 7] = 2.0, -1.0, 1.0
    columns, answer = decide_wide(a)
    assert answer.nonempty is False and columns.tolist() == list(range(100, 200))
    assert answer.proof is not None and answer.proof.rows == (0, 1) and check_proof(a, answer.proof)


def test_a_difference_of_two_terms() -> None:
    """2^53 + 1 is no float: the row is known by its two terms only."""
    a, minus = blank(2), blank(2)
    a[0, 5], minus[0, 5] = 2.0**53, -1.0
    a[1, 5], minus[1, 5] = -(2.0**53), 1.0
    columns, answer = decide_wide(a, minus)
    assert answer.nonempty is False and check_proof(a, answer.proof, minus)
    minus[1, 5], minus[1, 9] = 0.0, 1.0
    columns, answer = decide_wide(a, minus)
    assert answer.nonempty and columns.tolist() == [5, 9]
    assert check_direction(a, spread(columns, answer.direction, COLUMNS), minus)


def test_rows_with_radii_never_prove_emptiness() -> None:
    a, radius = blank(2), blank(2)
    a[:, 17] = 1.0, -1.0
    radius[0, 17] = 1e-30
    assert decide_wide(a, None, radius)[1].nonempty is None
    radius[0, 4000] = 1e-30
    a[1, 4000] = 1e-3
    columns, answer = decide_wide(a, None, radius)
    assert answer.nonempty and check_direction(a, spread(columns, answer.direction, COLUMNS), None, radius)


def test_a_radius_that_covers_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    a = np.ones((2, COLUMNS))
    monkeypatch.setattr(wide, "_WHOLE", 0)
    columns, answer = decide_wide(a, None, 2 * a)
    assert answer.nonempty is None and answer.proof is None and len(columns) < COLUMNS


def test_margins_above_the_radii_take_more_columns() -> None:
    """Every second column is within its radius of zero, and looks as good as the others."""
    a, radius = np.ones((3, COLUMNS)), np.full((3, COLUMNS), 0.9)
    radius[:, ::2] = 1.5
    columns, answer = decide_wide(a, None, radius)
    assert answer.nonempty and check_direction(a, spread(columns, answer.direction, COLUMNS), None, radius)


@pytest.mark.parametrize("seed", range(12))
def test_random_systems(seed: int) -> None:
    """20 rows of 100,000 small integers; in half of them the last row is minus a sum of others."""
    generator = np.random.default_rng(seed)
    a = generator.integers(-3, 4, (20, 100_000)).astype(np.float64)
    if seed % 2:
        a[-1] = -a[: 2 + seed].sum(axis=0)
    columns, answer = decide_wide(a)
    assert answer.nonempty is (seed % 2 == 0)
    if answer.proof is not None:
        assert check_proof(a, answer.proof) and answer.proof.rows == (*range(2 + seed), 19)
    else:
        assert len(columns) <= 200
        assert check_direction(a, spread(columns, answer.direction, 100_000))


def test_a_wide_block_lists_what_its_answer_rests_on() -> None:
    """Two parameters, rows opposite in one of them: the columns kept are in both, and in order."""
    ones = torch.ones(2, 3000, dtype=torch.float64)
    sign = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    owner, group = torch.arange(2), torch.zeros(2, dtype=torch.int64)
    first = Part("v", owner, group, 2 * sign * ones, torch.zeros_like(ones))
    second = Part("w", owner, group, ones, torch.zeros_like(ones))
    shapes = {"v": (1, 3000), "w": (1, 3000)}
    (block,) = solve(System("op", 1, [RowSet("op", "tie", 2, (first, second))], shapes)).blocks
    assert block.direction is not None and {column.parameter for column in block.columns} == {"v", "w"}
    assert block.rows.shape[1] == sum(len(column.indices) for column in block.columns) <= 20
    assert check_direction(block.rows, block.direction)
    (block,) = solve(System("op", 1, [RowSet("op", "tie", 2, (first,))], shapes)).blocks
    assert block.proof is not None and block.rows.shape == (2, 3000)
    assert check_proof(block.rows, block.proof, block.minus)
