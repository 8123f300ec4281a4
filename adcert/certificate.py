"""What a step's verdict rests on: rows, exact directions, exact proofs of emptiness, and how to recheck them.

:meth:`Certificate.verify` covers the rows listed in the certificate: that each direction makes every listed
row positive (Theorem 8, or E4 for the joint system) and that each proof shows the listed rows contradictory.
That the list is complete, and the rows are the network's, is what :meth:`Certificate.replay` gives evidence
for.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch

from adcert.errors import AdcertError, CertificateError
from adcert.feasibility import Proof, check_direction, check_proof
from adcert.independence import independent

SYSTEMS = ("paper", "lexicographic", "joint", "hull")
CLAIMS = ("bouligand", "clarke")
FREE = "free"  # a touch whose proxy is between the one-sided derivatives: both signs of its row are needed
RULES = ("touch", "tie", FREE)
THEOREMS = tuple(f"Theorem {name}" for name in ("1", "4", "5", "6", "8", "E4", "E5", "H"))
UNPOOLED = ("Theorem 1", "Theorem 4", "Theorem 6", "Theorem 5")  # the first three rest on biases
BIASES = ("none", "distinct", "shared", "partial")


class Verdict(str, enum.Enum):  # noqa: UP042
    """The three answers: a certificate, a proof that the named system is empty, or neither."""

    CERTIFIED = "certified"
    UNCERTIFIED = "uncertified"
    UNDECIDED = "undecided"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, eq=False)
class Column:
    """A run of columns of a block: the entries ``indices`` (int64 [n]) of the flattened ``parameter``."""

    parameter: str
    indices: np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Block:
    """One strict homogeneous system A p > 0 over a few entries of a few parameters of one layer.

    Where a block has very many columns only those are listed that its direction, or its proof, rests on: the others'
    entries of the direction are 0, and those of the proof's rows.

    ``rows``, ``minus``, ``radius``: float32 or float64 [K, n], n the total number of columns, with the
    meaning of :func:`adcert.feasibility.decide`. ``rules``: per row "touch", "tie" or "free". ``direction``: exact
    integers if nonempty; ``proof``: Gordan's, if empty; ``reason``: the stage that decided, or why none did.
    """

    layer: str
    rank: int
    columns: tuple[Column, ...]
    rows: np.ndarray[Any, Any]
    minus: np.ndarray[Any, Any] | None = None
    radius: np.ndarray[Any, Any] | None = None
    rules: tuple[str, ...] = ()
    direction: tuple[int, ...] | None = None
    proof: Proof | None = None
    reason: str = ""

    @property
    def nonempty(self) -> bool | None:
        """True with a direction, False with a proof, None with neither."""
        return True if self.direction is not None else False if self.proof is not None else None


@dataclass(frozen=True, eq=False)
class Combination:
    """Theorem H: ``target``, AD's gradient, as the mean of ``elements`` with the positive integers ``weights``.

    ``elements``: float64 [N, n], the gradient of each block's choices over the columns of all blocks, which have the
    same ones; ``target``: float64 [n].
    """

    elements: np.ndarray[Any, Any]
    target: np.ndarray[Any, Any]
    weights: tuple[int, ...]

    def verify(self, blocks: Sequence[Block]) -> None:
        """Exactly; the directions are the blocks' own matter."""
        if not blocks or len(blocks) != len(self.weights) or np.ndim(self.elements) != 2 or np.ndim(self.target) != 1:
            raise CertificateError("the combination needs one element and one weight for each block")
        first = blocks[0].columns
        for block in blocks:
            same = len(block.columns) == len(first) and all(
                a.parameter == b.parameter and np.array_equal(a.indices, b.indices)
                for a, b in zip(block.columns, first, strict=True)
            )
            if not same or np.shape(block.rows)[1] != len(self.target):
                raise CertificateError("the combination's elements differ in their columns")
        if np.shape(self.elements) != (len(blocks), len(self.target)):
            raise CertificateError("the combination's elements differ in shape")
        proof = Proof(tuple(range(len(blocks))), self.weights)  # the weights sum to more than 0, and may be divided
        if not check_proof(self.elements, proof, np.tile(self.target, (len(blocks), 1))):
            raise CertificateError("the combination is not the target")


