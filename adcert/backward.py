"""The batched partial backward engine: gradients of many unit differences at once, with rigorous error bounds.

A difference ``e_plus - e_minus`` of units of y is carried backwards through the step's graph down to every parameter
above it. All differences go together: the gradient at a tensor is a stack of :class:`Slices`, one for each (row,
sample) pair that is not zero, so that work and memory follow the samples involved. Arithmetic is float64 with
error radii (:mod:`adcert.balls`); each operation needs a rule here, an operation without one raises
:class:`Unsupported` by name. The user's graph is only read: no hook fires, ``.grad`` is not touched, nothing
upstream is freed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .balls import Ball
from .differences import Differences
from .layers import ACCUMULATE, Graph, complex_at, kind_of, shape_of
from .movement import PERMUTATIONS, permutation
from .nodes import Node
from .normalization import BATCH_NORM
from .rules import NUMBERED, RULES
from .slices import Slices, concatenate, padded, reduced, seeds, through_record, through_slopes
from .vjp import Sink, Unsupported

BUDGET = 256 << 20  # bytes a batch of rows may take

__all__ = ["BUDGET", "Gradients", "Pass", "Unsupported", "gradients"]


@dataclass(frozen=True, eq=False)
class Gradients:
    """For rows ``start .. start + count``: leaf name -> Ball [count, numel]; leaves not reached are exactly zero."""

    start: int
    count: int
    leaves: dict[str, Ball]


def gradients(
    graph: Graph, edge: tuple[Node, int], differences: Differences, *, local: bool = False
) -> Iterator[Gradients]:
    """Partial backward passes from differences of units of the tensor at ``edge``, in batches of bounded memory.

    ``local``: stop at recorded operations; complete for w_l, which no operation upstream reads.

    Raises:
        Unsupported: an operation upstream has no rule; the message names it.
    """
    per_row = _bytes_per_row(graph, edge)
    step = max(1, BUDGET // per_row)
    for start in range(0, len(differences), step):
        batch = Differences(differences.plus[start : start + step], differences.minus[start : start + step])
        yield Gradients(start, len(batch), Pass(graph, len(batch), local).run(edge, batch))


def _bytes_per_row(graph: Graph, edge: tuple[Node, int]) -> int:
    """An estimate from above of what one row takes: parameters, and activations of the samples involved."""
    total, seen, stack = 0, {edge[0]}, [edge[0]]
    coupled = False
    largest = 1
    while stack:
        node = stack.pop()
        leaf = graph.leaf(node)
        if leaf is not None:
            total += graph.leaves.tensor(leaf).numel()
        elif node not in graph.record_of:
            shape = shape_of(node, 0)
            largest = max(largest, math.prod(shape) // (1 if coupled else max(1, shape[0] if shape else 1)))
            coupled = coupled or _couples(node)
        for source, _ in graph.linked(node.next_functions):
            if source is not None and source not in seen:
                seen.add(source)
                stack.append(source)
    if coupled:
        largest = max((math.prod(shape_of(n, 0)) for n in seen if graph.leaf(n) is None), default=largest)
    return 16 * (total + 8 * largest)


_SPLITTING = frozenset(f"{name}Backward" for name in "View UnsafeView ReshapeAlias Mm Addmm".split())
_MIXING = frozenset(f"{name}Backward" for name in "Permute Transpose T Flip Roll Cat Index".split())


def _couples(node: Node) -> bool:
    """Rows spread over samples here: statistics of the batch, or a first dimension that is another one above."""
    kind = kind_of(node)
    if kind in BATCH_NORM:
        return bool(node._saved_training)
    for source, number in node.next_functions:
        if source is None or source.name() == ACCUMULATE:
            continue
        first, above = (padded(shape)[0] for shape in (shape_of(node, 0), shape_of(source, number)))
        if kind in _SPLITTING:
            if first and above and first % above and above % first:
                return True
        elif first != above or (kind in _MIXING and _moves_samples(node)):
            return True
    return False


def _moves_samples(node: Node) -> bool:
    return kind_of(node) not in PERMUTATIONS or permutation(node)[:1] not in ([], [0])


class Pass:
    """One batch: pending gradients by graph edge, taken in the graph's topological order."""

    def __init__(self, graph: Graph, count: int, local: bool) -> None:
        self.local = local
        self.graph = graph
        self.count = count
        self.pending: dict[Node, dict[int, list[Slices]]] = defaultdict(lambda: defaultdict(list))
        self.leaves: dict[str, Ball] = {}

    def run(self, edge: tuple[Node, int], differences: Differences) -> dict[str, Ball]:
        if edge[0] is None:
            return {}
        with torch.no_grad():
            return self._run(edge, differences)

    def _run(self, edge: tuple[Node, int], differences: Differences) -> dict[str, Ball]:
        self.send(edge, seeds(differences, shape_of(*edge)))
        start = self.graph.position[edge[0]]
        for node in self.graph.nodes[start:]:
            waiting = self.pending.pop(node, None)
            if waiting is None:
                continue
            for number, stacks in waiting.items():
                self.visit(node, number, concatenate(stacks))
        return self.leaves

    def send(self, edge: tuple[Node, int], slices: Slices) -> None:
        if edge[0] is None or len(slices.row) == 0:
            return
        (edge,) = self.graph.linked((edge,))
        alive = ~slices.data.zero().flatten(1).all(1) if slices.data.value.dim() > 1 else ~slices.data.zero()
        if not bool(alive.all()):
            slices = Slices(slices.row[alive], slices.sample[alive], slices.data.map(lambda t: t[alive]), slices.shape)
        if len(slices.row):
            self.pending[edge[0]][edge[1]].append(slices)

    def visit(self, node: Node, number: int, g: Slices) -> None:
        record = self.graph.record_of.get(node)
        leaf = self.graph.leaf(node)
        if complex_at(node):
            raise Unsupported(f"{node.name()} of complex numbers")
        if record is not None and self.local:
            return
        if record is not None:
            self.send(record.edge, through_record(self.count, record, g))
            own = record.own_edge
            if own[0] is not None:
                self.send(own, reduced(self.count, through_slopes(record, g), padded(shape_of(*own))))
        elif leaf is not None:
            shape = padded(tuple(self.graph.leaves.tensor(leaf).shape))
            full = g.data.value.new_zeros(self.count, shape[0], *shape[1:])
            radius = torch.zeros_like(full)
            full[g.row, g.sample] = g.data.value
            if g.data.radius is not None:
                radius[g.row, g.sample] = g.data.radius
            self.add_leaf(leaf, Ball(full.flatten(1), radius.flatten(1) if g.data.radius is not None else None))
        else:
            try:
                self._apply(node, number, g)
            except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
                raise Unsupported(f"{node.name()} of this form ({error})") from error

    def _apply(self, node: Node, number: int, g: Slices) -> None:
        kind = kind_of(node)
        numbered, rule = NUMBERED.get(kind), RULES.get(kind)
        if numbered is not None:
            numbered(self, self.graph.legible(node), number, g)
        elif rule is None or number != 0:
            raise Unsupported(node.name())
        else:
            rule(self, self.graph.legible(node), g)

    def add_leaf(self, leaf: str, gradient: Ball) -> None:
        """``gradient``: [count, numel]."""
        known = self.leaves.get(leaf)
        self.leaves[leaf] = gradient if known is None else known + gradient

    def sink(self, edge: tuple[Node, int]) -> Sink | None:
        """Where a weight's gradient goes: its leaf, or the edge of what it was computed from; None if frozen."""
        if edge[0] is None:
            return None
        leaf = self.graph.leaf(edge[0])
        return edge if leaf is None else leaf
