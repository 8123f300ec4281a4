"""Algorithm 1 on one graph: every touch and tie becomes a discharged decision, a row, or a reason for doubt.

Default: Algorithm 1 sharpened by E1 (zero gradients), E2 and E3 (irrelevance) and the lexicographic form of E4: a
row goes to the deepest layer in which it is provably nonzero while everything deeper is provably zero.
``strict``: the paper's own Algorithm 1, every row in its own layer, with Algorithm 2's shortcut (a shared or distinct
bias settles touches) only where that bias is really there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .between import Classes
from .bias import Bias
from .certificate import FREE
from .choices import Choice, Ties
from .coverage import kinks_of, outside
from .differences import Differences, Expansion, Part, RowSet, groups_of, unit_parts
from .equality import base_of, follow_to, prove_expansion_zero, prove_zero, tied_pairs
from .findings import Findings, Pending, Scope
from .layers import Graph
from .records import OpRecord
from .relevance import rectified, relevant_inputs, relevant_outputs
from .rows import expand
from .stages import stages_above
from .ties import resolve

NO_SIDE = "autodiff's derivative is none of the two one-sided ones"


def decide_record(scope: Scope, record: OpRecord) -> Findings:
    """Discharge every touch and tie of a record, as far as exact rows go; the rest is pending."""
    found = Findings(touches=len(record.touches))
    _touches(scope, record, found)
    if record.ties is not None:
        found.windows = record.output.numel()
        found.ties = len(record.ties.windows)
        _ties(scope, record, record.ties, found)
    return found


def _touches(scope: Scope, record: OpRecord, found: Findings) -> None:
    units, kinks, sides = record.touched()
    if len(units) and not scope.strict:
        keep = relevant_inputs(scope.graph, record, units)
        found.exemptions["irrelevant"] += int((~keep).sum())
        units, kinks, sides = units[keep], kinks[keep], sides[keep]
    top = record
    source = scope.graph.below(top)
    while source is not None and rectified(scope.graph, source):  # max 0 under a ReLU: every maximiser touches
        assert isinstance(source.ties, Ties)
        top, units = source, source.ties.maximisers(units)
        sides = torch.full_like(units, -1)
        source = scope.graph.below(top)
    if len(units):
        zero = torch.full_like(units, -1)
        if bool((sides == 0).any()):
            _between(scope, top, units[sides == 0], kinks[sides == 0], found)
        touched = Differences(torch.where(sides > 0, units, zero), torch.where(sides > 0, zero, units))
        _lowered(scope, top, touched.select(sides != 0), None, "touch", found)


def _between(scope: Scope, record: OpRecord, units: Tensor, kinks: Tensor, found: Findings) -> None:
    """Touches at which AD's proxy is no one-sided derivative: fine where the gradient is zero, else Theorem E5."""
    if len(units) == 0:
        return
    zero = prove_zero(scope.graph, record, Differences(torch.full_like(units, -1), units))
    found.exemptions["zero gradient"] += int(zero.sum())
    units, kinks = units[~zero], kinks[~zero]
    bias = scope.ranks.bias.get(record)
    for number, kink in enumerate(kinks_of(record)):
        mine = units[kinks == number]
        if len(mine) == 0:
            continue
        if kink.weight is None:
            found.mixed.append(f"{record.name}: {len(mine)} units at {kink.at:g}: {outside(kink)}")
        elif not scope.layered:
            found.mixed.append(f"{record.name}: {len(mine)} units at {kink.at:g}: {NO_SIDE}")
        elif bias is not None:
            order = scope.ranks.order
            below = (order.upstream[record] | order.own[record]) - {bias.leaf}
            groups = torch.unique(bias.group(mine))
            found.free.classes.append(Classes(record.name, bias.leaf, groups, kink.weight, below))
            found.exemptions["bias"] += len(mine)
        else:
            left = _free_rows(scope, record, Differences(torch.full_like(mine, -1), mine), found)
            if left:
                found.mixed.append(f"{record.name}: {left} units at a kink where {NO_SIDE}")


