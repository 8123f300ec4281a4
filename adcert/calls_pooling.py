"""Calls of max poolings, recorded: their windows, and what torch's own operation selected in each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import choices
from .calls import ALIKE, Arguments, Call, Handler
from .choices import Choice, Window
from .recorder import Recorder


def max_pool2d(recorder: Recorder, call: Call) -> Any:
    """By the recording kernel; by torch's own operation if indices are asked for."""
    given = call.given
    if given["return_indices"]:
        return _indexed(recorder, call, 2)
    window = _window(given)
    return recorder.max_pool2d(given["input"], call.name, window, ceil_mode=given["ceil_mode"])


def _window(given: Arguments) -> Window:
    kernel, stride, padding, dilation = _geometry(given, 2)
    return Window(kernel, stride, padding, dilation)  # type: ignore[arg-type]


def _geometry(given: Arguments, spatial: int) -> list[tuple[int, ...]]:
    kernel = _each(given["kernel_size"], spatial)
    stride = _each(given["stride"], spatial) if given["stride"] else kernel
    return [kernel, stride, _each(given["padding"], spatial), _each(given["dilation"], spatial)]


def _each(value: Any, count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    found = tuple(int(v) for v in value)
    return found * count if len(found) == 1 else found


def max_pool1d(recorder: Recorder, call: Call) -> Any:
    """The same windows in an image of one row: the same maxima, the same first maximiser, the same gradient."""
    given = call.given
    x = given["input"]
    if given["return_indices"] or x.dim() not in (2, 3):
        return _indexed(recorder, call, 1) if x.dim() in (2, 3) else NotImplemented
    window = Window(*(((0 if k == 2 else 1), *each) for k, each in enumerate(_geometry(given, 1))))  # type: ignore[arg-type]
    with torch._C.DisableTorchFunction():
        image = x.unsqueeze(-2)
        pooled = recorder.max_pool2d(image, call.name, window, ceil_mode=given["ceil_mode"])
        return pooled.squeeze(-2)


def pool_of(spatial: int) -> Handler:
    """Max pooling over so many dimensions, by torch's own operation."""
    return lambda recorder, call: _indexed(recorder, call, spatial)


def _indexed(recorder: Recorder, call: Call, spatial: int) -> Any:
    """A max pooling by torch's own operation, which keeps the indices of what it selected for its backward."""
    given = call.given
    x = given["input"]
    kernel, stride, padding, dilation = _geometry(given, spatial)

    def choice(result: Any) -> Choice:
        output, indices = _with_indices(result)
        sizes = zip(x.shape[-spatial:], output.shape[-spatial:], kernel, stride, padding, dilation, strict=True)
        axes = [_places(size, count, k, s, p, d) for size, count, k, s, p, d in sizes]
        return choices.windowed(x, output, _planar(x, indices, spatial), axes)

    return recorder.chosen(x, call.name, call.run, choice)


def _places(size: int, count: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """int64 [count, kernel]: the input places of every window of one axis, -1 in the padding."""
    places = torch.arange(count)[:, None] * stride - padding + torch.arange(kernel) * dilation
    return torch.where((places >= 0) & (places < size), places, -1)


def adaptive(spatial: int) -> Handler:
    """Adaptive max pooling over so many dimensions."""

    def handle(recorder: Recorder, call: Call) -> Any:
        x = call.given["input"]

        def choice(result: Any) -> Choice:
            output, indices = _with_indices(result)
            axes = [_shares(n, m) for n, m in zip(x.shape[-spatial:], output.shape[-spatial:], strict=True)]
            return choices.windowed(x, output, _planar(x, indices, spatial), axes)

        return recorder.chosen(x, call.name, call.run, choice)

    return handle


def _shares(size: int, count: int) -> Tensor:
    """int64 [count, cells]: the places from ``floor(j size / count)`` to before ``ceil((j + 1) size / count)``."""
    first = torch.arange(count) * size // count
    last = -((-(torch.arange(count) + 1) * size) // count)
    places = first[:, None] + torch.arange(int((last - first).max()) if count else 0)
    return torch.where(places < last[:, None], places, -1)


def _with_indices(result: Any) -> tuple[Tensor, Tensor]:
    if isinstance(result, Tensor):
        node = result.grad_fn
        while node is not None and not hasattr(node, "_saved_result1"):
            node = node.next_functions[0][0]  # a view that was added for fewer dimensions
        if node is None:
            raise ValueError("a pooling whose node does not keep its indices")
        indices: Tensor = node._saved_result1
        return result.detach(), indices.reshape(result.shape)
    return result[0].detach(), result[1]


def _planar(x: Tensor, indices: Tensor, spatial: int) -> Tensor:
    """Indices within each image as flat indices of x."""
    size = math.prod(x.shape[-spatial:])
    planes = math.prod(x.shape[:-spatial])
    start = (torch.arange(planes, device=x.device) * size).reshape(-1, *[1] * spatial)
    return (indices.reshape(planes, *indices.shape[-spatial:]) + start).reshape(indices.shape)


ALIKE.add(max_pool2d)


def fractional(spatial: int, pool: Callable[..., Any]) -> Handler:
    """Its windows start at random places, which are constants of the step; they are drawn as torch draws them."""

    def handle(recorder: Recorder, call: Call) -> Any:
        given = dict(call.given)
        x = given["input"]
        if x.dim() not in (spatial + 1, spatial + 2):
            return NotImplemented
        if given["_random_samples"] is None:
            batch = 1 if x.dim() == spatial + 1 else x.size(0)
            channels = x.size(-spatial - 1)
            given["_random_samples"] = torch.rand(batch, channels, spatial, dtype=x.dtype, device=x.device)
        samples = given["_random_samples"].reshape(-1, spatial)
        kernel = _each(given["kernel_size"], spatial)
        sample_of = (1, 0) if spatial == 2 else (0, 1, 2)  # torch takes the width's first in two dimensions

        def choice(result: Any) -> Choice:
            output, indices = _with_indices(result)
            sizes = zip(sample_of, x.shape[-spatial:], output.shape[-spatial:], kernel, strict=True)
            places = samples.to(output.dtype)  # autocast may pool in a wider dtype
            axes = [_intervals(places[:, k], size, count, cells) for k, size, count, cells in sizes]
            return choices.windowed(x, output, _planar(x, indices, spatial), axes)

        return recorder.chosen(x, call.name, lambda: pool(**given), choice)

    return handle


def _intervals(sample: Tensor, size: int, count: int, kernel: int) -> Tensor:
    """int64 [planes, count, kernel]: windows from ``int((i + u) a) - int(u a)`` on, in the samples' arithmetic."""
    first = torch.zeros(len(sample), count, dtype=torch.int64, device=sample.device)
    if count > 1:
        alpha = torch.tensor(size - kernel, dtype=sample.dtype) / (count - 1)
        steps = torch.arange(count - 1, dtype=sample.dtype, device=sample.device) + sample[:, None]
        first[:, :-1] = (steps * alpha).to(torch.int64) - (sample[:, None] * alpha).to(torch.int64)
    first[:, -1:] = size - kernel
    return first[:, :, None] + torch.arange(kernel, device=sample.device)
