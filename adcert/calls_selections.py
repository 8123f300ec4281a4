"""Calls of extrema, sorts and order statistics, recorded: what they chose, and from what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import choices
from .calls import Arguments, Call, Handler
from .choices import Choice
from .recorder import Recorder, recordable


def extremum(largest: bool) -> Handler:
    """``max(dim)`` and ``min(dim)``: one-hot at the first; without a dimension the gradient is split evenly."""

    def handle(recorder: Recorder, call: Call) -> Any:
        given, x = call.given, call.given["input"]
        if isinstance(given.get("dim"), Tensor):
            given["other"] = given["dim"]
        if isinstance(given.get("other"), Tensor):
            return greater(largest)(recorder, call)
        if given.get("dim") is None:
            return _even(recorder, call, None, largest)
        dim, keep = int(given["dim"]), bool(given["keepdim"])
        if x.dim() == 0:
            return NotImplemented

        def choice(result: Any) -> Choice:
            values, indices = (result[0].detach(), result[1])
            if not keep:
                values, indices = values.unsqueeze(dim), indices.unsqueeze(dim)
            return choices.along(x.detach(), values, indices, dim % x.dim(), largest=largest)

        return recorder.chosen(x, call.name, call.run, choice)

    return handle


class _Greater(torch.autograd.Function):
    """torch's own maximum or minimum of two tensors, as a function of their stack: equal to the last bit.

    ``even``: where both are equal each has half of the gradient; else the first has all of it (fmax, fmin). What is
    saved is what torch's own operation saves.
    """

    @staticmethod
    def forward(
        ctx: Any, stack: Tensor, pair: tuple[Tensor, Tensor], run: Callable[[], Tensor], largest: bool, even: bool
    ) -> Tensor:
        ctx.save_for_backward(*pair)
        ctx.largest, ctx.even = largest, even
        return run()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        first, second = ctx.saved_tensors
        if ctx.even:
            masks = (first < second, first > second) if ctx.largest else (first > second, first < second)
            both = [torch.where(first == second, grad / 2, grad).masked_fill_(mask, 0) for mask in masks]
        else:
            second_lost = ((first >= second) if ctx.largest else (first <= second)) | second.isnan()
            both = [grad.masked_fill(mask, 0) for mask in (~second_lost, second_lost)]
        # The layout decides in which order a sum over a broadcast dimension adds up.
        shape, strides = both[0].shape, both[0].stride()
        stack = grad.new_empty_strided((2, *shape), (both[0].numel(), *strides))
        for half, gradient in zip(stack, both, strict=True):
            half.copy_(gradient)
        return stack, None, None, None, None


def greater(largest: bool, even: bool = True) -> Handler:
    """``maximum`` and ``minimum`` of two tensors, as an extremum over their stack."""

    def handle(recorder: Recorder, call: Call) -> Any:
        pair = call.given["input"], call.given["other"]
        if not all(isinstance(t, Tensor) and t.dtype == pair[0].dtype for t in pair):
            return NotImplemented
        with torch._C.DisableTorchFunction():
            stack = torch.stack(torch.broadcast_tensors(*pair))  # type: ignore[no-untyped-call]
            if not recordable(stack):
                return NotImplemented
            run = functools.partial(_Greater.apply, stack, tuple(t.detach() for t in pair), call.run, largest, even)
            if even:
                return _even(recorder, replace(call, given={"input": stack}, run=run), (0,), largest)

            def choice(result: Tensor) -> Choice:
                lower = stack[0] < stack[1] if largest else stack[0] > stack[1]
                seen = stack.detach(), result.detach()[None], lower[None].to(torch.int64)
                return choices.along(*seen, 0, largest=largest)

            return recorder.chosen(stack, call.name, run, choice)

    return handle


def amax(largest: bool) -> Handler:
    """``amax`` and ``amin``: the gradient is split evenly."""

    def handle(recorder: Recorder, call: Call) -> Any:
        dims = call.given["dim"]
        return _even(recorder, call, (dims,) if isinstance(dims, int) else tuple(dims or ()), largest)

    return handle


def _even(recorder: Recorder, call: Call, dims: tuple[int, ...] | None, largest: bool) -> Any:
    """An extremum whose gradient autodiff splits evenly among the tied entries."""
    x = call.given["input"]
    if x.dim() == 0 or x.numel() == 0:
        return NotImplemented
    over = sorted(d % x.dim() for d in dims) if dims else list(range(x.dim()))
    rest = [d for d in range(x.dim()) if d not in over]

    def choice(result: Tensor) -> Choice:
        flat = x.detach().permute(*rest, *over).reshape(*(x.shape[d] for d in rest), -1)
        places = torch.arange(x.numel(), device=x.device).reshape(x.shape).permute(*rest, *over).reshape(flat.shape)
        values, indices = (flat.max if largest else flat.min)(-1, keepdim=True)
        found = choices.along(flat, values, indices, flat.dim() - 1, largest=largest, even=True)
        return choices.renamed(found, places.reshape(-1))

    return recorder.chosen(x, call.name, call.run, choice)


def sort(recorder: Recorder, call: Call) -> Any:
    """``sort``: every output is the entry of its rank."""
    given, x = call.given, call.given["input"]
    descending, dim = bool(given["descending"]), given["dim"]
    if x.dim() == 0:
        return NotImplemented

    def choice(result: Any) -> Choice:
        return choices.ordered(x.detach(), result[0].detach(), result[1], int(dim) % x.dim(), descending=descending)

    return recorder.chosen(x, call.name, call.run, choice)


def msort(recorder: Recorder, call: Call) -> Any:
    """``msort``: along the first dimension, by indices that the node keeps."""
    x = call.given["input"]
    if x.dim() == 0:
        return NotImplemented

    def choice(result: Tensor) -> Choice:
        node: Any = result.grad_fn
        return choices.ordered(x.detach(), result.detach(), node._saved_indices, 0, descending=False)

    return recorder.chosen(x, call.name, call.run, choice)


def running(largest: bool) -> Handler:
    """``cummax`` and ``cummin``: every output is an extremum of the entries up to its own place."""

    def handle(recorder: Recorder, call: Call) -> Any:
        x = call.given["input"]
        if x.dim() == 0:
            return NotImplemented
        dim = int(call.given["dim"]) % x.dim()

        def choice(result: Any) -> Choice:
            return choices.running(x.detach(), result[0].detach(), result[1], dim, largest=largest)

        return recorder.chosen(x, call.name, call.run, choice)

    return handle


def topk(recorder: Recorder, call: Call) -> Any:
    """``topk``: in order, or unsorted."""
    given, x = call.given, call.given["input"]
    if x.dim() == 0 or int(given["k"]) < 1:
        return NotImplemented
    dim, largest = int(given["dim"]) % x.dim(), bool(given["largest"])

    def choice(result: Any) -> Choice:
        values, indices = result[0].detach(), result[1]
        if given["sorted"] or int(given["k"]) == 1:
            return choices.ordered(x.detach(), values, indices, dim, descending=largest)

        def again(line: Tensor) -> Tensor:
            return line.topk(int(given["k"]), 0, largest, False).indices

        return choices.unordered(x.detach(), indices, dim, again, descending=largest)

    return recorder.chosen(x, call.name, call.run, choice)


def statistic(rank_of: Callable[[Arguments, int], int]) -> Handler:
    """An order statistic over one dimension: the median, the k-th value."""

    def handle(recorder: Recorder, call: Call) -> Any:
        given, x = call.given, call.given["input"]
        if x.dim() == 0 or given.get("dim") is None:
            return NotImplemented
        dim, keep = int(given["dim"]) % x.dim(), bool(given["keepdim"])

        def choice(result: Any) -> Choice:
            values, indices = result[0].detach(), result[1]
            if not keep:
                values, indices = values.unsqueeze(dim), indices.unsqueeze(dim)
            return choices.ranked(x.detach(), values, indices, dim, rank_of(given, x.shape[dim]))

        return recorder.chosen(x, call.name, call.run, choice)

    return handle
