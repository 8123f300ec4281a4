"""The witness, replayed: gradients of the float64 network along a certificate's direction tend to AD's gradient.

Evidence, not proof: it needs a float64 evaluation that reproduces every recorded touch and tie. Where rounding made the
ties (README, "Floating point"), it does not, and the answer is "not replayable".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .adopted import adopt
from .certificate import FREE
from .compiled import uncompiled
from .conclusion import Prints
from .errors import AdcertError
from .layers import Graph, Leaves
from .lists import Coming
from .recorder import Recorder, recording
from .watch import Watch

if TYPE_CHECKING:
    from .certificate import Certificate

_SMALLEST = 1e-12  # the smallest perturbation, relative to weights of order one: float64 still resolves it
_POINTS = 5


@dataclass(frozen=True)
class Replay:
    """Outcome of a replay.

    ``scales``: the parameters s of the perturbations ``w + s^(R+1) (sum_r s^(R-r) p_r + s^R noise)`` over the R
    ranks in use, decreasing. ``distances``: Euclidean distance of the gradient there from AD's at w, in float64.
    """

    replayable: bool
    reason: str
    scales: tuple[float, ...] = ()
    distances: tuple[float, ...] = ()
    norm: float = 0.0

    @property
    def converges(self) -> bool:
        """The last distance is tiny, absolutely or against the first one."""
        if not self.replayable or not self.distances:
            return False
        first, last = self.distances[0], self.distances[-1]
        return last <= 1e-5 * (1.0 + self.norm) or last <= 1e-3 * first


def replay(certificate: Certificate, closure: Callable[[], Tensor], model: torch.nn.Module, *, seed: int = 0) -> Replay:
    """Evaluate the true gradient near w along the certificate's witness, in float64.

    Args:
        certificate: of the step to replay, with the model's parameters as they were then.
        closure: returns the scalar loss, without calling backward. Floating tensors it uses are cast to float64.
            Compiled code in it runs uncompiled.
        model: the model; parameters, buffers, gradients and random states are restored afterwards.
        seed: of the noise that moves everything the witness leaves on a kink.

    Raises:
        AdcertError: if the certificate's parameters are not the model's.
    """
    parameters = dict(model.named_parameters())
    unknown = [
        name
        for name, shape in certificate.shapes.items()
        if name not in parameters or tuple(parameters[name].shape) != tuple(shape)
    ]
    if unknown:
        raise AdcertError(f"the certificate speaks of {unknown[0]}, which is no parameter of this model in that shape")
    if certificate.claim == "":
        return Replay(False, f"not replayable: the step is {certificate.verdict.value}, there is no witness")
    several = certificate.system == "hull" and len(certificate.blocks) > 1
    if several or any(FREE in block.rules for block in certificate.blocks):
        return Replay(False, "not replayable: the gradient is a convex combination of several limits")
    devices = sorted({p.device.index for p in (*model.parameters(), *model.buffers()) if p.is_cuda})
    with _float64(model), uncompiled():
        if _prints(closure, model, devices) != certificate.fingerprints:
            return Replay(
                False, "not replayable: the float64 evaluation does not reproduce the recorded ties and touches"
            )
        return _along(certificate, closure, {name: parameters[name] for name in certificate.shapes}, devices, seed)


def _along(
    certificate: Certificate,
    closure: Callable[[], Tensor],
    parameters: dict[str, Tensor],
    devices: list[int],
    seed: int,
) -> Replay:
    centre = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    target = _gradient(closure, parameters, devices)
    directions = {name: p.to(centre[name].device) for name, p in certificate.directions.items()}
    used = sorted({certificate.scales[name] for name, p in directions.items() if bool(p.any())})
    directions = _level(directions, certificate.scales)
    ranks = len(used)
    generator = torch.Generator().manual_seed(seed)
    options: Any = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    noise = {name: torch.randn(p.shape, **options).to(p.device) for name, p in centre.items()}
    smallest = min(0.05, _SMALLEST ** (1.0 / (2 * ranks + 1)))
    scales = torch.logspace(-0.5, float(torch.log10(torch.tensor(smallest))), _POINTS, dtype=torch.float64).tolist()
    distances = []
    for s in scales:
        t = s ** (ranks + 1)
        with torch.no_grad():
            for name, tensor in parameters.items():
                step = noise[name] * s**ranks
                if bool(directions[name].any()):
                    step = step + directions[name] * s ** (ranks - 1 - used.index(certificate.scales[name]))
                tensor.copy_(centre[name] + t * step)
        distances.append(float(torch.linalg.vector_norm(_gradient(closure, parameters, devices) - target)))
    return Replay(True, "", tuple(scales), tuple(distances), float(torch.linalg.vector_norm(target)))


def _level(directions: dict[str, Tensor], scales: dict[str, int]) -> dict[str, Tensor]:
    """Every rank's direction with largest entry 1: only its sign matters, and no rank may outgrow the next."""
    tops: dict[int, float] = {}
    for name, p in directions.items():
        if p.numel():
            tops[scales[name]] = max(tops.get(scales[name], 0.0), float(p.abs().max()))
    return {name: p / (tops.get(scales[name], 0.0) or 1.0) for name, p in directions.items()}


