"""E6: units that the loss does not feel near w, because a partial derivative on every way to it is exactly zero.

A unit is idle if each of its readers is idle, or reads it with partial derivative 0 in every active branch: a window in
which it loses strictly (E2), an activation in a flat piece of which it lies (E3), a weight that is 0, a dropped unit, a
normalisation with gamma = 0. It moves by O(t) along a direction, so what reads it moves by o(t) on its account. Not
enough is a zero backward gradient: a kink that is touched hides what lies behind it, and counts as felt.

Found by one pass backwards from the loss that adds up absolute values: the radii of :mod:`adcert.balls`, which cannot
cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backward import Pass, Unsupported
from .balls import Ball
from .layers import Graph, shape_of
from .nodes import Node
from .records import OpRecord
from .relevance import felt_inputs
from .slices import Slices, concatenate, from_dense, padded
from .vjp import Sink

LIGHT = 1 << 18  # entries of all recorded inputs of a graph that is worth a pass at every step with a decision


def felt(graph: Graph) -> dict[OpRecord, Tensor] | None:
    """Per record a mask of its flat outputs: may the loss feel them? None where that cannot be told."""
    walk = _Felt(graph)
    try:
        with torch.no_grad():
            walk.start()
    except Unsupported:
        return None
    return walk.outputs


class _Felt(Pass):
    """One row whose radius is positive exactly where some way to the loss has no zero factor."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, 1, False)
        self.outputs: dict[OpRecord, Tensor] = {}

    def start(self) -> None:
        for root in self.graph.roots:
            if len(root._input_metadata) != 1:
                raise Unsupported(f"{root.name()} with several outputs as a loss")
            shape = padded(shape_of(root, 0))
            self.mark((root, 0), torch.ones(shape, dtype=torch.bool), shape)
        for node in self.graph.nodes:
            waiting = self.pending.pop(node, None)
            for number, stacks in (waiting or {}).items():
                self.visit(node, number, concatenate(stacks))

    def mark(self, edge: tuple[Node, int], mask: Tensor, shape: tuple[int, ...]) -> None:
        ones = mask.reshape(1, *shape).to(torch.float64)
        self.send(edge, from_dense(Ball(ones, ones.clone()), shape))

    def visit(self, node: Node, number: int, g: Slices) -> None:
        record = self.graph.record_of.get(node)
        if record is None:
            if self.graph.leaf(node) is None:
                try:
                    super().visit(node, number, g)
                except Unsupported:  # no rule, as for most losses: it may feel all that it reads
                    self.mark_all(node)
            return
        if number != 0:
            raise Unsupported(node.name())
        radius = g.data.value.abs() if g.data.radius is None else g.data.radius + g.data.value.abs()
        mask = torch.zeros(g.shape, dtype=torch.bool)
        mask[g.sample] = radius != 0  # NaN, of an infinite radius times 0, is felt
        self.outputs[record] = mask.reshape(-1)
        if record.edge[0] is not None:
            shape = padded(shape_of(*record.edge))
            self.mark(record.edge, felt_inputs(record, mask.reshape(-1)), shape)
        if record.own_edge[0] is not None:  # slopes that were computed
            shape = padded(shape_of(*record.own_edge))
            self.mark(record.own_edge, torch.full(shape, bool(mask.any())), shape)

    def mark_all(self, node: Node) -> None:
        for source, number in self.graph.edges[node]:
            if source is not None and self.graph.leaf(source) is None:
                shape = padded(shape_of(source, number))
                self.mark((source, number), torch.ones(shape, dtype=torch.bool), shape)

    def sink(self, edge: tuple[Node, int]) -> Sink | None:
        """Parameters are not asked; what a weight was computed from is."""
        found = super().sink(edge)
        return None if isinstance(found, str) else found
