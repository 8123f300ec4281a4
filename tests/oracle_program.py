"""A tiny network as index tables, evaluated exactly along polynomial arcs. Knows nothing of adcert.

Truth comes from *arcs* ``w(t) = w + t q_1 + t^2 q_2 + ...`` with integer coefficients. Along an arc every
value of the network is, for all small t > 0, one polynomial in t with integer coefficients, and a
comparison is decided by the first coefficient that is not zero: no step size, no rounding. The pattern
found (which side each ReLU is on, which member each window selects) is that of w(t) for all small t > 0,
and ``lim grad f(w(t))`` is the chain rule with that pattern evaluated at w itself: an integer vector.

Is f differentiable at w(t)? Where every comparison is strict, yes. A comparison that stays an equality is
harmless exactly when the two functions compared are the same polynomial in the parameters under that
pattern (a dead unit, two equal patches): then f is a polynomial near w(t). Equality as polynomials is
tested at a random point modulo 2^31 - 1 (Schwartz-Zippel; a wrong answer has probability below degree /
2^31). Samples that fail are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

PRIME = 2**31 - 1

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Affine:
    """``y_i = sum_k theta[weights[i, k]] * z[inputs[i, k]] + theta[bias[i]]``; theta[-1] is the constant
    0."""

    source: int
    weights: Array  # [n, K]
    inputs: Array  # [n, K]
    bias: Array  # [n]


@dataclass(frozen=True)
class Relu:
    source: int


@dataclass(frozen=True)
class Pool:
    """``z_j = max_k y[members[j, k]]``; places in the padding repeat an in-bounds member."""

    source: int
    members: Array  # [n, W]


@dataclass(frozen=True)
class Add:
    source: int
    other: int


Op = Affine | Relu | Pool | Add


@dataclass(frozen=True)
class Program:
    """Registers of flattened units x samples: register 0 holds the inputs, ``ops[k]`` writes register k + 1.

    ``theta``: integer parameters [P + 1], the last entry the constant 0; ``trainable``: [P] bool;
    ``slices``: parameter name -> its entries; ``weights``: the linear loss on the last register;
    ``inputs``: [n_0]; ``values``: every register at w, int64.
    """

    ops: tuple[Op, ...]
    theta: Array
    trainable: Array
    slices: dict[str, slice]
    inputs: Array
    weights: Array
    values: tuple[Array, ...]

    @property
    def parameters(self) -> int:
        return len(self.theta) - 1


# ---- values along arcs ---------------------------------------------------------------------------


def leading_sign(coefficients: Array) -> Array:
    """Sign for small t > 0 of polynomials [D, ...] with the coefficient of t^d in entry d; 0 iff all
    vanish."""
    nonzero = coefficients != 0
    first = np.expand_dims(nonzero.argmax(axis=0), 0)
    return np.sign(np.take_along_axis(coefficients, first, axis=0)[0]).astype(np.int64)


Choice = Array | None  # ReLU: sign of the input [S, n]; pooling: the selected unit [S, n]; else None


def forward(program: Program, theta: Array) -> tuple[list[Array], list[Choice]]:
    """Registers [D, S, n] and choices of the network along the arcs theta [E, S, P + 1] (coefficients of
    t^e).

    int64 (checked against overflow), or object for Python integers and Fractions. E = 1 is a plain
    evaluation.
    """
    registers = [np.broadcast_to(program.inputs.astype(theta.dtype), (1, theta.shape[1], len(program.inputs)))]
    choices: list[Choice] = []
    for op in program.ops:
        z = registers[op.source]
        choice: Choice = None
        if isinstance(op, Affine):
            z = affine(op, z, theta)
        elif isinstance(op, Relu):
            choice = leading_sign(z)
            z = np.where(choice > 0, z, 0)
        elif isinstance(op, Pool):
            z, choice = _pool(op, z)
        else:
            other = registers[op.other]
            z, other = sorted((z, other), key=len)
            total = other.copy()
            total[: len(z)] += z
            z = total
        registers.append(z)
        choices.append(choice)
    return registers, choices


def affine(op: Affine, z: Array, theta: Array) -> Array:
    units, width = op.inputs.shape
    if z.dtype != object:
        bound = float(width) * len(z) * float(np.abs(z).max(initial=0)) * float(np.abs(theta).max())
        if bound > 2.0**62:
            raise OverflowError("arc coefficients too large for int64")
    samples = theta.shape[1]
    y = np.zeros((len(z) + len(theta) - 1, samples, units), dtype=theta.dtype)
    if z.dtype == object:
        y[:] = 0
    gathered = z[:, :, op.inputs]
    for e in range(len(theta)):
        if not theta[e].any():
            continue
        weights = theta[e][:, op.weights]
        if z.dtype == object:
            y[e : e + len(z)] += (gathered * weights).sum(axis=-1)
        else:
            y[e : e + len(z)] += np.einsum("dsnk,snk->dsn", gathered, weights)
        y[e] += theta[e][:, op.bias]
    return y


def _pool(op: Pool, z: Array) -> tuple[Array, Array]:
    samples = z.shape[1]
    best = np.broadcast_to(op.members[:, 0], (samples, len(op.members))).copy()
    value = z[:, :, op.members[:, 0]]
    for k in range(1, op.members.shape[1]):
        candidate = z[:, :, op.members[:, k]]
        better = leading_sign(candidate - value) > 0
        best = np.where(better, op.members[:, k], best)
        value = np.where(better, candidate, value)
    return value, best


# ---- gradients -----------------------------------------------------------------------------------


def jacobians(op: Affine, z: Array, theta: Array) -> tuple[Array, Array]:
    """d y / d z [n, n_in] and d y / d theta [n, P + 1] of an affine op at one point, float64."""
    rows = np.arange(len(op.bias))[:, None]
    by_input = np.zeros((len(op.bias), len(z)))
    by_parameter = np.zeros((len(op.bias), len(theta)))
    np.add.at(by_input, (rows, op.inputs), theta[op.weights].astype(np.float64))
    np.add.at(by_parameter, (rows, op.weights), z[op.inputs].astype(np.float64))
    np.add.at(by_parameter, (rows[:, 0], op.bias), 1.0)
    by_parameter[:, -1] = 0.0
    return by_input, by_parameter


def backward(program: Program, choices: list[Choice], values: tuple[Array, ...], theta: Array) -> Array:
    """Chain rule with S given patterns at one point (registers ``values``, parameters ``theta``): [S, P]
    float64.

    At a unit that stays on its kink the slope 0 is used; the caller knows that its gradient vanishes there.
    """
    samples = next((len(c) for c in choices if c is not None), 1)
    adjoints = [np.zeros((samples, len(v))) for v in values]
    adjoints[-1] += program.weights
    gradient = np.zeros((samples, len(theta)))
    for k in range(len(program.ops) - 1, -1, -1):
        op, choice, adjoint = program.ops[k], choices[k], adjoints[k + 1]
        if isinstance(op, Affine):
            by_input, by_parameter = jacobians(op, values[op.source], theta)
            gradient += adjoint @ by_parameter
            adjoints[op.source] += adjoint @ by_input
        elif isinstance(op, Relu):
            assert choice is not None
            adjoints[op.source] += np.where(choice > 0, adjoint, 0.0)
        elif isinstance(op, Pool):
            assert choice is not None
            width = adjoints[op.source].shape[1]
            flat = (np.arange(samples)[:, None] * width + choice).ravel()
            scattered = np.bincount(flat, weights=adjoint.ravel(), minlength=samples * width)
            adjoints[op.source] += scattered.reshape(samples, width)
        else:
            adjoints[op.source] += adjoint
            adjoints[op.other] += adjoint
    return gradient[:, : program.parameters]


def arc_limits(program: Program, arcs: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Limits of the true gradient along arcs: int64 [S, trainable parameters], and a mask [S] of the valid
    ones.

    ``arcs``: [E, S, P] integer coefficients of t, t^2, ...; entries of frozen parameters must be 0.
    Invalid: along that arc a comparison stays an equality between different functions, so f may not be
    differentiable there.
    """
    base = np.broadcast_to(program.theta[:-1].astype(arcs.dtype), (1, *arcs.shape[1:]))
    theta = np.concatenate([base, arcs])
    theta = np.concatenate([theta, np.zeros((*theta.shape[:2], 1), dtype=theta.dtype)], axis=2)
    registers, choices = forward(program, theta)
    valid = equalities_are_identities(program, registers, choices, rng)
    gradient = backward(program, choices, program.values, program.theta)
    return np.rint(gradient[:, program.trainable]).astype(np.int64), valid