def _free_rows(scope: Scope, record: OpRecord, differences: Differences, found: Findings) -> int:
    """Exact rows of the own layer, one for each difference; how many have none."""
    rows = Findings()
    _own_rows(scope, Pending(record, differences, FREE, torch.arange(len(differences)), None), rows)
    found.free.rowsets += rows.rowsets
    return len(differences) - sum(rowset.count for rowset in rows.rowsets)


def _lowered(
    scope: Scope, record: OpRecord, differences: Differences, windows: Tensor | None, rule: str, found: Findings
) -> None:
    """Settle differences of y of ``record`` at its base; where slopes in between differ, where they are."""
    base = base_of(scope.graph, record, scope.strict)
    lower, good = follow_to(scope.graph, record, base, differences)
    for place, d, mask in ((base, lower, good), (record, differences, ~good)):
        if bool(mask.any()):
            _settle(scope, place, d.select(mask), None if windows is None else windows[mask], rule, found)


def _ties(scope: Scope, record: OpRecord, ties: Ties | Choice, found: Findings) -> None:
    ties = _needed(scope, record, ties, found)
    if len(ties.windows) == 0:
        return
    base = base_of(scope.graph, record, scope.strict)
    stages = stages_above(scope.graph, record, base, scope.ranks.order.own[base]) if isinstance(ties, Ties) else None
    if stages is not None and isinstance(ties, Ties):
        windows, differences = resolve(scope, record, ties, stages, found)
        if len(windows):
            _settle(scope, base, differences, windows, "tie", found)
        return
    windows, differences = tied_pairs(ties)
    if ties.even:
        _even(scope, record, differences, windows, found)
    elif len(windows):
        _lowered(scope, record, differences, windows, "tie", found)


def _even(scope: Scope, record: OpRecord, differences: Differences, windows: Tensor, found: Findings) -> None:
    """AD splits the gradient evenly among tied units: right if all of them have the same one (any convex sum is it).

    Else it is the mean over the selections of one unit each. If the differences to one of them are independent, some
    direction leads to every selection: Theorem E5 with a class for each window.
    """
    equal = prove_zero(scope.graph, record, differences)
    found.exemptions["congruent"] += int(equal.sum())
    found.open.append(windows[~equal])
    left, open_ = int((~equal).sum()), differences.select(~equal)
    if left and scope.layered and not scope.strict:
        base = base_of(scope.graph, record, False)
        lower, good = follow_to(scope.graph, record, base, open_)
        if bool(good.all()):
            left = _free_rows(scope, base, lower, found)
    if left:
        found.outside.append(f"{record.name}: autodiff splits the gradient evenly in {left} ties: not covered")


def _needed(scope: Scope, record: OpRecord, ties: Ties | Choice, found: Findings) -> Ties | Choice:
    """The ties that need a decision at all: E2 and E3 discharge the others."""
    if len(ties.windows) and rectified(scope.graph, record):
        ties = _kept(ties, record.positive(ties.windows), "flat", found)
    if len(ties.windows) and not scope.strict and not ties.linked:
        ties = _kept(ties, relevant_outputs(scope.graph, record, ties.windows), "irrelevant", found)
    return ties


def _kept(ties: Ties | Choice, keep: Tensor, rule: str, found: Findings) -> Ties | Choice:
    if bool(keep.all()):
        return ties
    found.exemptions[rule] += ties.count(~keep)
    return ties.select(keep)


def _settle(
    scope: Scope, base: OpRecord, differences: Differences, windows: Tensor | None, rule: str, found: Findings
) -> None:
    """Settle differences of units of y of ``base`` (``plus`` must win); ``windows``: of every tie its window."""
    open_ = differences.plus != differences.minus
    found.exemptions["zero gradient" if rule == "touch" else "zero slope"] += int((~open_).sum())
    rows = torch.nonzero(open_).flatten()
    bias = scope.ranks.bias.get(base)
    if bias is not None and len(rows):
        current = differences.select(rows)
        plus = torch.where(current.plus >= 0, bias.group(current.plus.clamp(min=0)), -1)
        minus = torch.where(current.minus >= 0, bias.group(current.minus.clamp(min=0)), -1)
        moved = plus != minus
        if bool(moved.any()) and _below_bias(scope, base, bias):
            found.deep.append(_asked(base, current.select(moved), rule))
        _bias_rows(scope, base, bias, Differences(plus[moved], minus[moved]), rule, found)
        if windows is not None:
            found.open.append(windows[rows[moved]])
        rows = rows[~moved]
    if len(rows):
        asked = _asked(base, differences.select(rows), rule, None if windows is None else windows[rows])
        _own_rows(scope, asked.merged(), found)


