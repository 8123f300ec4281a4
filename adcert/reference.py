"""Every native op again in plain PyTorch: the specification, and what the tests compare against.

Slow and obviously right: each pooling window is spelled out as a row of its cells. The functions have the
signatures of :mod:`adcert.ops` and return the same named tuples; they need no compiled library and run on any
device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: An ``int`` or a pair ``(height, width)``.
Pair = int | tuple[int, int] | list[int]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ReluResult(NamedTuple):
    """What :func:`relu` returns.

    Attributes:
        output: ``max(x, 0)``, shape, dtype and strides of ``torch.relu(x)``; -0.0 and NaN pass unchanged.
        touches: int64 ``[M]``, ascending flat indices (row-major in ``x.shape``) of the units at 0.
        nonfinite: int64 ``[1]``, the number of NaN or infinite entries of ``x``.
    """

    output: Tensor
    touches: Tensor
    nonfinite: Tensor


class TouchResult(NamedTuple):
    """What :func:`touches` returns; see :class:`ReluResult`."""

    touches: Tensor
    nonfinite: Tensor


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
        nonfinite: int64 ``[1]``, the number of NaN or infinite entries of ``x``.
    """

    output: Tensor
    offsets: Tensor
    windows: Tensor
    members: Tensor
    touches: Tensor
    nonfinite: Tensor


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
    return ReluResult(torch.relu(x), found.touches, found.nonfinite)


def touches(x: Tensor, kink: float = 0.0) -> TouchResult:
    """The entries of ``x`` that equal ``kink``, and how many are not finite.

    >>> touches(torch.tensor([[6.0, 5.0], [6.0, 0.0]]), kink=6.0).touches
    tensor([0, 2])
    """
    _check_dtype(x, "touches")
    flat = x.detach().reshape(-1)
    return TouchResult((flat == kink).nonzero().reshape(-1), (~flat.isfinite()).sum().reshape(1))


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
    none = found.touches[:0]
    return PoolResult(output, offsets, windows, members, found.touches if relu else none, found.nonfinite)


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


def _check_dtype(x: Tensor, op: str) -> None:
    if x.dtype not in DTYPES:
        raise RuntimeError(f"{op}: expected float32, float64, bfloat16 or float16, got {x.dtype}")
