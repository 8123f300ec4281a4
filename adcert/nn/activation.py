"""Drop-in activations: torch's own functions, whose touched kinks are recorded while a step is monitored.

``proxy``, where a class takes it, is what autodiff multiplies by at the kinks (ascending): any number between the
one-sided derivatives. One that is neither of the two is outside Theorem 8: a touched kink then needs Theorem 4 or 6 (a
bias, and one lambda for the layer), or the step is undecided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adcert import activations
from adcert.activations import Activation
from adcert.errors import AdcertError
from adcert.recorder import active

Proxy = float | tuple[float, ...] | None


def _checked(rho: Activation, proxy: Proxy, inplace: bool) -> Proxy:
    """The proxies as a tuple, one for each kink; None keeps torch's own."""
    if proxy is None:
        return None
    given = proxy if isinstance(proxy, tuple) else (float(proxy),)
    if len(given) != len(rho.kinks):
        raise AdcertError(f"{rho.name} has kinks {rho.kinks}: proxy must be {len(rho.kinks)} numbers, got {proxy!r}")
    for value, kink, ends in zip(given, rho.kinks, rho.ends, strict=True):
        if not min(ends) <= value <= max(ends):
            raise AdcertError(
                f"proxy {value} at the kink {kink} of {rho.name} is not between the one-sided derivatives {ends}: "
                "no choice outside of them can be a generalised derivative"
            )
    if inplace:
        raise AdcertError("an activation with a proxy of its own does not run in place: drop inplace=True or proxy")
    return given


class _Proxied(torch.autograd.Function):
    """Torch's function with other derivatives at its kinks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rho: Activation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rho = rho
        return rho.compute(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            (result,) = torch.autograd.grad(ctx.rho.compute(again), again, grad)
        for kink, proxy in zip(ctx.rho.kinks, ctx.rho.given, strict=True):
            result = torch.where(x == kink, proxy * grad, result)
        return result, None


def _run(module: Any, rho: Callable[[], Activation], x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """The module's forward; in a monitored step under its own name."""
    recorder = active()
    if module.proxy is not None:
        ours = replace(rho(), given=module.proxy)

        def run() -> Tensor:
            output: Tensor = _Proxied.apply(x, ours)  # type: ignore[no-untyped-call]
            return output

        name = type(module).__name__
        return run() if recorder is None else recorder.kinked(x, ours, recorder.name_of(module, name), run)
    if recorder is None:
        return forward(x)
    with recorder.naming(module, type(module).__name__):
        return forward(x)


def _shown(module: Any, inner: str) -> str:
    given = "" if module.proxy is None else f"proxy={module.proxy}"
    return ", ".join(part for part in (inner, given) if part)


class ReLU(torch.nn.ReLU):
    """``relu(x) = max(x, 0)``, elementwise; AD's proxy at the kink 0 is 0 (torch's choice) or ``proxy``.

    Inside a monitored step the units with ``x == 0`` are recorded.

    Args:
        inplace: overwrite the input.
        proxy: what AD multiplies by at 0, in [0, 1]; 0 and 1 are covered by Theorem 8, others by Theorems 4 and 6 only.

    Raises:
        AdcertError: for a proxy outside [0, 1], or together with ``inplace``.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.ReLU()(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0., 0., 2.])
        >>> x = torch.zeros(1, requires_grad=True)
        >>> adcert.nn.ReLU(proxy=1.0)(x).backward()
        >>> x.grad
        tensor([1.])
    """

    proxy: Proxy = None

    def __init__(self, inplace: bool = False, *, proxy: Proxy = None) -> None:
        super().__init__(inplace)
        self.proxy = _checked(activations.relu(), proxy, inplace)

    def forward(self, input: Tensor) -> Tensor:
        recorder = active()
        if self.proxy is not None:
            return _run(self, activations.relu, input, super().forward)
        if recorder is None:
            return F.relu(input, inplace=self.inplace)
        return recorder.relu(input, recorder.name_of(self, "ReLU"), inplace=self.inplace)

    def extra_repr(self) -> str:
        return _shown(self, super().extra_repr())


