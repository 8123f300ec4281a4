"""Ties of a max pooling in bulk: the native resolver's answers as discharged decisions and as rows of the own layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops
from .balls import SLACK, TINY, UNIT, gamma
from .choices import Ties
from .differences import Differences, Part, RowSet
from .findings import Bulk, Findings, Pending, Scope
from .nodes import Node
from .normalization import eps_of
from .records import OpRecord
from .stages import Stages, axes_of
from .transfer import Arrival, in_use, pick, take

_ROW, _HARD = 1, 3  # answers of the resolver


def resolve(scope: Scope, record: OpRecord, ties: Ties, stages: Stages, found: Findings) -> tuple[Tensor, Differences]:
    """Discharge ties by congruence; put the exact rows and the normalised rows off.

    Returns:
        Windows and differences of y of the stages' base that are left to the general rules.
    """
    pool = axes_of(ties.window, record.input_shape[2:], tuple(ties.offsets.shape[2:]))
    seen = ops.resolve_ties(ties.windows, ties.members, ties.offsets, pool, stages.numbers, stages.tensors)
    equal, *_, flat = seen.counts.tolist()
    found.exemptions["congruent"] += equal
    found.exemptions["zero slope"] += flat
    rows, hard = seen.answer == _ROW, seen.answer == _HARD
    if not bool((rows | hard).any()):
        return seen.window, Differences(seen.chosen, seen.other)
    weight, below = _own_weight(scope, stages), scope.ranks.order.upstream[stages.base]
    if weight is None or (below and not scope.layered):
        return seen.window, Differences(seen.chosen, seen.other)
    if bool(rows.any()):
        found.open.append(seen.window[rows])
        found.bulk.append(Bulk(stages, weight, seen.chosen[rows], seen.other[rows]))
        if below:
            differences = Differences(seen.chosen[rows], seen.other[rows])
            found.deep.append(Pending(stages.base, differences, "tie", torch.arange(len(differences)), None))
    hard &= (seen.chosen >= 0) & (seen.other >= 0) & (_own_gamma(scope, stages) is not None)
    if bool(hard.any()):
        differences = Differences(seen.chosen[hard], seen.other[hard])
        uses = torch.arange(len(differences))
        found.pending.append(Pending(stages.base, differences, "tie", uses, seen.window[hard], stages))
    left = ~rows & ~hard
    return seen.window[left], Differences(seen.chosen[left], seen.other[left])


def _own_weight(scope: Scope, stages: Stages) -> str | None:
    """The leaf of the first convolution's weight if it belongs to the layer's own parameters."""
    assert stages.conv is not None
    leaf = scope.graph.leaf(stages.conv.next_functions[1][0])
    return leaf if leaf in scope.ranks.order.own[stages.base] else None


def _own_gamma(scope: Scope, stages: Stages) -> str | None:
    """The leaf of the normalisation's gamma, "" if that is frozen; None without one, or if another layer has it."""
    if stages.norm is None:
        return None
    edge = stages.norm.next_functions[1]
    leaf = scope.graph.leaf(edge[0])
    if edge[0] is None:
        return ""
    weight = _own_weight(scope, stages)
    ranks = scope.ranks.of
    same = leaf is not None and weight is not None and ranks.get(leaf) == ranks.get(weight)
    return leaf if same and leaf in scope.ranks.order.own[stages.base] else None


