"""Arithmetic on float64 tensors with rigorous error radii.

A :class:`Ball` stands for every real tensor within ``radius`` (elementwise) of ``value``. ``radius`` None means
exact. Every operation bounds its own rounding in addition to what it inherits, for any order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = 2.0**-53
SLACK = 1.0 + 2.0**-30  # covers the roundings made while a radius itself is computed
TINY = 1e-290  # covers underflow; far below anything a verdict rests on


def gamma(terms: int) -> float:
    """Bound of the relative error of a sum of ``terms`` products in float64: n u / (1 - n u), with slack."""
    n = (terms + 4) * UNIT
    return n / (1 - n) * SLACK


@dataclass(frozen=True, eq=False)
class Ball:
    """``value`` float64, ``radius`` float64 of the same shape or None (exact)."""

    value: Tensor
    radius: Tensor | None = None

    def map(self, move: Callable[[Tensor], Tensor]) -> Ball:
        """Apply a movement of data (no arithmetic)."""
        return Ball(move(self.value), None if self.radius is None else move(self.radius))

    def __neg__(self) -> Ball:
        return Ball(-self.value, self.radius)

    def __add__(self, other: Ball) -> Ball:
        value = self.value + other.value
        return Ball(value, _join(_total(self, other), value, self, other))

    def __sub__(self, other: Ball) -> Ball:
        return self + (-other)

    def __mul__(self, other: Ball) -> Ball:
        value = self.value * other.value
        radius = None
        if self.radius is not None:
            radius = self.radius * other.value.abs()
        if other.radius is not None:
            term = other.radius * (self.value.abs() if self.radius is None else self.value.abs() + self.radius)
            radius = term if radius is None else radius + term
        if radius is None and exact_products(self.value, other.value):
            return Ball(value)
        rounding = value.abs() * UNIT + _maybe_nonzero(self, other) * TINY
        return Ball(value, (rounding if radius is None else radius + rounding) * SLACK)

    def sum(self, dims: tuple[int, ...], keepdim: bool = False) -> Ball:
        """Sum over some dimensions."""
        if not dims:
            return self  # torch would sum over everything
        terms = 1
        for dim in dims:
            terms *= self.value.shape[dim]
        value = self.value.sum(dims, keepdim=keepdim)
        total = self.value.abs().sum(dims, keepdim=keepdim)
        inherited = None if self.radius is None else self.radius.sum(dims, keepdim=keepdim)
        if exact_sum(self.value, total):
            return Ball(value, None if inherited is None else inherited * SLACK)
        rounding = total * gamma(terms)
        return Ball(value, (rounding if inherited is None else rounding + inherited) * SLACK)

    def divided(self, count: int) -> Ball:
        """By a positive integer; exact for a power of two."""
        value = self.value / count
        if count & (count - 1) == 0 and _least(self.value) > 1e-280:
            return Ball(value, None if self.radius is None else self.radius / count * SLACK)
        rounding = value.abs() * UNIT + (self.value != 0).to(torch.float64) * TINY
        return Ball(value, (rounding if self.radius is None else self.radius / count + rounding) * SLACK)

    def where(self, keep: Tensor) -> Ball:
        """The entries to keep, exact zeros elsewhere."""
        return self.map(lambda t: torch.where(keep, t, 0.0))

    def nonzero(self) -> Tensor:
        """bool: certainly not zero."""
        return self.value.abs() > (0.0 if self.radius is None else self.radius)

    def zero(self) -> Tensor:
        """bool: certainly zero."""
        exact = self.value == 0
        return exact if self.radius is None else exact & (self.radius == 0)


def _total(a: Ball, b: Ball) -> Tensor | None:
    if a.radius is None:
        return b.radius
    return a.radius if b.radius is None else a.radius + b.radius


def _join(inherited: Tensor | None, value: Tensor, a: Ball, b: Ball) -> Tensor | None:
    if inherited is None and exact_additions(a.value, b.value):
        return None
    rounding = value.abs() * UNIT
    if inherited is not None:
        rounding = rounding + inherited
    return rounding * SLACK


def _maybe_nonzero(a: Ball, b: Ball) -> Tensor:
    first = (a.value != 0) if a.radius is None else (a.value != 0) | (a.radius != 0)
    second = (b.value != 0) if b.radius is None else (b.value != 0) | (b.radius != 0)
    return (first & second).to(torch.float64)


def quantum(x: Tensor) -> int | None:
    """Largest e such that every entry is a multiple of 2^e; None if all entries are zero."""
    nonzero = x[x != 0]
    if nonzero.numel() == 0:
        return None
    mantissa, exponent = torch.frexp(nonzero)
    whole = (mantissa * 2.0**53).to(torch.int64)
    lowest = (whole & -whole).to(torch.float64)
    return int((exponent.to(torch.int64) - 54 + torch.frexp(lowest)[1].to(torch.int64)).min())


_LARGE = 1 << 20  # beyond this, finding out that nothing was rounded costs more than it is worth


def exact_linear(x: Tensor, y: Tensor, bound: Tensor) -> bool:
    """True if every sum of products of entries of x and y, bounded in absolute terms by ``bound``, is exact."""
    if x.numel() > _LARGE or y.numel() > _LARGE:
        return False
    first, second = quantum(x), quantum(y)
    if first is None or second is None or bound.numel() == 0:
        return True
    return _below(float(bound.max()), first + second)


def _below(bound: float, exponent: int) -> bool:
    """Sums of multiples of 2^exponent, below ``bound`` in absolute terms, fit into 53 bits."""
    return -1000 < exponent < 900 and bound < math.ldexp(1.0, 52 + exponent)


def exact_products(x: Tensor, y: Tensor) -> bool:
    """True if elementwise products round nothing."""
    if x.numel() == 0 or y.numel() == 0:
        return True
    bound = x.abs().max() * y.abs().max()
    return exact_linear(x, y, bound)


def exact_additions(x: Tensor, y: Tensor) -> bool:
    """True if elementwise sums round nothing."""
    if x.numel() > _LARGE or y.numel() > _LARGE:
        return False
    if x.numel() == 0 or y.numel() == 0:
        return True
    quanta = [q for q in (quantum(x), quantum(y)) if q is not None]
    if not quanta:
        return True
    return _below(float(x.abs().max() + y.abs().max()), min(quanta))


def exact_sum(x: Tensor, total: Tensor) -> bool:
    """True if sums of entries of x, whose absolute sums are ``total``, round nothing."""
    if x.numel() > _LARGE:
        return False
    q = quantum(x)
    return q is None or total.numel() == 0 or _below(float(total.max()), q)


def linear(
    apply: Callable[[Tensor, Tensor], Tensor], x: Ball, weight: Tensor, terms: int, source: Tensor | None = None
) -> Ball:
    """``apply(x, weight)`` for a map that sums at most ``terms`` products of entries of x and of an exact weight.

    ``source``: a smaller tensor with the nonzero entries of ``weight`` (before unfolding, say), to read bounds from.
    """
    value = apply(x.value, weight)
    if max(x.value.numel(), weight.numel()) > _LARGE:
        return _large_linear(apply, x, weight, terms, value, weight if source is None else source)
    bound = apply(x.value.abs(), weight.abs())
    inherited = None if x.radius is None else apply(x.radius, weight.abs())
    if exact_linear(x.value, weight, bound):
        if inherited is not None and not _safe_from_underflow(x.radius, weight):
            inherited = inherited + TINY
        return Ball(value, None if inherited is None else inherited * SLACK)
    rounding = bound * gamma(terms)
    if not (_safe_from_underflow(x.value, weight) and _safe_from_underflow(x.radius, weight)):
        rounding = rounding + TINY
    radius = rounding if inherited is None else rounding + inherited * (1 + gamma(terms))
    return Ball(value, radius * SLACK)


def _large_linear(
    apply: Callable[[Tensor, Tensor], Tensor], x: Ball, weight: Tensor, terms: int, value: Tensor, source: Tensor
) -> Ball:
    """The radius of :func:`linear` in one more application, without the question whether anything rounded."""
    size = weight if bool((source >= 0).all()) else weight.abs()
    spread = x.value.abs() * gamma(terms)
    if x.radius is not None:
        spread = spread + x.radius * (1 + gamma(terms))
    radius = apply(spread, size) * SLACK
    if not (_safe_from_underflow(x.value, source) and _safe_from_underflow(x.radius, source)):
        radius = radius + TINY
    return Ball(value, radius)


def _safe_from_underflow(x: Tensor | None, y: Tensor) -> bool:
    """The smallest nonzero product is a normal number: zeros in the result's bound are true zeros."""
    if x is None:
        return True
    return _least(x) * _least(y) > 1e-280


