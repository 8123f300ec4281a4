"""Lists of recorded operations on a GPU: how much room they get, and how they come to the host.

On the host a kernel's lists are as long as what it found. On a GPU that would mean waiting for the device in every
forward pass: there the lists get room beforehand, and how much of it was used is asked when backward begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .choices import Ties
from .transfer import Arrival, Batch, follow

if TYPE_CHECKING:
    from .recorder import Recorder
    from .records import OpRecord

LEAST = 1024  # entries


class Rooms:
    """Entries the lists of a recorded operation have room for on a GPU, by its name; learned from step to step.

    An operation that is met for the first time gets exact lists, for which the device is waited for (None); later ones
    twice as many entries as were ever found, as a power of two.
    """

    def __init__(self) -> None:
        self._most: dict[str, int] = {}

    def of(self, name: str, most: int) -> int | None:
        """``most``: what the shape of the input allows."""
        found = self._most.get(name)
        return None if found is None else min(1 << (max(LEAST, 2 * found) - 1).bit_length(), most)

    def saw(self, name: str, found: int) -> None:
        self._most[name] = max(found, self._most.get(name, 0))

    def state(self) -> dict[str, int]:
        """What was learned, as plain numbers."""
        return dict(self._most)

    def restore(self, state: Mapping[str, int]) -> None:
        """A resumed step finds as much room as it would have found."""
        self._most = dict(state)


class Coming:
    """What a recorder's new records have found: first how much, then the lists themselves, exact and ascending.

    Nothing is waited for before :meth:`wait`, and there only what has been found is copied. A list that had too
    little room stays empty, and its record says so. ``losses``: asked for in the same breath, whether they are finite.
    """

    def __init__(self, recorder: Recorder, losses: Sequence[Tensor] = ()) -> None:
        follow(recorder.streams)
        for device in {*(stream.device for stream in recorder.streams), *(t.device for t in losses if t.is_cuda)}:
            recorder.ran_on(device)  # here autograd waits for the gradients of the backward pass that begins
        self._records = [record for record in recorder.records if not record.listed]
        self._rooms = recorder.rooms
        self._counts = Batch([record.counts for record in self._records])
        self._losses = Arrival([_sample(loss.detach()) for loss in losses])

    def wait(self) -> bool:
        """Bring the lists; tells whether all losses are finite. The last question first: it answers the others."""
        finite = all(bool(torch.isfinite(loss).all()) for loss in self._losses.wait())
        lists: list[tuple[Tensor, Tensor, Tensor]] = []
        for record, counts in zip(self._records, self._counts.wait(), strict=True):
            record.counts = counts
            windows, touches, _ = counts.tolist()
            self._rooms.saw(record.name, max(windows, touches))
            if record.room is not None and max(windows, touches) > record.room:
                found = f"{windows} ties" if windows > record.room else f"{touches} touches"
                record.overflow = (
                    f"{record.name}: {found}, more than the {record.room} the list had room for; the next step has more"
                )
                windows = touches = 0
            lists.append(_lists(record, windows, touches))
        arrived = iter(Arrival([t for each in lists for t in each]).wait())
        for record in self._records:
            record.touches, indices, members = next(arrived), next(arrived), next(arrived)
            if isinstance(record.ties, Ties):
                record.ties = replace(record.ties, windows=indices, members=members)
            record.listed = True
        self._records = []
        return finite


def _sample(loss: Tensor) -> Tensor:
    """All of a small loss; of a large one on a device one entry that is finite iff all are."""
    return loss.abs().amax() if loss.is_cuda and loss.numel() > LEAST else loss


def _lists(record: OpRecord, windows: int, touches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Touches, windows and members of a record, ascending; what is empty needs no copy and is on the host already."""
    nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
    touched = _sorted(record.touches[:touches], record)[0] if touches else nothing
    if not isinstance(record.ties, Ties):
        return touched, nothing, nothing
    members = record.ties.members
    if windows == 0:
        return touched, nothing, nothing.reshape(0, members.shape[1])
    indices, order = _sorted(record.ties.windows[:windows], record)
    return touched, indices, members[:windows] if order is None else members[order]


def _sorted(indices: Tensor, record: OpRecord) -> tuple[Tensor, Tensor | None]:
    """Exact lists are ascending already."""
    if record.room is None:
        return indices, None
    found = indices.sort()
    return found.values, found.indices