def equalities_are_identities(
    program: Program, registers: list[Array], choices: list[Choice], rng: np.random.Generator
) -> Array:
    """Mask [S]: every comparison that stays an equality along the arc compares identical polynomials of
    theta."""
    samples = registers[-1].shape[1]
    valid = np.ones(samples, dtype=bool)
    theta = rng.integers(0, PRIME, (1, program.parameters + 1))
    theta[:, :-1] = np.where(program.trainable, theta[:, :-1], program.theta[:-1] % PRIME)
    theta[:, -1] = 0
    values = [np.broadcast_to(program.inputs % PRIME, (samples, len(program.inputs)))]
    for op, choice in zip(program.ops, choices, strict=True):
        v = values[op.source]
        if isinstance(op, Affine):
            v = affine_mod(op, v, theta)
        elif isinstance(op, Relu):
            assert choice is not None
            valid &= ~((choice == 0) & (v != 0)).any(axis=1)
            v = np.where(choice > 0, v, 0)
        elif isinstance(op, Pool):
            assert choice is not None
            z, selected = registers[op.source], np.take_along_axis(v, choice, axis=1)
            best = np.take_along_axis(z, np.broadcast_to(choice, (len(z), *choice.shape)), axis=2)
            for k in range(op.members.shape[1]):
                tied = (z[:, :, op.members[:, k]] == best).all(axis=0)
                valid &= ~(tied & (v[:, op.members[:, k]] != selected)).any(axis=1)
            v = selected
        else:
            v = (v + values[op.other]) % PRIME
        values.append(v)
    return valid


def affine_mod(op: Affine, v: Array, theta: Array) -> Array:
    """An affine op modulo PRIME: v [S, n_in], theta [S or 1, P + 1]."""
    product = (v[:, op.inputs] * theta[:, op.weights]) % PRIME
    return (product.sum(axis=-1) + theta[:, op.bias]) % PRIME
