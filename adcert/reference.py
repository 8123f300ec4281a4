"""Every native op again in plain PyTorch: the specification, and what the tests compare against.

Slow and obviously right: each pooling window is spelled out as a row of its cells. The functions have the
signatures of :mod:`adcert.ops` and return the same named tuples; they need no compiled library and run on any
device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: An ``int`` or a pair ``(height, width)``.
Pair = int | tuple[int, int] | list[int]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ReluResult(NamedTuple):
    """What :func:`relu` returns.

    Attributes:
        output: ``max(x, 0)``, shape, dtype and strides of ``torch.relu(x)``; -0.0 and NaN pass unchanged.
        touches: int64 ``[M]``, ascending flat indices (row-major in ``x.shape``) of the units at 0.
        counts: int64 ``[3]``: tied windows (0), touches, NaN or infinite entries of ``x``.
    """

    output: Tensor
    touches: Tensor
    counts: Tensor


class ActivationResult(NamedTuple):
    """What :func:`activation` and :func:`prelu` return.

    Attributes:
        output: torch's own, in shape, dtype, strides and bits.
        touches: int64 ``[M]``, ascending; ``K * unit + k`` for each unit (flat index, row-major in ``x.shape``) that
            equals the k-th of K kinks, rounded to the dtype of ``x``.
        counts: int64 ``[3]``: tied windows (0), touches, NaN or infinite entries of ``x``.
    """

    output: Tensor
    touches: Tensor
    counts: Tensor


class TouchResult(NamedTuple):
    """What :func:`touches` returns; see :class:`ActivationResult`."""

    touches: Tensor
    counts: Tensor


class PoolResult(NamedTuple):
    """What :func:`max_pool2d` returns.

    Attributes:
        output: ``[N, C, OH, OW]`` or ``[C, OH, OW]``.
        offsets: shape and strides of ``output``; in-window offset ``kh * KW + kw`` of the selected member,
            the first maximum in row-major window order (the last NaN, if there is one);
            uint8 if ``KH * KW <= 255``, else int32.
        windows: int64 ``[T]``, ascending flat indices (row-major in ``output.shape``) of the windows whose
            set of maximisers has two or more members; with ``relu=True`` only those with a positive maximum.
        members: int64 ``[T, W]``, ``W = ceil(KH * KW / 64)``; bit ``(kh * KW + kw) % 64`` of word
            ``(kh * KW + kw) // 64`` is set iff that cell lies in the image and attains the maximum.
        touches: int64 ``[M]``, ascending flat indices of the input cells at 0; empty unless ``relu=True``.
        counts: int64 ``[3]``: tied windows, touches, NaN or infinite entries of ``x``.
    """

    output: Tensor
    offsets: Tensor
    windows: Tensor
    members: Tensor
    touches: Tensor
    counts: Tensor


class WindowTies(NamedTuple):
    """What :func:`window_ties` returns.

    Attributes:
        owner, member: int64 ``[K]``, by owner, then by member: flat output, and flat input that attains it; for all
            outputs that two or more cells of their windows attain.
        counts: int64 ``[4]``: tied windows, pairs, NaN or infinite entries of ``x``, outputs (NaN aside) that no
            cell of their window attains.
    """

    owner: Tensor
    member: Tensor
    counts: Tensor


#: Integers a stage of :func:`resolve_ties` takes: kind, relu, numbers of the tensors ``values`` and ``offsets``
#: (-1: none), channels of the input, groups, channels of the output, then size, kernel, stride, padding, dilation and
#: count of the height and of the width.
STAGE_INTS = 19


class Resolved(NamedTuple):
    """What :func:`resolve_ties` returns; the lists hold the K pairs not proved equal, in the order of the ties.

    Attributes:
        window: int64 ``[K]``, flat output index of the tied window.
        chosen, other: int64 ``[K]``, flat units of the tensor below the stages' first recorded operations (the input of
            the pooling, usually); -1 for a unit that is off.
        answer: int64 ``[K]``: 1, the patches of the first convolution differ: an exact nonzero row; 2, they are equal,
            what is below them is not proved equal; 3, the stages do not tell.
        counts: int64 ``[5]``, pairs by answer: 0, equal gradients; 1, 2, 3; 4, both units off, or the same unit.
    """

    window: Tensor
    chosen: Tensor
    other: Tensor
    answer: Tensor
    counts: Tensor


def pair(value: Pair, name: str) -> tuple[int, int]:
    """``value`` as ``(height, width)``.

    Raises:
        RuntimeError: if it is a sequence of another length than 1 or 2 (torch raises the same).

    >>> pair(3, "kernel_size"), pair((2, 5), "kernel_size")
    ((3, 3), (2, 5))
    """
    if isinstance(value, int):
        return value, value
    if len(value) not in (1, 2):
        raise RuntimeError(f"max_pool2d: {name} must be an int or a pair of ints, got {value!r}")
    return int(value[0]), int(value[-1])


def relu(x: Tensor) -> ReluResult:
    """ReLU with its touches (the units of Algorithm 1, step 1).

    >>> relu(torch.tensor([-1.0, 0.0, 2.0, -0.0])).touches
    tensor([1, 3])
    """
    found = touches(x)
    return ReluResult(torch.relu(x), found.touches, found.counts)


#: Kinked activations and the number of their parameters; their order numbers them in ``csrc/activation.h``.
ACTIVATIONS = {
    "hardtanh": 2,  # low, high
    "leaky_relu": 1,  # slope below 0
    "hardsigmoid": 0,
    "hardswish": 0,
    "threshold": 1,  # threshold and value in one: where they differ the function jumps
    "clamp": 2,  # low, high; one of them may be infinite, and then is no kink
    "abs": 0,
}


def kinks(kind: str, parameters: Sequence[float] = ()) -> tuple[float, ...]:
    """Where the derivative of an activation jumps, ascending.

    >>> kinks("hardtanh", (0, 6)), kinks("clamp", (0, math.inf)), kinks("hardswish")
    ((0.0, 6.0), (0.0,), (-3.0, 3.0))
    """
    numbers = tuple(map(float, parameters))
    if kind in ("hardsigmoid", "hardswish"):
        return -3.0, 3.0
    if kind == "clamp":
        return tuple(number for number in numbers if math.isfinite(number))
    return numbers if kind in ("hardtanh", "threshold") else (0.0,)


def activation(x: Tensor, kind: str, parameters: Sequence[float] = ()) -> ActivationResult:
    """torch's own function of that name, with its touches.

    >>> activation(torch.tensor([0.0, 3.0, 6.0]), "hardtanh", (0.0, 6.0)).touches
    tensor([0, 5])
    """
    functions: dict[str, Callable[..., Tensor]] = {
        "hardtanh": F.hardtanh,
        "leaky_relu": F.leaky_relu,
        "hardsigmoid": F.hardsigmoid,
        "hardswish": F.hardswish,
        "threshold": lambda x, at: F.threshold(x, at, at),
        "clamp": _clamp,
        "abs": torch.abs,
    }
    found = touches(x, kinks(kind, parameters))
    return ActivationResult(functions[kind](x, *parameters), found.touches, found.counts)


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    return x.clamp(low if math.isfinite(low) else None, high if math.isfinite(high) else None)


def prelu(x: Tensor, weight: Tensor) -> ActivationResult:
    """``F.prelu`` with its touches.

    >>> prelu(torch.tensor([-4.0, 0.0]), torch.tensor([0.25])).output
    tensor([-1.,  0.])
    """
    found = touches(x)
    return ActivationResult(F.prelu(x, weight), found.touches, found.counts)


def touches(x: Tensor, kinks: float | Sequence[float] = 0.0) -> TouchResult:
    """The entries of ``x`` that equal a kink, and how many are not finite.

    >>> touches(torch.tensor([[6.0, 5.0], [6.0, 0.0]]), 6.0).touches
    tensor([0, 2])
    >>> touches(torch.tensor([[6.0, 5.0], [6.0, 0.0]]), (0.0, 6.0)).touches
    tensor([1, 5, 6])
    """
    _check_dtype(x, "touches")
    flat = x.detach().reshape(-1)
    at = (kinks,) if isinstance(kinks, (int, float)) else kinks
    found = torch.stack([flat == kink for kink in at], 1).reshape(-1).nonzero().reshape(-1)
    return TouchResult(found, _counts(0, len(found), (~flat.isfinite()).sum(), x))


def max_pool2d(
    x: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    *,
    relu: bool = False,
) -> PoolResult:
    """Max pooling, of ``relu(x)`` if ``relu``, with its ties (the sets S_j of Algorithm 1, step 2).

    >>> x = torch.tensor([[[1.0, 3.0], [3.0, 0.0]]])
    >>> result = max_pool2d(x, 2)
    >>> result.offsets.item(), result.windows.tolist(), result.members.tolist()
    (1, [0], [[6]])
    """
    _check_dtype(x, "max_pool2d")
    kernel = pair(kernel_size, "kernel_size")
    rows, columns = _taps(x, kernel, stride, padding, dilation, ceil_mode)
    a = torch.relu(x) if relu else x

    (height, width), (kh, kw) = x.shape[-2:], kernel
    r, c = rows[:, None, :, None], columns[None, :, None, :]  # [OH, 1, KH, 1], [1, OW, 1, KW]
    inside = ((r >= 0) & (r < height) & (c >= 0) & (c < width)).flatten(2)  # [OH, OW, KH * KW]
    plane = (r.clamp(0, height - 1) * width + c.clamp(0, width - 1)).flatten(2)
    cells = a.flatten(-2)[..., plane]  # [..., OH, OW, KH * KW]

    with torch.no_grad():
        selected, maximum = _select(cells, inside)
        attains = inside & (cells == maximum[..., None])
        tied = attains.sum(-1) >= 2
        if relu:
            tied &= maximum > 0
        windows = tied.flatten().nonzero().reshape(-1)
        members = _words(attains.flatten(0, -2)[windows])
        found = touches(x)

    layout = _layout(a)
    output = cells.gather(-1, selected[..., None]).squeeze(-1).clone(memory_format=layout)
    offsets = selected.to(torch.uint8 if kh * kw <= 255 else torch.int32).clone(memory_format=layout)
    touched = found.touches if relu else found.touches[:0]
    counts = _counts(len(windows), len(touched), found.counts[2], x)
    return PoolResult(output, offsets, windows, members, touched, counts)


def window_ties(x: Tensor, output: Tensor, axes: Sequence[Tensor]) -> WindowTies:
    """The ties of a max pooling over any windows of the last ``len(axes)`` dimensions.

    >>> window_ties(torch.tensor([2.0, 1.0, 2.0]), torch.tensor([2.0]), [torch.tensor([[0, 1, 2]])]).member
    tensor([0, 2])
    """
    _check_dtype(x, "window_ties")
    lead = x.dim() - len(axes)
    planes, size = math.prod(x.shape[:lead]), math.prod(x.shape[lead:])
    image, found, lost = x.detach().reshape(planes, size), [], 0
    where = itertools.product(range(planes), *(range(n) for n in output.shape[lead:]))
    for number, ((plane, *at), value) in enumerate(zip(where, output.detach().reshape(-1), strict=True)):
        cells = torch.zeros(1, dtype=torch.int64)
        for axis, n, place in zip(axes, x.shape[lead:], at, strict=True):
            table = (axis[plane] if axis.dim() == 3 else axis)[place]
            table = table[(table >= 0) & (table < n)]
            cells = (cells[:, None] * n + table).flatten()
        equal = cells[image[plane, cells] == value].sort().values
        lost += int(len(equal) == 0 and not bool(value.isnan()))
        found += [(number, plane * size + int(cell)) for cell in equal if len(equal) > 1]
    owner, member = torch.tensor(found, dtype=torch.int64).reshape(-1, 2).unbind(1)
    counts = [len(set(owner.tolist())), len(owner), int((~x.isfinite()).sum()), lost]
    return WindowTies(owner, member, torch.tensor(counts))


def pool_indices(
    offsets: Tensor,
    input_shape: tuple[int, ...] | torch.Size,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
) -> Tensor:
    """In-window offsets as torch's indices: int64, flat in the input plane.

    >>> pool_indices(torch.tensor([[[1, 2]]]), (1, 2, 4), 2)
    tensor([[[1, 6]]])
    """
    (_, kw), width = pair(kernel_size, "kernel_size"), input_shape[-1]
    sh, sw = pair(kernel_size if stride is None else stride, "stride")
    (ph, pw), (dh, dw) = pair(padding, "padding"), pair(dilation, "dilation")
    result = torch.empty_like(offsets, dtype=torch.int64)
    for oh in range(offsets.shape[-2]):
        for ow in range(offsets.shape[-1]):
            at = offsets[..., oh, ow].long()
            ih, iw = oh * sh - ph + at // kw * dh, ow * sw - pw + at % kw * dw
            result[..., oh, ow] = ih * width + iw
    return result


def resolve_ties(
    windows: Tensor, members: Tensor, offsets: Tensor, pool: Sequence[int], stages: Sequence[int], tensors: list[Tensor]
) -> Resolved:
    """Value numbering without memory: every pair walks up the stages by itself."""
    walk = [_Stage(stages[i : i + STAGE_INTS], tensors) for i in range(0, len(stages), STAGE_INTS)]
    top = _Stage((3, 0, -1, -1, 1, 1, 1, *pool), tensors)
    cells = top.cells
    for stage in walk:  # poolings right above
        cells = stage.cells if stage.kind == 3 else cells
        if stage.kind not in (2, 3):
            break
    found: list[tuple[int, int, int, int]] = []
    counts = [0] * 5
    for window, words in zip(windows.tolist(), members.tolist(), strict=True):
        n, c, o = (int(i) for i in torch.unravel_index(torch.tensor(window), (*offsets.shape[:2], top.outputs)))
        selected = int(offsets[n, c].flatten()[o])
        for cell in range(top.taps):
            if cell == selected or not (words[cell // 64] >> (cell % 64)) & 1:
                continue
            answer, p, q = _compare(walk, n, c, top.source(o, selected), top.source(o, cell))
            counts[answer] += 1
            if answer in (1, 2, 3):
                base = (n * offsets.shape[1] + c) * cells
                found.append((window, *(-1 if u is None else base + u for u in (p, q)), answer))
    table = torch.tensor(found, dtype=torch.int64).reshape(-1, 4)
    return Resolved(table[:, 0], table[:, 1], table[:, 2], table[:, 3], torch.tensor(counts))


class _Stage:
    """One stage of :func:`resolve_ties`; positions are row * width + column, None for a unit that is off."""

    def __init__(self, numbers: Sequence[int], tensors: list[Tensor]) -> None:
        self.kind, _, values, offsets, channels, self.groups, self.channels_out = (int(i) for i in numbers[:7])
        self.values = None if values < 0 else tensors[values]
        self.offsets = None if offsets < 0 else tensors[offsets]
        self.channels = channels // max(1, self.groups)
        self.height, self.width = numbers[7:13], numbers[13:]
        self.taps, self.outputs = self.height[1] * self.width[1], self.height[5] * self.width[5]
        self.cells = self.height[0] * self.width[0]

    def source(self, position: int, tap: int) -> int | None:
        """Input position of a tap of an output position; None in the padding."""
        cells = []
        for axis, o, k in (
            (self.height, position // self.width[5], tap // self.width[1]),
            (self.width, position % self.width[5], tap % self.width[1]),
        ):
            size, _, stride, padding, dilation, _ = axis
            cells.append(o * stride - padding + k * dilation)
            if not 0 <= cells[-1] < size:
                return None
        return cells[0] * self.width[0] + cells[1]

    def value(self, n: int, c: int, position: int | None) -> float:
        assert self.values is not None
        return 0.0 if position is None else float(self.values[n, c].flatten()[position])

    def selected(self, n: int, c: int, position: int | None) -> int | None:
        """Of a recorded operation: the position AD selects, None if the unit is off."""
        if position is None or (self.values is not None and not self.value(n, c, position) > 0):
            return None
        return position if self.offsets is None else self.source(position, int(self.offsets[n, c].flatten()[position]))


def _compare(walk: list[_Stage], n: int, c: int, p: int | None, q: int | None) -> tuple[int, int | None, int | None]:
    """The answer for units p and q of channel c, and the positions where it was given."""
    for i, stage in enumerate(walk):
        if stage.kind in (2, 3):
            p, q = stage.selected(n, c, p), stage.selected(n, c, q)
            if p == q:
                return 4, p, q
            if p is None or q is None:
                return 3, p, q
        elif stage.kind == 4 and stage.value(n, c, p) != stage.value(n, c, q):
            return 3, p, q
        elif stage.kind == 5:
            return _compare_patches(walk, i, n, c, p, q), p, q
        elif stage.kind < 2:
            return 3, p, q
    return 3, p, q


def _compare_patches(walk: list[_Stage], i: int, n: int, c: int, p: int | None, q: int | None) -> int:
    stage, above = walk[i], walk[i + 1 :]
    assert p is not None and q is not None
    first = c // (stage.channels_out // stage.groups) * stage.channels
    pairs = [(stage.source(p, k), stage.source(q, k)) for k in range(stage.taps)]
    channels = range(first, first + stage.channels)
    cells = [(d, a, b) for a, b in pairs for d in channels]
    if stage.values is not None and any(stage.value(n, d, a) != stage.value(n, d, b) for d, a, b in cells):
        return 1
    if above and above[0].kind == 0:
        return 0
    equal = all(a == b or _compare(above, n, d, a, b)[0] in (0, 4) for d, a, b in cells)
    return 0 if equal else 2


def conv_patches(x: Tensor, units: Tensor, stage: Sequence[int]) -> Tensor:
    """Patches of a convolution's input, one row for each output unit."""
    conv = _Stage((5, 0, 0, -1, *stage[4:]), [x])
    shape = (x.shape[0], conv.channels_out, conv.outputs)
    rows = []
    for unit in units.tolist():
        n, c, p = (int(i) for i in torch.unravel_index(torch.tensor(max(unit, 0)), shape))
        first = c // (conv.channels_out // conv.groups) * conv.channels
        for d in range(first, first + conv.channels):
            taps = (conv.source(p, k) if unit >= 0 else None for k in range(conv.taps))
            rows += [conv.value(n, d, at) for at in taps]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(units), conv.channels * conv.taps).to(x.dtype)


