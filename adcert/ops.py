"""The native operators: per operator typed wrapper, fake kernel, autograd, vmap, autocast, in that order.

Their meaning is :mod:`adcert.reference`, in plain PyTorch; their schemas are in ``csrc/library.cpp``. What an
operator saw (touches, ties) is among its outputs. Under autocast they run in the dtype of their input, as
torch's own ReLU and max pooling do: none of them has an autocast rule, and none may get one, since a cast
would make and destroy ties.

The recording operators take a ``capacity``. None: their lists are as long as what was found, ascending; on a GPU that
waits for the device once, and once more if there was more to find than room. A number: nothing waits and no shape
depends on the data; each list has room for so many entries, ``counts`` tells how many were found, and only the first
``min(found, capacity)`` entries mean something, on a GPU in no order. ``found > capacity`` is an overflow: which
entries were kept is not defined, and whoever asked has to ask again with more room. This is the form for CUDA graphs
and torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from adcert._load import cuda_problem, load
from adcert.errors import BuildError
from adcert.reference import (
    ACTIVATIONS,
    DTYPES,
    STAGE_INTS,
    ActivationResult,
    Pair,
    PoolResult,
    ReluResult,
    Resolved,
    TouchResult,
    WindowTies,
    kinks,
    pair,
)

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "STAGE_INTS",
    "ActivationResult",
    "Pair",
    "PoolResult",
    "ReluResult",
    "Resolved",
    "TouchResult",
    "WindowTies",
    "activation",
    "conv_patches",
    "distinct_rows",
    "fingerprints",
    "kinks",
    "max_pool2d",
    "opposite_rows",
    "pool_indices",
    "prelu",
    "relu",
    "resolve_ties",
    "touches",
    "window_ties",
]

load()
_OPS = torch.ops.adcert
_ROOM = 4096  # entries of a list on a GPU, unless more are known to be needed
_NAMES = (
    "relu",
    "activation",
    "prelu",
    "touches",
    "max_pool2d",
    "max_pool2d_backward",
    "max_pool2d_gather",
    "window_ties",
    "resolve_ties",
    "conv_patches",
    "distinct_rows",
    "opposite_rows",
    "fingerprints",
)


def _refuse(*_: Any) -> Any:
    raise BuildError(f"adcert's operators do not take CUDA tensors here: {cuda_problem()}")


if cuda_problem() is not None:
    for _name in _NAMES:
        torch.library.impl(f"adcert::{_name}", "cuda", _refuse)

# relu ------------------------------------------------------------------------------------------------------


def relu(x: Tensor, capacity: int | None = None) -> ReluResult:
    """ReLU and its touches (Algorithm 1, step 1) in one pass.

    Bitwise ``torch.relu(x)``, with its gradient: the proxy at the kink is 0.

    Args:
        x: any shape and strides; float32, float64, bfloat16 or float16.
        capacity: room of the list, in entries; see the module.

    Returns:
        ``output`` (differentiable), ``touches`` and ``counts``: see :class:`adcert.reference.ReluResult`.

    Raises:
        RuntimeError: another dtype.

    >>> relu(torch.tensor([[-1.0, 0.0], [2.0, -0.0]])).touches
    tensor([1, 3])
    """
    return _listed(lambda room: ReluResult(*_OPS.relu(x, room)), x, capacity)


def _relu_fake(x: Tensor, capacity: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _list(x, capacity), _counts(x)


torch.library.register_fake("adcert::relu", _relu_fake)


def _relu_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0])


def _relu_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    return torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0], 0), None


torch.library.register_autograd("adcert::relu", _relu_backward, setup_context=_relu_save)

# activation ------------------------------------------------------------------------------------------------

_KINDS = tuple(ACTIVATIONS)


def activation(
    x: Tensor, kind: str, parameters: Sequence[float] = (), capacity: int | None = None
) -> ActivationResult:
    """A kinked activation and its touches in one pass: bitwise torch's function, with torch's gradient.

    A unit touches a kink if it equals it once the kink is rounded to the dtype of ``x``. torch does not always round
    what it compares with: then such a unit is next to torch's kink, and its derivative may be that of either side.

    Args:
        x: any shape and strides; float32, float64, bfloat16 or float16.
        kind: one of :data:`adcert.reference.ACTIVATIONS`; ReLU6 is ``hardtanh`` with 0 and 6.
        parameters: as listed there, none of them NaN, limits ascending.
        capacity: room of the list, in entries; see the module.

    Returns:
        ``output`` (differentiable), ``touches`` and ``counts``: see :class:`adcert.reference.ActivationResult`.

    Raises:
        RuntimeError: another dtype, or parameters that do not fit.
        ValueError: another kind.

    >>> activation(torch.tensor([-1.0, 0.0, 3.0, 6.0]), "hardtanh", (0.0, 6.0)).touches
    tensor([2, 7])
    """
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {kind!r}")
    number, numbers = _KINDS.index(kind), [float(p) for p in parameters]
    return _listed(lambda room: ActivationResult(*_OPS.activation(x, number, numbers, room)), x, capacity)


def _activation_fake(
    x: Tensor, kind: int, parameters: Sequence[float], capacity: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _list(x, capacity), _counts(x)


torch.library.register_fake("adcert::activation", _activation_fake)


def _activation_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0])
    ctx.kind, ctx.parameters = _KINDS[inputs[1]], inputs[2]


def _activation_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    return _DERIVATIVES[ctx.kind](grad, ctx.saved_tensors[0], *ctx.parameters), None, None, None


def _clamp_backward(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    return torch.where((x >= low) & (x <= high), grad, torch.zeros((), dtype=grad.dtype, device=grad.device))


_ATEN = torch.ops.aten
# What torch's own backward does, by the same operators.
_DERIVATIVES: dict[str, Callable[..., Tensor]] = {
    "hardtanh": _ATEN.hardtanh_backward,
    "leaky_relu": lambda grad, x, slope: _ATEN.leaky_relu_backward(grad, x, slope, False),
    "hardsigmoid": _ATEN.hardsigmoid_backward,
    "hardswish": _ATEN.hardswish_backward,
    "threshold": _ATEN.threshold_backward,
    "clamp": _clamp_backward,
    "abs": lambda grad, x: grad * x.sgn(),
}

torch.library.register_autograd("adcert::activation", _activation_backward, setup_context=_activation_save)

# prelu -----------------------------------------------------------------------------------------------------


def prelu(x: Tensor, weight: Tensor, capacity: int | None = None) -> ActivationResult:
    """``F.prelu(x, weight)`` and its touches in one pass, with the gradients of both.

    Under autocast it runs in autocast's dtype, as torch's does: touches are those of ``x`` in that dtype.

    Args:
        x: any shape and strides; float32, float64, bfloat16 or float16.
        weight: one slope, or one for each channel (axis 1); of the dtype of ``x``.
        capacity: room of the list, in entries; see the module.

    >>> result = prelu(torch.tensor([[-1.0, 0.0], [2.0, -4.0]]), torch.tensor([0.5, 0.25]))
    >>> result.output.tolist(), result.touches.tolist()
    ([[-0.5, 0.0], [2.0, -1.0]], [1])
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        x, weight = (t.to(narrow) if t.dtype != torch.float64 else t for t in (x, weight))
    return _listed(lambda room: ActivationResult(*_OPS.prelu(x, weight, room)), x, capacity)


