"""From what graphs showed to what a certificate needs: one order of layers, ranks, and the rows of all of them.

A :class:`Share` is what one process saw of a step. The loss of a step is the sum of those of its processes, and its
gradient that of gradient accumulation over their graphs; so :func:`merge` makes the share that one process with all of
these graphs would have had. :func:`assemble` needs no graph and runs on any thread.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from .between import Free, joined
from .certificate import Block
from .conclusion import Known, LayerFindings, Observed, Prints, Tally
from .coverage import Cover, Facts, cover
from .differences import RowSet
from .findings import Findings
from .gradients import Gradients, Sample
from .hull import Hull
from .joint import Joint
from .layers import Layer, Order, arrange

_NUMBERED = re.compile(r"(.*)#([0-9]+)", re.DOTALL)  # Recorder.unique


@dataclass(frozen=True, eq=False)
class Seen:
    """One recorded operation: what orders its layer, and what its decisions came to.

    ``own``, ``upstream``: of :class:`adcert.layers.Order`; ``bias``: its kind; ``facts``: None if some operation pools;
    ``found``: None where nothing was decided.
    """

    name: str
    own: frozenset[str]
    upstream: frozenset[str]
    bias: str = "none"
    facts: Facts | None = None
    found: Findings | Tally | None = None


@dataclass(frozen=True, eq=False)
class Share:
    """What one process saw of a step; no tensor of it requires grad or shares memory with the graph.

    Fields that are not explained here are those of :class:`adcert.conclusion.Observed`. ``split``: of every leaf in a
    layer whether it is a bias that ranks above its layer's weights; ``free``: touches with proxies between the sides;
    ``foreign``: leaves outside the model; ``problem``: why its own graphs have no order of layers, or "".
    ``sample``: of gradients and parameters, if they are to be compared.
    """

    failures: list[str]
    strict: bool
    mixed: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)
    problem: str = ""
    seen: tuple[Seen, ...] = ()
    split: dict[str, int] = field(default_factory=dict)
    rowsets: list[RowSet] = field(default_factory=list)
    free: list[Free] = field(default_factory=list)
    joint: Joint = field(default_factory=lambda: Joint(missing="its rows were not taken"))
    empty: list[tuple[str, Block]] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    foreign: frozenset[str] = frozenset()
    assumptions: tuple[str, ...] = ()
    prints: Mapping[str, Prints | Known] = field(default_factory=dict)
    gradients: Gradients | None = None
    hull: Hull | None = None
    sample: Sample | Known | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def unlisted(self) -> int:
        """Rows that were left out of ``rowsets`` because others prove a system empty."""
        return sum(each.found.unlisted for each in self.seen if each.found is not None)

    def rows(self) -> list[RowSet]:
        """Every set of rows once, of whatever system."""
        rowsets = [*self.rowsets, *(rows for free in self.free for rows in free.rowsets), *self.joint.rowsets]
        return list({id(rowset): rowset for rowset in rowsets}.values())

    @property
    def nbytes(self) -> int:
        """What holding it costs, in bytes: its rows and lists."""
        tensors = [t for prints in self.prints.values() if isinstance(prints, Prints) for t in prints.lists]
        tensors += [t for each in self.seen if isinstance(each.found, Findings) for t in each.found.open]
        tensors += [torch.from_numpy(element.rows) for element in (self.hull.elements if self.hull is not None else ())]
        for rowset in self.rows():
            for part in rowset.parts:
                tensors += [t for t in (part.owner, part.group, part.plus, part.minus, part.radius) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


def assemble(share: Share) -> Observed:
    """All of a step that a certificate needs."""
    failures = list(share.failures)
    own, upstream = {each: each.own for each in share.seen}, {each: each.upstream for each in share.seen}
    order = arrange(own, upstream, share.problem)
    covered, matrices = _covered(order)
    free, doubts = _between(share, covered)
    rowsets = share.rowsets + free
    ranks = _ranks(order, share.split)
    problem = order.problem or ("" if failures or share.outside else _misplaced(rowsets, ranks))
    if problem and share.strict and rowsets:
        failures.append(problem)
    return Observed(
        failures=failures,
        mixed=share.mixed + doubts,
        outside=share.outside,
        hull=share.hull,
        unsettled=share.unsettled,
        layers=tuple(_layer(layer, ranks, share.shapes) for layer in order.layers),
        rowsets=rowsets,
        ranks=ranks,
        empty=share.empty,
        unlisted=share.unlisted,
        shapes=share.shapes,
        strict=share.strict,
        cover=covered,
        matrices=matrices,
        assumptions=share.assumptions,
        prints=dict(share.prints),
        gradients=share.gradients,
        seconds=dict(share.seconds),
        problem="" if share.strict else problem,
        joint=Joint(missing="it has no rows for proxies between the sides") if free else share.joint,
    )


def _covered(order: Order[Seen]) -> tuple[Cover | None, frozenset[str]]:
    """The theorem that covers the whole step, and the matrices of Theorem 5: every record's facts are needed."""
    facts = {each: each.facts for each in order.own if each.facts is not None}
    return cover(order, facts) if facts.keys() == order.own.keys() else (None, frozenset())


