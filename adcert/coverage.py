"""Which of Theorems 1, 4, 5 and 6 cover a whole graph: decided from its structure, no value looked at.

Theorems 1, 4 and 6 say that AD's gradient is right whatever the values are. All three follow from Theorem E4: the
direction that moves every bias to the side its layer's proxies stand for, deeper layers faster, moves every touching
unit to that side, since a unit's own bias enters with coefficient one and dominates everything upstream. So what has to
be checked is that this direction exists: :func:`failing` lists what stands in its way.

With proxies strictly between the one-sided derivatives (``lambda`` in (0, 1)), let a class be the units that share a
bias entry. No path through the network meets a class twice (a record whose bias is another's lies beside it, never
below), so AD's gradient is affine in the ``lambda`` of each class. At the vertices, every ``lambda`` 0 or 1, it is in
dB by the above; so it is in their convex hull, hence in dC. That needs one ``lambda`` for each class.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch

from .bias import Bias
from .choices import Ties
from .layers import Graph, Order, R, kind_of, shape_of
from .nodes import Node
from .records import OpRecord
from .rows import SAME_UNITS

STATIC = ("Theorem 1", "Theorem 4", "Theorem 6")  # no work at run time


@dataclass(frozen=True)
class Kink:
    """A kink of rho: where it is, ``below`` = D-, ``above`` = D+, AD's proxy, and its side (-1, 1, or 0 for neither).

    >>> Kink(0.0, 0.0, 1.0, 0.25, 0).weight
    Fraction(3, 4)
    """

    at: float
    below: float
    above: float
    proxy: float
    side: int

    @property
    def weight(self) -> Fraction | None:
        """``lambda`` in [0, 1] with proxy = lambda D- + (1 - lambda) D+, exactly; None if there is none."""
        if self.side:
            return Fraction(self.side < 0)
        if self.below == self.above or not all(map(math.isfinite, (self.below, self.above, self.proxy))):
            return None
        below, above, proxy = map(Fraction, (self.below, self.above, self.proxy))
        weight = (above - proxy) / (above - below)
        return weight if 0 <= weight <= 1 else None


@dataclass(frozen=True)
class Added:
    """A bias: its leaf, and whether it is "distinct" or "shared"."""

    leaf: str
    kind: str


@dataclass(frozen=True, eq=False)
class Facts:
    """What the theorems ask about one recorded operation.

    ``kinks``: of rho, none where it is the identity. ``pooled``: phi chooses among two or more units. ``single``: no
    two units, over all samples, share a bias entry. ``mixed``: units that a window holds may add different ones.
    ``even``: AD splits the gradient among tied units. ``matrix``: (leaf, rows B of the input, features) where
    ``y = z A^T (+ b)`` with the leaf A, which nothing else in the layer is computed from.
    """

    name: str
    kinks: tuple[Kink, ...]
    pooled: bool
    bias: Added | None
    single: bool = False
    mixed: bool = False
    even: bool = False
    matrix: tuple[str, int, int] | None = None


@dataclass(frozen=True)
class Failure:
    """A condition that does not hold, and the operation it fails for ("" for the whole network)."""

    reason: str
    operation: str = ""


@dataclass(frozen=True)
class Cover:
    """The theorem that covers a graph, and the set it puts AD's gradient in."""

    theorem: str
    claim: str


def facts_of(graph: Graph, record: OpRecord, own: frozenset[str], bias: Bias | None) -> Facts:
    """The facts of a record; ``bias``: what :func:`adcert.bias.bias_of` says of it."""
    units = math.prod(record.input_shape)
    single = False
    if bias is not None and graph.leaves.tensor(bias.leaf).numel() == units:
        single = len(torch.unique(bias.group(torch.arange(units)))) == units
    return Facts(
        record.name,
        kinks_of(record),
        pools(record),
        None if bias is None else Added(bias.leaf, bias.kind),
        single=single,
        mixed=bias is not None and _mixes(graph, record, bias.run % max(1, math.prod(record.input_shape[-2:])) == 0),
        even=record.ties is not None and record.ties.even,
        matrix=_matrix(graph, record, own),
    )


