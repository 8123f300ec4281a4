"""Fields of data from outside, checked one by one: each function returns what it was given, or refuses it."""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from typing import Any, TypeVar

import flint

from .answers import Proof
from .errors import CertificateError

MAX_DIGITS = 200_000  # of one integer
_INTEGER = re.compile(r"-?[0-9]+")
_Item = TypeVar("_Item")


def keys(data: Any, names: str, what: str) -> None:
    """Exactly these keys."""
    if not isinstance(data, dict) or set(data) != set(names.split()):
        raise CertificateError(f"a {what} must have exactly the fields {names}")


def sequence(data: Any, item: Callable[[Any], _Item]) -> tuple[_Item, ...]:
    """A list of such items."""
    if not isinstance(data, list):
        raise CertificateError(f"a list is needed, not {type(data).__name__}")
    return tuple(item(entry) for entry in data)


def exactly(size: int, data: Any, item: Callable[[Any], _Item]) -> tuple[_Item, ...]:
    """A list of so many such items."""
    found = sequence(data, item)
    if len(found) != size:
        raise CertificateError(f"{size} items are needed, not {len(found)}")
    return found


def mapping(data: Any, item: Callable[[Any], _Item]) -> dict[str, _Item]:
    """A JSON object of such items."""
    if not isinstance(data, dict):
        raise CertificateError(f"an object is needed, not {type(data).__name__}")
    return {key: item(value) for key, value in data.items()}


def text(data: Any) -> str:
    """A string."""
    if not isinstance(data, str):
        raise CertificateError(f"a text is needed, not {type(data).__name__}")
    return data


def texts(data: Any) -> list[str]:
    """A list of strings."""
    return list(sequence(data, text))


def count(data: Any) -> int:
    """A nonnegative integer of at most 62 bits."""
    if not isinstance(data, int) or isinstance(data, bool) or not 0 <= data < 1 << 62:
        raise CertificateError("a nonnegative integer of at most 62 bits is needed")
    return data


def less_than(limit: int) -> Callable[[Any], int]:
    """A check for numbers of things of which there are ``limit``."""

    def checked(data: Any) -> int:
        if count(data) >= limit:
            raise CertificateError("a number that is out of range")
        return int(data)

    return checked


def one_of(names: Container[str], data: Any) -> str:
    """One of these names."""
    if text(data) not in names:
        raise CertificateError(f"unknown name {data!r}")
    return str(data)


def flag(data: Any) -> bool:
    """True or False."""
    if not isinstance(data, bool):
        raise CertificateError(f"true or false is needed, not {type(data).__name__}")
    return data


def refuse(constant: str) -> float:
    """``parse_constant`` of a JSON reader: NaN and infinities."""
    raise CertificateError(f"{constant} is not a number")


def digits(value: int) -> str:
    """Any integer as text, which :func:`integer` reads."""
    # Python refuses to convert integers beyond 4,300 digits and its limit is global; FLINT has none.
    written = str(flint.fmpz(value))
    if len(written) > MAX_DIGITS:
        raise CertificateError(f"an integer of {len(written)} digits, more than the {MAX_DIGITS} a file may hold")
    return written


def integer(data: Any) -> int:
    """An integer from its decimal digits."""
    if len(text(data)) > MAX_DIGITS or not _INTEGER.fullmatch(data):
        raise CertificateError(f"{data[:40]!r} is not a decimal integer of at most {MAX_DIGITS} digits")
    return int(flint.fmpz(data))


def proof(data: Any) -> Proof | None:
    """A proof as :func:`proof_fields` wrote it; its form, not its truth."""
    if data is None:
        return None
    keys(data, "rows weights", "proof")
    return Proof(sequence(data["rows"], count), sequence(data["weights"], integer))


def proof_fields(given: Proof | None) -> dict[str, Any] | None:
    """A proof as plain data."""
    return None if given is None else {"rows": list(given.rows), "weights": [digits(w) for w in given.weights]}
