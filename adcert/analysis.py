"""One step: from the graphs of its losses to a certificate. Plain functions over the records; no user code runs."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .audit import audit_graph
from .certificate import Block, Certificate, LayerReport, Verdict
from .decisions import Findings, Scope, decide_record, rank_leaves
from .differences import RowSet
from .layers import Graph, Layer, Leaves, Order, Tau, order_layers
from .records import Node, OpRecord
from .systems import System, solve
from .watch import Watch


class StepAnalysis:
    """Collects what each backward pass of a step shows; :meth:`certificate` joins it.

    Call :meth:`root` right before a backward pass runs, while the graph still holds its saved tensors.
    """

    def __init__(self, model: torch.nn.Module | None, strict: bool) -> None:
        self.leaves = Leaves(model)
        self.strict = strict
        self.failures: dict[str, None] = {}  # the audit's: nothing can be concluded
        self.findings: dict[OpRecord, Findings] = {}
        self.taus: dict[OpRecord, Tau] = {}
        self.bias: dict[OpRecord, str] = {}
        self.ranks: dict[str, int] = {}
        self.prints: dict[str, str] = {}
        self.pairs = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.roots: set[Node] = set()
        self.assumptions: dict[str, None] = {}

    def root(self, roots: Sequence[Tensor], inputs: Iterable[Tensor] | Tensor | None, watch: Watch) -> list[OpRecord]:
        """Analyse the graph below ``roots``; ``inputs`` are those of autograd.grad or backward(inputs=...).

        Returns the records of the graph.
        """
        start = time.perf_counter()
        nodes = [tensor.grad_fn for tensor in roots if tensor.grad_fn is not None]
        again = bool(nodes) and self.roots.issuperset(nodes)  # step.loss(loss), or the same loss once more
        self.roots.update(nodes)
        if not all(bool(torch.isfinite(tensor.detach()).all()) for tensor in roots):
            self.failures["the loss is not finite"] = None
        graph = Graph(nodes, watch.recorder.records, self.leaves)
        records = [graph.record_of[node] for node in graph.nodes if node in graph.record_of]
        self._audit(graph, inputs, watch)
        if again:
            return records
        for record in records:
            self._check_record(record)
        middle = time.perf_counter()
        if not self.failures:
            self._decide(graph, records)
        if not any(record.released for record in records):
            self.prints.update({record.name: fingerprint(record) for record in records})
        self.seconds["audit"] += middle - start
        self.seconds["rows"] += time.perf_counter() - middle
        return records

    def _audit(self, graph: Graph, inputs: Iterable[Tensor] | Tensor | None, watch: Watch) -> None:
        for reason in audit_graph(graph, watch):
            self.failures[reason] = None
        for node, message in watch.mixed:
            if node in graph.position:
                self.failures[f"{message}: autograd does not see this dependence"] = None
        for problem in watch.problems:
            self.failures[problem] = None
        for node in graph.nodes:
            graph.leaf(node)  # names foreign leaves
        self._check_leaves(watch)
        if inputs is not None:
            chosen = {id(t) for t in ([inputs] if isinstance(inputs, Tensor) else inputs)}
            leaves = {id(node.variable) for node in graph.nodes if graph.leaf(node) and hasattr(node, "variable")}
            if chosen != leaves:
                self.failures["the backward pass was restricted to some inputs: not supported"] = None

    def _check_leaves(self, watch: Watch) -> None:
        """A step is about one w; foreign leaves and gradient hooks are assumptions."""
        changed = watch.changed_leaf()
        if changed is not None:
            self.failures[f"{self.leaves.name(changed)} was modified after its first use in the step"] = None
        for name, tensor in self.leaves.trainable().items():
            if not self.leaves.in_model(name):
                self.assumptions[f"{name}, a leaf outside the model, is an independent variable"] = None
            if tensor._backward_hooks:
                self.assumptions[f"hooks on {name} may change its gradient afterwards"] = None

    def _check_record(self, record: OpRecord) -> None:
        if record.released:
            self.failures[f"{record.name}: used by a second backward pass; keep its graph with retain_graph=True"] = (
                None
            )
            return
        if int(record.nonfinite):
            self.failures[f"{record.name}: {int(record.nonfinite)} NaN or infinite activations"] = None
        if record.altered():
            self.failures[f"{record.name}: its output was modified in place after it was recorded"] = None

    def _decide(self, graph: Graph, records: list[OpRecord]) -> None:
        for record in records:
            self.taus[record] = graph.tau(record)
        ranks = rank_leaves(graph, order_layers(self.taus), self.strict)
        self.ranks.update(ranks.of)
        scope = Scope(graph, ranks, self.strict)
        for record in records:
            self.bias[record] = ranks.bias[record].kind if record in ranks.bias else "none"
            try:
                found = decide_record(scope, record)
            except Exception as error:  # the user's training goes on; the step is undecided, loudly
                self.failures[f"{record.name}: the analysis failed with {type(error).__name__}: {error}"] = None
                continue
            earlier = self.findings.get(record)
            if earlier is not None:  # a second backward through the same graph: both losses' rows count
                found.rowsets += earlier.rowsets
                found.doubts += earlier.doubts
            self.findings[record] = found
            self.seconds["partial"] += found.seconds
            self.pairs += found.partial

    def certificate(self, extra: Sequence[str] = (), assumptions: Iterable[str] = ()) -> Certificate:
        """The step's certificate. ``extra``: reasons found elsewhere that leave nothing to conclude."""
        start = time.perf_counter()
        failures = [*self.failures, *extra]
        if not self.roots and not failures:
            failures.append(
                "no backward pass was seen in this step: call loss.backward() inside it, or step.loss(loss)"
            )
        order = order_layers(self.taus)
        doubts = [doubt for found in self.findings.values() for doubt in found.doubts]
        rowsets = [rowset for found in self.findings.values() for rowset in found.rowsets]
        if rowsets and order.problem:
            failures.append(order.problem)
        ranks = self._final_ranks(order)
        blocks: list[Block] = []
        if not failures:
            failures += self._misplaced(rowsets, ranks)
        if not failures:
            try:
                blocks = self._blocks(order, rowsets, ranks)
            except Exception as error:
                failures.append(f"the systems could not be decided: {type(error).__name__}: {error}")
        verdict, reasons = _verdict(failures, doubts, blocks)
        self.seconds["solve"] += time.perf_counter() - start
        return self._assemble(verdict, reasons, order, ranks, blocks, tuple(assumptions))

    def _final_ranks(self, order: Order) -> dict[str, int]:
        """Ranks 1, 2, ... in the final order of all graphs; leaves without a layer rank with the first."""
        used: dict[str, int] = {}
        for index, layer in enumerate(order.layers):
            for leaf in layer.leaves:
                used[leaf] = 2 * index + self.ranks.get(leaf, 0) % 2
        dense = {rank: number for number, rank in enumerate(sorted(set(used.values())), start=1)}
        return {leaf: dense[rank] for leaf, rank in used.items()}

    def _misplaced(self, rowsets: list[RowSet], ranks: dict[str, int]) -> list[str]:
        """Recheck, in the final order, that every row sits in its deepest nonzero block."""
        for rowset in rowsets:
            own = {ranks[part.leaf] for part in rowset.parts}  # one rank
            if len(own) > 1 or any(ranks[leaf] >= rank for leaf in rowset.below for rank in own):
                return [f"{rowset.record.name}: the layers of several backward passes do not fit into one order"]
        return []

    def _blocks(self, order: Order, rowsets: list[RowSet], ranks: dict[str, int]) -> list[Block]:
        names = {leaf: layer.name for layer in order.layers for leaf in layer.leaves}
        home = {record: layer.name for layer in order.layers for record in layer.records}
        shapes = {leaf: tuple(self.leaves.tensor(leaf).shape) for leaf in names}
        systems: dict[tuple[str, int], list[RowSet]] = defaultdict(list)
        for rowset in rowsets:
            if rowset.parts:
                leaf = rowset.parts[0].leaf
                systems[names[leaf], ranks[leaf]].append(rowset)
            else:
                systems[home[rowset.record], 1].append(rowset)
        blocks = []
        for (layer, rank), members in systems.items():
            blocks += solve(System(layer, rank, members, shapes))
        return blocks

    def _assemble(
        self,
        verdict: Verdict,
        reasons: list[str],
        order: Order,
        ranks: dict[str, int],
        blocks: list[Block],
        assumptions: tuple[str, ...],
    ) -> Certificate:
        assumptions = (*self.assumptions, *assumptions)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.leaves.trainable().items()}
        scales = {name: ranks.get(name, 1) for name in shapes}
        layers = tuple(self._report(layer, scales, blocks) for layer in order.layers)
        return Certificate(
            verdict=verdict,
            reasons=reasons,
            layers=layers,
            blocks=tuple(blocks),
            system="paper" if self.strict else "lexicographic",
            claim="bouligand" if verdict is Verdict.CERTIFIED else "",
            shapes=shapes,
            scales=scales,
            assumptions=assumptions,
            fingerprints=dict(self.prints),
            seconds=dict(self.seconds),
        )

    def _report(self, layer: Layer, scales: dict[str, int], blocks: list[Block]) -> LayerReport:
        found = [self.findings[record] for record in layer.records if record in self.findings]
        mine = [block for block in blocks if block.layer == layer.name]
        exemptions: Counter[str] = sum((item.exemptions for item in found), Counter())
        kinds = {self.bias.get(record, "none") for record in layer.records}
        return LayerReport(
            name=layer.name,
            parameters=layer.leaves,
            bias=kinds.pop() if len(kinds) == 1 else "partial",
            rank=min((scales[leaf] for leaf in layer.leaves if leaf in scales), default=1),
            windows=sum(item.windows for item in found),
            ties=sum(item.ties for item in found),
            touches=sum(item.touches for item in found),
            exemptions=dict(+exemptions),
            differing=sum(item.differing for item in found),
            rows=sum(len(block.rows) for block in mine),
            blocks=len(mine),
        )


def _verdict(failures: list[str], doubts: list[str], blocks: list[Block]) -> tuple[Verdict, list[str]]:
    """Precedence: a failed audit, then a provably empty system, then any doubt."""
    if failures:
        return Verdict.UNDECIDED, failures
    empty = [
        f"the system of {block.layer} (rank {block.rank}) is empty: {block.reason}" for block in blocks if block.proof
    ]
    if empty:
        return Verdict.UNCERTIFIED, list(dict.fromkeys(empty))
    doubts = doubts + [f"{block.layer}: {block.reason}" for block in blocks if block.direction is None]
    if doubts:
        return Verdict.UNDECIDED, list(dict.fromkeys(doubts))
    return Verdict.CERTIFIED, []


def fingerprint(record: OpRecord) -> str:
    """sha256 of everything a record's comparisons decided: shapes, touches, ties and their selected members."""
    digest = hashlib.sha256(repr((record.relu, record.input_shape)).encode())
    digest.update(record.touches.numpy().tobytes())
    if record.ties is not None:
        digest.update(repr(record.ties.window).encode())
        digest.update(record.ties.windows.numpy().tobytes() + record.ties.members.numpy().tobytes())
    return digest.hexdigest()
