"""Evidence for any tiny torch network: a sampled hull of true gradients, a witness replayed.

Nothing here knows adcert.

At a generic point near w the loss is differentiable and autodiff right, so a gradient there, with the perturbation
tending to 0, is an element of the Bouligand subdifferential. Limits are extrapolated from two perturbations; where
the two are not close, a kink lies between them and the sample is dropped. A sampled hull says "member" or nothing:
it misses narrow cells. ``oracle.py`` (exact) and ``adcert.oracle`` say more where they apply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor
from wide_networks import WideNetwork

Array = np.ndarray[Any, Any]

STEP = 2.0**-12  # of perturbations; second-order terms of 2^-24 and third-order ones of 2^-36 stay far from rounding
ROUNDS = (24, 120, 400)  # samples until the next look at the hull
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Sampled:
    """``member``: True if g is in the hull of the elements within the tolerance, else None; ``bouligand``: True if one
    of them is g; ``distance``: of g from the hull, max norm over 1 + |g|; ``kinked``: there are two or more."""

    member: bool | None
    bouligand: bool | None
    distance: float
    elements: Array
    gradient: Array

    @property
    def kinked(self) -> bool:
        return len(self.elements) > 1


class Point:
    """The gradient of a network's loss as a function of its parameters, which are moved and put back.

    The parameters' memory moves, not the parameters, so a step may go on using them.
    """

    def __init__(self, network: WideNetwork) -> None:
        self.network = network.copy()
        self.parameters = [p for p in self.network.model.parameters() if p.requires_grad]
        self.centre = [p.detach().clone() for p in self.parameters]
        self.sizes = [p.numel() for p in self.parameters]
        self.buffers = [(b, b.detach().clone()) for b in self.network.model.buffers()]

    @property
    def width(self) -> int:
        return sum(self.sizes)

    def gradient(self, shift: Array | None = None) -> Array:
        """Autodiff's gradient [P] at w + shift."""
        if shift is not None:
            parts = torch.from_numpy(np.ascontiguousarray(shift)).split(self.sizes)
            with torch.no_grad():
                for p, c, d in zip(self.parameters, self.centre, parts, strict=True):
                    p.copy_(c + d.reshape(c.shape))
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        found: Array = self.network.gradient().numpy().copy()
        with torch.no_grad():
            for p, c in zip(self.parameters, self.centre, strict=True):
                p.copy_(c)
        return found

    def limit(self, arc: tuple[Array, ...]) -> Array | None:
        """Limit of the gradient along w + t arc[0] + t^2 arc[1] + ..., extrapolated; None if a kink is in between."""
        near, nearer = (
            self.gradient(sum((t ** (e + 1) * q for e, q in enumerate(arc)), start=np.zeros(self.width)))
            for t in (STEP, STEP / 2)
        )
        if not np.isfinite(near).all() or not np.isfinite(nearer).all():
            return None
        scale = 1 + np.abs(nearer).max(initial=0)
        if np.abs(near - nearer).max(initial=0) > 2.0**-6 * scale:
            return None
        return 2 * nearer - near


def sample(network: WideNetwork, seed: int = 0, rounds: tuple[int, ...] = ROUNDS) -> Sampled:
    """Sample the hull until it contains autodiff's gradient, or the rounds are over.

    A third of the arcs is a generic first-order direction; a third moves every tensor at its own power of t; a third
    is sparse to first order, with a generic second order. Where g is outside, more arcs follow along the
    direction that separates it.
    """
    point = Point(network)
    g = point.gradient()
    rng = np.random.default_rng((network.seed, seed))
    elements = np.zeros((0, point.width))
    distance, separator = np.inf, None
    for count in rounds:
        arcs = [_arc(point, rng, k, separator) for k in range(count - len(elements) if count == rounds[0] else count)]
        found = [limit for limit in map(point.limit, arcs) if limit is not None]
        elements = _distinct(np.concatenate([elements, *(f[None] for f in found)]), g)
        scale = 1 + np.abs(g).max(initial=0)
        if len(elements) and (np.abs(elements - g).max(axis=1, initial=0) <= TOLERANCE * scale).any():
            return Sampled(True, True, 0.0, elements, g)
        distance, separator = hull_distance(elements, g)
        if distance <= TOLERANCE * scale:
            return Sampled(True, None, distance, elements, g)
    return Sampled(None, None, distance, elements, g)


