"""Random integer arcs through a point, of the kinds on which narrow cells are met."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .program import Array


def arcs(
    slices: dict[str, slice], width: int, samples: int, directions: Sequence[Array], rng: np.random.Generator
) -> list[Array]:
    """Blocks [E, S, P] of coefficients of t, t^2, ...

    A third of the arcs is a generic first-order direction with magnitudes 1 to 2^10; a third gives every
    parameter or every tensor its own power t, t^2 or t^3; a third moves along a sparse small-integer
    direction (relations between parameters hold to first order) or one of ``directions`` (integers [P],
    each used once) and resolves what is left at t^2 and t^3.
    """
    third = samples // 3
    blocks = [_generic(width, third, rng), _powers(slices, width, third, rng), _sparse(width, samples - 2 * third, rng)]
    if len(directions):
        blocks.append(_along(np.array(directions), rng))
    return blocks


def first_order(slices: dict[str, slice], width: int, count: int, rng: np.random.Generator) -> Array:
    """Directions [S, P] alone: generic ones, sparse ones with a little of everything else, and scales far apart, by
    parameter or by tensor."""
    third = count // 3
    generic = noise(rng, (third, width), 1000)
    sparse = rng.integers(-1, 2, (third, width)) * 2**20 + noise(rng, (third, width), 1000)
    rank = rng.integers(0, 4, (count - 2 * third, width))
    for entries in slices.values():
        rank[::2, entries] = rng.integers(0, 4, (len(rank[::2]), 1))
    spread = noise(rng, rank.shape, 1000) * 2 ** (12 * rank)
    return np.concatenate([generic, sparse, spread])


def noise(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> Array:
    """Integers in -size..size without 0."""
    found: Array = rng.integers(1, size + 1, shape) * rng.choice((-1, 1), shape)
    return found


def _generic(width: int, count: int, rng: np.random.Generator) -> Array:
    magnitude = 2 ** rng.integers(0, 5, (1, count, width))
    return np.asarray(noise(rng, (1, count, width), 32) * magnitude)


def _powers(slices: dict[str, slice], width: int, count: int, rng: np.random.Generator) -> Array:
    """Every parameter (or, for half of the arcs, every tensor) moves at its own power of t."""
    power = rng.integers(0, 3, (count, width))
    for entries in slices.values():
        power[: count // 2, entries] = rng.integers(0, 3, (count // 2, 1))
    step = noise(rng, (count, width), 32)
    return np.where(np.arange(3)[:, None, None] == power, step, 0)


def _sparse(width: int, count: int, rng: np.random.Generator) -> Array:
    """A direction in {-1, 0, 1} with few entries, then another at t^2 plus noise, then noise at t^3."""
    shape = (count, width)
    first = rng.integers(-1, 2, shape) * (rng.random(shape) < rng.choice((0.15, 0.5), (count, 1)))
    second = rng.integers(-1, 2, shape) * (rng.random(shape) < 0.5)
    return np.stack([first, second, noise(rng, shape, 40)])


def _along(directions: Array, rng: np.random.Generator) -> Array:
    """The given directions, then noise at the next power of t (Python integers)."""
    full = np.zeros((2, *directions.shape), dtype=object)
    full[0] = directions
    full[1] = noise(rng, directions.shape, 1000)
    return full
