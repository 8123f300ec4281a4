"""A JSON document, then plain arrays, as bytes. No size that they tell is believed beyond what has arrived."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .errors import CertificateError
from .fields import count, refuse, sequence

FLOATS = ("f2", "b2", "f4", "f8")
_LENGTH = struct.Struct("<Q")
_DTYPES = {
    "f2": torch.float16,
    "b2": torch.bfloat16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i4": torch.int32,
    "i8": torch.int64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Writer:
    """Collects arrays; :meth:`bytes` puts a JSON document in front of them."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def put(self, t: Tensor) -> list[Any]:
        """What the document says of an array: its dtype and shape."""
        if t.dtype == torch.int64 and (not t.numel() or (int(t.min()) >= -(1 << 31) and int(t.max()) < 1 << 31)):
            t = t.to(torch.int32)
        self._parts.append(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return [_CODES[t.dtype], list(t.shape)]

    def bytes(self, document: Any) -> bytes:
        """The whole message."""
        head = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
        return b"".join([_LENGTH.pack(len(head)), head, *self._parts])


class Reader:
    """The document of a message, and its arrays in the order in which they were put."""

    def __init__(self, message: bytes) -> None:
        size = _LENGTH.unpack_from(message)[0] if len(message) >= _LENGTH.size else len(message)
        self._next = _LENGTH.size + size
        if self._next > len(message):
            raise CertificateError("a message that is shorter than it says")
        self.document = parsed(message[_LENGTH.size : self._next])
        self._message = message

    def take(self, data: Any, dimensions: int, codes: Sequence[str]) -> Tensor:
        """The next array."""
        code, shape = sequence(data, lambda item: item) if isinstance(data, list) and len(data) == 2 else ("", [])
        sizes = sequence(shape, count)
        if code not in codes or len(sizes) != dimensions:
            raise CertificateError(f"an array of {code!r} {sizes} where {dimensions} dimensions of {codes} belong")
        dtype = _DTYPES[code]
        length = prod(sizes) * dtype.itemsize
        if length > len(self._message) - self._next:
            raise CertificateError("an array that is longer than its message")
        raw = bytearray(self._message[self._next : self._next + length])
        self._next += length
        found = torch.frombuffer(raw, dtype=dtype) if length else torch.zeros(0, dtype=dtype)
        return found.reshape(sizes)

    def indices(self, data: Any, below: int, least: int = 0) -> Tensor:
        """int64 [n] with entries from ``least`` up to, not including, ``below``."""
        found = self.take(data, 1, ("i4", "i8")).to(torch.int64)
        if found.numel() and not (int(found.min()) >= least and int(found.max()) < below):
            raise CertificateError("an index that is out of range")
        return found

    def end(self) -> None:
        """Nothing may be left."""
        if self._next != len(self._message):
            raise CertificateError("bytes that no array needs")


def parsed(document: str | bytes) -> Any:
    """A JSON document without NaN and infinities."""
    try:
        return json.loads(document, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CertificateError(f"a message that is no JSON document: {error}") from error
