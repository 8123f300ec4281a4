"""Exact signs of the inner products of a system's rows with one integer vector.

Three stages, each for the rows the one before leaves open: a float64 evaluation with a rigorous error bound,
digits whose products BLAS adds without rounding (many rows at once), integers (one row at a time).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from adcert.exact import NARROW_BITS, Floats, Ints, System, integer_rows, row_slices, times

Matrix = NDArray[np.float64]

_UNIT = 2.0**-53
_LARGEST = 600  # bits of a direction that the float64 filter keeps
_DIGITS = 8  # of a row at most: rows of wider exponents go one at a time
_FEW = 8  # rows that are not worth digits


def estimate(system: System, p: Sequence[int]) -> tuple[Matrix, Matrix]:
    """float64 [K] twice: ``|<row, p> - <radius, |p|> - value| <= bound``, infinite where floats fail.

    The inner product of n terms errs by at most n u / (1 - n u) times the sum of magnitudes in any order of
    summation, fused or not; the rounding of the difference, of p and of the last subtraction add three more
    units, and the factor 2 covers the rounding of the bound itself. p is integral, so no product underflows.
    A very long p is shifted down first: value and bound are then for p / 2**shift, and the truncation is far
    below one unit of the largest.
    """
    columns = system.shape[1]
    largest = max(max(p, default=0), -min(p, default=0))
    shift = max(0, largest.bit_length() - _LARGEST)
    largest >>= shift
    vector = np.array([x >> shift for x in p] if shift else p, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        value = times(system.difference, vector)
        if system.radius is not None:
            value = value - times(system.radius.astype(np.float64, copy=False), np.abs(vector))
        bound = system.magnitude * (float(largest) * (2 * (columns + 8) * _UNIT)) + columns * 2.0**-1000
    return value, np.where(np.isfinite(value) & np.isfinite(bound), bound, np.inf)


def _terms(system: System, index: Ints, p: Sequence[int]) -> list[tuple[Floats, list[int]]]:
    """The inner products whose sum is ``<row, p> - <radius, |p|>``."""
    terms = [(system.a[index], list(p))]
    if system.minus is not None:
        terms.append((system.minus[index], [-x for x in p]))
    if system.radius is not None:
        terms.append((system.radius[index], [-abs(x) for x in p]))
    return terms


def exact_sign(system: System, k: int, p: Sequence[int]) -> int:
    """Sign of ``<a[k] - minus[k], p> - <radius[k], |p|>`` without any rounding."""
    if system.is_narrow and max((abs(x) for x in p), default=0) <= 1 << NARROW_BITS:
        terms = _terms(system, np.array([k]), p)
        products = [rows[0] * np.array(vector, dtype=np.float64) for rows, vector in terms]
        total: float = math.fsum(np.concatenate(products).tolist())
        return (total > 0) - (total < 0)
    exact, _ = _integer_value(system, k, p)
    return (exact > 0) - (exact < 0)


def _integer_value(system: System, k: int, p: Sequence[int]) -> tuple[int, int]:
    """``value, e``: the inner product is ``value * 2**e``."""
    terms = _terms(system, np.array([k]), p)
    integers, (exponent,) = integer_rows(*(rows for rows, _ in terms))
    pairs = zip(integers, terms, strict=True)
    return sum(sum(map(int.__mul__, rows[0], vector)) for rows, (_, vector) in pairs), exponent


def exact_values(system: System, index: Ints, p: Sequence[int]) -> tuple[NDArray[np.int8], Matrix, Ints]:
    """Of the rows ``index``: exact signs, and m (float64, of size 2**-53 to 2**53), e (int64) with value ~ m * 2**e.

    >>> sign, m, e = exact_values(System.read([[1.0, -1.0], [1e300, 1.0]]), np.array([0, 1]), (3, 3))
    >>> sign.tolist(), bool(m[1] * 2.0 ** e[1] == 3e300)
    ([0, 1], True)
    """
    parts = [(np.zeros(0, dtype=np.int8), np.zeros(0), np.zeros(0, dtype=np.int64))]
    for piece in row_slices((len(index), system.shape[1])):
        some = index[piece]
        parts.append(_digit_values(system, some, p) or _integer_values(system, some, p))
    sign, mantissa, exponent = zip(*parts, strict=True)
    return np.concatenate(sign), np.concatenate(mantissa), np.concatenate(exponent)


def _integer_values(system: System, index: Ints, p: Sequence[int]) -> tuple[NDArray[np.int8], Matrix, Ints]:
    values = [_integer_value(system, int(k), p) for k in index]
    size = [max(0, value.bit_length() - 60) for value, _ in values]
    mantissa = np.array([float(value >> s) for (value, _), s in zip(values, size, strict=True)])
    exponent = np.array([e + s for (_, e), s in zip(values, size, strict=True)])
    return np.sign(mantissa).astype(np.int8), mantissa, exponent


def _digit_values(system: System, index: Ints, p: Sequence[int]) -> tuple[NDArray[np.int8], Matrix, Ints] | None:
    """:func:`exact_values`; None where a row's exponents differ so much that its digits would be too many.

    Rows are cut into digits from the top and p from the bottom, each digit b bits and a sign, b so small that
    a sum of n products of digits is below 2**53: every matrix product is exact.
    """
    terms = _terms(system, index, p)
    bits = min(24, (53 - (system.shape[1] - 1).bit_length()) // 2)
    vectors = [_digits_of_integers(vector, bits) for _, vector in terms]
    top = np.frexp(np.max([np.abs(rows).max(axis=1, initial=0) for rows, _ in terms], axis=0))[1].astype(np.int64)
    levels = np.zeros((_DIGITS + vectors[0].shape[1], len(index)), dtype=np.int64)
    for (rows, _), vector in zip(terms, vectors, strict=True):
        digits = _digits_of_floats(rows, top, bits)
        if digits is None:
            return None
        for i, digit in enumerate(digits):
            product = times(digit, vector).astype(np.int64)
            levels[_DIGITS - 1 - i : levels.shape[0] - 1 - i] += product.T
    sign = _carry(levels, bits)
    _carry(np.multiply(levels, sign, out=levels), bits)
    # Digits of a nonnegative number: the leading ones are the number.
    mantissa, scale = np.zeros(len(index)), np.zeros(len(index), dtype=np.int64)
    for level, digit in enumerate(levels[::-1]):
        fresh = (mantissa == 0) & (digit != 0)
        scale[fresh] = level
        mantissa += np.ldexp(digit.astype(np.float64), np.maximum(-1000, bits * (scale - level)))
    exponent = top + bits * (levels.shape[0] - 1 - scale - _DIGITS)
    return sign, mantissa * sign, exponent


def _digits_of_integers(vector: Sequence[int], bits: int) -> Matrix:
    """float64 [n, d]: ``vector == sum_j digit[:, j] * 2**(bits * j)``, signed as the entry."""
    count = -(-max((abs(x).bit_length() for x in vector), default=0) // bits)
    mask = (1 << bits) - 1
    table = [[(abs(x) >> (bits * j)) & mask for j in range(count)] for x in vector]
    signs = np.array([-1.0 if x < 0 else 1.0 for x in vector])
    digits: Matrix = np.array(table, dtype=np.float64).reshape(len(vector), count) * signs[:, None]
    return digits


def _digits_of_floats(rows: Floats, top: Ints, bits: int) -> list[Matrix] | None:
    """``rows[k] == sum_i digit_i[k] * 2**(top[k] - bits * (i + 1))`` exactly, None beyond the last digit."""
    rest = np.ldexp(rows.astype(np.float64), -top[:, None])
    if not (np.ldexp(rest, top[:, None]) == rows).all():
        return None
    result: list[Matrix] = []
    while rest.any():
        if len(result) == _DIGITS:
            return None
        rest *= 2.0**bits
        result.append(np.trunc(rest))
        rest -= result[-1]
    return result


def _carry(levels: Ints, bits: int) -> NDArray[np.int8]:
    """Makes all levels but the last digits in [0, 2**bits), in place; int8: the signs of the numbers."""
    some = np.zeros(levels.shape[1], dtype=np.bool_)
    for low, high in pairwise(levels):
        high += low >> bits
        low &= (1 << bits) - 1
        some |= low != 0
    return np.where(levels[-1] < 0, -1, some | (levels[-1] > 0)).astype(np.int8)


def exact_signs(system: System, index: Ints, p: Sequence[int]) -> NDArray[np.int8]:
    """int8 [len(index)]: :func:`exact_sign` of the rows ``index``."""
    if len(index) > _FEW:
        return exact_values(system, index, p)[0]
    return np.array([exact_sign(system, int(k), p) for k in index], dtype=np.int8)


def signs(system: System, p: Sequence[int]) -> NDArray[np.int8]:
    """int8 [K]: the exact sign of ``<row, p> - <radius, |p|>`` for every row.

    >>> signs(System.read([[1e308, 1e308], [5e-324, -5e-324]]), (1, 1)).tolist()
    [1, 0]
    """
    value, bound = estimate(system, p)
    result = (value > bound).astype(np.int8) - (value < -bound).astype(np.int8)
    unknown = np.flatnonzero(result == 0)
    result[unknown] = exact_signs(system, unknown, p)
    return result


def first_failure(system: System, p: Sequence[int]) -> int | None:
    """A row with ``<row, p> - <radius, |p|> <= 0`` (the worst floats can name), None if all are positive.

    >>> first_failure(System.read([[1.0, 0.0], [0.0, 1.0]]), (1, -1))
    1
    """
    if system.shape[0] == 0:
        return None
    if system.radius is None and len(p) - p.count(0) == 1:
        # Rounded once, an entry a - minus keeps its sign, and with one entry of p that is all there is.
        j, sign = next((j, x) for j, x in enumerate(p) if x)
        column = system.difference[:, j]
        failing = np.flatnonzero(~(column > 0 if sign > 0 else column < 0))
        return int(failing[0]) if failing.size else None
    value, bound = estimate(system, p)
    low = ~(value > bound)  # a difference that overflows can make the value NaN
    if not low.any():
        return None
    wrong = value < -bound
    if wrong.any():
        with np.errstate(invalid="ignore"):  # infinity over infinity, in rows that are not wrong
            return int(np.argmin(np.where(wrong, value / system.magnitude, 0.0)))
    unknown = np.flatnonzero(low)
    failing = np.flatnonzero(exact_signs(system, unknown, p) <= 0)
    return int(unknown[failing[0]]) if failing.size else None
