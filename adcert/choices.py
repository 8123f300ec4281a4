"""What a selecting operation chose, and from what: the argmax sets of max pooling, and lists for every other one.

Both kinds answer the same questions: which inputs AD selected (:meth:`selected`), and which pairs of units have to part
in AD's order along a direction (:meth:`pairs`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import ops
from .transfer import host, take

_ORDERS = 120  # of the tied entries of one line that are tried


@dataclass(frozen=True)
class Window:
    """Geometry of a two-dimensional pooling window, each entry (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def most(self, shape: Sequence[int]) -> int:
        """An upper bound of the windows, and of the input units, for an input of this shape."""
        *planes, height, width = shape
        return math.prod(planes) * (height + 2 * self.padding[0]) * (width + 2 * self.padding[1])


@dataclass(frozen=True, eq=False)
class Ties:
    """Argmax sets S_j of a two-dimensional max pooling of a tensor of shape ``size``.

    ``windows``: int64 [T], flat output indices (logical row-major) of windows with two or more maximisers.
    ``members``: int64 [T, W], bit ``kh * KW + kw`` is set iff that cell attains the maximum.
    ``offsets``: in-window offset of the member AD selects, for every output; on the device of the output.
    """

    windows: Tensor
    members: Tensor
    offsets: Tensor
    window: Window
    size: tuple[int, ...]
    even = linked = False

    @property
    def overlap(self) -> int:
        """How many outputs may select one input."""
        return math.prod(self.window.kernel)

    def select(self, mask: Tensor) -> Ties:
        """The ties of this mask."""
        return replace(self, windows=self.windows[mask], members=self.members[mask])

    def count(self, mask: Tensor) -> int:
        """Number of (selected, other) pairs in the windows of this mask."""
        bits = torch.arange(min(64, math.prod(self.window.kernel)))
        held = ((self.members[mask][:, :, None] >> bits) & 1).sum()
        return int(held) - int(mask.sum())

    def selected(self, outputs: Tensor) -> Tensor:
        """Flat input indices that AD selects for these flat outputs (int64, any shape)."""
        return self._inputs(outputs, take(self.offsets, outputs).to(torch.int64))

    def _inputs(self, outputs: Tensor, cells: Tensor) -> Tensor:
        """Flat indices of the input of the in-window cells ``kh * KW + kw`` of these outputs."""
        window = self.window
        *_, height, width = self.size
        out_h, out_w = self.offsets.shape[-2:]
        line = outputs // out_w  # divisions of int64 are what this function costs
        plane = line // out_h
        row = (line - plane * out_h) * window.stride[0] - window.padding[0]
        column = (outputs - line * out_w) * window.stride[1] - window.padding[1]
        cell = torch.arange(window.kernel[0] * window.kernel[1])
        inside = cell // window.kernel[1] * (window.dilation[0] * width) + cell % window.kernel[1] * window.dilation[1]
        return (plane * height + row) * width + column + inside[cells]

    def _held(self) -> tuple[Tensor, Tensor]:
        """(window, cell) of every member of every tie, int64 [M] each, windows ascending."""
        kernel = self.window.kernel[0] * self.window.kernel[1]
        bits = torch.arange(min(kernel, 64))
        held = ((self.members[:, :, None] >> bits) & 1).flatten(1)[:, :kernel]
        which, cells = torch.nonzero(held, as_tuple=True)
        return self.windows[which], cells

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(window, selected member, other member) of every pair of these ties; the selected one has to win."""
        owner, cells = self._held()
        members, chosen = self._inputs(owner, cells), self.selected(owner)
        other = members != chosen
        return owner[other], chosen[other], members[other]

    def maximisers(self, outputs: Tensor) -> Tensor:
        """Distinct flat input indices of all members of the argmax sets of these outputs."""
        owner, cells = self._held()
        mine = torch.isin(owner, outputs)
        distinct: Tensor = torch.unique(torch.cat([self.selected(outputs), self._inputs(owner[mine], cells[mine])]))
        return distinct

    def places(self, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every (position in ``units``, flat output) whose window holds that input, and does the input attain it?"""
        window = self.window
        *_, height, width = self.size
        out_h, out_w = self.offsets.shape[-2:]
        cells = torch.arange(window.kernel[0] * window.kernel[1])
        plane, rest = units // (height * width), units % (height * width)
        row = (rest // width + window.padding[0])[:, None] - cells // window.kernel[1] * window.dilation[0]
        column = (rest % width + window.padding[1])[:, None] - cells % window.kernel[1] * window.dilation[1]
        aligned = (row % window.stride[0] == 0) & (column % window.stride[1] == 0)
        row, column = row // window.stride[0], column // window.stride[1]
        inside = aligned & (row >= 0) & (row < out_h) & (column >= 0) & (column < out_w)
        owner, cell = torch.nonzero(inside, as_tuple=True)
        outputs = ((plane[:, None] * out_h + row) * out_w + column)[inside]
        return owner, outputs, self._attains(outputs, cell)

    def _attains(self, windows: Tensor, cells: Tensor) -> Tensor:
        """Does the cell attain its window's maximum (selected, or member of a recorded tie)?"""
        found = take(self.offsets, windows).to(torch.int64) == cells
        if len(self.windows):
            place = torch.searchsorted(self.windows, windows).clamp(max=len(self.windows) - 1)
            word = self.members[place, cells // 64]
            found |= (self.windows[place] == windows) & ((word >> (cells % 64)) & 1).bool()
        return found

    def lists(self) -> tuple[Tensor, ...]:
        """What its comparisons decided, for a fingerprint."""
        return self.windows, self.members


@dataclass(frozen=True, eq=False)
class Choice:
    """Selections of any shape: every output is one input, and pairs of inputs whose order decides which.

    ``windows``: int64 [T], ascending, the outputs with a tie. ``owner``, ``plus``, ``minus``: int64 [K], of every pair
    an output it decides and two flat inputs of equal value; AD's choice is right if ``plus`` becomes the larger one.
    ``chosen``: int64, the flat input of every output, shaped as the output. ``even``: AD splits the gradient evenly
    among tied inputs, so all of them have to have the same gradient. ``linked``: a pair decides other outputs, too.
    """

    windows: Tensor
    owner: Tensor
    plus: Tensor
    minus: Tensor
    chosen: Tensor
    even: bool = False
    linked: bool = False

    @property
    def overlap(self) -> int:
        """How many outputs may select one input."""
        return max(1, self.chosen.numel())

    def select(self, mask: Tensor) -> Choice:
        """The ties of this mask."""
        kept = torch.isin(self.owner, self.windows[mask])
        return replace(
            self,
            windows=self.windows[mask],
            owner=self.owner[kept],
            plus=self.plus[kept],
            minus=self.minus[kept],
        )

    def count(self, mask: Tensor) -> int:
        """Number of pairs in the windows of this mask."""
        return int(torch.isin(self.owner, self.windows[mask]).sum())

    def selected(self, outputs: Tensor) -> Tensor:
        """Flat input indices that AD selects for these flat outputs."""
        return take(self.chosen, outputs)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(output, input that has to become larger, other input) of every pair."""
        return self.owner, self.plus, self.minus

    def attained(self, units: Tensor) -> Tensor:
        """bool: may some output be this flat input near w?"""
        return torch.isin(units, torch.cat([host(self.chosen).reshape(-1), self.plus, self.minus]))

    def lists(self) -> tuple[Tensor, ...]:
        """What its comparisons decided, for a fingerprint."""
        return self.windows, self.plus, self.minus, host(self.chosen).reshape(-1)


def along(x: Tensor, values: Tensor, indices: Tensor, dim: int, *, largest: bool, even: bool = False) -> Choice:
    """The choice of ``max`` or ``min`` over one dimension (kept, of size 1, in ``values`` and ``indices``)."""
    tied = (x == values).sum(dim, keepdim=True) > 1
    chosen = _flat(x.shape, indices, dim)
    windows = torch.nonzero(tied.reshape(-1)).flatten()
    lines = torch.nonzero((x == values) & tied)
    member = _ravel(lines, x.shape)
    lines[:, dim] = 0
    owner = _ravel(lines, tied.shape)
    first = chosen.reshape(-1)[owner]
    other = member != first
    owner, first, member = owner[other], first[other], member[other]
    order = torch.argsort(owner, stable=True)
    pair = (first[order], member[order]) if largest else (member[order], first[order])
    return Choice(windows, owner[order], *pair, chosen, even)


def ordered(x: Tensor, values: Tensor, indices: Tensor, dim: int, *, descending: bool) -> Choice:
    """The choice of a sort, or of a sorted topk, along one dimension: tied entries in the order of their outputs.

    Neighbours of equal value have to part in that order; entries that were left out have to stay behind the last one.
    """
    chosen = _flat(x.shape, indices, dim)
    length = values.shape[dim]
    same = values.narrow(dim, min(1, length), max(0, length - 1)) == values.narrow(dim, 0, max(0, length - 1))
    later = torch.nonzero(same)
    later[:, dim] += 1
    owner = _ravel(later, values.shape)
    behind = chosen.reshape(-1)[owner]
    later[:, dim] -= 1
    ahead = chosen.reshape(-1)[_ravel(later, values.shape)]
    if length < x.shape[dim]:
        last = values.narrow(dim, length - 1, 1)
        taken = torch.zeros(x.shape, dtype=torch.bool, device=x.device).scatter(dim, indices, True)
        out = torch.nonzero((x == last) & ~taken)
        left = _ravel(out, x.shape)
        out[:, dim] = length - 1
        place = _ravel(out, values.shape)
        owner = torch.cat([owner, place])
        ahead, behind = torch.cat([ahead, chosen.reshape(-1)[place]]), torch.cat([behind, left])
    order = torch.argsort(owner, stable=True)
    owner, ahead, behind = owner[order], ahead[order], behind[order]
    plus, minus = (ahead, behind) if descending else (behind, ahead)
    return Choice(torch.unique(owner), owner, plus, minus, chosen, linked=True)


def unordered(x: Tensor, indices: Tensor, dim: int, again: Callable[[Tensor], Tensor], *, descending: bool) -> Choice:
    """The choice of a topk that leaves its entries in an order of the algorithm's own.

    If whatever the order of tied entries each output is an entry of a fixed rank, the outputs are those of a sort, in
    other places. Near w tied entries may be in any weak order, so all of them are tried: ``again(line)`` is the indices
    that the algorithm finds in a line of numbers, on which it has the same comparisons to make.

    Raises:
        ValueError: if an output is not, if the orders of a line are too many to be tried, or on a GPU, where the
            algorithm for one line may be another one.
    """
    if x.is_cuda:
        raise ValueError("an unsorted topk on a GPU")
    line = x.movedim(dim, -1)
    values, order = line.sort(-1, descending=descending)
    place = torch.arange(x.shape[dim]).expand_as(order)
    ranks = torch.empty_like(order).scatter(-1, order, place).gather(-1, indices.movedim(dim, -1))
    for tied in torch.nonzero((values.diff(dim=-1) == 0).any(-1)).tolist():
        ranks[tuple(tied)] = _fixed_ranks(line[tuple(tied)], again, descending=descending)
    by_rank = ranks.argsort(-1).movedim(-1, dim)
    sorted_ = indices.gather(dim, by_rank)
    if not torch.equal(x.gather(dim, sorted_), values.movedim(-1, dim).narrow(dim, 0, indices.shape[dim])):
        raise ValueError("a topk whose outputs are not the entries of their ranks")
    choice = ordered(x, x.gather(dim, sorted_), sorted_, dim, descending=descending)
    owner = _flat(indices.shape, by_rank, dim).reshape(-1)[choice.owner]
    order = torch.argsort(owner, stable=True)
    return replace(
        choice,
        windows=torch.unique(owner),
        owner=owner[order],
        plus=choice.plus[order],
        minus=choice.minus[order],
        chosen=_flat(x.shape, indices, dim),
    )


def _fixed_ranks(line: Tensor, again: Callable[[Tensor], Tensor], *, descending: bool) -> Tensor:
    """The rank of every output, the same in each weak order of the tied entries."""
    groups: dict[float, list[int]] = {}
    for entry, value in enumerate(line.tolist()):
        groups.setdefault(value, []).append(entry)
    tied = [groups[value] for value in sorted(groups)]
    if max(map(len, tied)) > 4 or math.prod(len(_weak_orders(len(group))) for group in tied) > _ORDERS:
        raise ValueError(f"more than {_ORDERS} orders of tied entries")
    found: Tensor | None = None
    for orders in itertools.product(*(_weak_orders(len(group)) for group in tied)):
        numbers = torch.empty(line.shape, dtype=torch.int64)
        start = 0
        for group, order in zip(tied, orders, strict=True):
            numbers[group] = start + torch.tensor(order)
            start += len(group)
        given = numbers.to(line.dtype)
        if not torch.equal(numbers, given.long()):
            raise ValueError(f"{len(line)} ranks do not fit into {line.dtype}")
        selected = numbers[again(given)]
        in_order = numbers.sort(descending=descending).values
        if found is None:  # the first order is total
            found = torch.searchsorted(-in_order if descending else in_order, -selected if descending else selected)
        if not torch.equal(in_order[found], selected):
            raise ValueError("where an entry goes depends on how ties are broken")
    assert found is not None
    return found


@functools.cache
def _weak_orders(count: int) -> list[tuple[int, ...]]:
    """All ways to number so many entries from 0 on without a gap, a total one first."""
    found = [order for order in itertools.product(range(count), repeat=count) if set(order) == {*range(max(order) + 1)}]
    return sorted(found, key=lambda order: -max(order))


def running(x: Tensor, values: Tensor, indices: Tensor, dim: int, *, largest: bool) -> Choice:
    """The choice of a running maximum or minimum along one dimension: among the entries up to each place."""
    chosen = _flat(x.shape, indices, dim)
    found = []
    for place in range(x.shape[dim]):
        head = x.narrow(dim, 0, place + 1) == values.narrow(dim, place, 1)
        members = torch.nonzero(head)
        member = _ravel(members, x.shape)
        members[:, dim] = place
        owner = _ravel(members, x.shape)
        found.append(torch.stack([owner, chosen.reshape(-1)[owner], member]))
    owner, winner, member = torch.cat(found, 1) if found else chosen.new_zeros((3, 0))
    other = winner != member
    owner, winner, member = owner[other], winner[other], member[other]
    order = torch.argsort(owner, stable=True)
    pair = (winner[order], member[order]) if largest else (member[order], winner[order])
    return Choice(torch.unique(owner), owner[order], *pair, chosen)


def ranked(x: Tensor, values: Tensor, indices: Tensor, dim: int, rank: int) -> Choice:
    """The choice of an order statistic over one dimension (kept, of size 1): the entry of this rank from below.

    Of the entries tied with the selected one as many have to go below it as its rank asks for; the first ones do.
    """
    chosen = _flat(x.shape, indices, dim)
    others = (x == values).scatter(dim, indices, False)
    lower = rank - (x < values).sum(dim, keepdim=True)
    below = others & (torch.cumsum(others, dim) <= lower)
    places = torch.nonzero(others)
    member, down = _ravel(places, x.shape), below[tuple(places.T)]
    places[:, dim] = 0
    owner = _ravel(places, values.shape)
    middle = chosen.reshape(-1)[owner]
    plus, minus = torch.where(down, middle, member), torch.where(down, member, middle)
    order = torch.argsort(owner, stable=True)
    return Choice(torch.unique(owner), owner[order], plus[order], minus[order], chosen)


def windowed(x: Tensor, output: Tensor, chosen: Tensor, axes: Sequence[Tensor]) -> Choice:
    """The choice of a max pooling over any windows of the last ``len(axes)`` dimensions.

    ``axes``: for each of them int64 [outputs, cells], or [planes, outputs, cells], the input places of every window, -1
    where there is none.
    ``chosen``: flat input of every output. Autocast may have pooled x in a wider dtype, that of the output.
    """
    found = ops.window_ties(x.to(output.dtype), output, [axis.to(x.device) for axis in axes])
    if int(found.counts[3]):
        raise ValueError("an output of a pooling is not in the window it should come from")
    winner = chosen.reshape(-1)[found.owner]
    other = found.member != winner
    owner, winner, member = found.owner[other], winner[other], found.member[other]
    return Choice(torch.unique(owner), owner, winner, member, chosen)


def renamed(choice: Choice, places: Tensor) -> Choice:
    """The same choice where input k is called ``places[k]``."""
    plus, minus, chosen = (places[index] for index in (choice.plus, choice.minus, choice.chosen))
    return replace(choice, plus=plus, minus=minus, chosen=chosen)


def _flat(shape: Sequence[int], indices: Tensor, dim: int) -> Tensor:
    """Indices along one dimension as flat ones of a tensor of this shape."""
    grid = [torch.arange(n, device=indices.device) for n in indices.shape]
    place = list(torch.meshgrid(*grid, indexing="ij")) if grid else []
    if not place:
        return indices.clone()
    place[dim] = indices
    return _ravel(torch.stack(place, -1), shape)


def _ravel(places: Tensor, shape: Sequence[int]) -> Tensor:
    """Flat row-major indices of multi-indices [..., dimensions]."""
    flat = torch.zeros(places.shape[:-1], dtype=torch.int64, device=places.device)
    for axis, size in enumerate(shape):
        flat = flat * size + places[..., axis]
    return flat
