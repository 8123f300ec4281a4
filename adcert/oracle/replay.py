"""Replay of a witness in rational arithmetic, and the confirmation that comes before any accusation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
from torch import Tensor

from .cells import enumerate_cells
from .gradients import Closure, ad_gradient, flatten
from .localize import localized
from .program import Array, OracleError, Poly, Program, Select
from .sampling import noise
from .subdifferential import BUDGET, SAMPLES, Evidence, Judgement, judge
from .trace import Parameters, trace

__all__ = ["Confirmation", "Replay", "confirm", "replays"]

DEPTHS = (25, 75, 225)  # powers of t that are kept along a witness, until they decide
SCALES = tuple(2.0**-k for k in (2, 6, 12, 24, 48, 96))


@dataclass(frozen=True)
class Replay:
    """``distances[k]``: max norm between the true gradient at the k-th scale and g; None where f is not
    evidently differentiable at that point. ``limit``: the limit along the witness, None if the arc stays on
    a kink; ``reproduces``: that limit exists and is g (exactly, or as near as floating point allows)."""

    distances: tuple[float | None, ...]
    limit: tuple[Fraction, ...] | None
    reproduces: bool


@dataclass(frozen=True)
class Confirmation:
    """``false_certificate``: True only if hull, replay and denser sampling agree that g is not a
    subgradient."""

    false_certificate: bool
    judgement: Judgement
    replay: Replay
    reason: str


def replays(
    closure: Closure,
    parameters: Parameters,
    directions: Mapping[str, Tensor],
    scales: Mapping[str, int],
    series: Sequence[float] = SCALES,
    seed: int = 0,
) -> Replay:
    """Replay the witness ``w + T (sum_l eps_l p_l + noise)`` with eps_1 << eps_2 << ... << eps_L and T <<
    eps_1, against autodiff's gradient.

    ``directions``: parameter name -> p (any finite values, taken exactly; missing: 0); ``scales``: name ->
    rank l (missing: 1). With L the largest rank: T = s^(L + 1), eps_l = s^(L - l), noise of size s^L, for
    each s of ``series`` (dyadic) in exact rational arithmetic; the limit s -> 0 by an integer arc.

    Raises :class:`OracleError` where a piece of f is no polynomial.
    """
    evidence = Evidence(trace(closure, parameters), seed)
    program = evidence.program
    g = flatten(ad_gradient(closure, parameters), program.slices)
    rng = np.random.default_rng((seed, 2))
    arc = _witness(program, directions, scales, rng)
    for powers in DEPTHS:
        limits, valid = evidence.along(arc, rng, powers)
        if valid[0]:
            break
    unit = evidence.scale or Fraction(1)
    limit = tuple(int(x) * unit for x in limits[0]) if valid[0] else None
    distances = tuple(_distance(program, arc, Fraction(s), g) for s in series)
    room = Fraction(evidence.known().tolerance) * (1 + max(map(abs, g), default=0))
    same = limit is not None and all(abs(a - b) <= room for a, b in zip(limit, g, strict=True))
    return Replay(distances, limit, same)


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
    arc = np.zeros((2 * depth + 1, 1, len(program.parameters)), dtype=object)
    for name, step in steps.items():
        arc[2 * depth - scales.get(name, 1), 0, program.slices[name]] = [int(x * scale) for x in step]
    arc[2 * depth, 0] += noise(rng, (len(program.parameters),), 1000)
    return arc


def moved(program: Program, point: Sequence[Fraction]) -> Program:
    """The same program at other values of its parameters."""
    values = np.array([program.value(n) for n in range(len(program.values))], dtype=object)
    values[program.parameters] = point
    for op in program.ops:
        if isinstance(op, Poly):
            values[op.out] = (values[op.left] * values[op.right]).sum(axis=1)
        elif isinstance(op, Select):
            members = np.sort(values[op.members], axis=1)
            values[op.out] = members[np.arange(len(members)), op.rank]
        else:
            raise OracleError("a program with smooth pieces that are no polynomials cannot be moved")
    floats = values.astype(np.float64)
    fractions = {k: Fraction(x) for k, (x, y) in enumerate(zip(values, floats, strict=True)) if x != y}
    return Program(
        program.ops, floats, fractions, program.constant, program.parameters, program.slices, program.shapes,
        program.output, program.exact, program.eps,
    )  # fmt: skip


def _distance(program: Program, arc: Array, s: Fraction, g: list[Fraction]) -> float | None:
    """|grad f(w(s)) - g| in the max norm, in float64, from an exact evaluation at w(s); None if some comparison is an
    equality there between functions that are not identical."""
    powers = [s ** (e + 1) for e in range(len(arc))]
    shift = [sum((p * int(x) for p, x in zip(powers, arc[:, 0, k], strict=True)), Fraction(0)) for k in range(len(g))]
    local = localized(moved(program, [a + b for a, b in zip(program.point, shift, strict=True)]))
    cells = enumerate_cells(local, BUDGET)
    if not cells.complete or len(cells.certain) != 1 or len(cells.possible):
        return None
    pairs = zip(cells.certain[0], g, strict=True)
    return max((abs(float(int(x) * cells.scale) - float(y)) for x, y in pairs), default=0.0)


def confirm(
    closure: Closure,
    parameters: Parameters,
    directions: Mapping[str, Tensor],
    scales: Mapping[str, int],
    samples: int = 10 * SAMPLES,
    seed: int = 0,
) -> Confirmation:
    """Is a certificate with this witness false? Only if the judgement does not find g in dC f(w), the witness
    does not tend to g, and, where the judgement is not a proof, ``samples`` further arcs do not find g either.

    Raises ``AssertionError`` if a proof that g is outside meets a witness that tends to g: the oracle is wrong.
    """
    judgement = judge(closure, parameters, seed=seed)
    replay = replays(closure, parameters, directions, scales, seed=seed)
    if replay.reproduces and judgement.member is False:
        raise AssertionError("separated from every cell, yet the witness tends to g")
    if judgement.member:
        return Confirmation(False, judgement, replay, "g is an exact combination of true elements")
    if replay.reproduces:
        return Confirmation(False, judgement, replay, "the witness tends to g")
    if judgement.member is False:
        return Confirmation(True, judgement, replay, judgement.reason)
    evidence = Evidence(trace(closure, parameters), seed)
    evidence.sample(samples, (), 7)
    if evidence.known().judge(ad_gradient(closure, parameters)).member:
        return Confirmation(False, judgement, replay, "denser sampling finds g")
    return Confirmation(True, judgement, replay, "hull, replay and denser sampling agree")