def _least(x: Tensor) -> float:
    """The smallest absolute value that is not zero, infinity if there is none."""
    if x.numel() == 0:
        return math.inf
    return float(x.abs().masked_fill(x == 0, math.inf).min())


def matmul(a: Ball, b: Ball) -> Ball:
    """``a @ b`` of two balls, over the last two dimensions."""
    terms = a.value.shape[-1]
    if b.radius is None:
        return linear(torch.matmul, a, b.value, terms)
    if a.radius is None:
        return linear(lambda t, w: w @ t, b, a.value, terms)
    size, other = a.value.abs(), b.value.abs()
    spread = size * gamma(terms) + a.radius * (1 + gamma(terms))
    radius = spread @ other + (size + a.radius) * (1 + gamma(terms)) @ b.radius
    factors = [_least(size), _least(a.radius)], [_least(other), _least(b.radius)]
    if min(factors[0]) * min(factors[1]) <= 1e-280:
        radius = radius + TINY
    return Ball(a.value @ b.value, radius * SLACK)


def scattered(a: Ball, index: Tensor, size: int) -> Ball:
    """[M, K] entries added up at the places ``index`` (int64 [K], -1 for nowhere) of [M, size]."""
    known = torch.nonzero(index >= 0).flatten()
    place = index[known]
    terms = int(torch.bincount(place).max()) if len(place) else 1

    def add(t: Tensor) -> Tensor:
        return torch.zeros(len(t), size, dtype=torch.float64).index_add_(1, place, t[:, known])

    value = add(a.value)
    inherited = None if a.radius is None else add(a.radius)
    if terms == 1:
        return Ball(value, inherited)
    total = add(a.value.abs())
    if exact_sum(a.value, total):
        return Ball(value, None if inherited is None else inherited * SLACK)
    rounding = total * gamma(terms)
    return Ball(value, (rounding if inherited is None else rounding + inherited) * SLACK)
