"""The step's program with other branches at its touches and ties: those that a direction p leads to.

From the input to the loss every touching unit goes to the side to which its gradient moves it along p, and every tied
window to the member that moves up most (down, for a minimum), where the gradients are those under the choices made so
far. All inequalities used are kept as rows: a p that makes each of them positive resolves every selection, so that by
Theorem E4 the gradient of the loss under these choices is a Bouligand subgradient. Nothing is taken to be irrelevant,
and no operation is left out.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from .backward import Pass
from .balls import Ball
from .certificate import Column
from .choices import Choice, Ties
from .differences import Differences
from .feasibility import check_direction
from .layers import Graph, kind_of, shape_of, upstream_records
from .nodes import Node
from .records import OpRecord
from .slices import Slices, from_dense, padded, reduced, scattered, through_record, through_slopes, to_dense
from .transfer import host, take

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_EXTREMA: dict[str, Callable[[Tensor], Tensor]] = {
    "Amax": torch.amax,
    "Amin": torch.amin,
    "Max": torch.max,
    "Min": torch.min,
    "_Greater": lambda x: torch.maximum(*x.unbind()),  # of calls_selections: maximum and minimum of two tensors
}


class Uncertain(Exception):
    """This direction does not decide every selection, or a selection is of a kind that is not tried here."""


@dataclass(eq=False)
class Branched(OpRecord):
    """A record with slopes of our own, of every output (``table``), and selections of our own (``ties``)."""

    table: Ball | None = None

    def slopes(self, units: Tensor) -> Ball:
        return super().slopes(units) if self.table is None else self.table.map(lambda t: t[units])


@dataclass(frozen=True, eq=False)
class Shares:
    """An even split: output ``output[k]`` passes the share ``weight[k]`` of its gradient to input ``input[k]``."""

    output: Tensor
    input: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Element:
    """A Bouligand subgradient, exact, with the rows ``[K, W]`` of its choices, which ``direction`` makes positive."""

    gradient: Array
    rows: Array
    rules: tuple[str, ...]
    direction: tuple[int, ...]


def decisions(graph: Graph) -> int:
    """How many touches and tied windows the graph has."""
    ties = [record.ties for record in graph.record_of.values() if record.ties is not None]
    return sum(len(record.touches) for record in graph.record_of.values()) + sum(len(t.windows) for t in ties)


Chosen = Mapping[OpRecord, Branched | Shares]


class Program:
    """The graph below one number, the tensor at ``edge``, as a function of all its trainable leaves."""

    def __init__(self, graph: Graph, edge: tuple[Node, int]) -> None:
        self.graph = graph
        self.edge = edge
        self.sizes = {name: leaf.numel() for name, leaf in graph.leaves.trainable().items()}
        self.width = sum(self.sizes.values())
        records = (graph.record_of.get(node) for node in reversed(graph.nodes))
        self.records = [record for record in records if record is not None and record.decides()]
        self.above = upstream_records({record: graph.tau(record) for record in graph.record_of.values()})
        self.known: dict[object, Ball] = {}  # gradients of a record's units, by the choices above it

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(Column(name, np.arange(size)) for name, size in self.sizes.items() if size)

    def gradients(self, edge: tuple[Node, int], units: Tensor, chosen: Chosen) -> Ball:
        """Of these flat units of the tensor at ``edge``, float64 [K, W]."""
        differences = Differences(units, torch.full_like(units, -1))
        leaves = _Walk(self.graph, len(units), chosen).run(edge, differences)
        value = torch.zeros(len(units), self.width, dtype=torch.float64)
        radius, start = torch.zeros_like(value), 0
        for name, size in self.sizes.items():
            ball = leaves.get(name)
            if ball is not None:
                value[:, start : start + size] = ball.value
                if ball.radius is not None:
                    radius[:, start : start + size] = ball.radius
            start += size
        return Ball(value, radius if bool(radius.any()) else None)

    def autodiff(self) -> Array | None:
        """AD's own gradient, its even splits included; None if it is not known exactly."""
        even = [record for record in self.records if record.ties is not None and record.ties.even]
        return self.loss({record: _shares(record) for record in even})

    def loss(self, chosen: Chosen) -> Array | None:
        """The gradient of the number itself; None if it is not known exactly."""
        gradient = self.gradients(self.edge, torch.zeros(1, dtype=torch.int64), chosen)
        found = gradient.radius is None and bool(torch.isfinite(gradient.value).all())
        return gradient.value[0].numpy().copy() if found else None

    def along(self, p: tuple[int, ...]) -> Element | None:
        """The element that this direction leads to; None if its gradient is not known exactly.

        Raises:
            Uncertain: the direction does not decide every selection.
        """
        walk = _Along(self, torch.tensor(p, dtype=torch.float64))
        for record in self.records:
            walk.decide(record)
        gradient = self.loss(walk.chosen)
        if gradient is None:
            return None
        nothing = torch.zeros(0, self.width, dtype=torch.float64)
        rows = torch.cat([nothing, *(row.value for row in walk.rows)]).numpy()
        if any(row.radius is not None and bool(row.radius.any()) for row in walk.rows):
            raise Uncertain("rows that are rounded")  # they may hold by margins that no evaluation near w confirms
        if not check_direction(rows, p, None, None):
            raise Uncertain("the direction does not make every row positive")
        return Element(gradient, rows, tuple(walk.rules), p)


