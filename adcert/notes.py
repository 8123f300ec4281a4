"""Notes about tensors that do not keep them alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

from torch import Tensor

Note = TypeVar("Note")


class Notes(Generic[Note]):
    """Notes about tensors, each as an object of its own; the tensors are not kept alive (a note may keep another)."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[weakref.ref[Tensor], Note]] = {}

    def get(self, tensor: Tensor) -> Note | None:
        found = self._of.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None  # an id may come again

    def set(self, tensor: Tensor, note: Note) -> None:
        notes, key = self._of, id(tensor)
        notes[key] = weakref.ref(tensor, lambda _: notes.pop(key, None)), note

    def of_any(self, tensors: list[Tensor]) -> bool:
        """Quick, and never wrong where there is none."""
        notes = self._of
        return bool(notes) and any([id(tensor) in notes for tensor in tensors])

    def pairs(self) -> Iterator[tuple[Tensor, Note]]:
        """The tensors that are still there, with their notes."""
        for reference, note in list(self._of.values()):
            tensor = reference()
            if tensor is not None:
                yield tensor, note

    def __bool__(self) -> bool:
        return bool(self._of)

    def clear(self) -> None:
        self._of.clear()