def _mixes(graph: Graph, record: OpRecord, planes: bool) -> bool:
    """May a window hold units with different biases? ``planes``: a bias is the same all over an image's plane."""
    if pools(record) and not (planes and isinstance(record.ties, Ties)):
        return True
    readers = [graph.record_of.get(node) for node, _, _ in graph.consumers[record.node]]
    return any(_mixes(graph, reader, planes) for reader in readers if reader is not None)


def kinks_of(record: OpRecord) -> tuple[Kink, ...]:
    """The kinks of a record's rho, with the proxies of the running torch in the record's dtype and on its device."""
    if record.rho is None:
        return ()
    rho, proxies = record.rho, record.rho.proxies(record.output)
    each = zip(rho.kinks, rho.ends, proxies, record.sides, strict=True)
    return tuple(Kink(at, *ends, proxy, side) for at, ends, proxy, side in each)


def pools(record: OpRecord) -> bool:
    """Is phi a choice among two or more units?"""
    if isinstance(record.ties, Ties):
        return math.prod(record.ties.window.kernel) > 1
    return record.ties is not None


def _matrix(graph: Graph, record: OpRecord, own: frozenset[str]) -> tuple[str, int, int] | None:
    node: Node = record.edge[0]
    while node is not None and node not in graph.record_of and kind_of(node) in SAME_UNITS:
        node = graph.edges[node][0][0]
    if node is None or node in graph.record_of or kind_of(node) not in ("AddmmBackward", "MmBackward"):
        return None
    sources = [edge[0] for edge in graph.edges[node]]
    if kind_of(node) == "AddmmBackward":
        if node._saved_alpha != 1 or node._saved_beta != 1:
            return None
        bias, *sources = sources
        if bias is not None and graph.leaf(bias) not in own:
            return None
    weight = sources[1]
    if weight is not None and kind_of(weight) == "TBackward":
        weight = graph.edges[weight][0][0]
    leaf = None if weight is None else graph.leaf(weight)
    if leaf is None or leaf not in own or graph.reaches(sources[0], (leaf,)):
        return None
    rows, outputs = shape_of(node, 0)
    return leaf, rows, graph.leaves.tensor(leaf).numel() // max(1, outputs)


def failing(order: Order[R], facts: Mapping[R, Facts]) -> dict[str, tuple[Failure, ...]]:
    """Per theorem the conditions that fail in a graph; where nothing fails it applies.

    Theorems 1, 4 and 6 then hold at every step. Theorem 5 still asks for independent inputs at every step that touches.
    """
    kinked = {record: fact for record, fact in facts.items() if fact.kinks}
    common = [Failure(order.problem)] if order.problem else []
    common += [
        Failure("a choice among several units (Lemma 7)", f.name) for f in facts.values() if f.pooled
    ]
    common += [
        Failure("a proxy outside [D-, D+]", f.name) for f in kinked.values() if any(k.weight is None for k in f.kinks)
    ]
    biased = common + list(_biases(order, kinked))
    distinct = [Failure("its bias is shared", f.name) for f in kinked.values() if f.bias and f.bias.kind != "distinct"]
    weights = list(_weights(kinked.values()))
    return {
        "Theorem 1": (*biased, *_samples(kinked.values())),
        "Theorem 4": (*biased, *distinct, *weights),
        "Theorem 6": (*biased, *weights),
        "Theorem 5": (*common, *_matrices(order, kinked)),
    }


