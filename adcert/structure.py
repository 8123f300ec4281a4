"""What mostly stays the same of a share from step to step, as text and back: records, their order, parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from .assembly import Seen, Share
from .certificate import BIASES
from .coverage import Added, Facts, Kink
from .errors import CertificateError
from .fields import count, exactly, flag, keys, less_than, mapping, one_of, sequence, text, texts
from .message import parsed

_KEYS = "leaves seen split shapes foreign"
_SEEN = "name own upstream bias facts"


def structure_fields(share: Share) -> dict[str, Any]:
    """What mostly stays the same from step to step."""
    names = {*share.shapes, *(leaf for each in share.seen for leaf in each.own | each.upstream)}
    leaves = {leaf: number for number, leaf in enumerate(sorted(names))}
    return {
        "leaves": list(leaves),
        "seen": [
            {
                "name": each.name,
                "own": sorted(leaves[leaf] for leaf in each.own),
                "upstream": sorted(leaves[leaf] for leaf in each.upstream),
                "bias": each.bias,
                "facts": None if each.facts is None else _facts_fields(each.facts),
            }
            for each in share.seen
        ],
        "split": share.split,
        "shapes": {leaf: list(shape) for leaf, shape in share.shapes.items()},
        "foreign": sorted(share.foreign),
    }


@lru_cache(maxsize=32)
def read_structure(written: str) -> Share:
    """A share with this structure and nothing else; nobody alters it."""
    data = parsed(written)
    keys(data, _KEYS, "structure")
    leaves = sequence(data["leaves"], text)

    def named(numbers: Any) -> frozenset[str]:
        return frozenset(leaves[k] for k in sequence(numbers, less_than(len(leaves))))

    return Share(
        failures=[],
        strict=False,
        seen=tuple(_seen(each, named) for each in sequence(data["seen"], lambda item: item)),
        split=mapping(data["split"], less_than(2)),
        shapes=mapping(data["shapes"], lambda shape: sequence(shape, count)),
        foreign=frozenset(texts(data["foreign"])),
    )


def _seen(data: Any, named: Callable[[Any], frozenset[str]]) -> Seen:
    keys(data, _SEEN, "record")
    name = text(data["name"])
    facts = None if data["facts"] is None else _facts(name, data["facts"])
    return Seen(name, named(data["own"]), named(data["upstream"]), one_of(BIASES, data["bias"]), facts)


def _facts_fields(facts: Facts) -> dict[str, Any]:
    return {
        "kinks": [[*(float(x).hex() for x in (k.at, k.below, k.above, k.proxy)), k.side] for k in facts.kinks],
        "pooled": facts.pooled,
        "bias": None if facts.bias is None else [facts.bias.leaf, facts.bias.kind],
        "single": facts.single,
        "mixed": facts.mixed,
        "even": facts.even,
        "matrix": None if facts.matrix is None else list(facts.matrix),
    }


def _facts(name: str, data: Any) -> Facts:
    keys(data, "kinks pooled bias single mixed even matrix", "set of facts")
    kinks = tuple(_kink(item) for item in sequence(data["kinks"], lambda item: item))
    bias = None if data["bias"] is None else Added(*exactly(2, data["bias"], text))
    matrix = None
    if data["matrix"] is not None:
        leaf, rows, features = exactly(3, data["matrix"], lambda item: item)
        matrix = text(leaf), count(rows), count(features)
    flags = {key: flag(data[key]) for key in ("single", "mixed", "even")}
    return Facts(name, kinks, flag(data["pooled"]), bias, **flags, matrix=matrix)


def _kink(data: Any) -> Kink:
    *numbers, side = exactly(5, data, lambda item: item)
    if side not in (-1, 0, 1) or isinstance(side, bool):
        raise CertificateError("a side is -1, 0 or 1")
    try:
        at, below, above, proxy = (float.fromhex(text(number)) for number in numbers)
    except (ValueError, OverflowError) as error:
        raise CertificateError(f"a number is needed: {error}") from error
    return Kink(at, below, above, proxy, side)
