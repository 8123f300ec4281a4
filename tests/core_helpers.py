"""What the tests of the core share: a recorded forward pass, its graph, and a slow exact reference for derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mpmath
import numpy as np
import torch
from torch import Tensor

from adcert.backward import Gradients, gradients
from adcert.balls import Ball
from adcert.choices import Window
from adcert.differences import Differences, Expansion, groups_of
from adcert.layers import Graph, Leaves, Order, order_layers
from adcert.recorder import Recorder, recording
from adcert.records import OpRecord
from adcert.rows import expand

DIGITS = 120  # decimal digits of the exact reference


class Probe(Recorder):
    """A recorder that also keeps the tensor y every record was made from."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def relu(self, x: Tensor, name: str = "relu", *, inplace: bool = False) -> Tensor:
        return self._kept(x, super().relu(x, name, inplace=inplace))

    def max_pool2d(
        self, x: Tensor, name: str = "pool", window: Window | int = 2, *, ceil_mode: bool = False,
        relu: bool = False,
    ) -> Tensor:  # fmt: skip
        if isinstance(window, int):
            window = Window((window, window), (window, window), (0, 0), (1, 1))
        return self._kept(x, super().max_pool2d(x, name, window, ceil_mode=ceil_mode, relu=relu))

    def _kept(self, x: Tensor, output: Tensor) -> Tensor:
        if len(self.records) > len(self.inputs):
            self.inputs.append(x)
        return output


@dataclass(frozen=True, eq=False)
class Seen:
    """A forward pass that was recorded: nothing of its graph has run backward yet."""

    loss: Tensor
    graph: Graph
    records: list[OpRecord]
    inputs: list[Tensor]
    leaves: Leaves

    def record(self, name: str) -> OpRecord:
        """The record of this name."""
        return {record.name: record for record in self.records}[name]

    def y(self, record: OpRecord) -> Tensor:
        """The recorded operation's input."""
        return self.inputs[self.records.index(record)]

    def order(self) -> Order:
        return order_layers({record: self.graph.tau(record) for record in self.records})

    def parameters(self) -> dict[str, Tensor]:
        return self.leaves.trainable()


def look(forward: Callable[[Probe], Tensor], model: torch.nn.Module | None = None, **named: torch.nn.Parameter) -> Seen:
    """Run ``forward(probe)`` while the probe records, and read the graph of what it returns.

    Leaves are named as in ``model``, or else as in ``named``; the sum of a non-scalar result is the loss.

    >>> w = param([0.0, 1.0])
    >>> look(lambda probe: probe.relu(w), w=w).records[0].touches
    tensor([0])
    """
    probe = Probe()
    if model is None:
        model = torch.nn.Module()
        for name, parameter in named.items():
            model.register_parameter(name, parameter)
    leaves = Leaves(model)
    with recording(probe):
        out = forward(probe)
    loss = out if out.dim() == 0 else out.sum()
    graph = Graph([loss.grad_fn], probe.records, leaves)
    return Seen(loss, graph, probe.records, probe.inputs, leaves)


def param(values: object, dtype: torch.dtype = torch.float64, trainable: bool = True) -> torch.nn.Parameter:
    """A parameter from literals.

    >>> param([1, 2]).dtype
    torch.float64
    """
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype), requires_grad=trainable)


def pairs(*each: tuple[int, int]) -> Differences:
    """``pairs((plus, minus), ...)``; -1 is the zero function.

    >>> len(pairs((0, 1), (-1, 2)))
    2
    """
    table = torch.tensor(each, dtype=torch.int64).reshape(-1, 2)
    return Differences(table[:, 0].clone(), table[:, 1].clone())


def dense_rows(seen: Seen, expansion: Expansion) -> dict[str, Tensor]:
    """Every leaf's [K, numel] sum of exact parts (plus - minus) of an expansion."""
    found: dict[str, Tensor] = {}
    for part in expansion.parts:
        groups, width = groups_of(tuple(seen.leaves.tensor(part.leaf).shape))
        table = found.setdefault(part.leaf, torch.zeros(expansion.count, groups, width, dtype=torch.float64))
        entries = part.plus.to(torch.float64) - part.minus.to(torch.float64)
        table.index_put_((part.owner, part.group), entries, accumulate=True)
    return {leaf: table.flatten(1) for leaf, table in found.items()}


def rows_of(seen: Seen, record: OpRecord, differences: Differences) -> tuple[dict[str, Tensor], Tensor]:
    """(dense own-layer rows, mask of hard differences) of a record's y."""
    expansion = expand(seen.graph, record.edge, differences)
    hard = expansion.hard
    return dense_rows(seen, expansion), hard