def _prelu_fake(x: Tensor, weight: Tensor, capacity: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _list(x, capacity), _counts(x)


torch.library.register_fake("adcert::prelu", _prelu_fake)


def _prelu_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2])


def _prelu_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 3
    x, weight = ctx.saved_tensors
    axes = (-1, *(1,) * (x.dim() - 2)) if x.dim() > 1 else (-1,) * x.dim()  # as torch lays the weight over x
    view = weight.reshape(axes)
    into_x, into_weight = _ATEN._prelu_kernel_backward(grad, x, view)
    return into_x, into_weight.sum_to_size(view.shape).reshape(weight.shape), None


torch.library.register_autograd("adcert::prelu", _prelu_backward, setup_context=_prelu_save)

# touches ---------------------------------------------------------------------------------------------------


def touches(x: Tensor, kinks: float | Sequence[float] = 0.0, capacity: int | None = None) -> TouchResult:
    """The entries of ``x`` that equal one of one or two kinks, by a pass that only reads.

    Not differentiable; meant for kinked functions that run in place, or are not ours.

    Args:
        x: any shape and strides; float32, float64, bfloat16 or float16.
        kinks: ascending; rounded to the dtype of ``x``. With two of them the entries are ``2 * unit + k``.
        capacity: room of the list, in entries; see the module.

    Raises:
        RuntimeError: another dtype, a NaN kink, more than two.

    >>> touches(torch.tensor([6.0, 5.0, 6.0]), 6.0).touches
    tensor([0, 2])
    >>> touches(torch.tensor([6.0, 0.0, 6.0]), (0.0, 6.0)).touches
    tensor([1, 2, 5])
    """
    at = [float(kinks)] if isinstance(kinks, (int, float)) else [float(kink) for kink in kinks]
    return _listed(lambda room: TouchResult(*_OPS.touches(x.detach(), at, room)), x, capacity)


