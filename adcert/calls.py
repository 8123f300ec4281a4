"""Which torch functions a step records, and how their arguments are read: the routing table of the function mode.

A call that is not recorded here runs as it is, and the audit names its node if it is not smooth where it stands.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import activations, choices, recurrent
from .activations import Activation
from .choices import Choice, Window
from .recomputed import dropping
from .recorder import Recorder, recordable

Arguments = dict[str, Any]
Rho = Callable[[Arguments], Activation | None]  # None: no kink that the theory knows how to take


@dataclass(frozen=True)
class Call:
    """One call of a torch function: ``run()`` computes it; ``given``: its arguments by name, defaults included."""

    name: str
    given: Arguments
    run: Callable[[], Any]
    inplace: bool


Handler = Callable[[Recorder, Call], Any]  # NotImplemented: not recorded


def record(recorder: Recorder, func: Any, args: Sequence[Any], kwargs: Arguments, where: Callable[[], str]) -> Any:
    """The recorded result of a call, or NotImplemented; ``where()``: its place in somebody's program."""
    found = _TABLE.get(func)
    if found is None:
        return NotImplemented
    names, defaults, inplace, handler = found
    if dropping() and handler not in _ALIKE:
        return NotImplemented
    spelt = {_NUMPY.get(key, key): value for key, value in kwargs.items()}
    given = {**defaults, **dict(zip(names, args, strict=False)), **spelt}
    unknown = spelt.keys() - {*names, "out"}
    if unknown or spelt.get("out") is not None or len(args) > len(names) or not isinstance(given.get("input"), Tensor):
        return NotImplemented
    name = recorder.named or f"{func.__name__.strip('_')}{where()}"
    call = Call(name, given, lambda: func(*args, **kwargs), inplace or bool(given.get("inplace")))
    return handler(recorder, call)


def known(func: Any) -> bool:
    """Is there an entry for a function?"""
    return func in _TABLE


_ALIKE: set[Handler] = set()  # they save what the call saves that is not recorded, as a checkpoint demands


def _activation(rho: Rho) -> Handler:
    def handle(recorder: Recorder, call: Call) -> Any:
        found = rho(call.given)
        if found is None or len(set(found.kinks)) < len(found.kinks):
            return NotImplemented
        return recorder.kinked(call.given["input"], found, call.name, call.run, None, call.inplace)

    _ALIKE.add(handle)
    return handle


def _relu(recorder: Recorder, call: Call) -> Any:
    return recorder.relu(call.given["input"], call.name, inplace=call.inplace)


def _prelu(recorder: Recorder, call: Call) -> Any:
    """Under autocast it runs in autocast's dtype, and so do its record and :func:`ops.prelu`."""
    x, weight = call.given["input"], call.given["weight"]
    if torch.is_autocast_enabled(x.device.type):
        narrow = torch.get_autocast_dtype(x.device.type)
        with torch._C.DisableTorchFunction():
            x, weight = (t.to(narrow) if t.dtype != torch.float64 else t for t in (x, weight))
        call = replace(call, run=lambda: F.prelu(x, weight))
    shape = [1] * x.dim()
    if weight.numel() != 1:
        if x.dim() < 2 or x.shape[1] != weight.numel():
            return NotImplemented  # torch says why
        shape[1] = weight.numel()
    left = weight.reshape(shape)
    return recorder.kinked(x, activations.prelu(), call.name, call.run, left, False)


def _rrelu(recorder: Recorder, call: Call) -> Any:
    given = call.given
    if not given["training"]:
        slope = (given["lower"] + given["upper"]) / 2
        return recorder.kinked(given["input"], activations.leaky_relu(slope), call.name, call.run, None, call.inplace)
    drawn = activations.rrelu()
    return recorder.kinked(given["input"], drawn, call.name, call.run, lambda node: node._saved_noise, call.inplace)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _clamp(given: Arguments) -> Activation | None:
    low, high = given.get("min"), given.get("max")
    bounds = [_number(low), _number(high)]
    if (low is None and high is None) or any(
        b is None and v is not None for b, v in zip(bounds, (low, high), strict=True)
    ):
        return None
    if None not in bounds and not bounds[0] < bounds[1]:  # type: ignore[operator]
        return None
    return activations.clamp(*bounds)


def _hardtanh(given: Arguments) -> Activation | None:
    low, high = _number(given["min_val"]), _number(given["max_val"])
    return activations.hardtanh(low, high) if low is not None and high is not None and low < high else None


def _elu(given: Arguments) -> Activation | None:
    return None if given["alpha"] == 1 else activations.elu(float(given["alpha"]))


def _leaky(given: Arguments) -> Activation | None:
    return None if given["negative_slope"] == 1 else activations.leaky_relu(float(given["negative_slope"]))


def _threshold(given: Arguments) -> Activation | None:
    at = _number(given["threshold"])
    return activations.threshold(at) if at is not None and given["value"] == at else None


def _softshrink(given: Arguments) -> Activation | None:
    return activations.softshrink(float(given["lambd"])) if given["lambd"] > 0 else None


# Pooling and other selections.


