"""An emulated CUDA device at the level of torch's tensors: ``with emulated_cuda() as device: ...``.

Inside the block there is a device ``cuda:0`` whose tensors are torch's own, with the host's memory behind them
(runtime.cpp). Its operators arrive here and run on the CPU; before that they are checked as a GPU would: no tensors of
two devices in one operator, every wait of the host is counted, streams have to wait for each other (timeline.py).
Copies to pinned memory arrive only when the host has learned that they are done, and garbage lies there until then.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import kernels as host_kernels
from . import patches, rules, runtime
from .rules import Call
from .runtime import native
from .streams import Hub
from .timeline import Timeline, Transfer
from .waits import Waits

T = TypeVar("T", Tensor, torch.nn.Module)

# Composite in torch, but not for a GPU: its own implementation is in C++ that a CPU build lacks.
_ROUTED = ("copy_", "convolution", "convolution_backward", "native_layer_norm", "native_group_norm")


class Device:
    """The running emulation. ``waits``: what made the host wait so far."""

    def __init__(self, kernels: str, queries: int) -> None:
        tables = {"cpu": host_kernels.stand_ins, "emulated": host_kernels.emulated}
        self.kernels = tables[kernels]()
        self.waits = Waits()
        self.timeline = Timeline(queries)
        self.random = torch.Generator().manual_seed(0)  # the device's own, as CUDA has it

    def no_waits(self) -> AbstractContextManager[None]:
        """On this thread and in its backward passes, a wait for the device is an error."""
        return self.waits.forbidden()

    def wait(self, what: str) -> None:
        """The host waits for the current stream."""
        self.waits.add(what)
        self.timeline.complete(self.timeline.clock(native.stream()))

    def kernel(self, op: OpOverload) -> Callable[..., Any]:
        if op.namespace == "adcert":
            return self.kernels[op.overloadpacket.__name__]
        return _STAND_INS.get(op.overloadpacket.__name__, op)


_STAND_INS = {
    name: getattr(host_kernels, name)
    for name in """relu relu_ hardsigmoid hardsigmoid_ hardswish hardswish_ cudnn_batch_norm
    cudnn_batch_norm_backward""".split()
}
_active: Device | None = None


def _run(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Every operator of the CUDA key that has no kernel in C++."""
    if _active is None:
        raise RuntimeError(f"{op} was called on a tensor of the emulated device, outside emulated_cuda()")
    with torch._C.DisableTorchFunction():
        call = Call(op, args, kwargs)
        if call.name == "copy_":
            return _copy(_active, **call.given)
        return _execute(_active, call)


def _execute(device: Device, call: Call) -> Any:
    rules.check_devices(call)
    given = [tensor for _, tensor in call.tensors]
    numbers = native.memory(given)
    named = list(zip(numbers, (name for name, _ in call.tensors), strict=True))
    stream = native.stream()
    written = [number for number, name in named if call.written(name)]
    device.timeline.access(str(call.op), stream, (n for n, name in named if not call.written(name)), written)
    if rules.waits(call):
        device.wait(str(call.op))
    seen = native.host(given)
    result = _call(device, call, dict(zip(map(id, given), seen, strict=True)))
    for tensor, view in zip(given, seen, strict=True):
        if tensor.is_cuda and (tensor.shape != view.shape or tensor.stride() != view.stride()):
            native.adopt(tensor, view)  # an out= argument found its size
    if call.name == "resolve_ties" and not call.given["windows"].is_cuda:
        return result
    return _on_device(device, str(call.op), stream, result, given, seen)


def _call(device: Device, call: Call, views: dict[int, Tensor]) -> Any:
    """Run on the CPU; random numbers come from the device's generator."""
    kwargs = {name: _seen(value, views) for name, value in call.kwargs.items()}
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    args = [_seen(value, views) for value in call.args]
    kernel = device.kernel(call.op)
    if torch.Tag.nondeterministic_seeded not in call.op.tags:
        return kernel(*args, **kwargs)
    users = torch.get_rng_state()
    try:
        torch.set_rng_state(device.random.get_state())
        result = kernel(*args, **kwargs)
        device.random.set_state(torch.get_rng_state())
    finally:
        torch.set_rng_state(users)
    return result