def _touches_fake(x: Tensor, kinks: Sequence[float], capacity: int = -1) -> tuple[Tensor, Tensor]:
    return _list(x, capacity), _counts(x)


torch.library.register_fake("adcert::touches", _touches_fake)


# max_pool2d ------------------------------------------------------------------------------------------------


def max_pool2d(
    x: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    *,
    relu: bool = False,
    capacity: int | None = None,
) -> PoolResult:
    """Max pooling, of ``relu(x)`` if ``relu``, with its ties (Algorithm 1, step 2) and touches in one pass.

    Bitwise ``F.max_pool2d(x, ...)`` or ``F.max_pool2d(F.relu(x), ...)``, with its gradient and memory format:
    the proxy of the maximum is one-hot at the first maximiser in row-major window order (at the last NaN).

    Args:
        x: ``[N, C, H, W]`` or ``[C, H, W]``, any strides; float32, float64, bfloat16 or float16; N may be 0.
        kernel_size: an int or ``(KH, KW)``.
        stride: default ``kernel_size``.
        padding: at most half the span ``dilation * (kernel_size - 1) + 1``.
        dilation: distance of the cells of a window.
        ceil_mode: keep the windows that hang over the lower right border.
        relu: pool ``relu(x)``; then only windows with a positive maximum count as tied.
        capacity: room of each list, in entries; see the module.

    Returns:
        ``output`` (differentiable) and what was seen: see :class:`adcert.reference.PoolResult`.

    Raises:
        RuntimeError: another dtype, a geometry torch refuses, or a window without any cell of the image.

    >>> result = max_pool2d(torch.tensor([[[1.0, 3.0], [3.0, 0.0]]]), 2)
    >>> result.offsets.item(), result.windows.tolist(), result.members.tolist()
    (1, [0], [[6]])
    """
    kernel, pads = pair(kernel_size, "kernel_size"), pair(padding, "padding")
    strides, dilations = kernel if stride is None else pair(stride, "stride"), pair(dilation, "dilation")
    geometry = (kernel, strides, pads, dilations, ceil_mode)
    return _listed(lambda room: PoolResult(*_OPS.max_pool2d(x, *geometry, relu, room)[:6]), x, capacity)