def _max_pool2d(recorder: Recorder, call: Call) -> Any:
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


def _max_pool1d(recorder: Recorder, call: Call) -> Any:
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


def _pool_of(spatial: int) -> Handler:
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


def _adaptive(spatial: int) -> Handler:
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


def _extremum(largest: bool) -> Handler:
    """``max(dim)`` and ``min(dim)``: one-hot at the first; without a dimension the gradient is split evenly."""

    def handle(recorder: Recorder, call: Call) -> Any:
        given, x = call.given, call.given["input"]
        if isinstance(given.get("dim"), Tensor):
            given["other"] = given["dim"]
        if isinstance(given.get("other"), Tensor):
            return _greater(largest)(recorder, call)
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


def _greater(largest: bool, even: bool = True) -> Handler:
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


def _amax(largest: bool) -> Handler:
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


def _sorted(recorder: Recorder, call: Call) -> Any:
    given, x = call.given, call.given["input"]
    descending, dim = bool(given["descending"]), given["dim"]
    if x.dim() == 0:
        return NotImplemented

    def choice(result: Any) -> Choice:
        return choices.ordered(x.detach(), result[0].detach(), result[1], int(dim) % x.dim(), descending=descending)

    return recorder.chosen(x, call.name, call.run, choice)


def _msort(recorder: Recorder, call: Call) -> Any:
    x = call.given["input"]
    if x.dim() == 0:
        return NotImplemented

    def choice(result: Tensor) -> Choice:
        node: Any = result.grad_fn
        return choices.ordered(x.detach(), result.detach(), node._saved_indices, 0, descending=False)

    return recorder.chosen(x, call.name, call.run, choice)


def _running(largest: bool) -> Handler:
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


def _topk(recorder: Recorder, call: Call) -> Any:
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


def _statistic(rank_of: Callable[[Arguments, int], int]) -> Handler:
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


def _fractional(spatial: int, pool: Callable[..., Any]) -> Handler:
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


# Recurrent networks.


def _rnn(recorder: Recorder, call: Call) -> Any:
    given = call.given
    x: Tensor = given["input"]
    hx, params = given.get("hx"), given.get("params")
    if not isinstance(params, (list, tuple)) or not isinstance(hx, Tensor) or x.dim() != 3:
        return NotImplemented  # packed sequences
    if x.is_cuda or not any(recordable(t) for t in (x, hx, *params)):
        return NotImplemented
    weights = recurrent.grouped(params, bool(given["has_biases"]))
    ways = 2 if given["bidirectional"] else 1
    if not len(weights) == ways * given["num_layers"] == len(hx):
        return NotImplemented  # torch says why
    layers = [weights[start : start + ways] for start in range(0, len(weights), ways)]
    with torch._C.DisableTorchFunction():
        first = x.transpose(0, 1) if given["batch_first"] else x
        relu = functools.partial(recorder.relu, name=call.name)
        output, last = recurrent.network(first, hx, layers, given["dropout"] if given["train"] else 0.0, relu)
        return output.transpose(0, 1) if given["batch_first"] else output, last


def _rnn_cell(recorder: Recorder, call: Call) -> Any:
    given = call.given
    x, state, *tensors = (given.get(name) for name in ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"))
    if not isinstance(x, Tensor) or not isinstance(state, Tensor) or x.is_cuda:
        return NotImplemented
    if not any(recordable(t) for t in (x, state, *tensors) if isinstance(t, Tensor)):
        return NotImplemented
    with torch._C.DisableTorchFunction():
        weights = recurrent.Weights(*tensors)  # type: ignore[arg-type]
        return weights.step(state, lambda: weights.read(x), functools.partial(recorder.relu, name=call.name))


_NUMPY = {"axis": "dim", "keepdims": "keepdim"}  # torch's functions take numpy's names, too
_Entry = tuple[tuple[str, ...], Arguments, bool, Handler]
_TABLE: dict[Any, _Entry] = {}


def _enter(
    functions: Sequence[Any], names: str, defaults: Arguments, handler: Handler, inplace: Sequence[Any] = ()
) -> None:
    for written, group in ((False, functions), (True, inplace)):
        for function in group:
            _TABLE[function] = ("input", *names.split()), defaults, written, handler


_ALIKE |= {_relu, _prelu, _rrelu, _max_pool2d}
_NO = {"inplace": False}
_BOUNDS: Arguments = {"min": None, "max": None}
_KEEP: Arguments = {"keepdim": False}
_POOL = "kernel_size stride padding dilation ceil_mode return_indices"
_POOLED: Arguments = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}