class ReLU6(torch.nn.ReLU6):
    """``min(max(x, 0), 6)``; AD's proxy is 0 at both kinks. ``proxy``: as for :class:`ReLU`.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.ReLU6()(torch.tensor([-1.0, 3.0, 7.0]))
        tensor([0., 3., 6.])
    """

    proxy: Proxy = None

    def __init__(self, inplace: bool = False, *, proxy: Proxy = None) -> None:
        super().__init__(inplace)
        self.proxy = _checked(self._rho(), proxy, inplace)

    def _rho(self) -> Activation:
        return activations.hardtanh(0.0, 6.0)

    def forward(self, input: Tensor) -> Tensor:
        return _run(self, self._rho, input, super().forward)

    def extra_repr(self) -> str:
        return _shown(self, super().extra_repr())


class Hardtanh(torch.nn.Hardtanh):
    """``min(max(x, min_val), max_val)``; AD's proxy is 0 at both kinks. ``proxy``: as for :class:`ReLU`.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.Hardtanh()(torch.tensor([-2.0, 0.5, 2.0]))
        tensor([-1.0000,  0.5000,  1.0000])
    """

    proxy: Proxy = None

    def __init__(
        self, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False, *, proxy: Proxy = None
    ) -> None:
        super().__init__(min_val, max_val, inplace)
        self.proxy = _checked(self._rho(), proxy, inplace)

    def _rho(self) -> Activation:
        return activations.hardtanh(float(self.min_val), float(self.max_val))

    def forward(self, input: Tensor) -> Tensor:
        return _run(self, self._rho, input, super().forward)

    def extra_repr(self) -> str:
        return _shown(self, super().extra_repr())


class LeakyReLU(torch.nn.LeakyReLU):
    """``max(x, 0) + negative_slope min(x, 0)``; AD's proxy at 0 is the slope. ``proxy``: as for :class:`ReLU`.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.LeakyReLU(0.5)(torch.tensor([-2.0, 2.0]))
        tensor([-1.,  2.])
    """

    proxy: Proxy = None

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False, *, proxy: Proxy = None) -> None:
        super().__init__(negative_slope, inplace)
        self.proxy = _checked(self._rho(), proxy, inplace)

    def _rho(self) -> Activation:
        return activations.leaky_relu(float(self.negative_slope))

    def forward(self, input: Tensor) -> Tensor:
        return _run(self, self._rho, input, super().forward)

    def extra_repr(self) -> str:
        return _shown(self, super().extra_repr())