_Ints = tuple[int, int] | list[int]
_PoolRaw = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _max_pool2d_fake(
    x: Tensor,
    kernel_size: _Ints,
    stride: _Ints,
    padding: _Ints,
    dilation: _Ints,
    ceil_mode: bool,
    relu: bool,
    capacity: int = -1,
) -> _PoolRaw:
    taps = kernel_size[0] * kernel_size[1]
    base = torch.empty_like(x) if relu else x
    geometry = (kernel_size, stride, padding, dilation, ceil_mode)
    output, _ = torch.ops.aten.max_pool2d_with_indices(base, *geometry)
    offsets = torch.empty_like(output, dtype=torch.uint8 if taps <= 255 else torch.int32)
    windows = _list(x, capacity)
    members = x.new_empty((windows.shape[0], -(-taps // 64)), dtype=torch.int64)
    routes = torch.empty_like(offsets) if relu else offsets.new_empty((0,))
    touched = _list(x, capacity) if relu else x.new_empty((0,), dtype=torch.int64)
    return output, offsets, windows, members, touched, _counts(x), routes


torch.library.register_fake("adcert::max_pool2d", _max_pool2d_fake)


def _max_pool2d_save(ctx: Any, inputs: tuple[Any, ...], output: _PoolRaw) -> None:
    x, *geometry, _, relu, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[6] if relu else output[1])
    ctx.geometry, ctx.size = geometry, x.shape[-2:]
    ctx.channels_last = _channels_last(torch.empty_like(x) if relu and not _plain(x) else x)


def _max_pool2d_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    (routes,) = ctx.saved_tensors
    return _OPS.max_pool2d_backward(grad, routes, *ctx.size, *ctx.geometry, ctx.channels_last), *(None,) * 7


torch.library.register_autograd("adcert::max_pool2d", _max_pool2d_backward, setup_context=_max_pool2d_save)

# max_pool2d_backward ---------------------------------------------------------------------------------------


def _scatter_fake(
    grad: Tensor,
    routes: Tensor,
    height: int,
    width: int,
    kernel_size: _Ints,
    stride: _Ints,
    padding: _Ints,
    dilation: _Ints,
    channels_last: bool,
) -> Tensor:
    layout = torch.channels_last if channels_last and grad.dim() == 4 else torch.contiguous_format
    return torch.empty(
        (*grad.shape[:-2], height, width), dtype=grad.dtype, device=grad.device, memory_format=layout
    )


torch.library.register_fake("adcert::max_pool2d_backward", _scatter_fake)


def _scatter_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.geometry = inputs[4:8]


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _OPS.max_pool2d_gather(grad, ctx.saved_tensors[0], *ctx.geometry), *(None,) * 8


torch.library.register_autograd("adcert::max_pool2d_backward", _scatter_backward, setup_context=_scatter_save)


def _scatter_vmap(
    info: Any, in_dims: tuple[int | None, ...], grad: Tensor, routes: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    grads, folded = _fold(info.batch_size, in_dims, grad, routes)
    return _unfold(_OPS.max_pool2d_backward(grads, folded, *rest), info.batch_size, in_dims[0], grad), 0


torch.library.register_vmap("adcert::max_pool2d_backward", _scatter_vmap)


# max_pool2d_gather, the adjoint of max_pool2d_backward -----------------------------------------------------


def _gather_fake(
    x: Tensor, routes: Tensor, kernel_size: _Ints, stride: _Ints, padding: _Ints, dilation: _Ints
) -> Tensor:
    layout = torch.channels_last if _channels_last(x) else torch.contiguous_format
    shape = (*x.shape[:-2], *routes.shape[-2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


torch.library.register_fake("adcert::max_pool2d_gather", _gather_fake)


def _gather_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.geometry, ctx.size, ctx.channels_last = inputs[2:], inputs[0].shape[-2:], _channels_last(inputs[0])


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (routes,) = ctx.saved_tensors
    return _OPS.max_pool2d_backward(grad, routes, *ctx.size, *ctx.geometry, ctx.channels_last), *(None,) * 5


torch.library.register_autograd("adcert::max_pool2d_gather", _gather_backward, setup_context=_gather_save)


def _gather_vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, routes: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    xs, folded = _fold(info.batch_size, in_dims, x, routes)
    return _unfold(_OPS.max_pool2d_gather(xs, folded, *rest), info.batch_size, in_dims[0], x), 0


torch.library.register_vmap("adcert::max_pool2d_gather", _gather_vmap)


# pool_indices, a composition of torch's operators ----------------------------------------------------------


def pool_indices(
    offsets: Tensor,
    input_shape: tuple[int, ...] | torch.Size,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
) -> Tensor:
    """In-window offsets of :func:`max_pool2d` as the indices torch returns: int64, flat in the input plane.

    Args:
        offsets: ``[..., OH, OW]``, uint8 or int32.
        input_shape: shape of the input that was pooled; only its last size, the width, matters.
        kernel_size, stride, padding, dilation: as given to :func:`max_pool2d`.

    >>> pool_indices(torch.tensor([[[1, 2]]], dtype=torch.uint8), (1, 2, 4), 2)
    tensor([[[1, 6]]])
    """
    (_, kw), (ph, pw), width = pair(kernel_size, "kernel_size"), pair(padding, "padding"), input_shape[-1]
    (sh, sw), (dh, dw) = pair(kernel_size if stride is None else stride, "stride"), pair(dilation, "dilation")
    at = offsets.long()
    rows = torch.arange(offsets.shape[-2], device=offsets.device)[:, None] * sh - ph
    columns = torch.arange(offsets.shape[-1], device=offsets.device) * sw - pw
    return (rows + at // kw * dh) * width + columns + at % kw * dw


# window_ties -----------------------------------------------------------------------------------------------


def window_ties(x: Tensor, output: Tensor, axes: Sequence[Tensor], capacity: int | None = None) -> WindowTies:
    """The ties of a max pooling over any windows of the last one to three dimensions, given its output.

    For poolings that are not ours: three-dimensional, adaptive, fractional. Not differentiable. Values are equal as
    torch compares them: -0.0 equals 0.0, and NaN nothing.

    Args:
        x: ``[..., D]``, ``[..., H, W]`` or ``[..., D, H, W]``; float32, float64, bfloat16 or float16.
        output: of the pooling, of the same dtype.
        axes: for each pooled dimension int64 ``[outputs, cells]``, or ``[planes, outputs, cells]``: the input places
            of every window, distinct; those outside of the input, as -1, are no cells.
        capacity: room of the lists, in pairs; see the module. On a GPU they are in no order.

    Raises:
        RuntimeError: another dtype, or shapes that do not fit.

    >>> x = torch.tensor([[5.0, 5.0, 1.0]])
    >>> result = window_ties(x, torch.tensor([[5.0, 5.0]]), [torch.tensor([[0, 1], [1, 2]])])
    >>> result.owner.tolist(), result.member.tolist()
    ([0, 0], [0, 1])
    """
    given = x.detach(), output.detach(), list(axes)
    if capacity is not None or not x.is_cuda:
        return WindowTies(*_OPS.window_ties(*given, _room(capacity)))
    room = _ROOM
    while True:
        result = WindowTies(*_OPS.window_ties(*given, room))
        pairs = int(result.counts[1])
        if pairs <= room:
            break
        room = pairs
    member, order = result.member[:pairs].sort()
    owner, again = result.owner[:pairs][order].sort(stable=True)
    return WindowTies(owner, member[again], result.counts)


def _window_ties_fake(
    x: Tensor, output: Tensor, axes: list[Tensor], capacity: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    owner = _list(x, capacity)
    return owner, torch.empty_like(owner), x.new_empty((4,), dtype=torch.int64)


torch.library.register_fake("adcert::window_ties", _window_ties_fake)

# resolve_ties ----------------------------------------------------------------------------------------------


def resolve_ties(
    windows: Tensor, members: Tensor, offsets: Tensor, pool: Sequence[int], stages: Sequence[int], tensors: list[Tensor]
) -> Resolved:
    """Every tied member against the selected one: are their AD gradients equal (T_j of Algorithm 1)?

    Value numbering up the straight part of the network above a max pooling: two units are the same function of the
    parameters if they are one unit, or both off, or see patches that are equal in value and, element by element,
    such pairs themselves. One-sided: equality is proved, its absence says nothing.

    Args:
        windows, members, offsets: of :func:`max_pool2d`, ``offsets`` ``[N, C, OH, OW]``.
        pool: (size, kernel, stride, padding, dilation, count) of the pooling's height, then of its width.
        stages: :data:`STAGE_INTS` integers for each stage; :mod:`adcert.stages` writes them.
        tensors: ``[N, C, H, W]`` each, what the stages saved.

    Raises:
        RuntimeError: shapes or stages that do not fit together.

    Not differentiable. See :class:`adcert.reference.Resolved` for the result.
    """
    return Resolved(*_OPS.resolve_ties(windows, members, offsets, pool, stages, tensors))


def _resolve_fake(
    windows: Tensor, members: Tensor, offsets: Tensor, pool: Sequence[int], stages: Sequence[int], tensors: list[Tensor]
) -> tuple[Tensor, ...]:
    window = _list(windows)
    return window, *(torch.empty_like(window) for _ in range(3)), windows.new_empty((5,))


torch.library.register_fake("adcert::resolve_ties", _resolve_fake)

# conv_patches ----------------------------------------------------------------------------------------------


def conv_patches(x: Tensor, units: Tensor, stage: Sequence[int]) -> Tensor:
    """``[K, C / groups * KH * KW]``: the patch of ``x`` each output unit of a convolution looks at, 0 in the padding.

    Args:
        x: ``[N, C, H, W]``, any strides; float32, float64, bfloat16 or float16.
        units: int64 ``[K]``, flat indices of the convolution's output; -1 stands for a row of zeros.
        stage: the convolution as a stage (:mod:`adcert.stages`).
    """
    result: Tensor = _OPS.conv_patches(x.detach(), units, stage)
    return result


def _patches_fake(x: Tensor, units: Tensor, stage: Sequence[int]) -> Tensor:
    return x.new_empty((units.shape[0], stage[4] // stage[5] * stage[8] * stage[14]))


torch.library.register_fake("adcert::conv_patches", _patches_fake)

# distinct_rows, opposite_rows ------------------------------------------------------------------------------


def distinct_rows(rows: Tensor) -> Tensor:
    """Ascending indices of the first of each set of rows of a contiguous matrix that are equal byte by byte.

    >>> distinct_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]))
    tensor([0, 1])
    """
    result: Tensor = _OPS.distinct_rows(rows)
    return result


torch.library.register_fake("adcert::distinct_rows", lambda rows: _list(rows))


def opposite_rows(plus: Tensor, minus: Tensor, group: Tensor) -> Tensor:
    """``[i, k]``, the first row k that seems the opposite of an earlier row i of its group, or ``[]``.

    Rows are ``plus - minus`` in float64, so the pair is a proposal: two exact rows on opposite rays prove that no p
    makes both positive (Gordan), which the caller has to check.

    Args:
        plus, minus: ``[K, n]`` of one dtype: float32, float64, bfloat16 or float16.
        group: int64 ``[K]``.

    >>> opposite_rows(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([7, 7]))
    tensor([0, 1])
    """
    result: Tensor = _OPS.opposite_rows(plus, minus, group)
    return result


torch.library.register_fake("adcert::opposite_rows", lambda plus, minus, group: _list(group))

# fingerprints ----------------------------------------------------------------------------------------------


def fingerprints(tensors: Sequence[Tensor]) -> Tensor:
    """int64 ``[K]``: of each tensor a sum over its memory, modulo 2^64.

    Tensors of one shape and layout have the same number if they are equal, bit for bit. It is another one if a single
    word of 64 bits differs; of any others about one in 2^64 has the same. No defence against somebody who looks for it.

    Args:
        tensors: at least one, all on one device; any dtypes, shapes and strides.

    Raises:
        RuntimeError: no tensor, or several devices.

    >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    >>> first, second, third = fingerprints([a, b, a.clone()]).tolist()
    >>> first == second, first == third
    (False, True)
    """
    if not tensors:
        raise RuntimeError("fingerprints: expected at least one tensor")
    result: Tensor = _OPS.fingerprints([t.detach() for t in tensors])
    return result


torch.library.register_fake(
    "adcert::fingerprints", lambda tensors: tensors[0].new_empty((len(tensors),), dtype=torch.int64)
)

# helpers ---------------------------------------------------------------------------------------------------


Result = TypeVar("Result", ReluResult, ActivationResult, TouchResult, PoolResult)


def _listed(call: Callable[[int], Result], x: Tensor, capacity: int | None) -> Result:
    """Calls a recording operator; without a capacity its lists are exact and ascending on every device."""
    if capacity is not None or not x.is_cuda:
        return call(_room(capacity))
    room = _ROOM
    while True:
        result = call(room)
        windows, touches, _ = result.counts.tolist()
        if max(windows, touches) <= room:
            return ordered(result, windows, touches)
        room = max(windows, touches)


def _room(capacity: int | None) -> int:
    """As the operators take it: -1 for lists that are as long as what was found."""
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity is a number of entries, at least 0, got {capacity}")
    return -1 if capacity is None else capacity


def ordered(result: Result, windows: int, touches: int) -> Result:
    """The first so many entries of lists that are in no order, ascending."""
    result = result._replace(touches=result.touches[:touches].sort().values)
    if isinstance(result, PoolResult):
        indices, order = result.windows[:windows].sort()
        result = result._replace(windows=indices, members=result.members[:windows][order])
    return result


def _list(x: Tensor, capacity: int = -1) -> Tensor:
    """A fake int64 list with room for so many entries; -1: of unknown length."""
    length = torch.library.get_ctx().new_dynamic_size() if capacity < 0 else capacity
    return x.new_empty((length,), dtype=torch.int64)


def _counts(x: Tensor) -> Tensor:
    return x.new_empty((3,), dtype=torch.int64)


def _plain(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _channels_last(x: Tensor) -> bool:
    """torch's rule (csrc/checks.h): strides that look like channels_last; ambiguous ones do not."""
    if x.is_contiguous() or x.dim() != 4 or 0 in x.shape:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if x.stride(d) < least or (d == 0 and least == x.stride(1)):
            return False
        least = x.stride(d) * max(x.shape[d], 1)
    return True


def _fold(
    size: int, in_dims: tuple[int | None, ...], values: Tensor, routes: Tensor
) -> tuple[Tensor, Tensor]:
    """Batches of values and routes as one 4-D batch each; unbatched routes repeat, which costs no memory."""
    v, r = in_dims[:2]
    values = values.expand(size, *values.shape) if v is None else values.movedim(v, 0)
    if r is None:
        routes = routes if values.dim() == 5 else routes.unsqueeze(0)
    else:
        routes = routes.movedim(r, 0)
        routes = routes.flatten(0, 1) if values.dim() == 5 else routes
    return values.flatten(0, 1) if values.dim() == 5 else values, routes


def _unfold(result: Tensor, size: int, batched: int | None, values: Tensor) -> Tensor:
    dims = values.dim() - (batched is not None)
    return result.reshape(size, -1, *result.shape[1:]) if dims == 4 else result
