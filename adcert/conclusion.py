"""From what a step showed to its certificate: systems, decisions, fingerprints. Needs no graph, runs on any thread."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .between import judged
from .certificate import FREE, Block, Certificate, LayerReport, Verdict
from .choices import Ties
from .coverage import Cover
from .differences import RowSet
from .errors import AdcertError
from .findings import Findings
from .gradients import Gradients
from .hull import Hull
from .independence import independent
from .joint import ENTRIES, Joint
from .records import OpRecord
from .systems import Memory, Solved, System, Team, count_blocks, solve

_EMPTY = Verdict.UNCERTIFIED
LARGE = 256  # rows of a step from which on nothing more is decided once one block is proved empty


@dataclass(frozen=True, eq=False)
class Prints:
    """Everything a record's comparisons decided: shapes, touches, ties and their selected members."""

    header: str
    lists: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, record: OpRecord) -> Prints:
        rho = None if record.rho is None else (record.rho.name, record.rho.arguments)
        header = repr((rho, record.input_shape))
        if record.ties is None:
            return cls(header, (record.touches,))
        window = repr(record.ties.window) if isinstance(record.ties, Ties) else ""
        return cls(header + window, (record.touches, *record.ties.lists()))

    def digest(self) -> str:
        """sha256."""
        digest = hashlib.sha256(self.header.encode())
        for values in self.lists:
            digest.update(repr(tuple(values.shape)).encode())
            digest.update(values.numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Known:
    """A fingerprint that another process has made."""

    text: str

    def digest(self) -> str:
        """sha256."""
        return self.text


@dataclass(frozen=True)
class Tally:
    """What :class:`adcert.findings.Findings` has counted."""

    windows: int
    ties: int
    touches: int
    differing: int
    unlisted: int
    exemptions: Counter[str]


@dataclass(frozen=True)
class LayerFindings:
    """One layer's report before its systems are decided; ``ops``: names of its records, ``found``: their findings."""

    name: str
    ops: tuple[str, ...]
    parameters: tuple[str, ...]
    bias: str
    rank: int
    found: tuple[Findings | Tally, ...]

    def counts(self) -> dict[str, Any]:
        """Sums over the records, by the names of :class:`LayerReport`."""
        exemptions: Counter[str] = sum((item.exemptions for item in self.found), Counter())
        names = ("windows", "ties", "touches", "differing")
        sums = {name: sum(getattr(item, name) for item in self.found) for name in names}
        return sums | {"exemptions": dict(+exemptions)}


@dataclass(frozen=True, eq=False)
class Observed:
    """A whole step, over all its graphs (:mod:`adcert.assembly`).

    ``failures``: of the audit, nothing can be concluded; ``unsettled``: decisions of which only a layered row is open;
    ``outside``, ``mixed``: even splits, and touches with proxies on neither side, that no direction covers. Only
    ``hull``, Theorem H's combination if there is one, does without them. ``ranks``: of the leaves that belong to a
    layer. ``problem``: why there is no layered system, or "". ``joint``: the rows of Theorem E4. ``empty``: blocks that
    are proved empty already, with a leaf of each; ``unlisted``: rows that were left out of ``rowsets`` because of that.
    Of ``rowsets`` and ``gradients`` some values may still be on their way from a device. ``cover``: the theorem that
    covers the step whatever its values are. ``matrices``: A_l of every layer with kinks, if the step has the form of
    Theorem 5.
    """

    failures: list[str]
    mixed: list[str]
    layers: tuple[LayerFindings, ...]
    rowsets: list[RowSet]
    ranks: dict[str, int]
    empty: list[tuple[str, Block]]
    unlisted: int
    shapes: dict[str, tuple[int, ...]]
    strict: bool
    assumptions: tuple[str, ...]
    prints: dict[str, Prints | Known]
    gradients: Gradients | None = None
    cover: Cover | None = None
    matrices: frozenset[str] = frozenset()
    seconds: dict[str, float] = field(default_factory=dict)
    unsettled: list[str] = field(default_factory=list)
    problem: str = ""
    joint: Joint = field(default_factory=lambda: Joint(missing="its rows were not taken"))
    outside: list[str] = field(default_factory=list)
    hull: Hull | None = None

@dataclass(frozen=True, eq=False)
class _Answer:
    """What one system says of the step."""

    system: str
    verdict: Verdict
    reasons: list[str]
    layers: tuple[LayerReport, ...]
    blocks: tuple[Block, ...] = ()
    sound: bool = True  # False where something is missing that cannot be


Solve = Callable[[System, bool], Solved]  # adcert.systems.solve, whatever helps it


def conclude(step: Observed, memory: Memory | None = None, team: Team | None = None) -> Certificate:
    """The step's certificate: UNDECIDED if the systems cannot be decided for whatever reason.

    ``memory``: directions of earlier steps, tried first where a block is large. ``team``: processes that conclude the
    same step and share the work.
    """
    start = time.perf_counter()

    def decided(system: System, short: bool) -> Solved:
        return solve(system, short, memory, team)

    try:
        failures = [*step.failures, *(step.gradients.late() if step.gradients else [])]
        answer = _nothing(step, failures) if failures else _tried(step, decided)
    except Exception as error:
        reason = f"the systems could not be decided: {type(error).__name__}: {error}"
        answer = _nothing(step, [reason])
        if team is not None and not isinstance(error, AdcertError):  # which all processes have raised
            team.leave(reason)
    joint = answer.system in ("joint", "hull")
    certificate = Certificate(
        verdict=answer.verdict,
        reasons=answer.reasons,
        layers=answer.layers,
        blocks=answer.blocks,
        system=answer.system,
        claim=_claim(answer) if answer.verdict is Verdict.CERTIFIED else "",
        theorem=_theorem(step, answer) if answer.verdict is Verdict.CERTIFIED else "",
        shapes=step.shapes,
        scales={name: 1 if joint else step.ranks.get(name, 1) for name in step.shapes},
        assumptions=step.assumptions,
        fingerprints={name: prints.digest() for name, prints in step.prints.items()},
        seconds=dict(step.seconds),
        combination=step.hull.combination if answer.system == "hull" and step.hull is not None else None,
    )
    certificate.seconds["solve"] = time.perf_counter() - start
    return certificate


def _claim(answer: _Answer) -> str:
    """What a certified step claims: with proxies between the one-sided derivatives a convex combination."""
    several = answer.system == "hull" and len(answer.blocks) > 1
    return "clarke" if several or any(FREE in block.rules for block in answer.blocks) else "bouligand"


def _theorem(step: Observed, answer: _Answer) -> str:
    """The theorem a certified step rests on: one that needs no values, else 5 where it holds, else the system's own."""
    if answer.system in ("joint", "hull"):
        return "Theorem E4" if answer.system == "joint" else "Theorem H"
    if step.cover is not None:
        return step.cover.theorem
    if step.matrices and _independent(step.matrices, answer.layers, answer.blocks):
        return "Theorem 5"
    if _claim(answer) == "clarke":
        return "Theorem E5"
    return "Theorem 8" if step.strict else "Theorem E4"


def _independent(matrices: frozenset[str], layers: tuple[LayerReport, ...], blocks: tuple[Block, ...]) -> bool:
    """Theorem 5, sharpened: the inputs z of the samples in which a unit touches are independent, for every unit.

    Only those of each unit have to be: they are the rows of its block. If all columns of z are independent, they are.
    """
    touches, rows = sum(layer.touches for layer in layers), sum(len(block.rows) for block in blocks)
    return touches == rows and all(_inputs_independent(matrices, block) for block in blocks)


def _inputs_independent(matrices: frozenset[str], block: Block) -> bool:
    """Of a block's rows the entries in a matrix only: those of a bias do not count."""
    of_matrix = np.concatenate([np.full(len(c.indices), c.parameter in matrices) for c in block.columns])
    parts = (None if array is None else array[:, of_matrix] for array in (block.rows, block.minus, block.radius))
    return bool(of_matrix.any()) and independent(*parts)


def _tried(step: Observed, solve: Solve) -> _Answer:
    """The systems' answer; where they do not certify, and no defect is behind that, the combination's."""
    answer = _nothing(step, step.outside) if step.outside else _answer(step, solve)
    if answer.verdict is Verdict.CERTIFIED or not answer.sound or step.strict or step.hull is None:
        return answer
    return _convex(step, step.hull)


def _convex(step: Observed, hull: Hull) -> _Answer:
    """Theorem H: its elements are reported as blocks of a layer of their own."""
    name = _whole(step)
    blocks = hull.blocks(name)
    layers = tuple(replace(_report(layer, {}), rank=1, rows=0) for layer in step.layers)
    leaves = tuple(column.parameter for column in hull.columns)
    whole = LayerReport(name, leaves, "none", 1, rows=sum(len(b.rows) for b in blocks), blocks=len(blocks))
    return _Answer("hull", Verdict.CERTIFIED, [], (*layers, whole), blocks)


def _answer(step: Observed, solve: Solve) -> _Answer:
    """The layered system's answer; the joint one's where there is no other, or where only that one certifies.

    Where the layered system has a direction the joint one has too; where both are empty the layered proof, which names
    a layer, is kept.
    """
    if step.problem:
        tried = not step.joint.missing and not step.unlisted
        return _jointly(step, solve) if tried else _nothing(step, [step.problem, _untried(step)])
    first = _layered(step, solve)
    if step.strict or first.verdict is Verdict.CERTIFIED or not first.sound:
        return first
    if step.joint.missing or step.unlisted:
        return replace(first, reasons=[*first.reasons, _untried(step)])
    second = _jointly(step, solve)
    if second.verdict is Verdict.CERTIFIED or (second.verdict, first.verdict) == (_EMPTY, Verdict.UNDECIDED):
        return second
    return replace(first, reasons=[*first.reasons, *second.reasons])


def _untried(step: Observed) -> str:
    return f"the joint system was not tried: {step.joint.missing or 'rows were left out'}"


def _nothing(step: Observed, reasons: list[str]) -> _Answer:
    name = "paper" if step.strict else "joint" if step.problem else "lexicographic"
    return _Answer(name, Verdict.UNDECIDED, reasons, tuple(_report(layer, {}) for layer in step.layers))


def _layered(step: Observed, solve: Solve) -> _Answer:
    """The systems of all layers and ranks: the paper's, or the lexicographic form of E4."""
    solved = _solved(step, solve)
    blocks = tuple(block for system in solved.values() for block in system.blocks)
    left = step.unlisted + sum(system.count - len(system.blocks) for system in solved.values())
    failures = []
    if left and not any(block.proof is not None for block in blocks):
        failures.append(f"{left} rows or blocks were left out though no other one is proved empty")  # a defect of ours
    verdict, reasons = _verdict(failures, [*step.mixed, *step.unsettled], blocks)
    layers = tuple(_report(layer, solved) for layer in step.layers)
    return _Answer("paper" if step.strict else "lexicographic", verdict, reasons, layers, blocks, not failures)


def _jointly(step: Observed, solve: Solve) -> _Answer:
    """Theorem E4's one system over all parameters. Its rows are reported as those of a layer of its own."""
    name = _whole(step)
    solved = solve(System(name, 1, step.joint.rowsets, step.shapes, ENTRIES), True)
    verdict, reasons = _verdict([], [*step.mixed, *step.joint.doubts], solved.blocks, joint=True)
    layers = tuple(replace(_report(layer, {}), rank=1, rows=0) for layer in step.layers)
    if solved.count:
        leaves = dict.fromkeys(column.parameter for block in solved.blocks for column in block.columns)
        whole = LayerReport(name, tuple(leaves), "none", 1, rows=solved.rows, blocks=solved.count)
        layers = (*layers, whole)
    return _Answer("joint", verdict, reasons, layers, tuple(solved.blocks))


def _whole(step: Observed) -> str:
    """The name of a layer of all parameters."""
    name = "all parameters"
    while any(layer.name == name for layer in step.layers):
        name += "_"
    return name


def failed(step: Observed, reason: str) -> Certificate:
    """The certificate of a step whose conclusion was lost: UNDECIDED, for this reason."""
    return conclude(replace(step, failures=[*step.failures, reason], prints={}, gradients=None))


def _solved(step: Observed, solve: Solve) -> dict[tuple[str, int], Solved]:
    """Every (layer, rank) system's blocks."""
    names = {leaf: layer.name for layer in step.layers for leaf in layer.parameters}
    home = {op: layer.name for layer in step.layers for op in layer.ops}
    systems: dict[tuple[str, int], list[RowSet]] = defaultdict(list)
    for rowset in step.rowsets:
        if rowset.parts:
            leaf = rowset.parts[0].leaf
            systems[names[leaf], step.ranks[leaf]].append(rowset)
        else:
            systems[home[rowset.op], 1].append(rowset)
    known = {(names[leaf], step.ranks[leaf]): block for leaf, block in step.empty}
    solved: dict[tuple[str, int], Solved] = {}
    free = any(rowset.rule == FREE for rowset in step.rowsets)
    short = _size(step.rowsets) > LARGE and not free  # then one empty block is enough, found where rows abound
    for (layer, rank), members in sorted(systems.items(), key=lambda item: -_size(item[1]) if short else 0):
        system = System(layer, rank, members, {leaf: step.shapes[leaf] for leaf in names})
        block = known.get((layer, rank))
        if block is not None:
            solved[layer, rank] = Solved([replace(block, layer=layer, rank=rank)], *count_blocks(system))
        elif short and (known or any(done.empty for done in solved.values())):
            solved[layer, rank] = Solved([], *count_blocks(system))
        else:
            solved[layer, rank] = solve(system, short)
        if free:
            solved[layer, rank] = replace(solved[layer, rank], blocks=[judged(b) for b in solved[layer, rank].blocks])
    return {key: solved[key] for key in systems}


def _size(rowsets: list[RowSet]) -> int:
    return sum(rowset.count for rowset in rowsets)


def _verdict(
    failures: list[str], doubts: list[str], blocks: Sequence[Block], joint: bool = False
) -> tuple[Verdict, list[str]]:
    """Precedence: a failed audit, then a provably empty system, then any doubt."""
    if failures:
        return Verdict.UNDECIDED, failures
    empty = [f"{_name(block, joint)} is empty: {block.reason}" for block in blocks if block.proof]
    if empty:
        return Verdict.UNCERTIFIED, list(dict.fromkeys(empty))
    doubts = doubts + [f"{_name(block, joint)}: {block.reason}" for block in blocks if block.direction is None]
    if doubts:
        return Verdict.UNDECIDED, list(dict.fromkeys(doubts))
    return Verdict.CERTIFIED, []


def _name(block: Block, joint: bool) -> str:
    if joint:
        return "the joint system of Theorem E4"
    return f"the system of {block.layer} (rank {block.rank})"


def _report(layer: LayerFindings, solved: dict[tuple[str, int], Solved]) -> LayerReport:
    mine = [system for (name, _), system in solved.items() if name == layer.name]
    return LayerReport(
        name=layer.name,
        parameters=layer.parameters,
        bias=layer.bias,
        rank=layer.rank,
        rows=sum(system.rows for system in mine) + sum(found.unlisted for found in layer.found),
        blocks=sum(system.count for system in mine),
        **layer.counts(),
    )