def _between(share: Share, covered: Cover | None) -> tuple[list[RowSet], list[str]]:
    """Rows of the touches with proxies between the one-sided derivatives, and why they may not do."""
    if not share.free:
        return [], []
    rowsets, doubts = joined(share.free, share.shapes)
    if share.strict and covered is None:
        doubts.append(f"{rowsets[0].op}: proxies between the one-sided derivatives, which Theorem 8 does not admit")
    return rowsets, doubts


def _ranks(order: Order[Seen], split: Mapping[str, int]) -> dict[str, int]:
    """Ranks 1, 2, ... in the order of all graphs."""
    used: dict[str, int] = {}
    for index, layer in enumerate(order.layers):
        for leaf in layer.leaves:
            used[leaf] = 2 * index + split.get(leaf, 0)
    dense = {rank: number for number, rank in enumerate(sorted(set(used.values())), start=1)}
    return {leaf: dense[rank] for leaf, rank in used.items()}


def _misplaced(rowsets: list[RowSet], ranks: Mapping[str, int]) -> str:
    """Recheck, in the order of all graphs, that every row sits in its deepest nonzero block."""
    for rowset in rowsets:
        own = {ranks[part.leaf] for part in rowset.parts}  # one rank
        if len(own) > 1 or any(ranks[leaf] >= rank for leaf in rowset.below for rank in own):
            return f"{rowset.op}: the layers of several backward passes do not fit into one order"
    return ""


