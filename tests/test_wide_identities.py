"""Odd parts of every kinked operation: ``f(w) = <c, S(x + w u)> - <c, S(x - w u)>`` is differentiable at 0.

S being piecewise linear along u near x, both one-sided derivatives of f at 0 are ``<c, S'(x; u) - S'(x; -u)>``, while
autodiff returns ``2 <c, J u>`` with its own choice J (Lemma 2, for any S). Where the two differ there must be no
certificate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from wide_campaign import certificate_of
from wide_networks import WideNetwork
from wide_parts import ACTIVATIONS, POOLINGS, SELECTIONS, build

import adcert

H = 2.0**-20


class Part(nn.Module):
    """``sum_s s S(x + s w u)`` over the given signs; random numbers are the same in each term."""

    def __init__(self, form: str, x: Tensor, u: Tensor, signs: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.body = build(form, C=1, n=x.dim() - 2).double()
        for parameter in self.body.parameters():
            parameter.requires_grad_(False)
        self.x, self.u, self.signs = x, u, signs

    def forward(self, one: Tensor) -> Tensor:
        total = None
        for sign in self.signs:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                term = sign * self.body(self.x * one + (sign * self.w) * self.u)
            total = term if total is None else total + term
        assert total is not None
        return total


def network(form: str, x: Tensor, u: Tensor, signs: tuple[int, ...], c: Tensor | None = None) -> WideNetwork:
    model = Part(form, x, u, signs)
    one = torch.ones((), dtype=torch.float64)
    with torch.no_grad():
        shape = model(one).shape
    c = torch.ones(shape, dtype=torch.float64) if c is None else c.flatten()[: shape.numel()].reshape(shape)
    return WideNetwork(0, "", frozenset(), model, ((one, c),), "linear", False)


def slopes(net: WideNetwork) -> tuple[float, float]:
    """One-sided derivatives at 0, from the left and from the right."""
    values = []
    for w in (-H, 0.0, H):
        with torch.no_grad():
            net.model.w.fill_(w)
            values.append(net.closure().item())
    with torch.no_grad():
        net.model.w.fill_(0.0)
    return (values[1] - values[0]) / H, (values[2] - values[1]) / H


def close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-4 * (1 + abs(a) + abs(b))


def kinks(form: str) -> list[float]:
    """Multiples of 1/2 where the slopes of an elementwise form differ."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return [k for k in (n / 2 for n in range(-14, 15)) if not close(*slopes(network(form, k * one, one, (1,))))]


def cases() -> Iterator[tuple[str, str, Tensor, Tensor, Tensor | None]]:
    one = torch.ones(1, 1, dtype=torch.float64)
    for kind, forms in ACTIVATIONS.items():
        for form in (*forms.plain, *forms.inplace, *forms.random):
            for kink in kinks(form):
                yield kind, form, kink * one, one, None
    generator = torch.Generator().manual_seed(5)
    for kind, forms in SELECTIONS.items():
        for form in forms:
            for shape in ((2, 3), (1, 2, 4)):
                yield from _tied(kind, form, shape, generator)
    for kind, forms in POOLINGS.items():
        for form in forms:
            yield from _tied(kind, form, (1, 1, *[4] * (int(kind[-2]) if kind[-1] == "d" else 2)), generator)


def _tied(
    kind: str, form: str, shape: tuple[int, ...], generator: torch.Generator
) -> Iterator[tuple[str, str, Tensor, Tensor, Tensor]]:
    for _ in range(2):
        x, u, c = (torch.randint(low, 3, shape, generator=generator).double() for low in (0, -2, -2))
        yield kind, form, x, u, c


def test_no_odd_part_is_certified_that_autodiff_gets_wrong() -> None:
    wrong: Counter[str] = Counter()
    for kind, form, x, u, c in cases():
        odd = network(form, x, u, (1, -1), c)
        left, after = slopes(odd)
        assert close(left, after), f"{form}: not an odd function"
        gradient = float(odd.gradient())
        if close(gradient, after):
            continue
        wrong[kind] += 1
        for strict in (False, True):
            certificate = certificate_of(odd, strict)
            assert certificate.verdict is not adcert.Verdict.CERTIFIED, f"{form} at {x.tolist()} along {u}, {c}"
    print(dict(wrong))
    assert set(wrong) >= {*ACTIVATIONS, *POOLINGS, *SELECTIONS} - {"abs", "celu"}


@pytest.mark.parametrize(
    ("form", "expected"), [("F.relu6(x)", [0, 6]), ("nn.Softshrink(0.5)", [-0.5, 0.5]), ("F.celu(x)", [])]
)
def test_kinks_are_measured(form: str, expected: list[float]) -> None:
    assert kinks(form) == expected