def _gradient(closure: Callable[[], Tensor], parameters: dict[str, Tensor], devices: list[int]) -> Tensor:
    """The flat gradient of the loss on the host, from the random state the replay began with."""
    for tensor in parameters.values():
        tensor.grad = None
    with torch.random.fork_rng(devices, device_type="cuda"), _Double():
        closure().backward()  # type: ignore[no-untyped-call]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    flat = [part.reshape(-1).to("cpu", torch.float64) for part in parts]
    return torch.cat(flat or [torch.zeros(0, dtype=torch.float64, device="cpu")])


def _prints(closure: Callable[[], Tensor], model: torch.nn.Module, devices: list[int]) -> dict[str, str]:
    """Fingerprints of the float64 evaluation at w."""
    recorder = Recorder({id(module): name for name, module in model.named_modules()})
    watch = Watch(recorder, lambda roots, inputs, keep: None)
    with torch.random.fork_rng(devices, device_type="cuda"), recording(recorder), watch, _Double():
        loss = closure()
    Coming(recorder).wait()
    graph = Graph([loss.grad_fn], recorder.records, Leaves(model))
    adopt(graph, recorder, watch.origin)
    return {record.name: Prints.of(record).digest() for record in recorder.records if record.node in graph.position}


class _Double(TorchFunctionMode):
    """Casts floating tensors to float64 wherever a torch function meets them."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            return func(*args, **(kwargs or {}))
        return func(*_cast(args), **_cast(kwargs or {}))


def _cast(value: Any) -> Any:
    if isinstance(value, Tensor):
        narrow = value.is_floating_point() and value.dtype != torch.float64
        return value.to(torch.float64) if narrow else value
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Tensor, list, tuple)) for item in value):
        items = [_cast(item) for item in value]
        return type(value)(items) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        return {key: _cast(item) for key, item in value.items()}
    return value


@contextlib.contextmanager
def _float64(model: torch.nn.Module) -> Iterator[None]:
    """The model in float64, restored bit by bit afterwards, gradients and buffers included."""
    held: list[tuple[Tensor, Tensor, Tensor | None]] = [(p, p.data, p.grad) for p in model.parameters()]
    buffers: list[tuple[Tensor, Tensor]] = [(buffer, buffer.data) for buffer in model.buffers()]
    try:
        for tensor, data, _ in held:
            tensor.grad = None
            tensor.data = data.to(torch.float64, copy=True)
        for tensor, data in buffers:
            tensor.data = data.to(torch.float64, copy=True) if data.is_floating_point() else data.clone()
        yield
    finally:
        for tensor, data, gradient in held:
            tensor.grad = None
            tensor.data = data
            tensor.grad = gradient
        for tensor, data in buffers:
            tensor.data = data