_enter([F.relu, torch.relu, Tensor.relu], "inplace", _NO, _relu, [F.relu_, torch.relu_, Tensor.relu_])
_enter([F.relu6], "inplace", _NO, _activation(lambda given: activations.hardtanh(0.0, 6.0)))
_enter(
    [F.hardtanh],
    "min_val max_val inplace",
    {"min_val": -1.0, "max_val": 1.0} | _NO,
    _activation(_hardtanh),
    [F.hardtanh_],
)
_enter([F.leaky_relu], "negative_slope inplace", {"negative_slope": 0.01} | _NO, _activation(_leaky), [F.leaky_relu_])
_enter([F.hardsigmoid], "inplace", _NO, _activation(lambda given: activations.hardsigmoid()))
_enter([F.hardswish], "inplace", _NO, _activation(lambda given: activations.hardswish()))
_enter([F.softshrink], "lambd", {"lambd": 0.5}, _activation(_softshrink))
_enter([F.elu], "alpha inplace", {"alpha": 1.0} | _NO, _activation(_elu))
_enter([], "alpha", {"alpha": 1.0}, _activation(_elu), [F.elu_])  # a scale after alpha is another function
_enter(
    [F.selu, torch.selu], "inplace", _NO, _activation(lambda given: activations.elu(*activations.SELU)), [torch.selu_]
)
_enter([F.threshold], "threshold value inplace", _NO, _activation(_threshold), [torch.threshold_])
_enter([F.prelu, torch.prelu, Tensor.prelu], "weight", {}, _prelu)
_enter([F.rrelu], "lower upper training inplace", {"lower": 1 / 8, "upper": 1 / 3, "training": False} | _NO, _rrelu)
_enter([torch.clamp, Tensor.clamp, torch.clip, Tensor.clip], "min max", _BOUNDS, _activation(_clamp))
_enter([], "min max", _BOUNDS, _activation(_clamp), [torch.clamp_, Tensor.clamp_, Tensor.clip_])
_enter([torch.clamp_min, Tensor.clamp_min], "min", {}, _activation(_clamp), [torch.clamp_min_, Tensor.clamp_min_])
_enter([torch.clamp_max, Tensor.clamp_max], "max", {}, _activation(_clamp), [torch.clamp_max_, Tensor.clamp_max_])
_enter(
    [torch.abs, Tensor.abs, torch.absolute, Tensor.absolute, Tensor.__abs__],
    "",
    {},
    _activation(lambda given: activations.magnitude()),
    [torch.abs_, Tensor.abs_],
)
_enter([F.max_pool2d, torch.max_pool2d], _POOL, _POOLED, _max_pool2d)
_enter([F.max_pool1d, torch.max_pool1d], _POOL, _POOLED, _max_pool1d)
_enter([F.max_pool3d, torch.max_pool3d], _POOL, _POOLED, _pool_of(3))
_INDICES = {"return_indices": False}
for _spatial in (1, 2, 3):
    _both = (getattr(F, f"max_pool{_spatial}d_with_indices"), getattr(F, f"adaptive_max_pool{_spatial}d_with_indices"))
    _enter([_both[0]], _POOL, _POOLED | {"return_indices": True}, _pool_of(_spatial))
    _enter(
        [getattr(F, f"adaptive_max_pool{_spatial}d"), _both[1]],
        "output_size return_indices",
        _INDICES,
        _adaptive(_spatial),
    )
for _spatial in (2, 3):
    for _name in (f"fractional_max_pool{_spatial}d", f"fractional_max_pool{_spatial}d_with_indices"):
        _enter(
            [getattr(F, _name)],
            "kernel_size output_size output_ratio return_indices _random_samples",
            {"output_size": None, "output_ratio": None, "_random_samples": None} | _INDICES,
            _fractional(_spatial, getattr(F, _name)),
        )
for _largest, _names in ((True, ("max", "amax")), (False, ("min", "amin"))):
    _enter([getattr(torch, _names[0]), getattr(Tensor, _names[0])], "dim keepdim other", _KEEP, _extremum(_largest))
    _enter(
        [getattr(torch, _names[1]), getattr(Tensor, _names[1])],
        "dim keepdim",
        {"dim": (), "keepdim": False},
        _amax(_largest),
    )
for _largest, _name in ((True, "maximum"), (False, "minimum")):
    _enter([getattr(torch, _name), getattr(Tensor, _name)], "other", {}, _greater(_largest))
for _largest, _name in ((True, "fmax"), (False, "fmin")):
    _enter([getattr(torch, _name), getattr(Tensor, _name)], "other", {}, _greater(_largest, even=False))
_enter([torch.sort, Tensor.sort], "dim descending stable", {"dim": -1, "descending": False}, _sorted)
_enter([torch.msort, Tensor.msort], "", {}, _msort)
_enter([torch.cummax, Tensor.cummax], "dim", {}, _running(True))
_enter([torch.cummin, Tensor.cummin], "dim", {}, _running(False))
_enter([torch.topk, Tensor.topk], "k dim largest sorted", {"dim": -1, "largest": True, "sorted": True}, _topk)
_enter([torch.rnn_relu], "hx params has_biases num_layers dropout train bidirectional batch_first", {}, _rnn)
_enter([torch.rnn_relu_cell], "hx w_ih w_hh b_ih b_hh", {"b_ih": None, "b_hh": None}, _rnn_cell)
_enter([torch.median, Tensor.median], "dim keepdim", _KEEP, _statistic(lambda given, size: (size - 1) // 2))
_enter(
    [torch.kthvalue, Tensor.kthvalue],
    "k dim keepdim",
    {"dim": -1, "keepdim": False},
    _statistic(lambda given, size: given["k"] - 1),
)
