"""Exact signs of sums of products of floats, and exact linear relations between rows of floats.

A system is three arrays of the same shape [K, n]: ``a``, ``minus`` and ``radius``. Row k stands for every
real vector within ``radius[k]`` (entrywise) of the exact difference ``a[k] - minus[k]``, which is never
rounded. Each decision is made by a float64 evaluation with a rigorous error bound where that settles it, and
by integers where it does not: a float is an integer times a power of two, so nothing overflows, underflows or
rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flint
import numpy as np
from numpy.typing import NDArray

from adcert.errors import AdcertError

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

_TINY, _LEAST = 5e-324, 2.0**-1022  # the least subnormal and the least normal number
NARROW_BITS = 29  # 29 bits times the 24 of a float32 are the 53 of a float64
_LONG = 100  # bits of an integer worth shortening
_CHUNK = 1 << 22  # entries turned into integers at once
_CACHED = 1 << 16  # entries of a run of rows
_SERIAL = 9000  # entries that OpenBLAS multiplies by a vector without threads
_SERIAL_PRODUCTS = 1 << 18  # products of a matrix with a matrix that it does without threads


def require_gradual_underflow() -> None:
    """Refuses to work on a thread that flushes subnormals to zero: there x - y == 0 does not mean x == y."""
    if not (_TINY > 0.0 and _LEAST * 0.5 > 0.0):
        raise AdcertError(
            "this thread flushes subnormal numbers to zero, so exact comparisons are impossible; "
            "call torch.set_flush_denormal(False) on it"
        )


def row_slices(shape: tuple[int, int]) -> Iterator[slice]:
    """Runs of rows small enough for the processor's cache."""
    step = max(1, _CACHED // max(1, shape[1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def times(matrix: NDArray[np.float64], factor: NDArray[np.float64]) -> NDArray[np.float64]:
    """``matrix @ factor`` (a vector or a matrix) in pieces below the size at which BLAS wakes its threads.

    Beside a training loop that keeps every core busy, waiting for those threads costs up to a hundred times
    the product.
    """
    step = max(1, _SERIAL // max(1, matrix.shape[1]) if factor.ndim == 1 else _SERIAL_PRODUCTS // max(1, factor.size))
    if matrix.shape[0] <= step:
        return np.asarray(matrix @ factor)
    result = np.empty((matrix.shape[0], *factor.shape[1:]))
    for start in range(0, matrix.shape[0], step):
        np.dot(matrix[start : start + step], factor, out=result[start : start + step])
    return result


def read_array(values: Any, name: str) -> Floats:
    """``values`` as a float32 or float64 array [K, n] of finite numbers, else :class:`AdcertError`."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AdcertError(f"{name} cannot be read as an array: {error}") from error
    if array.dtype.kind in "iub":
        rounded = array.astype(np.float64)
        if array.size and (np.abs(rounded) > 2.0**53).any():
            raise AdcertError(f"{name} holds integers beyond 2**53, which float64 would round")
        array = rounded
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    if array.dtype not in (np.float32, np.float64):
        raise AdcertError(f"{name} has dtype {array.dtype}; float32 or float64 is needed")
    if array.ndim != 2:
        raise AdcertError(f"{name} has {array.ndim} dimensions; rows x columns is needed")
    if not np.isfinite(array).all():
        raise AdcertError(f"{name} holds a NaN or an infinity in row {int(np.argmin(np.isfinite(array).all(axis=1)))}")
    return array


@dataclass(frozen=True, eq=False)
class System:
    """Rows ``a - minus`` known up to ``radius``; build it with :meth:`read`.

    >>> system = System.read([[1.0, 2.0]], minus=[[1.0, 0.0]])
    >>> system.difference.tolist()
    [[0.0, 2.0]]
    """

    a: Floats
    minus: Floats | None
    radius: Floats | None

    @classmethod
    def read(cls, a: Any, minus: Any = None, radius: Any = None) -> System:
        """Checks shapes, dtypes and finiteness (:class:`AdcertError`); takes the radius in absolute value."""
        require_gradual_underflow()
        first = read_array(a, "A")
        second = None if minus is None else read_array(minus, "minus")
        third = None if radius is None else np.abs(read_array(radius, "radius"))
        for name, array in (("minus", second), ("radius", third)):
            if array is not None and array.shape != first.shape:
                raise AdcertError(f"{name} has shape {array.shape}, A has {first.shape}")
        if third is not None and not third.any():
            third = None
        return cls(first, second, third)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.a.shape[0], self.a.shape[1]

    @cached_property
    def difference(self) -> NDArray[np.float64]:
        """float64 [K, n], ``a - minus`` rounded once: zero only where it is zero, infinite on overflow."""
        if self.minus is None:
            return np.ascontiguousarray(self.a, dtype=np.float64)
        with np.errstate(over="ignore"):
            return np.subtract(self.a, self.minus, dtype=np.float64)

    @cached_property
    def magnitude(self) -> NDArray[np.float64]:
        """float64 [K]: the sum of |entry| + radius over the row, rounded (:func:`estimate` has the slack)."""
        total = np.empty(self.shape[0])
        with np.errstate(over="ignore"):
            for part in row_slices(self.shape):
                total[part] = np.abs(self.difference[part]).sum(axis=1)
                if self.radius is not None:
                    total[part] += self.radius[part].sum(axis=1, dtype=np.float64)
        return total

    @cached_property
    def is_exact(self) -> NDArray[np.bool_]:
        """bool [K]: the row's radius is zero, so that it may take part in a proof of emptiness."""
        if self.radius is None:
            return np.ones(self.shape[0], dtype=np.bool_)
        return np.asarray(~self.radius.any(axis=1))

    @cached_property
    def is_narrow(self) -> bool:
        """Every entry is a float32, so products with 29-bit integers are exact in float64."""
        arrays = (self.a, self.minus, self.radius)
        return all(array is None or array.dtype == np.float32 for array in arrays)

    def take(self, index: Ints) -> System:
        """The system of the rows ``index``."""
        minus, radius = (None if x is None else x[index] for x in (self.minus, self.radius))
        return System(self.a[index], minus, radius)

    def columns(self, part: slice) -> System:
        """The system of some columns."""
        minus, radius = (None if x is None else x[:, part] for x in (self.minus, self.radius))
        return System(self.a[:, part], minus, radius)


def decode(values: Floats) -> tuple[Ints, Ints]:
    """Exact ``values == mantissa * 2**exponent`` (int64, same shape), every mantissa odd or zero.

    >>> decode(np.array([0.75, -6.0, 0.0]))
    (array([ 3, -3,  0]), array([-2,  1,  0]))
    """
    fraction, exponent = np.frexp(np.asarray(values, dtype=np.float64))
    mantissa = (fraction * 2.0**53).astype(np.int64)
    low = (mantissa & -mantissa).astype(np.float64)  # a power of two, or zero
    zeros = np.maximum(np.frexp(low)[1] - 1, 0)
    return mantissa >> zeros, np.where(mantissa == 0, 0, exponent.astype(np.int64) + (zeros - 53))


def _aligned(terms: Sequence[Floats]) -> tuple[NDArray[Any], Ints]:
    """Integers [terms, K, n] (int64 below 2**61, else Python's) and int64 [K]: ``terms[t][k] == i[t, k] * 2**e[k]``."""
    mantissa, exponent = decode(np.stack(terms))
    zero = mantissa == 0
    unset = 1 << 30
    least = np.where(zero, unset, exponent).min(axis=(0, 2), initial=unset)
    least[least == unset] = 0
    shift = np.where(zero, 0, exponent - least[:, None])
    if shift.size and int((np.frexp(mantissa.astype(np.float64))[1] + shift).max()) > 61:
        return mantissa.astype(object) << shift.astype(object), least
    return mantissa << shift, least


def integer_rows(*terms: Floats) -> tuple[list[list[list[int]]], list[int]]:
    """``terms`` (each [K, n]) as Python integers: ``terms[t][k] == result[t][k] * 2**exponent[k]``."""
    integers, exponents = _aligned(terms)
    return integers.tolist(), exponents.tolist()


def true_integers(system: System, index: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """The exact rows ``a - minus`` of ``index`` (radius ignored) as integers, and their exponents of two.

    >>> true_integers(System.read([[0.5, 1.0]], [[0.25, 0.0]]), [0])
    ([[1, 4]], [-2])
    """
    integers, exponents = _true_array(system, index)
    return integers.tolist(), exponents.tolist()


def _true_array(system: System, index: Sequence[int]) -> tuple[NDArray[Any], Ints]:
    rows = np.asarray(index, dtype=np.int64)
    if system.minus is None:
        (integers,), exponents = _aligned([system.a[rows]])
        return integers, exponents
    (first, second), exponents = _aligned([system.a[rows], system.minus[rows]])
    return first - second, exponents


def combination_is_zero(system: System, index: Sequence[int], weights: Sequence[int]) -> bool:
    """Whether ``sum_i weights[i] * (a - minus)[index[i]]`` is the zero vector, exactly.

    >>> combination_is_zero(System.read([[1.0], [-3.0]]), (0, 1), (3, 1))
    True
    """
    if len(index) == 1 and weights[0] != 0:
        return not system.difference[index[0]].any()  # zero only where the exact difference is
    columns = system.shape[1]
    step = max(1, _CHUNK // max(1, len(index)))
    for start in range(0, columns, step):
        rows, exponents = _true_array(system.columns(slice(start, start + step)), index)
        least = int(exponents.min(initial=1 << 30))
        scaled = [w << (e - least) for w, e in zip(weights, exponents.tolist(), strict=True)]
        if not _vanishes(scaled, rows):
            return False
    return True


def _vanishes(weights: list[int], rows: NDArray[Any]) -> bool:
    if rows.dtype == np.int64 and rows.size:
        largest = max(int(rows.max()), -int(rows.min())), max(map(abs, weights))
        if len(weights) * largest[0] * largest[1] < 1 << 62:
            return not (np.array(weights) @ rows).any()
    product = flint.fmpz_mat([weights]) * flint.fmpz_mat(rows.tolist())
    return all(x == 0 for x in product.entries())


def relation(rows: list[list[int]]) -> list[int] | None:
    """The weights y, unique up to scale, with ``sum_k y[k] * rows[k] == 0``; None if none or several.

    >>> relation([[1, 2], [-2, -4]])
    [2, 1]
    """
    matrix = flint.fmpz_mat(_without_common_factors(rows))
    if matrix.ncols() > 2 * matrix.nrows():
        matrix = matrix * matrix.transpose()  # over the rationals the Gram matrix has the same left null space
    basis, nullity = matrix.transpose().nullspace()
    if nullity != 1:
        return None
    weights = primitive([int(basis[i, 0]) for i in range(len(rows))])
    return weights if sum(weights) >= 0 else [-y for y in weights]


def _without_common_factors(rows: list[list[int]]) -> list[list[int]]:
    """The columns divided by their greatest common divisors, which changes no relation, where they are long."""
    if max((abs(x) for row in rows for x in row), default=0).bit_length() <= _LONG:
        return rows
    divisors = [math.gcd(*column) or 1 for column in zip(*rows, strict=True)]
    return [[x // d for x, d in zip(row, divisors, strict=True)] for row in rows]


def primitive(vector: Sequence[int]) -> list[int]:
    """``vector`` divided by the greatest common divisor of its entries (the zero vector stays)."""
    divisor = math.gcd(*vector)
    return [x // divisor for x in vector] if divisor > 1 else list(vector)


def round_direction(p: NDArray[np.float64], bits: int) -> tuple[int, ...] | None:
    """``p`` times a power of two as integers of ``bits`` bits (beyond 52: exact); None if zero or not finite.

    >>> round_direction(np.array([0.5, -0.25, 1e-30]), 3)
    (4, -2, 0)
    """
    largest = float(np.abs(p).max(initial=0.0))
    if not math.isfinite(largest) or largest == 0:
        return None
    if bits > 52:
        mantissa, exponent = decode(p)
        least = int(exponent[mantissa != 0].min())
        return tuple(int(m) << max(0, int(e) - least) for m, e in zip(mantissa, exponent, strict=True))
    scaled = np.ldexp(p, bits - math.frexp(largest)[1])
    return tuple(int(x) for x in np.rint(scaled))