def distinct_rows(rows: Tensor) -> Tensor:
    """Ascending indices of the first of each set of equal rows, byte by byte."""
    seen: dict[bytes, int] = {}
    for i, row in enumerate(rows):
        seen.setdefault(row.contiguous().view(torch.uint8).numpy().tobytes(), i)
    return torch.tensor(sorted(seen.values()), dtype=torch.int64)


def opposite_rows(plus: Tensor, minus: Tensor, group: Tensor) -> Tensor:
    """``[i, k]``: the first row k that is the opposite of an earlier row of its group, the first such i; or ``[]``."""
    rows = plus.to(torch.float64) - minus.to(torch.float64)
    for k in range(len(rows)):
        for i in range(k):
            if group[i] == group[k] and bool(rows[k].any()) and torch.equal(rows[k], -rows[i]):
                return torch.tensor([i, k])
    return torch.zeros(0, dtype=torch.int64)


def fingerprints(tensors: Sequence[Tensor]) -> Tensor:
    """int64 ``[K]``: the sum of the scattered words of 64 bits of each tensor's memory, modulo 2^64."""
    totals = []
    for t in tensors:
        memory = sorted(range(t.dim()), key=t.stride, reverse=True)  # dense ones by falling strides
        raw = bytes(t.detach().permute(memory).contiguous().flatten().view(torch.uint8).tolist())
        total = 0
        for k in range(-(-len(raw) // 128) * 16):
            h = int.from_bytes(raw[8 * k : 8 * k + 8], "little") ^ (k * 0x9E3779B97F4A7C15 % 2**64)
            for _ in range(2):
                h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93 % 2**64
            total += h ^ (h >> 32)
        totals.append((total + 2**63) % 2**64 - 2**63)
    return torch.tensor(totals, dtype=torch.int64)


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format torch gives pooled output: channels_last iff the strides of ``x`` look like it."""
    if x.dim() != 4 or 0 in x.shape:
        return torch.contiguous_format
    least = 0
    for d in (1, 3, 2, 0):
        if x.stride(d) < least or (d == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = x.stride(d) * max(x.shape[d], 1)
    return torch.channels_last


def _select(cells: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and value of the first maximum (last NaN) among the cells inside the image, ``[...]`` each."""
    selected = inside.byte().argmax(-1).expand(cells.shape[:-1]).clone()  # the first cell inside
    maximum = torch.full(cells.shape[:-1], -torch.inf, dtype=cells.dtype, device=cells.device)
    for k in range(cells.shape[-1]):
        cell = cells[..., k]
        better = inside[..., k] & ((cell > maximum) | cell.isnan())
        selected = torch.where(better, k, selected)
        maximum = torch.where(better, cell, maximum)
    return selected, maximum


def _words(attains: Tensor) -> Tensor:
    """Boolean ``[T, K]`` as bit sets, int64 ``[T, ceil(K / 64)]``."""
    count = attains.shape[1]
    words = attains.new_zeros((attains.shape[0], -(-count // 64)), dtype=torch.int64)
    for k in range(count):
        words[:, k // 64] |= attains[:, k].long() << (k % 64)
    return words


def _taps(
    x: Tensor, kernel: tuple[int, int], stride: Pair | None, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """Input rows ``[OH, KH]`` and columns ``[OW, KW]`` the windows look at; outside the image: padding."""
    if x.dim() not in (3, 4):
        raise RuntimeError(f"max_pool2d: expected a 3-D or 4-D input, got shape {tuple(x.shape)}")
    if 0 in x.shape[-3:]:
        raise RuntimeError(f"max_pool2d: only the batch may be empty, got shape {tuple(x.shape)}")
    strides = pair(kernel if stride is None else stride, "stride")
    pads, dilations = pair(padding, "padding"), pair(dilation, "dilation")
    result = []
    for axis in (0, 1):
        size, k, s, p, d = x.shape[axis - 2], kernel[axis], strides[axis], pads[axis], dilations[axis]
        if k <= 0 or s <= 0 or d <= 0:
            raise RuntimeError("max_pool2d: kernel_size, stride and dilation must be positive")
        span = d * (k - 1) + 1
        if p < 0 or p > span // 2:
            raise RuntimeError(f"max_pool2d: padding {p} must be between 0 and half the window's span {span}")
        room = size + 2 * p - span
        count = (-(-room // s) if ceil_mode else room // s) + 1
        if ceil_mode and (count - 1) * s >= size + p:
            count -= 1  # a window must start inside the image or in its left padding
        if count <= 0:
            raise RuntimeError(f"max_pool2d: a window of span {span} does not fit: size {size}, padding {p}")
        taps = torch.arange(count, device=x.device)[:, None] * s - p + torch.arange(k, device=x.device) * d
        if not ((taps >= 0) & (taps < size)).any(1).all():
            raise RuntimeError("max_pool2d: a window holds no cell of the image (dilation steps over it)")
        result.append(taps)
    return result[0], result[1]


def _counts(windows: int, touches: int, nonfinite: Tensor, like: Tensor) -> Tensor:
    return torch.tensor([windows, touches, int(nonfinite)], device=like.device)


def _check_dtype(x: Tensor, op: str) -> None:
    if x.dtype not in DTYPES:
        raise RuntimeError(f"{op}: expected float32, float64, bfloat16 or float16, got {x.dtype}")