def _asked(base: OpRecord, differences: Differences, rule: str, windows: Tensor | None = None) -> Pending:
    return Pending(base, differences, rule, torch.arange(len(differences)), windows)


def _below_bias(scope: Scope, record: OpRecord, bias: Bias) -> frozenset[str]:
    order = scope.ranks.order
    return (order.upstream[record] | order.own[record]) - {bias.leaf}


def _bias_rows(scope: Scope, record: OpRecord, bias: Bias, groups: Differences, rule: str, found: Findings) -> None:
    if len(groups) == 0:
        return
    found.exemptions["bias"] += len(groups)
    pairs = torch.unique(torch.stack([groups.plus, groups.minus], 1), dim=0)
    shape = tuple(scope.graph.leaves.tensor(bias.leaf).shape)
    owner = torch.arange(len(pairs))
    parts = unit_parts(bias.leaf, shape, Differences(pairs[:, 0], pairs[:, 1]), owner)
    below = _below_bias(scope, record, bias)
    found.rowsets.append(RowSet(record.name, rule, len(pairs), tuple(parts), below))


def _own_rows(scope: Scope, asked: Pending, found: Findings) -> None:
    """Rows of the own layer, exact where the structure allows; what it does not settle stays pending."""
    record, d, rule = asked.record, asked.differences, asked.rule
    expansion = expand(scope.graph, record.edge, d)
    zero = torch.zeros(len(d), dtype=torch.bool)
    if not (scope.strict and rule == "touch"):  # the paper asks a row of every touch, even a zero one
        zero = prove_expansion_zero(scope.graph, expansion)
    # Leaves of earlier layers that skip into tau_l are reached on other paths too: only w_l's parts are whole.
    expansion.parts = [part for part in expansion.parts if part.leaf in scope.ranks.order.own[record]]
    hard = expansion.hard | _entangled(scope.graph, expansion)
    own = expansion.own_nonzero() & ~hard
    below = scope.ranks.order.upstream[record]
    if below and not scope.layered:
        own[:] = False
    if bool(own.any()):
        parts = _renumbered(expansion.parts, own)
        found.rowsets.append(RowSet(record.name, rule, int(own.sum()), parts, below))
        if below:
            found.deep.append(asked.select(own))
    left = ~own & ~zero
    if scope.strict and rule == "touch" and bool((left & ~hard).any()):
        found.rowsets.append(RowSet(record.name, rule, int((left & ~hard).sum()), ()))
        left &= hard
    found.settle(asked.select(~left), zero[~left])
    if bool(left.any()):
        found.pending.append(asked.select(left))


def _entangled(graph: Graph, expansion: Expansion) -> Tensor:
    """Rows in which two parts meet in one group, or scaled parts stand beside others: not exact as they are."""
    bad = torch.zeros(expansion.count, dtype=torch.bool)
    parts = expansion.parts
    for index, part in enumerate(parts):
        for other in parts[index + 1 :]:
            both = torch.isin(part.owner, other.owner)
            if not bool(both.any()):
                continue
            if part.scaled or other.scaled:
                bad[part.owner[both]] = True
            elif part.leaf == other.leaf:
                groups = groups_of(tuple(graph.leaves.tensor(part.leaf).shape))[0]
                mine, theirs = part.owner * groups + part.group, other.owner * groups + other.group
                bad[part.owner[torch.isin(mine, theirs)]] = True
    return bad


def _renumbered(parts: list[Part], keep: Tensor) -> tuple[Part, ...]:
    number = torch.cumsum(keep, 0) - 1
    result = []
    for part in parts:
        mask = keep[part.owner]
        if bool(mask.any()):
            owner = number[part.owner[mask]]
            result.append(Part(part.leaf, owner, part.group[mask], part.plus[mask], part.minus[mask]))
    return tuple(result)