def autograd_rows(y: Tensor, leaves: dict[str, Tensor], differences: Differences) -> dict[str, Tensor]:
    """[K, numel] of every leaf by ``torch.autograd.grad`` of ``y[plus] - y[minus]``, one row at a time."""
    names = list(leaves)
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for plus, minus in zip(differences.plus.tolist(), differences.minus.tolist(), strict=True):
        seed = torch.zeros(y.numel(), dtype=y.dtype)
        if plus >= 0:
            seed[plus] += 1
        if minus >= 0:
            seed[minus] -= 1
        found = torch.autograd.grad(
            y, [leaves[name] for name in names], seed.reshape(y.shape), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(names, found, strict=True):
            zero = torch.zeros(leaves[name].numel(), dtype=torch.float64)
            rows[name].append(zero if gradient is None else gradient.detach().to(torch.float64).flatten())
    return {name: torch.stack(each) for name, each in rows.items()}


def engine_rows(seen: Seen, record: OpRecord, differences: Differences) -> dict[str, Ball]:
    """All batches of :func:`adcert.backward.gradients` as one ball [K, numel] for every leaf."""
    batches = list(gradients(seen.graph, record.edge, differences))
    assert [batch.start for batch in batches] == _starts(batches)
    assert sum(batch.count for batch in batches) == len(differences)
    result = {}
    for name, leaf in seen.leaves.trainable().items():
        values, radii = [], []
        for batch in batches:
            zero = torch.zeros(batch.count, leaf.numel(), dtype=torch.float64)
            ball = batch.leaves.get(name, Ball(zero))
            values.append(ball.value)
            radii.append(zero if ball.radius is None else ball.radius)
        result[name] = Ball(torch.cat(values), torch.cat(radii))
    return result


def _starts(batches: list[Gradients]) -> list[int]:
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + batch.count)
    return starts[:-1]


def random_pairs(units: int, count: int, seed: int) -> Differences:
    """``count`` differences of two different units, a fourth of them touches (plus is the zero function)."""
    generator = torch.Generator().manual_seed(seed)
    plus = torch.randint(0, units, (count,), generator=generator)
    minus = (plus + torch.randint(1, max(2, units), (count,), generator=generator)) % units
    touch = torch.randint(0, 4, (count,), generator=generator) == 0
    return Differences(torch.where(touch | (plus == minus), -1, plus), minus)


def integers(shape: Sequence[int], seed: int, low: int = -2, high: int = 2) -> Tensor:
    """Small random integers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, tuple(shape), generator=generator).to(torch.float64)


def fill(model: torch.nn.Module, seed: int, low: int = -2, high: int = 2) -> torch.nn.Module:
    """Integer parameters, so that every float64 operation is exact."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(integers(parameter.shape, 1000 * seed + index, low, high))
    return model


# ---- an exact reference: scalar reverse mode in 120 digits ---------------------------------------