def cover(order: Order[R], facts: Mapping[R, Facts]) -> tuple[Cover | None, frozenset[str]]:
    """The first of Theorems 1, 4 and 6 that covers every recorded operation; the matrices A_l of Theorem 5's form."""
    conditions = failing(order, facts)
    theorem = next((theorem for theorem in STATIC if not conditions[theorem]), None)
    matrices = [] if conditions["Theorem 5"] else [fact.matrix[0] for fact in facts.values() if fact.matrix is not None]
    return None if theorem is None else Cover(theorem, claim_of(facts.values())), frozenset(matrices)


def claim_of(facts: Collection[Facts]) -> str:
    """The set that holds AD's gradient where every condition on proxies is met."""
    return "bouligand" if all(kink.side for fact in facts for kink in fact.kinks) else "clarke"


def shifted(order: Order[R], facts: Mapping[R, Facts]) -> frozenset[R]:
    """Records all of whose touches are settled, whatever the values are, by moving their own bias.

    Ties elsewhere are no obstacle: they get no say in a bias that all units of a window add.
    """
    if order.problem:
        return frozenset()
    kinked = {record: fact for record, fact in facts.items() if fact.kinks}
    biases = [fact.bias.leaf for fact in kinked.values() if fact.bias is not None]
    spoilt = {leaf for leaf in biases if any(_misread(order, kinked, leaf)) or not _agree(kinked.values(), leaf)}
    spoilt |= {fact.bias.leaf for fact in kinked.values() if fact.bias is not None and fact.mixed}
    return frozenset(r for r, fact in kinked.items() if fact.bias is not None and fact.bias.leaf not in spoilt)


def outside(kink: Kink) -> str:
    """Why a proxy is in no subdifferential of rho."""
    ends = sorted((kink.below, kink.above))
    return f"autodiff's derivative {kink.proxy:g} lies outside [{ends[0]:g}, {ends[1]:g}]"


def _biases(order: Order[R], kinked: Mapping[R, Facts]) -> Iterator[Failure]:
    """Every kinked record needs a bias of its own layer, which no other record reads in another way."""
    for fact in kinked.values():
        if fact.bias is None:
            yield Failure("no trainable bias of its own is added to its input (Lemma 2)", fact.name)
    for leaf in sorted({fact.bias.leaf for fact in kinked.values() if fact.bias is not None}):
        for name in _misread(order, kinked, leaf):
            yield Failure(f"it reads {leaf}, the bias of another operation, in another way", name)


def _misread(order: Order[R], kinked: Mapping[R, Facts], leaf: str) -> Iterator[str]:
    for record, own in order.own.items():
        bias = kinked[record].bias if record in kinked else None
        if leaf in own and (bias is None or bias.leaf != leaf):
            yield record.name


def _agree(facts: Collection[Facts], leaf: str) -> bool:
    """One lambda at all kinks of the records that add this bias."""
    weights = [kink.weight for fact in facts if fact.bias and fact.bias.leaf == leaf for kink in fact.kinks]
    return None not in weights and len(set(weights)) <= 1


def _weights(facts: Collection[Facts]) -> Iterator[Failure]:
    for fact in facts:
        if fact.bias is not None and not _agree(facts, fact.bias.leaf):
            yield Failure("proxies from different sides (Lemma 3)", fact.name)


def _samples(facts: Collection[Facts]) -> Iterator[Failure]:
    users = Counter(fact.bias.leaf for fact in facts if fact.bias is not None)
    for fact in facts:
        if fact.bias is not None and (users[fact.bias.leaf] > 1 or not fact.single):
            yield Failure("several units or samples share an entry of its bias", fact.name)


def _matrices(order: Order[R], kinked: Mapping[R, Facts]) -> Iterator[Failure]:
    users = Counter(leaf for own in order.own.values() for leaf in own)
    for fact in kinked.values():
        if fact.matrix is None:
            yield Failure("its input is not z A^T (+ b) with a trainable matrix A of its own", fact.name)
        elif users[fact.matrix[0]] > 1:
            yield Failure("its matrix is used by several operations", fact.name)
