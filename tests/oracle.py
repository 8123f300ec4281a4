"""Independent ground truth for tiny networks with integer data: is autodiff's gradient a Clarke subgradient?

Nothing here imports adcert. The pieces, each exact:

* ``bouligand_elements``: limits of the true gradient along integer polynomial arcs (``oracle_program``);
* ``exact_elements``: all of them, by enumeration of the cells around w (``oracle_cells``);
* ``in_hull``: membership with a rational combination or an integer separator (``oracle_hull``);
* ``judge``: all of these together, True / False / None;
* ``replays``, ``confirm``: replay of a witness, before anybody is accused.

``judge`` says True when g is an exact convex combination of true elements, and False only when it is
separated from everything the complete enumeration of cells allows. A sampled hull alone never yields False:
it misses narrow cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
import torch
from networks import Network
from oracle_cells import Cells, enumerate_cells
from oracle_compile import compile_network
from oracle_hull import Hull, in_hull
from oracle_program import (
    Array,
    Program,
    arc_limits,
    backward,
    equalities_are_identities,
    forward,
)
from torch import Tensor

__all__ = [
    "Confirmation",
    "Hull",
    "Judgement",
    "Replay",
    "ad_gradient",
    "bouligand_elements",
    "confirm",
    "exact_elements",
    "in_hull",
    "judge",
    "replays",
]

SAMPLES = 240
BUDGET = 2000
SCALES = tuple(2.0**-k for k in (2, 6, 12, 24, 48, 96))


@dataclass(frozen=True)
class Judgement:
    """The oracle's opinion of g, autodiff's gradient at w over the trainable parameters (integers [P]).

    ``member``: g in dC f(w)? True, False or None (unknown); ``bouligand``: g in dB f(w), None when unknown;
    ``exact``: the elements are all of dB f(w); ``elements``: integers [m, P], true Bouligand elements;
    ``hull``: the exact combination or separator; ``reason``: how it was decided.
    """

    member: bool | None
    bouligand: bool | None
    exact: bool
    gradient: Array
    elements: Array
    hull: Hull
    reason: str


@dataclass(frozen=True)
class Replay:
    """``distances[k]``: max norm between the true gradient at the k-th scale and g; None where f is not
    evidently differentiable at that point. ``limit``: the limit along the witness, None if the arc stays on
    a kink; ``reproduces``: that limit exists and is g, exactly."""

    distances: tuple[float | None, ...]
    limit: tuple[int, ...] | None
    reproduces: bool


@dataclass(frozen=True)
class Confirmation:
    """``false_certificate``: True only if hull, replay and denser sampling agree that g is not a
    subgradient."""

    false_certificate: bool
    judgement: Judgement
    replay: Replay
    reason: str


def ad_gradient(network: Network) -> Array:
    """PyTorch's gradient of the closure over the trainable parameters, int64 [P], in the order of their
    names.

    >>> from networks import random_network
    >>> ad_gradient(random_network(0)).dtype
    dtype('int64')
    """
    parameters = [p for p in network.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(network.closure(), parameters, allow_unused=True)
    flat = [
        (torch.zeros_like(p) if g is None else g).detach().to(torch.float64).flatten()
        for p, g in zip(parameters, gradients, strict=True)
    ]
    values = torch.cat(flat).numpy()
    if not np.array_equal(values, np.rint(values)):
        raise ValueError("the gradient is not an integer vector: the data are not small integers")
    return values.astype(np.int64)


def bouligand_elements(
    network: Network, samples: int = SAMPLES, directions: Sequence[Array] = (), seed: int = 0
) -> Array:
    """Distinct elements of dB f(w) met along random integer arcs, [m, P]; a subset, each one true.

    A third of the arcs is a generic first-order direction with magnitudes 1 to 2^10; a third gives every
    parameter or every tensor its own power t, t^2 or t^3; a third moves along a sparse small-integer
    direction (relations between parameters hold to first order) or one of ``directions`` (integers [P],
    each used once per sample block) and resolves what is left at t^2 and t^3.
    """
    return _sample(compile_network(network), samples, directions, np.random.default_rng((network.seed, seed)))


def _sample(program: Program, samples: int, directions: Sequence[Array], rng: np.random.Generator) -> Array:
    third = samples // 3
    arcs = [
        _generic(program, third, rng),
        _powers(program, third, rng),
        _sparse(program, samples - 2 * third, rng),
    ]
    if len(directions):
        arcs.append(_along(program, np.array(directions), rng))
    limits = []
    for block in arcs:
        block[:, :, ~program.trainable] = 0
        elements, valid = arc_limits(program, block, rng)
        limits.append(elements[valid])
    return np.unique(np.concatenate(limits), axis=0)


def _generic(program: Program, count: int, rng: np.random.Generator) -> Array:
    magnitude = 2 ** rng.integers(0, 5, (1, count, program.parameters))
    return _noise(rng, (1, count, program.parameters), 32) * magnitude


def _noise(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> Array:
    """Integers in -size..size without 0."""
    noise: Array = rng.integers(1, size + 1, shape) * rng.choice((-1, 1), shape)
    return noise


def _powers(program: Program, count: int, rng: np.random.Generator) -> Array:
    """Every parameter (or, for half of the arcs, every tensor) moves at its own power of t."""
    power = rng.integers(0, 3, (count, program.parameters))
    for entries in program.slices.values():
        power[: count // 2, entries] = rng.integers(0, 3, (count // 2, 1))
    step = _noise(rng, (count, program.parameters), 32)
    return np.where(np.arange(3)[:, None, None] == power, step, 0)


def _sparse(program: Program, count: int, rng: np.random.Generator) -> Array:
    """A direction in {-1, 0, 1} with few entries, then another at t^2 plus noise, then noise at t^3."""
    shape = (count, program.parameters)
    first = rng.integers(-1, 2, shape) * (rng.random(shape) < rng.choice((0.15, 0.5), (count, 1)))
    second = rng.integers(-1, 2, shape) * (rng.random(shape) < 0.5)
    return np.stack([first, second, _noise(rng, shape, 40)])


def _along(program: Program, directions: Array, rng: np.random.Generator) -> Array:
    """The given directions over the trainable parameters, then noise at the next power of t (Python
    integers)."""
    full = np.zeros((2, len(directions), program.parameters), dtype=object)
    full[0][:, program.trainable] = directions
    full[1] = _noise(rng, full.shape[1:], 1000)
    return full


def exact_elements(network: Network, budget: int = BUDGET) -> Array | None:
    """The limit gradients of all cells around w, integers [m, P]; their hull is dC f(w). None when not
    enumerable within the budget or when first-order analysis leaves a cell in doubt."""
    cells = enumerate_cells(compile_network(network), budget, network.seed)
    return cells.certain if cells.complete and len(cells.possible) == 0 else None


def judge(network: Network, samples: int = SAMPLES, budget: int = BUDGET) -> Judgement:
    """Decide membership of autodiff's gradient: sample, enumerate the cells, sample again, in this order.

    >>> from networks import random_network
    >>> judge(random_network(0)).member in (True, False, None)
    True
    """
    program = compile_network(network)
    g = ad_gradient(network)
    rng = np.random.default_rng((network.seed, 1))
    elements = _sample(program, samples, (), rng)
    hull = in_hull(elements, g)
    if _contains(elements, g):
        return Judgement(True, True, False, g, elements, hull, "sampled")
    cells = enumerate_cells(program, budget, network.seed)
    elements = _merge(elements, cells)
    exact = cells.complete and len(cells.possible) == 0
    bouligand = _contains(elements, g) or (False if exact else None)
    hull = in_hull(elements, g)
    if hull.member:
        return Judgement(True, bouligand, exact, g, elements, hull, "cells" if exact else "sampled")
    if cells.complete:
        outer = in_hull(np.concatenate([elements, cells.possible]), g)
        if outer.member is False:
            return Judgement(False, False, exact, g, elements, outer, "separated from every cell")
    elements = np.unique(np.concatenate([elements, _sample(program, 10 * samples, (), rng)]), axis=0)
    hull = in_hull(elements, g)
    if hull.member:
        bouligand = _contains(elements, g) or None
        return Judgement(True, bouligand, False, g, elements, hull, "sampled densely")
    reason = "possible cells" if cells.complete else "too many cells"
    return Judgement(None, None, False, g, elements, hull, f"not in the sampled hull; {reason}")


def _contains(elements: Array, g: Array) -> bool:
    return bool((elements == g).all(axis=1).any())


def _merge(elements: Array, cells: Cells) -> Array:
    return np.unique(np.concatenate([elements, cells.certain]), axis=0)


def replays(
    network: Network,
    directions: Mapping[str, Tensor],
    scales: Mapping[str, int],
    series: Sequence[float] = SCALES,
    seed: int = 0,
) -> Replay:
    """Replay the witness ``w + T (sum_l eps_l p_l + noise)`` with eps_1 << eps_2 << ... << eps_L and T <<
    eps_1.

    ``directions``: parameter name -> p (any finite values, taken exactly; missing: 0); ``scales``: name ->
    rank l (missing: 1). With L the largest rank: T = s^(L + 1), eps_l = s^(L - l), noise of size s^L, for
    each s of ``series`` (dyadic) in exact rational arithmetic; the limit s -> 0 by an integer arc.
    """
    program = compile_network(network)
    g = ad_gradient(network)
    rng = np.random.default_rng((network.seed, seed, 2))
    arc = _witness(program, directions, scales, rng)
    limits, valid = arc_limits(program, arc, rng)
    limit = tuple(int(x) for x in limits[0]) if valid[0] else None
    distances = tuple(_distance(program, arc, Fraction(s), g) for s in series)
    return Replay(distances, limit, limit == tuple(int(x) for x in g))


def _witness(
    program: Program, directions: Mapping[str, Tensor], scales: Mapping[str, int], rng: np.random.Generator
) -> Array:
    """The witness as an arc [2 L + 1, 1, P] of Python integers; entry e is the coefficient of s^(e + 1)."""
    unknown = (set(directions) | set(scales)) - set(program.slices)
    if unknown:
        raise KeyError(f"no parameter named {sorted(unknown)}")
    depth = max(scales.values(), default=1)
    steps = {n: [Fraction(x) for x in p.detach().flatten().tolist()] for n, p in directions.items()}
    scale = lcm(*(x.denominator for step in steps.values() for x in step))
    arc = np.zeros((2 * depth + 1, 1, program.parameters), dtype=object)
    for name, step in steps.items():
        arc[2 * depth - scales.get(name, 1), 0, program.slices[name]] = [int(x * scale) for x in step]
    arc[2 * depth, 0] = _noise(rng, (program.parameters,), 1000)
    arc[:, :, ~program.trainable] = 0
    return arc


def _distance(program: Program, arc: Array, s: Fraction, g: Array) -> float | None:
    """|grad f(w(s)) - g| in the max norm, from an exact evaluation at w(s); None if some comparison is an
    equality there between functions that are not identical."""
    powers = np.array([s ** (e + 1) for e in range(len(arc))], dtype=object)
    shift = np.tensordot(powers, arc, axes=1)  # [1, P]
    theta = np.append(program.theta[:-1] + shift[0], 0).astype(object)
    registers, choices = forward(program, theta[None, None])
    if not equalities_are_identities(program, registers, choices, np.random.default_rng(3))[0]:
        return None
    values = tuple(r[0, 0] for r in registers)
    gradient = backward(program, choices, values, theta)[0]
    return float(np.abs(gradient[program.trainable] - g).max(initial=0.0))


def confirm(
    network: Network, directions: Mapping[str, Tensor], scales: Mapping[str, int], samples: int = 10 * SAMPLES
) -> Confirmation:
    """Is a certificate for this network false? Only if the judgement does not find g in dC f(w), the witness
    does not tend to g, and, where the judgement is not a proof, ``samples`` further arcs do not find g either.

    Raises ``AssertionError`` if a proof that g is outside meets a witness that tends to g: the oracle is wrong.
    """
    judgement = judge(network)
    replay = replays(network, directions, scales)
    if replay.reproduces and judgement.member is False:
        raise AssertionError(f"network {network.seed}: separated from every cell, yet the witness tends to g")
    if judgement.member:
        return Confirmation(False, judgement, replay, "g is an exact combination of true elements")
    if replay.reproduces:
        return Confirmation(False, judgement, replay, "the witness tends to g")
    if judgement.member is False:
        return Confirmation(True, judgement, replay, judgement.reason)
    more = bouligand_elements(network, samples, seed=7)
    elements = np.unique(np.concatenate([judgement.elements, more]), axis=0)
    if in_hull(elements, judgement.gradient).member:
        return Confirmation(False, judgement, replay, "denser sampling finds g")
    return Confirmation(True, judgement, replay, "hull, replay and denser sampling agree")