class Scalar:
    """A number with the local derivatives of the one operation that made it (recorded values may be pinned).

    >>> x = Scalar(mpmath.mpf(3))
    >>> (x * x + x).gradients([x])[0]
    mpf('7.0')
    """

    __slots__ = ("parents", "value")

    def __init__(self, value: mpmath.mpf, parents: tuple[tuple[Scalar, mpmath.mpf], ...] = ()) -> None:
        self.value = value
        self.parents = parents

    def __add__(self, other: Scalar | int) -> Scalar:
        if isinstance(other, int):
            return Scalar(self.value + other, ((self, mpmath.mpf(1)),))
        return Scalar(self.value + other.value, ((self, mpmath.mpf(1)), (other, mpmath.mpf(1))))

    __radd__ = __add__

    def __sub__(self, other: Scalar) -> Scalar:
        return Scalar(self.value - other.value, ((self, mpmath.mpf(1)), (other, mpmath.mpf(-1))))

    def __mul__(self, other: Scalar) -> Scalar:
        return Scalar(self.value * other.value, ((self, other.value), (other, self.value)))

    def divided(self, count: int) -> Scalar:
        return Scalar(self.value / count, ((self, mpmath.mpf(1) / count),))

    def inverse_root(self) -> Scalar:
        root = mpmath.sqrt(self.value)
        return Scalar(1 / root, ((self, -1 / (2 * root * self.value)),))

    def pinned(self, value: float, slope: int = 1) -> Scalar:
        """The value recorded in the real run, with ``slope`` times this number's derivative."""
        return Scalar(mpmath.mpf(value), ((self, mpmath.mpf(slope)),))

    def gradients(self, leaves: Iterable[Scalar]) -> list[mpmath.mpf]:
        order: list[Scalar] = []
        seen: set[int] = set()
        stack: list[tuple[Scalar, bool]] = [(self, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                stack += [(parent, False) for parent, _ in node.parents]
        total: dict[int, mpmath.mpf] = {id(self): mpmath.mpf(1)}
        for node in reversed(order):
            gradient = total.get(id(node), mpmath.mpf(0))
            for parent, slope in node.parents:
                total[id(parent)] = total.get(id(parent), mpmath.mpf(0)) + gradient * slope
        return [total.get(id(leaf), mpmath.mpf(0)) for leaf in leaves]


def scalars(t: Tensor) -> np.ndarray:
    """An object array of leaves with the exact values of a tensor."""
    out = np.empty(tuple(t.shape), dtype=object)
    for index in np.ndindex(out.shape):
        out[index] = Scalar(mpmath.mpf(float(t[index])))
    return out


def pin(y: np.ndarray, recorded: Tensor, relu: bool = False) -> np.ndarray:
    """The offset network: recorded values, derivatives of ``y`` (of ``relu(y)``: slope 0 where the output is 0)."""
    out = np.empty_like(y)
    for index in np.ndindex(y.shape):
        value = float(recorded[index])
        out[index] = y[index].pinned(value, int(value > 0) if relu else 1)
    return out


def exact_conv2d(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, stride: int, padding: int) -> np.ndarray:
    """Cross-correlation of [N, C, H, W] with [O, C, k, k], by its definition."""
    n, _, h, w = x.shape
    o, c, k, _ = weight.shape
    oh, ow = (h + 2 * padding - k) // stride + 1, (w + 2 * padding - k) // stride + 1
    out = np.empty((n, o, oh, ow), dtype=object)
    for a, b, i, j in np.ndindex(out.shape):
        total = Scalar(mpmath.mpf(0)) if bias is None else bias[b] + 0
        for d, p, q in np.ndindex(c, k, k):
            row, column = i * stride + p - padding, j * stride + q - padding
            if 0 <= row < h and 0 <= column < w:
                total = total + x[a, d, row, column] * weight[b, d, p, q]
        out[a, b, i, j] = total
    return out


def exact_batch_norm(
    x: np.ndarray, gamma: np.ndarray | None, beta: np.ndarray | None, eps: float,
    running: tuple[Tensor, Tensor] | None = None,
) -> np.ndarray:  # fmt: skip
    """``gamma (x - mean) / sqrt(var + eps) + beta`` with the batch's statistics, or ``running`` ones."""
    out = np.empty_like(x)
    for c in range(x.shape[1]):
        entries = x[:, c].ravel()
        if running is None:
            mean = entries.sum().divided(len(entries))
            variance = sum(((e - mean) * (e - mean) for e in entries[1:]),
                           (entries[0] - mean) * (entries[0] - mean)).divided(len(entries))  # fmt: skip
        else:
            mean, variance = (Scalar(mpmath.mpf(float(t[c]))) for t in running)
        scale = (variance + Scalar(mpmath.mpf(eps))).inverse_root()
        for index in np.ndindex(x[:, c].shape):
            value = (x[:, c][index] - mean) * scale
            value = value if gamma is None else value * gamma[c]
            out[:, c][index] = value if beta is None else value + beta[c]
    return out


def exact_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """``x W^T + b`` for [N, F] and [O, F]."""
    out = np.empty((x.shape[0], weight.shape[0]), dtype=object)
    for n, o in np.ndindex(out.shape):
        total = Scalar(mpmath.mpf(0)) if bias is None else bias[o] + 0
        for f in range(x.shape[1]):
            total = total + x[n, f] * weight[o, f]
        out[n, o] = total
    return out


def outside(ball: Ball, row: int, exact: Sequence[mpmath.mpf]) -> list[tuple[int, float, float]]:
    """Entries of a row whose exact value lies outside the radius: (entry, distance, radius)."""
    bad = []
    for index, value in enumerate(exact):
        distance = abs(mpmath.mpf(float(ball.value[row, index])) - value)
        radius = mpmath.mpf(0 if ball.radius is None else float(ball.radius[row, index]))
        if not distance <= radius + mpmath.mpf(10) ** (-DIGITS + 30) * (1 + abs(value)):
            bad.append((index, float(distance), float(radius)))
    return bad