def _arc(point: Point, rng: np.random.Generator, k: int, separator: Array | None) -> tuple[Array, ...]:
    normal = [rng.standard_normal(point.width) for _ in range(3)]
    if separator is not None and k % 2:
        return separator * rng.choice((-1.0, 1.0)) + 0.3 * rng.random() * normal[0], normal[1]
    if k % 3 == 0:
        return (normal[0] * 2.0 ** rng.integers(-2, 3, point.width),)
    if k % 3 == 1:
        power = np.repeat(rng.integers(0, 3, len(point.sizes)), point.sizes)
        return tuple(np.where(power == e, n, 0.0) for e, n in enumerate(normal))
    first = rng.integers(-1, 2, point.width) * (rng.random(point.width) < rng.choice((0.15, 0.5)))
    return first.astype(np.float64), normal[1]


def _distinct(elements: Array, g: Array) -> Array:
    if not len(elements):
        return elements
    keys = np.round(elements / (1e-6 * (1 + np.abs(g).max(initial=0)))).astype(np.int64)
    _, index = np.unique(keys, axis=0, return_index=True)
    return elements[np.sort(index)]


def hull_distance(elements: Array, g: Array) -> tuple[float, Array | None]:
    """Max-norm distance of g from the hull of the elements [m, P], and a direction that separates it (None: inside).

    >>> hull_distance(np.array([[0.0], [2.0]]), np.array([3.0]))[0]
    1.0
    """
    count, width = elements.shape
    if count == 0:
        return np.inf, None
    # min d subject to -d <= sum l_k e_k - g <= d, sum l = 1, l >= 0
    table = np.concatenate([elements.T, -np.ones((width, 1))], axis=1)
    other = np.concatenate([-elements.T, -np.ones((width, 1))], axis=1)
    answer = linprog(
        np.append(np.zeros(count), 1.0),
        A_ub=np.concatenate([table, other]), b_ub=np.concatenate([g, -g]),
        A_eq=np.append(np.ones(count), 0.0)[None], b_eq=[1.0],
        bounds=[(0, None)] * (count + 1), method="highs",
    )  # fmt: skip
    if answer.status != 0:
        return np.inf, None
    duals = answer.ineqlin.marginals
    separator = duals[:width] - duals[width:]
    size = np.abs(separator).max(initial=0)
    return float(answer.fun), separator / size * np.sqrt(width) if size > 0 else None


@dataclass(frozen=True)
class Witnessed:
    """``distances``: max-norm distances, over 1 + |g|, of gradients along a witness from g; ``tends``: to 0."""

    distances: tuple[float, ...]
    tends: bool


def witness(network: WideNetwork, directions: dict[str, Tensor], scales: dict[str, int], seed: int = 0) -> Witnessed:
    """Gradients at ``w + s^(R+1) (sum_r s^(R-r) p_r + s^R noise)`` over the R ranks in use, as s shrinks.

    Several smallest scales and noises are tried: float64 resolves few orders, so one that tends to g suffices.
    """
    point = Point(network)
    g = point.gradient()
    names = [n for n, p in network.model.named_parameters() if p.requires_grad]
    steps = [
        directions.get(n, torch.zeros(size)).double().flatten().numpy()
        for n, size in zip(names, point.sizes, strict=True)
    ]
    used = sorted({scales.get(n, 1) for n, p in zip(names, steps, strict=True) if p.any()})
    ranks = len(used)
    rng = np.random.default_rng((network.seed, seed, 3))
    best: tuple[float, ...] = ()
    for smallest in (1e-13, 1e-11, 1e-14, 1e-9):
        noise = rng.standard_normal(point.width)
        last = min(0.05, smallest ** (1.0 / (2 * ranks + 1)))
        distances = []
        for s in np.geomspace(0.3, last, 5):
            step = [
                p * s ** (ranks - 1 - used.index(scales.get(n, 1))) if p.any() else p
                for n, p in zip(names, steps, strict=True)
            ]
            shift = s ** (ranks + 1) * (np.concatenate([*step, np.zeros(0)]) + noise * s**ranks)
            distances.append(float(np.abs(point.gradient(shift) - g).max(initial=0) / (1 + np.abs(g).max(initial=0))))
        if not best or distances[-1] < best[-1]:
            best = tuple(distances)
        if best[-1] <= TOLERANCE or (ranks > 2 and best[-1] <= 1e-3 and best[-1] < best[0]):
            return Witnessed(best, True)
    return Witnessed(best, best[-1] <= 1e-3 * best[0])