class _Walk(Pass):
    """A partial backward pass under other choices at some of the records."""

    def __init__(self, graph: Graph, count: int, chosen: Chosen) -> None:
        super().__init__(graph, count, False)
        self.chosen = chosen

    def visit(self, node: Node, number: int, g: Slices) -> None:
        record = self.graph.record_of.get(node)
        chosen = None if record is None else self.chosen.get(record)
        if record is None or chosen is None:
            super().visit(node, number, g)
        elif isinstance(chosen, Shares):
            self.send(record.edge, _split(self.count, record, chosen, g))
        else:
            self.send(record.edge, through_record(self.count, chosen, g))
            own = record.own_edge
            if own[0] is not None:
                self.send(own, reduced(self.count, through_slopes(record, g), padded(shape_of(*own))))


def _split(count: int, record: OpRecord, shares: Shares, g: Slices) -> Slices:
    shape = padded(record.input_shape)
    dense = to_dense(count, g).map(lambda t: t.reshape(count, -1)[:, shares.output])
    into = shares.input.expand(count, -1)
    ball = scattered(dense * Ball(shares.weight), into, math.prod(shape), len(shares.output))
    return from_dense(ball.map(lambda t: t.reshape(count, *shape)), shape)


def _shares(record: OpRecord) -> Shares:
    """AD's even split, measured."""
    assert record.ties is not None
    outputs = torch.arange(record.output.numel())
    owner, first, second = record.ties.pairs()
    chosen = record.ties.selected(outputs)
    other = torch.where(first == chosen[owner], second, first)
    count = 1 + torch.bincount(owner, minlength=len(outputs))
    for size in set(count.tolist()):
        if size & (size - 1) or not _even(kind_of(record.node), size, record.output.dtype):
            raise Uncertain(f"{record.name}: shares of {size} tied units are rounded")
    output = torch.cat([outputs, owner])
    return Shares(output, torch.cat([chosen, other]), 1.0 / count[output].to(torch.float64))


@functools.lru_cache(maxsize=256)
def _even(kind: str, size: int, dtype: torch.dtype) -> bool:
    """Does the running torch split a gradient evenly among so many tied entries?"""
    run = _EXTREMA.get(kind.removesuffix("Backward"))
    if run is None or size == 1:
        return run is not None
    with torch.enable_grad(), torch.inference_mode(False), torch._C.DisableTorchFunction():
        x = torch.zeros(size, dtype=dtype, requires_grad=True)
        (found,) = torch.autograd.grad(run(x), x)
    return bool((found.to(torch.float64) == 1.0 / size).all())