def _layer(layer: Layer[Seen], ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> LayerFindings:
    kinds = {each.bias for each in layer.records}
    return LayerFindings(
        name=layer.name,
        ops=tuple(each.name for each in layer.records),
        parameters=layer.leaves,
        bias=kinds.pop() if len(kinds) == 1 else "partial",
        rank=min((ranks.get(leaf, 1) for leaf in layer.leaves if leaf in shapes), default=1),
        found=tuple(each.found for each in layer.records if each.found is not None),
    )


def merge(shares: Sequence[Share]) -> Share:
    """The share of one process that runs the graphs of all of these, in turn: the loss is their sum.

    Operations are numbered on: what "relu" is on the second process is "relu#2" here. A combination of Theorem H is of
    one number and there is none; the joint system needs the joint rows of all.
    """
    used: dict[str, int] = defaultdict(int)
    taken: set[str] = set()
    found = [_renamed(share, _names(share, used, taken)) for share in shares]
    prefixed = [(f"rank {number}: ", share) for number, share in enumerate(found)]
    missing = next((prefix + share.joint.missing for prefix, share in prefixed if share.joint.missing), "")
    failures = [prefix + text for prefix, share in prefixed for text in share.failures]
    for prefix, share in prefixed:
        if share.foreign:
            text = f"{prefix}{min(share.foreign)}, a leaf outside the model, is not the other ranks': not supported"
            failures.append(text)
        failures += [] if share is found[0] else _differences(prefix, share, found[0])
    return Share(
        failures=failures,
        strict=any(share.strict for share in found),
        mixed=[prefix + text for prefix, share in prefixed for text in share.mixed],
        outside=[prefix + text for prefix, share in prefixed for text in share.outside],
        unsettled=[prefix + text for prefix, share in prefixed for text in share.unsettled],
        problem=next((prefix + share.problem for prefix, share in prefixed if share.problem), ""),
        seen=tuple(each for share in found for each in share.seen),
        split={leaf: rank for share in found for leaf, rank in share.split.items()},
        rowsets=[rowset for share in found for rowset in share.rowsets],
        free=[free for share in found for free in share.free],
        joint=Joint(
            rowsets=[rowset for share in found for rowset in share.joint.rowsets],
            doubts=[prefix + text for prefix, share in prefixed for text in share.joint.doubts],
            missing=missing,
        ),
        empty=[item for share in found for item in share.empty],
        shapes={leaf: shape for share in found for leaf, shape in share.shapes.items()},
        assumptions=tuple(dict.fromkeys(text for share in found for text in share.assumptions)),
        prints={name: prints for share in found for name, prints in share.prints.items()},
    )


def _differences(prefix: str, share: Share, first: Share) -> list[str]:
    """Why a process does not differentiate at the point, and with the result, of the first one."""
    found = []
    if [*share.shapes.items()] != [*first.shapes.items()]:  # gradients are averaged in this order
        unequal = {leaf for leaf, _ in share.shapes.items() ^ first.shapes.items()} or {"their order"}
        found.append(f"{prefix}its trainable parameters are not those of rank 0: {min(unequal)}")
    if share.strict != first.strict:
        found.append(f"{prefix}strict={share.strict}, but rank 0 has strict={first.strict}")
    samples = {"" if each.sample is None else each.sample.digest() for each in (share, first)}
    if len(samples) > 1 and not (share.failures or first.failures):
        found.append(
            f"{prefix}its gradients or parameters are not those of rank 0: no backward pass of the step averaged them "
            "(no_sync, or a forward pass around DistributedDataParallel), FSDP gathers or averages in another order, "
            "or the ranks have parted before"
        )
    return found


def _names(share: Share, used: dict[str, int], taken: set[str]) -> dict[str, str]:
    """New names of a share's operations, in the order in which they ran; ``used``: how often each was, before."""
    split = {}
    for name in {**dict.fromkeys(each.name for each in share.seen), **dict.fromkeys(share.prints)}:
        numbered = _NUMBERED.fullmatch(name)
        split[name] = (numbered[1], int(numbered[2])) if numbered else (name, 1)
    names = {}
    for name, (base, _) in sorted(split.items(), key=lambda item: item[1]):
        new = name
        while not used[base] or new in taken:
            used[base] += 1
            new = base if used[base] == 1 else f"{base}#{used[base]}"
        names[name] = new
        taken.add(new)
    return names


def _renamed(share: Share, names: Mapping[str, str]) -> Share:
    if all(name == new for name, new in names.items()):
        return share
    rows = {id(rowset): replace(rowset, op=names[rowset.op]) for rowset in share.rows()}

    def new(rowsets: Iterable[RowSet]) -> Iterator[RowSet]:
        return (rows[id(rowset)] for rowset in rowsets)

    return replace(
        share,
        seen=tuple(replace(each, name=names[each.name], facts=_of(each.facts, names)) for each in share.seen),
        rowsets=list(new(share.rowsets)),
        free=[
            Free([replace(item, op=names[item.op]) for item in free.classes], list(new(free.rowsets)))
            for free in share.free
        ],
        joint=replace(share.joint, rowsets=list(new(share.joint.rowsets))),
        prints={names[name]: prints for name, prints in share.prints.items()},
    )


def _of(facts: Facts | None, names: Mapping[str, str]) -> Facts | None:
    return None if facts is None else replace(facts, name=names[facts.name])