@dataclass(frozen=True)
class LayerReport:
    """What one layer saw and how its decisions were discharged.

    ``windows``: pooling windows seen; ``ties``: those with two or more members; ``exemptions``: rule ->
    decisions (touches or tied members) it discharged; ``differing``: windows whose S_j \\ T_j is nonempty
    (Algorithm 1).
    """

    name: str
    parameters: tuple[str, ...]
    bias: str
    rank: int
    windows: int = 0
    ties: int = 0
    touches: int = 0
    exemptions: dict[str, int] = field(default_factory=dict)
    differing: int = 0
    rows: int = 0
    blocks: int = 0


@dataclass(frozen=True, eq=False)
class Certificate:
    """Verdict of one training step with everything needed to recheck it.

    ``reasons``: empty iff certified (a list, whatever sequence was given). ``system``: which system was
    decided ("paper" P_l, "lexicographic" or "joint" E4), or "hull": each block has a direction for one element of
    dB, and the ``combination`` of them is AD's gradient (Theorem H). ``claim``: the set the gradient is certified
    to lie in. ``theorem``: the one a certified step rests on; 1, 4 and 6 hold for the network whatever the values are.
    ``shapes``: of every trainable parameter. ``scales``: rank per parameter, rank 1 perturbed least.
    ``fingerprints``: op -> sha256 of its recorded decisions. ``seconds``: stage -> time.

    >>> columns, rows = (Column("w", np.array([0, 1])),), np.array([[1.0, -2.0]])
    >>> block = Block("conv", 1, columns, rows, rules=("tie",), direction=(1, 0))
    >>> report = LayerReport("conv", ("w",), "none", 1, rows=1, blocks=1)
    >>> certificate = Certificate(
    ...     Verdict.CERTIFIED, layers=(report,), blocks=(block,), claim="bouligand",
    ...     shapes={"w": (2,)}, scales={"w": 1})
    >>> certificate.verify()
    >>> certificate.directions["w"].tolist()
    [0.5, 0.0]
    """

    verdict: Verdict
    reasons: Sequence[str] = ()
    layers: tuple[LayerReport, ...] = ()
    blocks: tuple[Block, ...] = ()
    system: str = "lexicographic"
    claim: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scales: dict[str, int] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    fingerprints: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    theorem: str = ""
    combination: Combination | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reasons", list(self.reasons))

    @property
    def directions(self) -> dict[str, torch.Tensor]:
        """The witness: per parameter a float64 tensor of its shape, zero where no block speaks.

        Each block's integers are scaled by one power of two to largest entry in [1/2, 1) and rounded to
        float64; the exact integers are the blocks' own.
        """
        result = {name: torch.zeros(prod(shape), dtype=torch.float64) for name, shape in self.shapes.items()}
        several = self.system == "hull" and len(self.blocks) > 1  # each element has a witness of its own
        for block in self.blocks:
            if block.direction is None or several:
                continue
            unit = 1 << max((abs(x) for x in block.direction), default=0).bit_length()
            values = torch.tensor([x / unit for x in block.direction], dtype=torch.float64)
            start = 0
            for column in block.columns:
                stop = start + len(column.indices)
                result[column.parameter][torch.tensor(column.indices)] = values[start:stop]
                start = stop
        return {name: result[name].reshape(shape) for name, shape in self.shapes.items()}

    def verify(self) -> None:
        """Rechecks the verdict exactly from the certificate alone; :class:`CertificateError` names the block.

        CERTIFIED: every block has a direction that makes each of its rows positive, and independent rows if some are
        free. UNCERTIFIED: some block
        has a proof that no direction does. UNDECIDED: there is a reason. In each case columns lie inside
        their parameters, the blocks of one rank do not overlap (those of a combination have the same columns,
        and it is the target exactly), and the layers' counts agree with the blocks
        (for a certified step exactly; otherwise a certificate may list fewer blocks than were counted). It
        covers the rows listed, not that the list is complete.
        """
        self._verify_header()
        taken: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
        for number, block in enumerate(self.blocks):
            where = f"block {number} of layer {block.layer!r}"
            try:
                self._verify_columns(block, {} if self.system == "hull" else taken)
                _verify_system(block)
            except CertificateError as error:
                raise CertificateError(f"{where}: {error}") from None
            except (AdcertError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise CertificateError(f"{where}: {error}") from error
            if self.verdict is Verdict.CERTIFIED and block.direction is None:
                raise CertificateError(f"{where} has no direction, but the certificate says certified")
            if self.verdict is Verdict.CERTIFIED and FREE in block.rules:
                self._verify_free(block, where)
        if self.verdict is Verdict.UNCERTIFIED and all(block.proof is None for block in self.blocks):
            raise CertificateError("no block has a proof of emptiness, but the certificate says uncertified")
        self._verify_combination()
        self._verify_layers()

    def _verify_combination(self) -> None:
        """Theorem H, and nothing else, rests on a combination."""
        if self.system != "hull" and self.theorem != "Theorem H" and self.combination is None:
            return
        certified = self.verdict is Verdict.CERTIFIED
        if not certified or self.system != "hull" or self.theorem != "Theorem H" or self.combination is None:
            raise CertificateError("system hull, Theorem H and a combination belong together, in a certified step")
        if self.claim == "bouligand" and len(self.blocks) != 1:
            raise CertificateError("a combination of several elements is claimed to be one")
        try:
            self.combination.verify(self.blocks)
        except (AdcertError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CertificateError(f"the combination: {error}") from error

    def _verify_free(self, block: Block, where: str) -> None:
        """Theorem E5: independent rows have a direction for every choice of their signs."""
        if self.claim != "clarke":
            raise CertificateError(f"{where} has free rows, but the certificate claims {self.claim}")
        if not independent(block.rows, block.minus, block.radius):
            raise CertificateError(f"{where} has free rows among rows that are not independent")

    def _verify_header(self) -> None:
        certified = self.verdict is Verdict.CERTIFIED
        if not isinstance(self.verdict, Verdict):
            raise CertificateError(f"unknown verdict {self.verdict!r}")
        if self.system not in SYSTEMS:
            raise CertificateError(f"unknown system {self.system!r}")
        if certified == bool(self.reasons):
            raise CertificateError("reasons must be empty for a certified step, and given for any other")
        if self.claim not in (CLAIMS if certified else ("",)):
            raise CertificateError(f"claim {self.claim!r} does not fit the verdict {self.verdict}")
        if self.theorem not in (("", *THEOREMS) if certified else ("",)):
            raise CertificateError(f"theorem {self.theorem!r} does not fit the verdict {self.verdict}")
        if any(size < 0 for shape in self.shapes.values() for size in shape):
            raise CertificateError("a parameter has a negative size")
        for name, rank in self.scales.items():
            if name not in self.shapes or rank < 1 or (self.system in ("joint", "hull") and rank != 1):
                raise CertificateError(
                    f"scale {rank} of {name!r}: unknown parameter, or not a rank of system {self.system}"
                )

    def _verify_columns(self, block: Block, taken: dict[tuple[str, int], np.ndarray[Any, Any]]) -> None:
        width = 0
        for column in block.columns:
            name, indices = column.parameter, np.asarray(column.indices)
            if name not in self.shapes:
                raise CertificateError(f"unknown parameter {name!r}")
            if self.scales.get(name) != block.rank:
                raise CertificateError(f"rank {block.rank}, but scales gives {name!r} rank {self.scales.get(name)}")
            size = prod(self.shapes[name])
            if indices.dtype != np.int64 or indices.ndim != 1:
                raise CertificateError(f"column indices of {name!r} must be int64 [n]")
            if indices.size and not (indices.min() >= 0 and indices.max() < size):
                raise CertificateError(f"a column lies outside {name!r}, which has {size} entries")
            earlier = taken.get((name, block.rank), np.zeros(0, dtype=np.int64))
            merged = np.union1d(earlier, indices)
            if merged.size != earlier.size + indices.size:
                raise CertificateError(f"an entry of {name!r} appears twice among the columns of rank {block.rank}")
            taken[name, block.rank] = merged
            width += indices.size
        if np.ndim(block.rows) != 2 or np.shape(block.rows)[1] != width:
            raise CertificateError(f"rows of shape {np.shape(block.rows)} for {width} columns")

    def _verify_layers(self) -> None:
        reports = {report.name: report for report in self.layers}
        if len(reports) != len(self.layers):
            raise CertificateError("two layer reports bear the same name")
        unknown = sorted({block.layer for block in self.blocks} - reports.keys())
        if unknown:
            raise CertificateError(f"blocks of layers without a report: {unknown}")
        for report in self.layers:
            blocks = [block for block in self.blocks if block.layer == report.name]
            listed = (sum(len(block.rows) for block in blocks), len(blocks))
            counted = (report.rows, report.blocks)
            fewer = listed[0] <= counted[0] and listed[1] <= counted[1]
            if listed != counted and (self.verdict is Verdict.CERTIFIED or not fewer):
                raise CertificateError(
                    f"layer {report.name!r} reports {counted[0]} rows in {counted[1]} blocks, "
                    f"listed are {listed[0]} in {listed[1]}"
                )
            ranks = {self.scales.get(parameter) for parameter in report.parameters}
            if any(block.columns and block.rank not in ranks for block in blocks):
                raise CertificateError(f"layer {report.name!r} has a block of another layer's rank")
            counts = (
                report.windows,
                report.ties,
                report.touches,
                report.differing,
                *report.exemptions.values(),
            )
            if self.theorem in UNPOOLED and report.ties:
                raise CertificateError(f"layer {report.name!r} has ties, which {self.theorem} excludes")
            if self.theorem in UNPOOLED[:3] and report.touches and report.bias == "none":
                raise CertificateError(f"layer {report.name!r} has no bias, which {self.theorem} needs")
            if report.bias not in BIASES or min(counts) < 0 or report.ties > report.windows:
                raise CertificateError(f"layer {report.name!r}: impossible counts or bias structure")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file of numbers and text, no pickle; :class:`CertificateError` if that is impossible."""
        from adcert._certificate_file import write

        write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Certificate:
        """Reads a file of :meth:`save`; never runs code. It checks form, not truth: call :meth:`verify`.

        Raises :class:`CertificateError` for anything truncated, altered, oversized or unknown.
        """
        from adcert._certificate_file import read

        return read(path)

    def replay(self, closure: Callable[[], torch.Tensor], model: torch.nn.Module, **options: Any) -> Any:
        """Evidence by evaluation along the witness; see :func:`adcert.replay.replay`."""
        from adcert.replay import replay

        return replay(self, closure, model, **options)

    def summary(self) -> str:
        """A few lines for people: the verdict, why, and what each layer saw."""
        by = f", {self.theorem}" if self.theorem else ""
        claim = f" ({self.claim} subgradient{by})" if self.claim else ""
        lines = [f"{self.verdict}{claim}, {self.system} system, {sum(len(b.rows) for b in self.blocks)} rows"]
        lines += [f"  because {reason}" for reason in self.reasons]
        for report in self.layers:
            exempt = ", ".join(f"{count} {rule}" for rule, count in sorted(report.exemptions.items()))
            lines.append(
                f"  {report.name}: {report.windows} windows, {report.ties} tied, {report.touches} touches, "
                f"{report.rows} rows in {report.blocks} blocks" + (f" (exempt: {exempt})" if exempt else "")
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def _verify_system(block: Block) -> None:
    if len(block.rules) != len(block.rows) or any(rule not in RULES for rule in block.rules):
        raise CertificateError(f"rules must name one of {RULES} for each of the {len(block.rows)} rows")
    if block.proof is not None and any(block.rules[row] == FREE for row in block.proof.rows if row < len(block.rules)):
        raise CertificateError("a proof of emptiness rests on rows that may have either sign")
    if block.direction is not None and block.proof is not None:
        raise CertificateError("it has both a direction and a proof of emptiness")
    if block.direction is not None and not check_direction(block.rows, block.direction, block.minus, block.radius):
        raise CertificateError("the direction does not make every row positive")
    if block.proof is not None and not check_proof(block.rows, block.proof, block.minus, block.radius):
        raise CertificateError("the proof of emptiness does not hold")