def _seen(value: Any, views: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return views[id(value)]
    if isinstance(value, (list, tuple)):
        return [_seen(item, views) for item in value]
    return value


def _on_device(device: Device, name: str, stream: int, result: Any, given: list[Tensor], seen: list[Tensor]) -> Any:
    """The result as tensors of the device; what was given comes back as itself."""
    found = list(rules.tensors_in(result))
    back = {id(view): tensor for tensor, view in zip(given, seen, strict=True)}
    fresh = [tensor for tensor in found if id(tensor) not in back]
    made = native.device(fresh, given, seen)
    known = set(native.memory(given))
    for number in native.memory(made):
        if number not in known:
            device.timeline.wrote(name, stream, number)
    return _seen(result, back | dict(zip(map(id, fresh), made, strict=True)))


def _copy(device: Device, self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """``self.copy_(src)`` between the devices, or on the device."""
    stream = native.stream()
    numbers = native.memory([self, src])
    position = device.timeline.access("aten.copy_", stream, numbers[1:], numbers[:1])
    target, source = native.host([self, src])
    pinned = (self if src.is_cuda else src).is_pinned() if self.is_cuda != src.is_cuda else False
    if self.is_cuda == src.is_cuda or self.numel() == 0:
        target.copy_(source)
    elif self.is_cuda:
        if not non_blocking:
            device.wait("a copy from the host")
        elif pinned:
            device.timeline.begin(Transfer(stream, position, None, _alias(source), source.clone()))
        target.copy_(source)
    elif non_blocking and pinned and _dense(self):
        content = source.to(target.dtype).expand(target.shape).clone()
        target.fill_(torch.nan if target.is_floating_point() else _garbage(target.dtype))
        device.timeline.begin(Transfer(stream, position, _alias(target), None, content))
    else:
        device.wait("a copy to the host")
        target.copy_(source)
    return self


def _alias(host: Tensor) -> Tensor:
    """The same memory with a version of its own: a copy that arrives late is no new write."""
    place = host.storage_offset(), host.shape, host.stride()
    return torch.empty(0, dtype=host.dtype).set_(host.untyped_storage(), *place)


def _dense(host: Tensor) -> bool:
    """Other strides go through pageable memory, which waits."""
    return host.is_contiguous() or (host.dim() == 4 and host.is_contiguous(memory_format=torch.channels_last))


def _garbage(dtype: torch.dtype) -> int:
    if dtype == torch.bool:
        return 1
    return torch.iinfo(dtype).min + 1 if dtype.is_signed else 0xAB


@functools.cache
def _register() -> tuple[torch.library.Library, ...]:
    """Once for a process: the registrations live as long as their libraries."""
    fallback, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    fallback.fallback(_run, "CUDA")
    for name in _ROUTED:
        aten.impl(name, functools.partial(_run, getattr(torch.ops.aten, name).default), "CUDA")
    return fallback, aten


def _take_over() -> torch.library.Library:
    """adcert's operators, which refuse CUDA tensors where there is no CUDA library, come here too."""
    library = torch.library.Library("adcert", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel is overridden: it is
        for name in host_kernels.NAMES:
            kernel = functools.partial(_run, getattr(torch.ops.adcert, name).default)
            library.impl(name, kernel, "CUDA", allow_override=True)
    return library


@contextmanager
def emulated_cuda(kernels: str = "cpu", cudnn: bool = True, queries: int = 2) -> Iterator[Device]:
    """A device cuda:0 for the duration of the block.

    Args:
        kernels: adcert's operators on it: "cpu", the CPU's, or "emulated", the CUDA sources compiled for the CPU.
        cudnn: torch finds a cuDNN, so that a batch normalisation is a ``CudnnBatchNormBackward0`` where it would be.
        queries: how often an event is asked in vain before it has passed.

    Raises:
        RuntimeError: in the end, if an operator used memory it must not use.
    """
    global _active
    if _active is not None:
        raise RuntimeError("the device is emulated already")
    runtime.load()
    _register()
    with ExitStack() as stack:
        device = _active = Device(kernels, queries)
        Hub.timeline, Hub.waits = device.timeline, device.waits
        stack.callback(_leave)
        stack.callback(_take_over()._destroy)
        native.enable(True, cudnn)
        patches.install(stack, device.random)
        _probe()
        yield device
        device.timeline.close()


def _leave() -> None:
    global _active
    _active = None
    time.sleep(0.001)  # the engine's thread may still hold Python objects, and wait for this one to let it drop them
    native.set_stream(0)
    native.enable(False, False)


def _probe() -> None:
    x = torch.ones(1, device="cuda", requires_grad=True)
    try:
        x.backward()
    except RuntimeError as error:
        raise RuntimeError("emulation.runtime.load() has to come before the first backward pass") from error


def to_device(what: T) -> T:
    """A tensor on the device, or a module moved there, without counting waits."""
    assert _active is not None
    with _active.waits.paused():
        return what.to("cuda")


def to_host(what: T) -> T:
    """What a tensor of the device holds now, or a module moved to the CPU, without counting waits."""
    if isinstance(what, torch.nn.Module):
        assert _active is not None
        with _active.waits.paused():
            return what.cpu()
    (seen,) = native.host([what.detach()])
    return seen.clone()