@dataclass(eq=False)
class _Along:
    """The choices along p, record by record, with the rows that they rest on."""

    program: Program
    p: Tensor
    chosen: dict[OpRecord, Branched | Shares] = field(default_factory=dict)
    rows: list[Ball] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    made: dict[OpRecord, tuple[float, ...]] = field(default_factory=dict)  # the choices, to be compared

    def decide(self, record: OpRecord) -> None:
        if record.ties is None:
            self._touches(record)
        elif record.rho is None:
            self._ties(record, record.ties, None)
        elif record.relu and isinstance(record.ties, Ties):
            self._ties(record, record.ties, take(record.output, torch.arange(record.output.numel())) > 0)
        else:
            raise Uncertain(f"{record.name}: an activation and a selection in one")

    def _keep(self, rows: Ball, rule: str) -> Tensor:
        """Keep the rows that are not exactly zero, turned to the side of p; returns that side of each, 0 for those."""
        moved = ~rows.zero().all(1)
        side = torch.sign(rows.value @ self.p) * moved
        if bool((side[moved] == 0).any()):
            raise Uncertain("a gradient that is orthogonal to the direction")
        kept = Ball(rows.value * side[:, None], rows.radius).map(lambda t: t[moved])
        if len(kept.value):
            self.rows.append(kept)
            self.rules += [rule] * len(kept.value)
        return side.to(torch.int64)

    def _gradients(self, record: OpRecord, units: Tensor) -> Ball:
        """Of units of y; they depend on the choices above only, which often are those of an earlier direction."""
        above = self.program.above[record]
        key = (record, tuple(units.tolist()), tuple(self.made[r] for r in self.program.records if r in above))
        if key not in self.program.known:
            self.program.known[key] = self.program.gradients(record.edge, units, self.chosen)
        return self.program.known[key]

    def _touches(self, record: OpRecord) -> None:
        units = record.touched()[0]
        side = self._keep(self._gradients(record, units), "touch")
        self.made[record] = tuple(side.tolist())
        units, side = units[side != 0], side[side != 0]
        table = record.slopes(torch.arange(record.output.numel()))
        forced = _slopes(record, units, side)
        value, radius = table.value.clone(), torch.zeros_like(table.value)
        if table.radius is not None:
            radius = table.radius.clone()
        value[units] = forced.value
        radius[units] = 0.0 if forced.radius is None else forced.radius
        self.chosen[record] = _branched(record, record.ties, Ball(value, radius if bool(radius.any()) else None))

    def _ties(self, record: OpRecord, ties: Ties | Choice, positive: Tensor | None) -> None:
        """``positive``: of a pooling of relu(y), where its output is."""
        selected = host(ties.selected(torch.arange(record.output.numel()))).reshape(-1).clone()
        groups = list(_groups(record, ties, selected))
        for group, best in zip(groups, self._ranked(record, groups), strict=True):
            selected[list(group.outputs)] = best
        table = None if positive is None else Ball(self._rectified(record, positive, selected))
        none = torch.zeros(0, dtype=torch.int64)
        self.made[record] = (*selected.tolist(), *(() if table is None else table.value.tolist()))
        self.chosen[record] = _branched(record, Choice(none, none, none, none, selected), table)

    def _rectified(self, record: OpRecord, positive: Tensor, selected: Tensor) -> Tensor:
        """Slopes, 0 or 1, of a pooling of relu(y); where its value is 0, the largest of 0 and what touches."""
        assert isinstance(record.ties, Ties)
        slopes, units = positive.to(torch.float64), record.touched()[0]
        place, windows, _ = record.ties.places(units)
        groups = []
        for window in sorted(set(windows[~positive[windows]].tolist())):
            members = units[place[windows == window]]
            groups.append(Group(members, {window: len(members) - 1}))
        if groups:
            best = torch.cat(self._ranked(record, groups))
            side = self._keep(self._gradients(record, best), "touch")
            for group, unit, sign in zip(groups, best.tolist(), side.tolist(), strict=True):
                if sign > 0:
                    (window,) = group.outputs
                    slopes[window], selected[window] = 1.0, unit
        return slopes

    def _ranked(self, record: OpRecord, groups: Sequence[Group]) -> list[Tensor]:
        """The members of the ranks asked for, in the order in which p moves them; they have to part from all others."""
        if not groups:
            return []
        units = torch.unique(torch.cat([group.members for group in groups]))
        gradients, found, parted = self._gradients(record, units), [], []
        for group in groups:
            place = torch.searchsorted(units, group.members)
            order = place[torch.argsort(gradients.value[place] @ self.p, stable=True)]
            ranks = sorted(set(group.outputs.values()))
            pairs = {(max(rank, k), min(rank, k)) for rank in ranks for k in range(len(order)) if k != rank}
            parted.append(order[torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2)])
            found.append(units[order[list(group.outputs.values())]])
        above, below = torch.cat(parted).unbind(1)
        if bool((self._keep(gradients.map(lambda t: t[above]) - gradients.map(lambda t: t[below]), "tie") < 0).any()):
            raise Uncertain("members that are too close to each other along the direction")
        return found