def _patches(stages: Stages, chosen: Tensor, other: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of the units that have to win and of those that have to lose, once the slope's sign is taken in."""
    assert stages.conv is not None
    x = in_use(stages.conv._saved_input)
    swap = sign < 0
    first, second = torch.where(swap, other, chosen), torch.where(swap, chosen, other)
    return ops.conv_patches(x, first, stages.patches), ops.conv_patches(x, second, stages.patches)


def _signs(norm: Node | None, channel: Tensor) -> Tensor:
    """Sign of the factor that a normalisation puts in front of a channel's patch differences."""
    factors = None if norm is None else norm._saved_weight
    return torch.ones(len(channel)) if factors is None else take(factors.detach(), channel).sign()


def exact_rows(scope: Scope, bulk: Bulk) -> RowSet:
    """Patch differences; a normalisation whose inputs tie puts one factor in front of each."""
    stages = bulk.stages
    first = ops.distinct_rows(torch.stack([bulk.chosen, bulk.other], 1))
    chosen, other = bulk.chosen[first], bulk.other[first]
    channel = stages.channel(chosen)
    arrival = Arrival(_patches(stages, chosen, other, _signs(stages.norm, channel)), patient=True)
    plus, minus = arrival.tensors
    part = Part(bulk.weight, torch.arange(len(channel)), channel, plus, minus)
    below = scope.ranks.order.upstream[stages.base]
    return RowSet(stages.base.name, "tie", len(channel), (part,), below, arrival)


def normalized_rows(scope: Scope, pending: Pending, found: Findings) -> Tensor:
    """Rows of ties between rounded normalised values, whose inputs x differ; returns the mask of rows written.

    With ``y = gamma xhat + beta`` and ``xhat = (x - mean) s`` the gradient of ``y_p - y_q``, divided by ``gamma s``, is

    * in the filter: ``P_p - P_q - (x_p - x_q) s S / M``, where in train mode ``S / M`` is the mean of ``xhat P`` over
      the batch, at most the largest input by Cauchy and Schwarz; it goes into the radius (in eval mode it is 0);
    * in gamma: ``(x_p - x_q) / gamma``; in beta and in the convolution's bias: 0.
    """
    stages = pending.stages
    assert stages is not None and stages.norm is not None and stages.conv is not None
    norm, d = stages.norm, pending.differences
    weight, scale_leaf = _own_weight(scope, stages), _own_gamma(scope, stages)
    assert weight is not None and scale_leaf is not None
    x = norm._saved_input.detach()
    channel = stages.channel(d.plus)
    step = take(x, d.plus).to(torch.float64) - take(x, d.minus).to(torch.float64)
    factors = norm._saved_weight
    factor = torch.ones_like(step) if factors is None else take(factors.detach(), channel).to(torch.float64)
    sign = factor.sign()
    plus, minus = Arrival(_patches(stages, d.plus, d.minus, sign)).wait()
    reach = torch.zeros_like(step)
    if norm._saved_training:
        largest = float(stages.conv._saved_input.detach().abs().amax())
        reach = step.abs() * _scale_bound(norm, channel) * largest * SLACK
    radius = reach[:, None].expand(-1, plus.shape[1])
    along = step / factor.abs()
    nonzero = ((plus.to(torch.float64) - minus.to(torch.float64)).abs() > radius * (1 + 2 * UNIT)).any(1)
    rows = torch.nonzero(nonzero | (scale_leaf != "")).flatten()
    if len(rows) == 0:
        return nonzero
    owner = torch.arange(len(rows))
    parts = [Part(weight, owner, channel[rows], plus[rows], minus[rows], False, radius[rows])]
    if scale_leaf:
        value = along[rows, None]
        parts.append(
            Part(scale_leaf, owner, channel[rows], value, torch.zeros_like(value), False, value.abs() * 4 * UNIT + TINY)
        )
    below = scope.ranks.order.upstream[stages.base]
    found.rowsets.append(RowSet(stages.base.name, "tie", len(rows), tuple(parts), below))
    written = torch.zeros(len(d), dtype=torch.bool)
    written[rows] = True
    return written


def _scale_bound(norm: Node, channel: Tensor) -> Tensor:
    """float64 [K]: an upper bound of s = (variance + eps)^(-1/2) of these channels over the batch."""
    used, place = torch.unique(channel, return_inverse=True)
    x = pick(norm._saved_input, used, 1).to(torch.float64)
    dims = (0, *range(2, x.dim()))
    count = math.prod(x.shape[k] for k in dims)
    mean = x.mean(dims, keepdim=True)
    squares = ((x - mean) ** 2).mean(dims)
    drift = x.abs().mean(dims) * 2 * gamma(count)  # of the rounded mean
    least = (squares * (1 - 2 * gamma(count)) - drift * drift - TINY).clamp(min=0)
    bound: Tensor = (least + eps_of(norm)).rsqrt() * SLACK
    return bound[place]
