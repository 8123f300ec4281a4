"""Shares and answers as bytes and back: JSON, then plain arrays. Every field that is read is checked; no pickle.

Equal rows of one set are sent once. Nothing that a peer sends becomes a name of code, a path, or a size of memory
beyond the bytes that have arrived.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
import torch

from . import ops
from .answers import Decision
from .assembly import Share
from .between import Classes, Free
from .certificate import FREE, RULES, Block, Column
from .conclusion import Known, Tally
from .differences import Part, RowSet, groups_of
from .errors import CertificateError
from .feasibility import check_proof
from .fields import (
    count,
    digits,
    exactly,
    flag,
    integer,
    keys,
    less_than,
    mapping,
    one_of,
    proof,
    proof_fields,
    sequence,
    text,
    texts,
)
from .findings import Findings
from .joint import Joint
from .message import FLOATS, Reader, Writer
from .structure import read_structure, structure_fields
from .systems import Answer

_TALLY = "windows ties touches differing unlisted"
_SHARE = """structure failures strict mixed outside unsettled problem found sets rowsets free joint empty assumptions
    prints sample"""


def pack(share: Share) -> bytes:
    """A share as bytes. Waits for what is still on its way from a device; a combination is not sent."""
    late = [] if share.gradients is None else share.gradients.late()
    writer = Writer()
    sets = [_distinct(rowset) for rowset in share.rows()]
    place = {id(rowset): number for number, rowset in enumerate(share.rows())}

    def at(rowsets: Iterable[RowSet]) -> list[int]:
        return [place[id(rowset)] for rowset in rowsets]

    document = {
        "structure": json.dumps(structure_fields(share), allow_nan=False, separators=(",", ":")),
        "failures": [*share.failures, *late],
        "strict": share.strict,
        "mixed": share.mixed,
        "outside": share.outside,
        "unsettled": share.unsettled,
        "problem": share.problem,
        "found": [None if each.found is None else _tally_fields(each.found) for each in share.seen],
        "sets": [
            {
                "op": rowset.op,
                "rule": rowset.rule,
                "count": rowset.count,
                "below": sorted(rowset.below),
                "parts": [_part_fields(writer, part) for part in rowset.parts],
            }
            for rowset in sets
        ],
        "rowsets": at(share.rowsets),
        "free": [
            {
                "classes": [
                    {
                        "op": item.op,
                        "leaf": item.leaf,
                        "groups": writer.put(item.groups),
                        "weight": [digits(item.weight.numerator), digits(item.weight.denominator)],
                        "below": sorted(item.below),
                    }
                    for item in free.classes
                ],
                "rowsets": at(free.rowsets),
            }
            for free in share.free
        ],
        "joint": {
            "rowsets": at(share.joint.rowsets),
            "doubts": share.joint.doubts,
            "missing": share.joint.missing,
        },
        "empty": [{"leaf": leaf, "block": _block_fields(writer, block)} for leaf, block in share.empty],
        "assumptions": list(share.assumptions),
        "prints": {name: prints.digest() for name, prints in share.prints.items()},
        "sample": "" if share.sample is None else share.sample.digest(),
    }
    return writer.bytes(document)


def unpack(message: bytes) -> Share:
    """A share from its bytes.

    Raises:
        CertificateError: for anything that :func:`pack` would not have written, or a proof that does not hold.
    """
    reader = Reader(message)
    data = reader.document
    keys(data, _SHARE, "share")
    structure = read_structure(text(data["structure"]))
    shapes = structure.shapes
    found = exactly(len(structure.seen), data["found"], _tally)
    seen = tuple(replace(each, found=tally) for each, tally in zip(structure.seen, found, strict=True))
    sets = [_rowset(reader, item, shapes) for item in sequence(data["sets"], lambda item: item)]
    which = less_than(len(sets))

    def at(numbers: Any) -> list[RowSet]:
        return [sets[k] for k in sequence(numbers, which)]

    free = [_free(reader, item, shapes, at) for item in sequence(data["free"], lambda item: item)]
    keys(data["joint"], "rowsets doubts missing", "joint system")
    joint = Joint(
        at(data["joint"]["rowsets"]), texts(data["joint"]["doubts"]), text(data["joint"]["missing"])
    )
    empty = [_empty(reader, item, shapes) for item in sequence(data["empty"], lambda item: item)]
    share = Share(
        failures=texts(data["failures"]),
        strict=flag(data["strict"]),
        mixed=texts(data["mixed"]),
        outside=texts(data["outside"]),
        unsettled=texts(data["unsettled"]),
        problem=text(data["problem"]),
        seen=seen,
        split=structure.split,
        rowsets=at(data["rowsets"]),
        free=free,
        joint=joint,
        empty=empty,
        shapes=shapes,
        foreign=structure.foreign,
        assumptions=tuple(texts(data["assumptions"])),
        prints={name: Known(digest) for name, digest in mapping(data["prints"], text).items()},
        sample=Known(text(data["sample"])) if data["sample"] else None,
    )
    reader.end()
    _consistent(share)
    return share


def pack_answers(answers: dict[int, Answer]) -> bytes:
    """Decisions of blocks by their numbers."""
    writer = Writer()
    document = [
        {
            "block": number,
            "chosen": None if chosen is None else writer.put(torch.from_numpy(chosen)),
            "direction": None if found.direction is None else [digits(x) for x in found.direction],
            "proof": proof_fields(found.proof),
            "reason": found.reason,
        }
        for number, (chosen, found) in answers.items()
    ]
    return writer.bytes(document)


def unpack_answers(message: bytes) -> dict[int, Answer]:
    """Their form, not their truth: whoever uses an answer checks it."""
    reader = Reader(message)
    answers: dict[int, Answer] = {}
    for item in sequence(reader.document, lambda item: item):
        keys(item, "block chosen direction proof reason", "answer")
        chosen = None if item["chosen"] is None else reader.indices(item["chosen"], 1 << 62).numpy()
        direction = None if item["direction"] is None else sequence(item["direction"], integer)
        gordan = proof(item["proof"])
        nonempty = True if direction is not None else False if gordan is not None else None
        answers[count(item["block"])] = chosen, Decision(nonempty, direction, gordan, text(item["reason"]))
    reader.end()
    return answers


def _distinct(rowset: RowSet) -> RowSet:
    """Equal rows once, where that is cheap to tell: every part has one entry of every row.

    Free rows stay as many as they are: each stands for a choice of its own.
    """
    if rowset.arrival is not None:
        rowset.arrival.wait()
    if rowset.rule == FREE or rowset.count < 2 or not rowset.parts:
        return rowset
    order = [torch.argsort(part.owner) for part in rowset.parts]
    each = torch.arange(rowset.count)
    if not all(torch.equal(part.owner[index], each) for part, index in zip(rowset.parts, order, strict=True)):
        return rowset
    columns = []
    for part, index in zip(rowset.parts, order, strict=True):
        columns += [part.group[index][:, None].double(), part.plus[index].double(), part.minus[index].double()]
        columns += [] if part.radius is None else [part.radius[index].double()]
    first = ops.distinct_rows(torch.cat(columns, 1).contiguous())
    if len(first) == rowset.count:
        return rowset
    parts = []
    for part, index in zip(rowset.parts, order, strict=True):
        kept = index[first]
        radius = None if part.radius is None else part.radius[kept]
        moved = torch.arange(len(first)), part.group[kept], part.plus[kept], part.minus[kept]
        parts.append(Part(part.leaf, *moved, part.scaled, radius))
    return replace(rowset, count=len(first), parts=tuple(parts), arrival=None)


def _part_fields(writer: Writer, part: Part) -> dict[str, Any]:
    return {
        "leaf": part.leaf,
        "owner": writer.put(part.owner),
        "group": writer.put(part.group),
        "plus": writer.put(part.plus),
        "minus": writer.put(part.minus),
        "scaled": part.scaled,
        "radius": None if part.radius is None else writer.put(part.radius),
    }


def _rowset(reader: Reader, data: Any, shapes: dict[str, tuple[int, ...]]) -> RowSet:
    keys(data, "op rule count below parts", "set of rows")
    rows = count(data["count"])
    parts = tuple(_part(reader, item, rows, shapes) for item in sequence(data["parts"], lambda item: item))
    return RowSet(text(data["op"]), one_of(RULES, data["rule"]), rows, parts, frozenset(texts(data["below"])))


def _part(reader: Reader, data: Any, rows: int, shapes: dict[str, tuple[int, ...]]) -> Part:
    keys(data, "leaf owner group plus minus scaled radius", "part")
    leaf = one_of(shapes, data["leaf"])
    groups, width = groups_of(shapes[leaf])
    owner, group = reader.indices(data["owner"], rows), reader.indices(data["group"], groups)
    plus, minus = (reader.take(data[side], 2, FLOATS) for side in ("plus", "minus"))
    radius = None if data["radius"] is None else reader.take(data["radius"], 2, FLOATS)
    shape = (len(owner), width)
    if len(group) != len(owner) or any(t is not None and t.shape != shape for t in (plus, minus, radius)):
        raise CertificateError("the arrays of a part differ in shape")
    return Part(leaf, owner, group, plus, minus, flag(data["scaled"]), radius)


def _free(
    reader: Reader, data: Any, shapes: dict[str, tuple[int, ...]], at: Callable[[Any], list[RowSet]]
) -> Free:
    keys(data, "classes rowsets", "set of free touches")
    classes = []
    for item in sequence(data["classes"], lambda item: item):
        keys(item, "op leaf groups weight below", "class")
        leaf = one_of(shapes, item["leaf"])
        groups = reader.indices(item["groups"], prod(shapes[leaf]))
        weight = sequence(item["weight"], integer)
        if len(weight) != 2 or weight[1] < 1:
            raise CertificateError("a weight is a fraction")
        below = frozenset(texts(item["below"]))
        classes.append(Classes(text(item["op"]), leaf, groups, Fraction(*weight), below))
    return Free(classes, at(data["rowsets"]))


def _block_fields(writer: Writer, block: Block) -> dict[str, Any]:
    return {
        "columns": [[column.parameter, writer.put(torch.from_numpy(column.indices))] for column in block.columns],
        "rows": writer.put(torch.from_numpy(np.asarray(block.rows, np.float64))),
        "minus": None if block.minus is None else writer.put(torch.from_numpy(np.asarray(block.minus, np.float64))),
        "rules": list(block.rules),
        "proof": proof_fields(block.proof),
        "reason": block.reason,
    }


def _empty(reader: Reader, data: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[str, Block]:
    """A block that is proved empty, and a leaf of it. The proof is checked: nobody does so later."""
    keys(data, "leaf block", "empty block")
    leaf, block = one_of(shapes, data["leaf"]), data["block"]
    keys(block, "columns rows minus rules proof reason", "block")
    columns = []
    for item in sequence(block["columns"], lambda item: item):
        name, indices = sequence(item, lambda part: part) if isinstance(item, list) and len(item) == 2 else ("", [])
        name = one_of(shapes, name)
        columns.append(Column(name, reader.indices(indices, prod(shapes[name])).numpy()))
    rows = reader.take(block["rows"], 2, ("f8",)).numpy()
    minus = None if block["minus"] is None else reader.take(block["minus"], 2, ("f8",)).numpy()
    rules = tuple(one_of(RULES, rule) for rule in sequence(block["rules"], text))
    gordan = proof(block["proof"])
    width = sum(len(column.indices) for column in columns)
    fits = rows.shape == (len(rules), width) and (minus is None or minus.shape == rows.shape) and FREE not in rules
    if not fits or gordan is None or not check_proof(rows, gordan, minus):
        raise CertificateError("a block that is said to be empty has no proof of it")
    return leaf, Block("", 1, tuple(columns), rows, minus, None, rules, None, gordan, text(block["reason"]))


def _tally_fields(found: Findings | Tally) -> list[Any]:
    return [*(getattr(found, name) for name in _TALLY.split()), dict(found.exemptions)]


def _tally(data: Any) -> Tally | None:
    if data is None:
        return None
    *numbers, exemptions = exactly(6, data, lambda item: item)
    windows, ties, touches, differing, unlisted = (count(number) for number in numbers)
    return Tally(windows, ties, touches, differing, unlisted, Counter(mapping(exemptions, count)))


def _consistent(share: Share) -> None:
    """Rows speak of records and leaves that are there."""
    ops_seen, leaves = {each.name for each in share.seen}, set(share.shapes)
    rows = [(rowset.op, rowset.below) for rowset in share.rows()]
    for op, below in rows + [(item.op, item.below) for free in share.free for item in free.classes]:
        if op not in ops_seen or not below <= leaves:
            raise CertificateError(f"rows of {op!r} where no such operation, or no such leaf below it, was recorded")