@dataclass(frozen=True, eq=False)
class Group:
    """Tied units, and which of them outputs select: output -> rank among them, 0 for the one that is the least."""

    members: Tensor
    outputs: dict[int, int]


def _groups(record: OpRecord, ties: Ties | Choice, selected: Tensor) -> Iterator[Group]:
    """The tied units of every window, or of every value in a line that is sorted; ranks are AD's own choice."""
    owner, larger, smaller = ties.pairs()
    if not ties.linked:
        for window in ties.windows.tolist():
            mine, chosen = owner == window, int(selected[window])
            if not bool(((larger[mine] == chosen) | (smaller[mine] == chosen)).all()):
                raise Uncertain(f"{record.name}: an order of others than what is selected")
            members = torch.unique(torch.cat([larger[mine], smaller[mine]]))
            yield Group(members, {window: int((larger[mine] == chosen).sum())})
        return
    below: dict[int, set[int]] = defaultdict(set)
    near: dict[int, set[int]] = defaultdict(set)
    for up, down in zip(larger.tolist(), smaller.tolist(), strict=True):
        below[up].add(down)
        near[up].add(down)
        near[down].add(up)
    outputs = defaultdict(list)
    for output, unit in enumerate(selected.tolist()):
        outputs[unit].append(output)
    left = set(near)
    while left:
        members = _reached(near, left.pop())
        left -= members
        ranks = {
            output: len(_reached(below, unit)) - 1 for unit in sorted(members) for output in outputs.get(unit, ())
        }
        yield Group(torch.tensor(sorted(members)), ranks)


def _reached(links: Mapping[int, set[int]], start: int) -> set[int]:
    found, stack = {start}, [start]
    while stack:
        new = links.get(stack.pop(), set()) - found
        found |= new
        stack += new
    return found


def _branched(record: OpRecord, ties: Ties | Choice | None, table: Ball | None) -> Branched:
    held = {item.name: getattr(record, item.name) for item in fields(OpRecord)}
    return Branched(**held | {"ties": ties}, table=table)


def _slopes(record: OpRecord, units: Tensor, side: Tensor) -> Ball:
    """The one-sided derivatives of rho at touching units, on these sides (-1 or 1)."""
    assert record.rho is not None
    if record.relu:
        return Ball((side > 0).to(torch.float64))
    found = record.values(units)
    left = None if record.left is None else take(record.left.expand(record.input_shape), units)
    coded = found.dtype == torch.uint8
    code = (found if coded else record.rho.code(found)).long()
    if not bool((code % 2 == 1).all()):
        raise Uncertain(f"{record.name}: a touch that is at no kink")
    return record.rho.slope(code + side, record.output, None if coded else found, left)
