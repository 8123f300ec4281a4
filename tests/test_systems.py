"""Rows to blocks: cut exactly where no row couples columns, joint over windows and samples, kept to what decides."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from core_helpers import integers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adcert
from adcert.certificate import Block
from adcert.differences import Part, RowSet
from adcert.feasibility import check_direction, check_proof
from adcert.systems import Memory, System, contradiction, count_blocks, solve

SHAPES = {"w": (2, 1, 1, 2), "v": (3,)}  # two filters of two entries; three single entries


def part(leaf: str, owner: list[int], group: list[int], plus: list[list[float]], minus: list[list[float]] | None = None,
         radius: list[list[float]] | None = None) -> Part:  # fmt: skip
    def table(t: list[list[float]]) -> Tensor:
        return torch.tensor(t, dtype=torch.float64)

    zero = [[0.0] * len(row) for row in plus]
    return Part(leaf, torch.tensor(owner), torch.tensor(group), table(plus), table(minus or zero), False,
                None if radius is None else table(radius))  # fmt: skip


def rowset(count: int, *parts: Part, rule: str = "tie") -> RowSet:
    return RowSet("op", rule, count, parts)


def blocks(*rowsets: RowSet, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Block]:
    return solve(System("layer", 3, rowsets, shapes)).blocks


def columns(block: Block) -> list[tuple[str, list[int]]]:
    return [(column.parameter, column.indices.tolist()) for column in block.columns]


# ---- literal cases -------------------------------------------------------------------------------


def test_no_rows_no_blocks():
    assert blocks() == []
    assert blocks(rowset(0)) == []


def test_two_filters_are_two_blocks():
    found = blocks(rowset(3, part("w", [0, 1, 2], [0, 1, 0], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])))
    assert sorted((columns(b), b.rows.tolist()) for b in found) == [
        ([("w", [0, 1])], [[1.0, 2.0], [5.0, 6.0]]),
        ([("w", [2, 3])], [[3.0, 4.0]]),
    ]
    for block in found:
        assert (block.layer, block.rank) == ("layer", 3)
        assert check_direction(block.rows, block.direction)
        assert block.proof is None


def test_a_row_across_channels_joins_their_blocks():
    across = (part("w", [0], [0], [[1.0, 0.0]]), part("w", [0], [1], [[0.0, 0.0]], [[0.0, 1.0]]))
    found = blocks(rowset(1, part("w", [0], [0], [[2.0, 2.0]])), rowset(1, *across))
    (block,) = found
    assert columns(block) == [("w", [0, 1]), ("w", [2, 3])]
    assert (block.rows - block.minus).tolist() == [[2.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, -1.0]]
    assert check_direction(block.rows, block.direction, block.minus)


def test_a_row_across_leaves_joins_their_blocks():
    found = blocks(
        rowset(2, part("w", [0, 1], [0, 1], [[1.0, 1.0], [1.0, 1.0]]), part("v", [0], [2], [[1.0]]), rule="touch"),
        rowset(1, part("v", [0], [2], [[4.0]])),
    )
    assert sorted((columns(b), b.rows.tolist(), b.rules) for b in found) == [
        ([("w", [0, 1]), ("v", [2])], [[1.0, 1.0, 1.0], [0.0, 0.0, 4.0]], ("touch", "tie")),
        ([("w", [2, 3])], [[1.0, 1.0]], ("touch",)),
    ]


def test_untouched_columns_are_left_out():
    (block,) = blocks(rowset(1, part("v", [0], [1], [[-1.0]])))
    assert columns(block) == [("v", [1])]
    assert block.rows.tolist() == [[-1.0]]
    assert block.direction[0] < 0


def test_repeated_rows_are_kept_once():
    rows = [[1.0, 2.0], [1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]
    (block,) = blocks(rowset(4, part("w", [0, 1, 2, 3], [0] * 4, rows)), rowset(1, part("w", [0], [0], [[2.0, 1.0]])))
    assert block.rows.tolist() == [[1.0, 2.0], [2.0, 1.0]]
    assert len(block.rules) == 2


def test_equal_differences_of_different_terms_are_not_confused():
    """(3, 1) and (2, 1) differ; so do rows that differ in their radius only."""
    (block,) = blocks(rowset(2, part("v", [0, 1], [0, 0], [[3.0], [2.0]], [[1.0], [1.0]])))
    assert (block.rows - block.minus).tolist() == [[2.0], [1.0]]
    (block,) = blocks(rowset(2, part("v", [0, 1], [0, 0], [[3.0], [3.0]], None, [[0.0], [1.0]])))
    assert len(block.rows) == 2
    assert block.radius.tolist() == [[0.0], [1.0]]


def test_an_empty_block_keeps_only_the_rows_of_its_proof():
    rows = [[5.0, 1.0], [1.0, 0.0], [0.0, 7.0], [-2.0, 0.0], [3.0, 3.0]]
    (block,) = blocks(rowset(5, part("w", list(range(5)), [0] * 5, rows)))
    assert block.direction is None
    assert sorted(block.rows.tolist()) == [[-2.0, 0.0], [1.0, 0.0]]
    assert sorted(block.proof.rows) == [0, 1]
    assert len(block.rules) == 2
    weights = dict(zip(block.proof.rows, block.proof.weights, strict=True))
    total = [sum(weights[i] * Fraction(block.rows[i, j]) for i in weights) for j in range(2)]
    assert total == [0, 0]
    assert check_proof(block.rows, block.proof, block.minus, block.radius)


def test_opposite_rows_of_two_rowsets_are_one_empty_block():
    found = blocks(rowset(1, part("w", [0], [0], [[1.0, -1.0]])), rowset(1, part("w", [0], [0], [[-1.0, 1.0]])))
    (block,) = found
    assert block.proof is not None
    assert block.direction is None


def test_opposite_rows_in_different_filters_are_two_solvable_blocks():
    found = blocks(rowset(2, part("w", [0, 1], [0, 1], [[1.0, -1.0], [-1.0, 1.0]])))
    assert len(found) == 2
    assert all(block.direction is not None for block in found)


def test_a_zero_row_is_an_empty_block_of_its_own():
    found = blocks(rowset(1), rowset(1, part("v", [0], [0], [[1.0]])))
    assert len(found) == 2
    empty = next(block for block in found if not block.columns)
    assert empty.proof is not None
    assert empty.rows.shape == (1, 0)
    assert next(block for block in found if block.columns).direction is not None


def test_a_rounded_opposite_row_proves_nothing():
    (block,) = blocks(rowset(1, part("v", [0], [0], [[1.0]])), rowset(1, part("v", [0], [0], [[-1.0]], None, [[0.5]])))
    assert block.proof is None
    assert block.direction is None
    assert block.reason


def test_lower_precision_parts_are_taken_exactly():
    low = Part("v", torch.tensor([0]), torch.tensor([0]), torch.tensor([[0.1]], dtype=torch.bfloat16),
               torch.tensor([[0.2]], dtype=torch.bfloat16))  # fmt: skip
    (block,) = blocks(rowset(1, low))
    assert block.rows.tolist() == [[0.10009765625]]
    assert block.minus.tolist() == [[0.2001953125]]
    assert block.direction[0] < 0


# ---- joint over windows and samples: the whole way -----------------------------------------------


def pooled(x: Tensor) -> tuple[nn.Module, adcert.Certificate]:
    """1x1-output convolution [1 1] without bias, pooled in pairs: ties when both patches have equal sums."""
    model = nn.Sequential(nn.Conv2d(1, 1, (1, 2), bias=False), nn.MaxPool2d((1, 2))).double()
    nn.init.ones_(model[0].weight)
    adcert.convert(model)
    return model, adcert.certify(lambda: model(x).sum(), model)


def test_opposite_rows_of_two_samples_are_one_joint_empty_block(monkeypatch):
    """Row 1 2 1 ties with patches [1 2], [2 1]: row [-1 1]. Row 2 1 2 gives [1 -1]. Each alone is solvable."""
    monkeypatch.setattr("adcert.analysis.combine", lambda graph, edge: None)  # Theorem H needs no system
    one = torch.tensor([[[[1.0, 2.0, 1.0]]]], dtype=torch.float64)
    other = torch.tensor([[[[2.0, 1.0, 2.0]]]], dtype=torch.float64)
    for x, row in ((one, [-1.0, 1.0]), (other, [1.0, -1.0])):
        _, certificate = pooled(x)
        (block,) = certificate.blocks
        minus = np.zeros_like(block.rows) if block.minus is None else block.minus
        assert (block.rows - minus).tolist() == [row]
        assert certificate.verdict == adcert.Verdict.CERTIFIED
    _, certificate = pooled(torch.cat([one, other]))
    (block,) = certificate.blocks
    assert block.proof is not None
    assert certificate.verdict == adcert.Verdict.UNCERTIFIED


# ---- property ------------------------------------------------------------------------------------


@given(st.integers(0, 5000))
def test_blocks_are_a_partition_of_the_system(seed: int):
    """Disjoint columns; without proofs the blocks hold exactly the distinct rows of the dense system."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 7, (), generator=generator))
    shapes = {"w": (3, 2), "v": (2,)}
    dense = np.zeros((count, 8))
    parts = []
    for leaf, groups, width, start in (("w", 3, 2, 0), ("v", 2, 1, 6)):
        for group in range(groups):
            chosen = torch.nonzero(torch.randint(0, 3, (count,), generator=generator) == 0).flatten()
            if len(chosen) == 0:
                continue
            plus, minus = (integers((len(chosen), width), seed + k, -1, 2) for k in (group, group + 7))
            parts.append(Part(leaf, chosen, torch.full_like(chosen, group), plus, minus))
            at = start + group * width
            dense[chosen.numpy(), at : at + width] += (plus - minus).numpy()
    found = blocks(rowset(count, *parts), shapes=shapes)
    offset = {"w": 0, "v": 6}
    used: list[int] = []
    wide_rows = []
    for block in found:
        at = [offset[name] + i for name, indices in columns(block) for i in indices]
        used += at
        wide = np.zeros((len(block.rows), 8))
        wide[:, at] = block.rows - (0 if block.minus is None else block.minus)
        wide_rows += [tuple(row) for row in wide]
        if block.direction is not None:
            assert check_direction(block.rows, block.direction, block.minus)
        else:
            assert check_proof(block.rows, block.proof, block.minus)
    assert len(used) == len(set(used))
    assert set(wide_rows) <= {tuple(row) for row in dense}
    if all(block.proof is None for block in found):
        assert set(wide_rows) == {tuple(row) for row in dense}


