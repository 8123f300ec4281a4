"""Ranks of the parameters for the lexicographic form of E4: layers by depth, each layer's bias above its weights."""

from __future__ import annotations

import math
from collections import defaultdict
from fractions import Fraction

import torch

from .bias import Bias, bias_of
from .choices import Ties
from .coverage import kinks_of
from .equality import base_of, follow_to, tied_pairs
from .findings import Ranks
from .layers import Graph, Order
from .records import OpRecord


def rank_leaves(graph: Graph, order: Order[OpRecord], strict: bool) -> Ranks:
    """Split a layer's bias from its other parameters where every record of the layer agrees on it.

    The bias block of a same-group tie is exactly zero and that of a touch is -1, so ranking the bias above the
    weights settles all touches by moving every bias down (Algorithm 2's remark), without any row of the weights.
    """
    of: dict[str, int] = {}
    chosen: dict[OpRecord, Bias] = {}
    present = set(graph.record_of.values())
    tied: dict[OpRecord, list[OpRecord]] = defaultdict(list)
    for record in present:
        if record.ties is not None and len(record.ties.windows):
            tied[base_of(graph, record, strict)].append(record)
    for index, layer in enumerate(order.layers):
        for leaf in layer.leaves:
            of[leaf] = 2 * index
        biases = {record: bias_of(graph, record, order.own[record]) for record in layer.records if record in present}
        if _torn(biases):
            continue
        if _splits(graph, order, biases, tied):
            for record, bias in biases.items():
                if bias is not None:
                    chosen[record] = bias
                    of[bias.leaf] = 2 * index + 1
    return Ranks(order, of, chosen)


def _torn(biases: dict[OpRecord, Bias | None]) -> bool:
    """Do touches ask some entry of a bias for several sides (a unit at both kinks of a hardtanh, in two samples)?

    Then its weights may tell them apart: they are decided jointly. Sides differ where their lambda does
    (:class:`adcert.coverage.Kink`).
    """
    touched = [(record, bias) for record, bias in biases.items() if bias is not None and len(record.touches)]
    weights = {record: [kink.weight for kink in kinks_of(record)] for record, _ in touched}
    if len({weight for each in weights.values() for weight in each}) < 2:
        return False
    asked: dict[tuple[str, int], Fraction | None] = {}
    for record, bias in touched:
        units, kinks, _ = record.touched()
        distinct = torch.unique(torch.stack([bias.group(units), kinks], 1), dim=0)  # touches may be many
        for group, kink in distinct.tolist():
            weight = weights[record][kink]
            if asked.setdefault((bias.leaf, group), weight) != weight:
                return True
    return False


def _splits(
    graph: Graph, order: Order[OpRecord], biases: dict[OpRecord, Bias | None], tied: dict[OpRecord, list[OpRecord]]
) -> bool:
    used = {bias.leaf for bias in biases.values() if bias is not None}
    for record, bias in biases.items():
        for leaf in order.own[record]:
            if leaf in used and (bias is None or bias.leaf != leaf):
                return False  # here the same parameter is not a bias
        if bias is not None and not all(_same_bias(graph, pooling, record, bias) for pooling in tied[record]):
            return False  # ties across biases: solve jointly with the weights
    return True


def _same_bias(graph: Graph, pooling: OpRecord, base: OpRecord, bias: Bias) -> bool:
    """Do the tied units of every window of a pooling add the same entry of the bias?"""
    images = isinstance(pooling.ties, Ties) and len(base.input_shape) == len(pooling.ties.size)
    if images and bias.run % math.prod(base.input_shape[-2:]) == 0:
        return True  # windows stay inside one plane, and so does the bias
    assert pooling.ties is not None
    d, good = follow_to(graph, pooling, base, tied_pairs(pooling.ties)[1])
    if not bool(good.all()):
        return False
    both = (d.plus >= 0) & (d.minus >= 0)
    return torch.equal(bias.group(d.plus[both]), bias.group(d.minus[both]))
