"""One step on the training thread: from the graphs of its losses to compact rows. No user code runs.

What needs activations happens here, right before a backward pass frees them; :mod:`adcert.conclusion` makes the
certificate of it, on whatever thread.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from .adopted import adopt
from .assembly import Seen, Share
from .audit import audit_graph
from .between import entangled
from .certificate import Block
from .conclusion import LARGE, Prints
from .coverage import Facts, facts_of, pools
from .decisions import decide_record
from .differences import RowSet
from .findings import Findings, Scope
from .gradients import Gradients
from .hull import Hull, combine, light
from .idle import LIGHT, felt
from .joint import ENTRIES, Joint, by_rank
from .layers import Graph, Leaves, Order, Tau, order_layers, upstream_records
from .lists import Coming
from .nodes import Node
from .partial import finish, give_up
from .ranks import rank_leaves
from .records import OpRecord
from .systems import System, contradiction, solve
from .ties import exact_rows
from .transfer import Batch
from .watch import Watch

SAMPLE = 4096  # exact rows of one record that are looked at first where there are more in all
CHEAP = 8  # differences worth a partial backward pass without asking whether it can matter


class StepAnalysis:
    """Collects what each backward pass of a step shows; :meth:`share` hands it over.

    Call :meth:`root` right before a backward pass runs, while the graph still holds its saved tensors.
    """

    def __init__(self, model: torch.nn.Module | None, strict: bool) -> None:
        self.leaves = Leaves(model)
        self.strict = strict
        self.failures: dict[str, None] = {}  # the audit's: nothing can be concluded
        self.outside: dict[str, None] = {}  # even splits that no system covers
        self.hull: Hull | None = None
        self.backwards = 0  # passes seen, and losses named
        self.findings: dict[OpRecord, Findings] = {}
        self.taus: dict[OpRecord, Tau] = {}
        self.bias: dict[OpRecord, str] = {}
        self.facts: dict[OpRecord, Facts] = {}  # of every record, unless one pools
        self.ranks: dict[str, int] = {}
        self.prints: dict[str, Prints] = {}
        self.empty: list[tuple[str, Block]] = []  # the leaf of a block that is proved empty already
        self.order: Order[OpRecord] | None = None  # of the only graph so far
        self.joint = Joint()
        self.pairs = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.roots: set[tuple[Node, int]] = set()  # with the number of the node's output
        self.assumptions: dict[str, None] = {}

    @contextmanager
    def _guarded(self, record: OpRecord) -> Iterator[None]:
        """The user's training goes on whatever happens here; the step is undecided then, loudly."""
        try:
            yield
        except Exception as error:
            self.failures[f"{record.name}: the analysis failed with {type(error).__name__}: {error}"] = None

    def root(self, roots: Sequence[Tensor], inputs: Iterable[Tensor] | Tensor | None, watch: Watch) -> list[OpRecord]:
        """Analyse the graph below ``roots``; ``inputs`` are those of autograd.grad or backward(inputs=...).

        Returns the records of the graph. On a GPU the device is asked first and waited for once, after everything
        that needs no answer.
        """
        start = time.perf_counter()
        edges = [watch.recorder.edge(tensor) for tensor in roots if tensor.grad_fn is not None]
        nodes, losses = [node for node, _ in edges], set(edges)
        again = bool(nodes) and self.roots >= losses  # step.loss(loss), or the same loss once more
        if not (again and losses == self.roots):  # what is combined is the gradient of one number
            self.hull = None
        only = self.backwards == 0 and len(roots) == 1  # a root that is a leaf counts, too
        self.backwards += 1
        self.roots |= losses
        coming = Coming(watch.recorder, [] if again else roots)
        graph = Graph(nodes, watch.recorder.records, self.leaves, watch.recorder.links, watch.dropped)
        adopt(graph, watch.recorder, watch.origin)
        records = [graph.record_of[node] for node in graph.nodes if node in graph.record_of]
        reasons = self._audit(graph, roots, inputs, watch)
        flags = Batch([flag for _, flag in reasons if flag is not None])
        lost = again or self.failures or self.outside or any(flag is None for _, flag in reasons)
        plan = None if lost else self._plan(graph, records)
        asked = time.perf_counter()
        told = iter(flags.wait())
        if not coming.wait():
            self.failures["the loss is not finite"] = None
        if watch.recorder.streams:
            self.seconds["device"] += time.perf_counter() - asked
        self.failures.update({reason: None for reason, flag in reasons if flag is None or not bool(next(told))})
        if again:
            return records
        for record in records:
            self._check_record(record)
        middle = time.perf_counter()
        if not self.failures and plan is not None:
            self._decide(graph, records, plan, next(iter(losses)) if only and losses else None)
        if not any(record.released for record in records):
            self.prints.update({record.name: Prints.of(record) for record in records if not record.overflow})
        self.seconds["audit"] += middle - start
        self.seconds["rows"] += time.perf_counter() - middle
        return records

    def _audit(
        self, graph: Graph, roots: Sequence[Tensor], inputs: Iterable[Tensor] | Tensor | None, watch: Watch
    ) -> list[tuple[str, Tensor | None]]:
        """Reasons for failure; one with a flag, on a device, holds only if the flag is false."""
        reasons: list[tuple[str, Tensor | None]] = [(problem, None) for problem in watch.problems]
        reasons += [(problem, None) for problem in watch.overwritten()]
        reasons += watch.flags
        reasons += audit_graph(graph, watch, roots)
        for node, message in watch.mixed:
            if node in graph.position:
                reasons.append((f"{message}: autograd does not see this dependence", None))
        for node in graph.nodes:
            graph.leaf(node)  # names foreign leaves
        changed = self._check_leaves(watch)
        if changed:
            reasons.append((changed, None))
        if inputs is not None:
            chosen = {id(t) for t in ([inputs] if isinstance(inputs, Tensor) else inputs)}
            leaves = {id(node.variable) for node in graph.nodes if graph.leaf(node) and hasattr(node, "variable")}
            if chosen != leaves:
                reasons.append(("the backward pass was restricted to some inputs: not supported", None))
        return reasons

    def _check_leaves(self, watch: Watch) -> str:
        """A step is about one w, or the reason why not; foreign leaves and gradient hooks are assumptions."""
        for name, tensor in self.leaves.trainable().items():
            if not self.leaves.in_model(name):
                self.assumptions[f"{name}, a leaf outside the model, is an independent variable"] = None
            if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
                self.assumptions[f"hooks on {name} may change its gradient afterwards"] = None
        changed = watch.changed_leaf()
        return "" if changed is None else f"{self.leaves.name(changed)} was modified after its first use in the step"

    def _check_record(self, record: OpRecord) -> None:
        if record.released:
            self.failures[f"{record.name}: used by a second backward pass; keep its graph with retain_graph=True"] = (
                None
            )
            return
        nonfinite = int(record.counts[2])
        if nonfinite:
            self.failures[f"{record.name}: {nonfinite} NaN or infinite activations"] = None
        if record.altered():
            self.failures[f"{record.name}: its output was modified in place after it was recorded"] = None
        if record.overflow:
            self.failures[record.overflow] = None

    def _plan(self, graph: Graph, records: list[OpRecord]) -> tuple[dict[OpRecord, Tau], Order[OpRecord]]:
        """What the layers of the step are with this graph, whatever its values."""
        taus = self.taus | {record: graph.tau(record) for record in records}
        return taus, order_layers(taus)

    def _decide(
        self,
        graph: Graph,
        records: list[OpRecord],
        plan: tuple[dict[OpRecord, Tau], Order[OpRecord]],
        edge: tuple[Node, int] | None,
    ) -> None:
        """``edge``: of the number whose gradient it is, if there is only one."""
        first = not self.taus
        self.taus, order = plan
        self.order = order if first else None
        ranks = rank_leaves(graph, order, self.strict)
        self.ranks.update(ranks.of)
        layered = self.strict or not order.problem
        scope = Scope(graph, ranks if layered else replace(ranks, bias={}), self.strict, layered)
        fresh: dict[OpRecord, Findings] = {}
        pooled = any(pools(record) for record in self.taus)
        light = sum(math.prod(record.input_shape) for record in records) <= LIGHT
        if light and not self.strict and any(record.decides() for record in records):
            graph.felt = felt(graph)
        for record in records:
            self.bias[record] = ranks.bias[record].kind if record in ranks.bias else "none"
            if not pooled:
                self.facts[record] = facts_of(graph, record, order.own[record], ranks.bias.get(record))
            with self._guarded(record):
                found = fresh[record] = decide_record(scope, record)
                through = bool(found.touches) or bool(found.free)
                found.rests = not found.own_alone() or (through and graph.below(record) is not None)
        if layered:
            self._settle_rows(scope, fresh)
            self._settle_pending(scope, fresh)
        start = time.perf_counter()
        if not layered:
            self.joint.alone(scope, fresh)
        elif not self.strict:
            self.joint.second(scope, fresh, self.findings.values(), [leaf for leaf, _ in self.empty])
        self.seconds["joint"] += time.perf_counter() - start
        if edge is not None and not self.strict and not self.failures:
            self._combine(scope, fresh, edge)
        for record, found in fresh.items():
            self.outside.update(dict.fromkeys(found.outside))
            earlier = self.findings.get(record)
            if earlier is not None:  # a second backward through the same graph: both losses' rows count
                found.rowsets += earlier.rowsets
                found.mixed += earlier.mixed
                found.unsettled += earlier.unsettled
                found.unlisted += earlier.unlisted
                found.free.classes += earlier.free.classes
                found.free.rowsets += earlier.free.rowsets
                found.rests |= earlier.rests
            self.findings[record] = found
            self.seconds["partial"] += found.seconds
            self.pairs += found.partial

    def _combine(self, scope: Scope, fresh: dict[OpRecord, Findings], edge: tuple[Node, int]) -> None:
        """Theorem H's combination, where the systems of a tiny network may not certify."""
        start = time.perf_counter()
        try:
            if not scope.graph.dropped and light(scope.graph) and self._open(scope, fresh):
                self.hull = combine(scope.graph, edge)
        except Exception as error:
            self.failures[f"the combination failed with {type(error).__name__}: {error}"] = None
        self.seconds["hull"] += time.perf_counter() - start

    def _open(self, scope: Scope, fresh: dict[OpRecord, Findings]) -> bool:
        """Does neither the layered nor the joint system certify, as far as that is seen here?"""
        if any(found.outside or found.mixed or found.free for found in fresh.values()):
            return True
        shapes = {leaf: tuple(tensor.shape) for leaf, tensor in scope.graph.leaves.trainable().items()}
        if scope.layered and not any(found.unsettled or found.unlisted for found in fresh.values()):
            systems = by_rank(scope, fresh.values())
            zero = any(not rowset.parts for found in fresh.values() for rowset in found.rowsets)
            if not zero and all(_solvable(rows, shapes) for rows in systems.values()):
                return False
        return bool(self.joint.missing or self.joint.doubts) or not _solvable(self.joint.rowsets, shapes)

    def _settle_rows(self, scope: Scope, fresh: dict[OpRecord, Findings]) -> None:
        """Exact rows of the ties. Where they abound a sample may contradict itself: then the others are counted."""
        bulk = [(record, found, rows) for record, found in fresh.items() for rows in found.bulk]
        many = sum(len(rows) for _, _, rows in bulk) > SAMPLE
        bulk.sort(key=lambda item: -len(item[2]))
        for size in (SAMPLE, 4 * SAMPLE) if many else ():
            for record, found, rows in bulk:
                if self.empty or size >= SAMPLE + len(rows):
                    continue
                with self._guarded(record):
                    sample = exact_rows(scope, rows.head(size))
                    self._find_contradiction(scope, [sample], False)
                    if self.empty:
                        found.rowsets.append(sample)
                        found.unlisted += len(rows) - sample.count
                        found.bulk.remove(rows)
        for record, found in fresh.items():
            with self._guarded(record):
                for rows in found.bulk:
                    if many and self.empty:
                        found.unlisted += len(rows)
                    else:
                        found.rowsets.append(exact_rows(scope, rows))
            found.bulk.clear()

    def _settle_pending(self, scope: Scope, fresh: dict[OpRecord, Findings]) -> None:
        """Partial backward passes, unless exact rows contradict each other: then they cannot change the verdict."""
        many = sum(len(pending.differences) for found in fresh.values() for pending in found.pending) > CHEAP
        rows = sum(rowset.count for found in fresh.values() for rowset in found.rowsets)
        if many or rows > LARGE:
            self._find_contradiction(scope, [rowset for found in fresh.values() for rowset in found.rowsets], many)
        for record, found in fresh.items():
            with self._guarded(record):
                if self.empty and many:
                    give_up(found, "the exact rows contradict each other already")
                else:
                    finish(scope, found)

    def _find_contradiction(self, scope: Scope, rowsets: list[RowSet], thorough: bool) -> None:
        """Look for a block of exact rows that is empty; ``thorough``: by deciding the systems if need be."""
        if self.empty:
            return
        shapes = {leaf: tuple(scope.graph.leaves.tensor(leaf).shape) for leaf in scope.ranks.of}
        systems: dict[int, list[RowSet]] = defaultdict(list)
        for rowset in rowsets:
            if rowset.parts:
                systems[scope.ranks.of[rowset.parts[0].leaf]].append(rowset)
        for thoroughly in (False, True) if thorough else (False,):
            for rank, members in sorted(systems.items(), key=lambda item: -sum(rows.count for rows in item[1])):
                system = System(members[0].op, rank, members, shapes)
                found = solve(system, True).blocks if thoroughly else [contradiction(system)]
                block = next((block for block in found if block is not None and block.proof is not None), None)
                if block is not None:
                    self.empty.append((block.columns[0].parameter, block))
                    return

    def share(self, gradients: Gradients | None = None, assumptions: Iterable[str] = ()) -> Share:
        """All of the step that a certificate needs, without anything of its graph.

        ``gradients``: whether they are finite, as far as it is known.
        """
        failures = [*self.failures, *(gradients.problems if gradients else ())]
        if not self.roots and not failures:
            failures.append(
                "no backward pass was seen in this step: call loss.backward() inside it, or step.loss(loss)"
            )
        order = self.order if self.order is not None else order_layers(self.taus)
        trainable = self.leaves.trainable()
        found = self.findings.values()
        return Share(
            failures=failures,
            mixed=[doubt for each in found for doubt in each.mixed] + self._entangled(),
            outside=list(self.outside),
            hull=self.hull,
            unsettled=[doubt for each in found for doubt in each.unsettled],
            seen=tuple(self._seen(record, order) for record in self.taus),
            split={leaf: rank % 2 for leaf, rank in self.ranks.items()},
            rowsets=[rowset for each in found for rowset in each.rowsets],
            free=[each.free for each in found if each.free],
            empty=self.empty,
            shapes={name: tuple(tensor.shape) for name, tensor in trainable.items()},
            foreign=frozenset(name for name in trainable if not self.leaves.in_model(name)),
            strict=self.strict,
            assumptions=(*self.assumptions, *assumptions),
            prints=dict(self.prints),
            gradients=gradients,
            seconds=dict(self.seconds),
            problem=order.problem,
            joint=self.joint,
        )

    def _seen(self, record: OpRecord, order: Order[OpRecord]) -> Seen:
        bias, found = self.bias.get(record, "none"), self.findings.get(record)
        return Seen(record.name, order.own[record], order.upstream[record], bias, self.facts.get(record), found)

    def _entangled(self) -> list[str]:
        """Why touches with proxies between the one-sided derivatives may not do."""
        if not any(found.free for found in self.findings.values()):
            return []
        return entangled(upstream_records(self.taus), self.findings)


def _solvable(rowsets: list[RowSet], shapes: dict[str, tuple[int, ...]]) -> bool:
    blocks = solve(System("", 1, rowsets, shapes, ENTRIES), True).blocks
    return all(block.direction is not None for block in blocks)