@pytest.mark.parametrize("samples", [1, 3])
def test_a_certified_step_has_one_block_for_each_filter_that_ties(samples: int):
    model = nn.Sequential(nn.Conv2d(1, 3, 2, bias=False), nn.MaxPool2d(2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(3, 1, 2, 2) * torch.tensor([1.0, 0.0, 2.0]).reshape(3, 1, 1, 1))
    adcert.convert(model)
    x = torch.arange(9.0, dtype=torch.float64).reshape(1, 1, 3, 3).repeat(samples, 1, 1, 1)
    certificate = adcert.certify(lambda: model(x).sum(), model)
    (block,) = certificate.blocks  # only the zero filter ties: its four patches differ
    assert columns(block) == [("0.weight", [4, 5, 6, 7])]
    assert len(block.rows) == 3


# ---- where rows abound ---------------------------------------------------------------------------


def test_the_direction_of_a_large_block_is_tried_first_in_the_next_step():
    memory = Memory()
    rows = [[math.cos(i / 20), math.sin(i / 20)] for i in range(-10, 40)]  # no column has one sign
    many = list(range(50))
    system = System("layer", 3, [rowset(50, part("w", many, [0] * 50, rows))], SHAPES)
    (first,) = solve(system, memory=memory).blocks
    (second,) = solve(system, memory=memory).blocks
    assert first.reason != "warm direction"
    assert second.reason == "warm direction"
    assert second.direction == first.direction
    (other,) = solve(System("another", 3, system.rowsets, SHAPES), memory=memory).blocks
    assert other.reason == first.reason
    turned = System("layer", 3, [rowset(50, part("w", many, [0] * 50, [[-a, -b] for a, b in rows]))], SHAPES)
    (opposite,) = solve(turned, memory=memory).blocks
    assert check_direction(opposite.rows, opposite.direction)


def test_short_stops_at_the_first_empty_block_and_counts_the_others():
    entries = part("w", [0, 1, 2, 3, 4], [0, 1, 1, 1, 0], [[1, 0], [1, 0], [0, 1], [-1, 0], [0, 1]])
    system = System("layer", 3, [rowset(5, entries)], SHAPES)
    short, full = solve(system, True), solve(system)
    assert [columns(block) for block in short.blocks] == [[("w", [2, 3])]]
    assert short.empty
    assert full.empty
    assert (len(full.blocks), full.count, short.count) == (2, 2, 2)
    assert count_blocks(system) == (5, 2)


def test_a_contradiction_is_seen_without_any_program():
    entries = part("w", [0, 1, 2], [0, 1, 1], [[1, 0], [1, 2], [0, 0]], [[0, 0], [0, 0], [1, 2]])
    block = contradiction(System("layer", 3, [rowset(3, entries)], SHAPES))
    assert block is not None
    assert block.proof is not None
    assert columns(block) == [("w", [2, 3])]
    assert check_proof(block.rows, block.proof, block.minus)


@pytest.mark.parametrize(
    "entries",
    [
        part("w", [0, 1], [0, 1], [[1, 2], [-1, -2]]),  # another filter
        part("w", [0, 1], [0, 0], [[1, 2], [-1, -2.5]]),
        part("w", [0, 1], [0, 0], [[1, 2], [-1, -2]], radius=[[0, 0], [0, 0.5]]),  # rounded rows prove nothing
        part("w", [0, 0], [0, 0], [[1, 2], [-1, -2]]),  # two entries of one row
        part("v", [0, 1], [0, 0], [[1], [-1]]),  # single entries: left to the systems
    ],
)
def test_no_contradiction_where_there_is_none(entries: Part):
    assert contradiction(System("layer", 3, [rowset(2, entries)], SHAPES)) is None


def test_contradictions_across_row_sets_of_different_dtypes():
    one, other = part("w", [0], [0], [[1, 2]]), part("w", [0], [0], [[-1, -2]])
    other = Part("w", other.owner, other.group, other.plus.bfloat16(), other.minus.bfloat16())
    block = contradiction(System("layer", 3, [rowset(1, one), rowset(1, other)], SHAPES))
    assert block is not None
    assert block.proof is not None
