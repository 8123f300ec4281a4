"""From the autograd graph of a step to layers: which parameters are w_l, what is upstream of what.

The graph is read from the loss backwards through ``node.next_functions``; nothing is executed and no hook fires.
``tau_l`` of a recorded operation is everything between its input y and the recorded operations (or leaves) that
feed it; ``w_l`` are the trainable leaves met there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .nodes import Edge, Links, Node, linked
from .recomputed import Dropped
from .records import OpRecord

ACCUMULATE = "torch::autograd::AccumulateGrad"


def shape_of(node: Node, number: int) -> tuple[int, ...]:
    """Shape of output ``number`` of a node (its gradient's shape)."""
    return tuple(int(size) for size in node._input_metadata[number].shape)


def kind_of(node: Node) -> str:
    """Name of a node without the overload number: ``AddBackward0`` -> ``AddBackward``."""
    name: str = node.name()
    return name.rstrip("0123456789")


def spacing(node: Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(stride, padding, dilation) of a convolution, one number for each dimension; torch keeps one alone if it was."""
    kept = [[int(size) for size in getattr(node, f"_saved_{name}")] for name in ("stride", "padding", "dilation")]
    rank = len(shape_of(node, 0)) - 2
    stride, padding, dilation = (tuple(sizes * rank if len(sizes) == 1 else sizes) for sizes in kept)
    return stride, padding, dilation


def complex_at(node: Node) -> bool:
    """Does a node compute complex numbers?"""
    return any(each.dtype.is_complex for each in node._input_metadata)


class Leaves:
    """Names of the leaves that require grad: the model's qualified names, else ``leaf0``, ``leaf1``, ..."""

    def __init__(self, model: torch.nn.Module | None) -> None:
        self._names: dict[int, str] = {}
        self._tensors: dict[str, Tensor] = {}
        self._model: frozenset[str] = frozenset()
        if model is not None:
            for name, parameter in model.named_parameters():
                self._names[id(parameter)] = name
                self._tensors[name] = parameter
            self._model = frozenset(self._tensors)

    def name(self, leaf: Tensor) -> str:
        """The leaf's name; an unknown leaf gets the next free number."""
        if id(leaf) not in self._names:
            name = f"leaf{sum(known.startswith('leaf') for known in self._tensors)}"
            while name in self._tensors:
                name += "_"
            self._names[id(leaf)] = name
            self._tensors[name] = leaf
        return self._names[id(leaf)]

    def stand_in(self, leaf: Tensor, forms: Iterable[Tensor]) -> str:
        """From now on ``leaf`` is the parameter known as one of ``forms``. Returns its name, "" if none is known."""
        name = next((self._names[id(form)] for form in forms if id(form) in self._names), "")
        if name:
            self._names[id(leaf)] = name
            self._tensors[name] = leaf
        return name

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def in_model(self, name: str) -> bool:
        return name in self._model

    def trainable(self) -> dict[str, Tensor]:
        """Every known leaf that requires grad."""
        return {name: tensor for name, tensor in self._tensors.items() if tensor.requires_grad}


_VIEWS = frozenset(f"{name}Backward" for name in "View UnsafeView ReshapeAlias Squeeze Unsqueeze Alias".split())


class Graph:
    """The graph below some roots: nodes in topological order (consumers first), consumers, records by node.

    ``edges``: ``node.next_functions``, which autograd makes anew each time it is asked, along ``links`` (of a
    :class:`~adcert.recorder.Recorder`). ``felt``: of every record the outputs that the loss may feel
    (:mod:`adcert.idle`), if that was asked. ``dropped``: nodes whose saved tensors a checkpoint computes again.
    """

    def __init__(
        self,
        roots: Sequence[Node],
        records: Iterable[OpRecord],
        leaves: Leaves,
        links: Links | None = None,
        dropped: Container[Node] = frozenset(),
    ) -> None:
        self.leaves = leaves
        self.links = {} if links is None else links
        self.dropped = dropped
        self.roots = tuple(roots)
        self.edges: dict[Node, tuple[tuple[Node, int], ...]] = {}
        self.consumers: dict[Node, list[tuple[Node, int, int]]] = defaultdict(list)
        self.nodes = self._sorted(roots)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.record_of = {record.node: record for record in records if record.node in self.position}
        self.felt: dict[OpRecord, Tensor] | None = None
        self._leaf: dict[Node, str | None] = {None: None}
        self._accumulators: dict[str, Node] = {}
        self._reach: dict[Node, int] = {}
        self._ends: list[_End] = []
        self._numbers: dict[_End, int] = {}
        self._tau: dict[OpRecord, Tau] = {}

    def _sorted(self, roots: Sequence[Node]) -> list[Node]:
        edges, consumers = self.edges, self.consumers
        seen: set[Node] = set(roots)
        stack = list(seen)
        while stack:
            node = stack.pop()
            edges[node] = self.linked(node.next_functions)
            for slot, (source, number) in enumerate(edges[node]):
                if source is None:
                    continue
                consumers[source].append((node, slot, number))
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        waiting = {node: len(users) for node, users in consumers.items()}
        order: list[Node] = []
        ready = [node for node in dict.fromkeys(roots) if node not in waiting]
        while ready:
            node = ready.pop()
            order.append(node)
            for source, _ in edges[node]:
                if source is None:
                    continue
                waiting[source] -= 1
                if waiting[source] == 0:
                    ready.append(source)
        return order

    def linked(self, edges: Sequence[Edge]) -> tuple[Edge, ...]:
        """Edges of this graph: what a compiled program made leads into its replay."""
        return tuple(linked(self.links, edge) for edge in edges) if self.links else tuple(edges)

    def legible(self, node: Node) -> Node:
        """The node, as far as a rule may read it."""
        return Dropped(node) if node in self.dropped else node

    def leaf(self, node: Node | None) -> str | None:
        """Name of the leaf a node accumulates into, directly or through a cast (casts are the identity), or None."""
        if node not in self._leaf:
            self._leaf[node] = self._find_leaf(node)
        return self._leaf[node]

    def accumulator(self, leaf: str) -> Node:
        """The node that accumulates the gradient of a leaf of this graph."""
        if not self._accumulators:
            nodes = (node for node in self.nodes if not self.edges[node] and self.leaf(node) is not None)
            self._accumulators = {str(self.leaf(node)): node for node in nodes}
        return self._accumulators[leaf]

    def _find_leaf(self, node: Any) -> str | None:
        name = "" if node is None else node.name()
        while name.startswith("ToCopyBackward"):
            node = node.next_functions[0][0]
            name = "" if node is None else node.name()
        return self.leaves.name(node.variable) if name == ACCUMULATE else None

    def below(self, record: OpRecord) -> OpRecord | None:
        """The recorded operation whose output is y, directly or through views that keep the order of the units."""
        node = record.edge[0]
        while node is not None and node not in self.record_of and kind_of(node) in _VIEWS:
            node = self.edges[node][0][0]
        return self.record_of.get(node)

    def readers(self, record: OpRecord) -> list[OpRecord | None]:
        """What reads the output of a record, directly or through such views; None for anything but another's y."""
        found: list[OpRecord | None] = []
        stack: list[Node] = [record.node]
        while stack:
            node = stack.pop()
            if node in self.roots:
                found.append(None)
            for reader, slot, _ in self.consumers[node]:
                if reader not in self.record_of and kind_of(reader) in _VIEWS:
                    stack.append(reader)
                else:
                    found.append(None if slot else self.record_of.get(reader))
        return found

    def reaches(self, start: Node | None, leaves: Container[str | None]) -> bool:
        """Does some path upwards from ``start`` end in one of these leaves without crossing a recorded operation?"""
        stack, seen = [start], set()
        while stack:
            node = stack.pop()
            if node is None or node in seen or node in self.record_of:
                continue
            seen.add(node)
            leaf = self.leaf(node)
            if leaf is not None and leaf in leaves:
                return True
            stack += [source for source, _ in self.edges[node]]
        return False

    def tau(self, record: OpRecord) -> Tau:
        """The smooth part above a record: its leaves with the number of paths' ends, and the records it reads."""
        if not self._reach:  # once for all records; those of a residual network meet much the same ends
            for node in reversed(self.nodes):
                self._reach[node] = self._mask(node, [source for source, _ in self.edges[node]])
        if record not in self._tau:
            self._tau[record] = self._find_tau(record)
        return self._tau[record]

    def _find_tau(self, record: OpRecord) -> Tau:
        # y, and what the operation itself reads: of its layer, but not above its y
        mask = self._mask(record.node, [record.edge[0], record.own_edge[0]])
        users: dict[str, list[Node]] = defaultdict(list)
        sources = []
        while mask:
            number = mask.bit_length() - 1
            mask ^= 1 << number
            met = self._ends[number]
            if isinstance(met, OpRecord):
                sources.append(met)
            else:
                users[met[0]].append(met[1])
        return Tau({name: tuple(nodes) for name, nodes in users.items()}, tuple(sources))

    def _mask(self, user: Node, sources: Iterable[Node]) -> int:
        """Bits of the ends that ``user`` reaches through what it reads: recorded operations, and uses of leaves."""
        mask = 0
        for slot, node in enumerate(sources):
            record = self.record_of.get(node)
            if record is not None:
                mask |= self._bit(record)
            elif (name := self.leaf(node)) is not None:
                mask |= self._bit((name, user, slot))
            elif node is not None:
                mask |= self._reach[node]
        return mask

    def _bit(self, end: _End) -> int:
        number = self._numbers.setdefault(end, len(self._ends))
        if number == len(self._ends):
            self._ends.append(end)
        return 1 << number


_End = OpRecord | tuple[str, Node, int]  # a leaf's name, who reads it, by which of its edges


@dataclass(frozen=True)
class Tau:
    """Leaves tau_l reads (name -> the nodes that use it, once for each use) and the records whose outputs it reads."""

    leaves: dict[str, tuple[Node, ...]]
    sources: tuple[OpRecord, ...]


class Named(Protocol):
    """A recorded operation, or what is left of one without its graph (:class:`adcert.assembly.Seen`)."""

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Named)


@dataclass(frozen=True, eq=False)
class Layer(Generic[R]):
    """Recorded operations whose w_l intersect, transitively; ``leaves`` is the union of their w_l."""

    records: tuple[R, ...]
    leaves: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.records[0].name


@dataclass(frozen=True)
class Order(Generic[R]):
    """Layers from the input to the loss.

    ``own``: w_l of every record, the leaves of tau_l that no operation upstream reads. ``upstream``: every leaf its y
    depends on otherwise. ``problem``: why the parameters cannot be ordered by depth, or "".
    """

    layers: tuple[Layer[R], ...]
    own: dict[R, frozenset[str]]
    upstream: dict[R, frozenset[str]]
    problem: str


def order_layers(taus: dict[OpRecord, Tau]) -> Order[OpRecord]:
    """Group records into layers and sort the layers topologically.

    A value that skips a nonsmooth operation (``x + f(relu(x))`` with ``x`` affine) brings leaves of an earlier layer
    into tau_l; they stay with the earlier layer, as if ``x`` were one of its outputs. A leaf that is used again
    downstream of its own layer is weight tying, which the layered theorems do not cover: ``problem`` says so. So does a
    circle between layers.
    """
    above = upstream_records(taus)
    upstream_of = {
        record: frozenset(leaf for source in above[record] for leaf in taus[source].leaves) for record in taus
    }
    own = {record: frozenset(taus[record].leaves) - upstream_of[record] for record in taus}
    upstream = {record: (upstream_of[record] | frozenset(taus[record].leaves)) - own[record] for record in taus}
    problem = next((problem for record in taus for problem in _tied(record, taus, above)), "")
    return arrange(own, upstream, problem)


def arrange(own: dict[R, frozenset[str]], upstream: dict[R, frozenset[str]], problem: str) -> Order[R]:
    """Layers of records whose leaves are known, sorted; ``problem``: one that is known already, or ""."""
    groups = _groups(own)
    leaves = [frozenset(leaf for record in group for leaf in own[record]) for group in groups]
    problems = [problem] if problem else []
    home = {leaf: index for index, members in enumerate(leaves) for leaf in members}
    before: list[set[int]] = []
    for index, group in enumerate(groups):
        needed = {home[leaf] for record in group for leaf in upstream[record] if leaf in home}
        if index in needed:
            problems.append(f"the parameters of {group[0].name} cannot be ordered by depth")
        before.append(needed - {index})
    order: list[int] = []
    left = list(range(len(groups)))
    while left:
        free = [index for index in left if not before[index] - set(order)]
        if not free:
            problems.append("layers that share parameters depend on each other in a circle")
            order += left
            break
        order += free
        left = [index for index in left if index not in set(free)]
    layers = tuple(Layer(tuple(groups[i]), tuple(sorted(leaves[i]))) for i in order)
    return Order(layers, own, upstream, problems[0] if problems else "")


def _tied(record: OpRecord, taus: dict[OpRecord, Tau], above: dict[OpRecord, set[OpRecord]]) -> list[str]:
    """Leaves this record's tau uses in a node that no operation upstream shares, though one upstream uses the leaf."""
    found = []
    for leaf, users in taus[record].leaves.items():
        others = [source for source in above[record] if leaf in taus[source].leaves]
        known = {user for source in others for user in taus[source].leaves[leaf]}
        if others and not set(users) <= known:
            found.append(
                f"weight tying: parameter {leaf} is used by {others[0].name} and again by {record.name} downstream"
            )
    return found


def _groups(own: Mapping[R, frozenset[str]]) -> list[list[R]]:
    parent = {record: record for record in own}

    def root(record: R) -> R:
        while parent[record] is not record:
            parent[record] = parent[parent[record]]
            record = parent[record]
        return record

    owner: dict[str, R] = {}
    for record, leaves in own.items():
        for leaf in leaves:
            first = owner.setdefault(leaf, record)
            parent[root(record)] = root(first)
    groups: dict[R, list[R]] = defaultdict(list)
    for record in own:
        groups[root(record)].append(record)
    return list(groups.values())


def upstream_records(taus: dict[OpRecord, Tau]) -> dict[OpRecord, set[OpRecord]]:
    """Of every record the ones its y depends on."""
    found: dict[OpRecord, set[OpRecord]] = {}
    for start in taus:
        stack = [start]
        while stack:
            record = stack[-1]
            missing = [source for source in taus[record].sources if source not in found]
            if record in found or not missing:
                if record not in found:
                    direct = taus[record].sources
                    found[record] = set(direct).union(*(found[source] for source in direct))
                stack.pop()
            else:
                stack += missing
    return found