class Hardsigmoid(torch.nn.Hardsigmoid):
    """``min(max(x + 3, 0), 6) / 6``; AD's proxy is 0 at both kinks, -3 and 3. ``proxy``: as for :class:`ReLU`.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.Hardsigmoid()(torch.tensor([-3.0, 0.0, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    proxy: Proxy = None

    def __init__(self, inplace: bool = False, *, proxy: Proxy = None) -> None:
        super().__init__(inplace)
        self.proxy = _checked(self._rho(), proxy, inplace)

    def _rho(self) -> Activation:
        return activations.hardsigmoid()

    def forward(self, input: Tensor) -> Tensor:
        return _run(self, self._rho, input, super().forward)

    def extra_repr(self) -> str:
        return _shown(self, super().extra_repr())


class Hardswish(torch.nn.Hardswish):
    """``x min(max(x + 3, 0), 6) / 6``; AD's proxies are 0 at -3 (left) and 1 at 3 (right).

    ``proxy``: as for :class:`ReLU`.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.Hardswish()(torch.tensor([-3.0, 0.0, 3.0]))
        tensor([-0., 0., 3.])
    """

    proxy: Proxy = None

    def __init__(self, inplace: bool = False, *, proxy: Proxy = None) -> None:
        super().__init__(inplace)
        self.proxy = _checked(self._rho(), proxy, inplace)

    def _rho(self) -> Activation:
        return activations.hardswish()

    def forward(self, input: Tensor) -> Tensor:
        return _run(self, self._rho, input, super().forward)

    def extra_repr(self) -> str:
        return _shown(self, super().extra_repr())


class Softshrink(torch.nn.Softshrink):
    """``x - lambd above lambd, x + lambd below -lambd, 0 between``; AD's proxy is 0 at both kinks.

    ``proxy``: as for :class:`ReLU`.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.Softshrink(1.0)(torch.tensor([-3.0, 0.5, 3.0]))
        tensor([-2.,  0.,  2.])
    """

    proxy: Proxy = None

    def __init__(self, lambd: float = 0.5, *, proxy: Proxy = None) -> None:
        super().__init__(lambd)
        self.proxy = _checked(self._rho(), proxy, False)

    def _rho(self) -> Activation:
        return activations.softshrink(float(self.lambd))

    def forward(self, input: Tensor) -> Tensor:
        return _run(self, self._rho, input, super().forward)

    def extra_repr(self) -> str:
        return _shown(self, super().extra_repr())


class ELU(torch.nn.ELU):
    """``max(x, 0) + min(alpha (e^x - 1), 0)``; a kink at 0 unless alpha is 1, with proxy alpha.

    ``proxy``: as for :class:`ReLU`.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.ELU(2.0)(torch.tensor([0.0, 2.0]))
        tensor([0., 2.])
    """

    proxy: Proxy = None

    def __init__(self, alpha: float = 1.0, inplace: bool = False, *, proxy: Proxy = None) -> None:
        super().__init__(alpha, inplace)
        self.proxy = _checked(self._rho(), proxy, inplace)

    def _rho(self) -> Activation:
        return activations.elu(float(self.alpha))

    def forward(self, input: Tensor) -> Tensor:
        return _run(self, self._rho, input, super().forward)

    def extra_repr(self) -> str:
        return _shown(self, super().extra_repr())


class SELU(torch.nn.SELU):
    """ELU with two fixed constants; a kink at 0 whose proxy is the left derivative.

    ``proxy``: as for :class:`ReLU`.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.SELU()(torch.tensor([0.0]))
        tensor([0.])
    """

    proxy: Proxy = None

    def __init__(self, inplace: bool = False, *, proxy: Proxy = None) -> None:
        super().__init__(inplace)
        self.proxy = _checked(self._rho(), proxy, inplace)

    def _rho(self) -> Activation:
        return activations.elu(*activations.SELU)

    def forward(self, input: Tensor) -> Tensor:
        return _run(self, self._rho, input, super().forward)

    def extra_repr(self) -> str:
        return _shown(self, super().extra_repr())


class PReLU(torch.nn.PReLU):
    """``x`` above 0 and ``a x`` below, with a trainable slope ``a``, one or one for each channel; AD's proxy is ``a``.

    The slopes belong to the layer: a certificate's direction has entries for them.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.PReLU(init=0.5)(torch.tensor([-2.0, 2.0])).tolist()
        [-1.0, 2.0]
    """

    def forward(self, input: Tensor) -> Tensor:
        recorder = active()
        if recorder is None:
            return super().forward(input)
        with recorder.naming(self, "PReLU"):
            return super().forward(input)


class RReLU(torch.nn.RReLU):
    """``x`` above 0 and ``a x`` below; in train mode each unit draws its ``a``, which is a constant of the step.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.RReLU(0.5, 0.5).eval()(torch.tensor([-2.0, 2.0]))
        tensor([-1.,  2.])
    """

    def forward(self, input: Tensor) -> Tensor:
        recorder = active()
        if recorder is None:
            return super().forward(input)
        with recorder.naming(self, "RReLU"):
            return super().forward(input)


class CELU(torch.nn.CELU):
    """``max(x, 0) + min(alpha (e^(x / alpha) - 1), 0)``: continuously differentiable, so nothing has to be recorded.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.CELU(2.0)(torch.tensor([0.0, 2.0]))
        tensor([0., 2.])
    """

    def forward(self, input: Tensor) -> Tensor:
        recorder = active()
        if recorder is None:
            return super().forward(input)
        with recorder.naming(self, "CELU"):
            return super().forward(input)


class Threshold(torch.nn.Threshold):
    """``x`` above ``threshold``, the constant ``value`` below; recorded where the two are equal, else discontinuous.

    Example:
        >>> import torch, adcert
        >>> adcert.nn.Threshold(1.0, 1.0)(torch.tensor([0.0, 2.0]))
        tensor([1., 2.])
    """

    def forward(self, input: Tensor) -> Tensor:
        recorder = active()
        if recorder is None:
            return super().forward(input)
        with recorder.naming(self, "Threshold"):
            return super().forward(input)
