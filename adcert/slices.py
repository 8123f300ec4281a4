"""Sparse stacks of gradients: what the partial backward engine carries from node to node."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import balls
from .balls import Ball
from .differences import Differences
from .records import OpRecord


@dataclass(frozen=True, eq=False)
class Slices:
    """A sparse stack: entry m is the gradient of row ``row[m]`` restricted to index ``sample[m]`` of dimension 0.

    ``data``: [M, *shape[1:]]; tensors without dimensions count as shape [1].
    """

    row: Tensor
    sample: Tensor
    data: Ball
    shape: tuple[int, ...]

    def merged(self) -> Slices:
        """Add up slices of the same (row, sample)."""
        keys = self.row * max(1, self.shape[0]) + self.sample
        unique, inverse = torch.unique(keys, return_inverse=True)
        if len(unique) == len(keys):
            return self
        order = torch.argsort(inverse, stable=True)
        ranks = torch.arange(len(order)) - torch.searchsorted(inverse[order], inverse[order])
        total: Ball | None = None
        for rank in range(int(ranks.max()) + 1):
            picked = order[ranks == rank]
            value = torch.zeros(len(unique), *self.data.value.shape[1:], dtype=torch.float64)
            radius = None if self.data.radius is None else torch.zeros_like(value)
            value[inverse[picked]] = self.data.value[picked]
            if radius is not None and self.data.radius is not None:
                radius[inverse[picked]] = self.data.radius[picked]
            term = Ball(value, radius)
            total = term if total is None else total + term
        assert total is not None
        return Slices(unique // max(1, self.shape[0]), unique % max(1, self.shape[0]), total, self.shape)


def concatenate(stacks: list[Slices]) -> Slices:
    """One stack with the slices of all."""
    if len(stacks) == 1:
        return stacks[0]
    value = torch.cat([stack.data.value for stack in stacks])
    radius = None
    if any(stack.data.radius is not None for stack in stacks):
        radius = torch.cat([torch.zeros_like(s.data.value) if s.data.radius is None else s.data.radius for s in stacks])
    rows, samples = torch.cat([s.row for s in stacks]), torch.cat([s.sample for s in stacks])
    return Slices(rows, samples, Ball(value, radius), stacks[0].shape).merged()


def padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if shape else (1,)


def seeds(differences: Differences, shape: tuple[int, ...]) -> Slices:
    """+1 at the plus unit, -1 at the minus unit, as slices of a tensor of this shape."""
    shape = padded(shape)
    inner = math.prod(shape[1:])
    rows, units, signs = [], [], []
    for index, sign in ((differences.plus, 1.0), (differences.minus, -1.0)):
        known = torch.nonzero(index >= 0).flatten()
        rows.append(known)
        units.append(index[known])
        signs.append(torch.full((len(known),), sign, dtype=torch.float64))
    row, unit, sign_ = torch.cat(rows), torch.cat(units), torch.cat(signs)
    data = torch.zeros(len(row), inner, dtype=torch.float64)
    data[torch.arange(len(row)), unit % inner] = sign_
    return Slices(row, unit // inner, Ball(data.reshape(len(row), *shape[1:])), shape).merged()


def through_record(count: int, record: OpRecord, g: Slices) -> Slices:
    """AD's backward of a recorded operation, towards y: scatter to the selected inputs, times the proxy of rho."""
    shape = padded(tuple(record.output.shape))
    inner = math.prod(shape[1:])
    units = g.sample[:, None] * inner + torch.arange(inner)
    data = g.data
    if record.rho is not None:
        slope = record.slopes(units).map(lambda t: t.reshape(data.value.shape))
        data = data.map(lambda t: t * slope.value) if record.relu else data * slope  # times 0 or 1: exact
    if record.ties is None:
        return Slices(g.row, g.sample, data, shape)
    in_shape = padded(record.input_shape)
    in_inner = math.prod(in_shape[1:])
    target = record.ties.selected(units)
    flat = data.map(lambda t: t.reshape(len(g.row), -1))
    if not bool((target // in_inner == g.sample[:, None]).all()):  # selected across samples
        into = (g.row[:, None] * (in_shape[0] * in_inner) + target).reshape(1, -1)
        ball = scattered(flat.map(lambda t: t.reshape(1, -1)), into, count * in_shape[0] * in_inner, target.numel())
        return from_dense(ball.map(lambda t: t.reshape(count, *in_shape)), in_shape)
    ball = scattered(flat, target - g.sample[:, None] * in_inner, in_inner, record.ties.overlap)
    return Slices(g.row, g.sample, ball.map(lambda t: t.reshape(len(g.row), *in_shape[1:])), in_shape)


def scattered(data: Ball, target: Tensor, size: int, overlap: int) -> Ball:
    """[M, size]: entries added up at ``target``, at most ``overlap`` in one place (overlapping windows)."""
    value = torch.zeros(len(target), size, dtype=torch.float64).scatter_add_(1, target, data.value)
    total = torch.zeros_like(value).scatter_add_(1, target, data.value.abs())
    inherited = None if data.radius is None else torch.zeros_like(value).scatter_add_(1, target, data.radius)
    exact = balls.exact_sum(data.value, total)
    radius = inherited if exact else total * balls.gamma(overlap) + (0.0 if inherited is None else inherited)
    return Ball(value, radius if radius is None else radius * balls.SLACK)


def through_slopes(record: OpRecord, g: Slices) -> Slices:
    """PReLU's backward towards its slopes, before they are summed over the units that share one: ``min(y, 0)``."""
    shape = padded(tuple(record.output.shape))
    inner = math.prod(shape[1:])
    units = g.sample[:, None] * inner + torch.arange(inner)
    below = record.values(units).to(torch.float64).clamp(max=0).reshape(g.data.value.shape)
    return Slices(g.row, g.sample, g.data * Ball(below), shape)


def to_dense(count: int, g: Slices) -> Ball:
    """[count, *shape]."""

    def fill(t: Tensor) -> Tensor:
        full = torch.zeros(count, *g.shape, dtype=torch.float64)
        full[g.row, g.sample] = t
        return full

    return g.data.map(fill)


def from_dense(ball: Ball, shape: tuple[int, ...]) -> Slices:
    """Every slice that is not exactly zero."""
    count, length = ball.value.shape[:2]
    zero = ball.zero().reshape(count, length, -1).all(2)
    row, sample = torch.nonzero(~zero, as_tuple=True)
    return Slices(row, sample, ball.map(lambda t: t[row, sample]), shape)


def reshaped(count: int, g: Slices, shape: tuple[int, ...]) -> Slices:
    """The same units seen in another shape; where the first dimension is split or merged, slices are, too."""
    if shape[0] == g.shape[0]:
        return Slices(g.row, g.sample, g.data.map(lambda t: t.reshape(len(t), *shape[1:])), shape)
    if g.shape[0] and shape[0] % g.shape[0] == 0:  # every slice becomes a run of slices
        run = shape[0] // g.shape[0]
        row = g.row.repeat_interleave(run)
        sample = (g.sample[:, None] * run + torch.arange(run)).flatten()
        data = g.data.map(lambda t: t.reshape(len(sample), *shape[1:]))
        keep = ~data.zero().reshape(len(sample), -1).all(1)
        return Slices(row[keep], sample[keep], data.map(lambda t: t[keep]), shape)
    if shape[0] and g.shape[0] % shape[0] == 0:
        return _joined(g, shape)
    return from_dense(to_dense(count, g).map(lambda t: t.reshape(count, *shape)), shape)


def _joined(g: Slices, shape: tuple[int, ...]) -> Slices:
    run = g.shape[0] // shape[0]
    keys, place = torch.unique(g.row * shape[0] + g.sample // run, return_inverse=True)

    def fill(t: Tensor) -> Tensor:
        full = torch.zeros(len(keys), run, *g.shape[1:], dtype=torch.float64)
        full[place, g.sample % run] = t
        return full.reshape(len(keys), *shape[1:])

    return Slices(keys // shape[0], keys % shape[0], g.data.map(fill), shape)


def reduced(count: int, g: Slices, shape: tuple[int, ...]) -> Slices:
    """Sum over the dimensions along which an operand of this shape was broadcast."""
    if shape == g.shape:
        return g
    wide = (1,) * (len(g.shape) - len(shape)) + shape
    dims = tuple(i for i, (a, b) in enumerate(zip(g.shape, wide, strict=True)) if a != b)
    inside = tuple(d for d in dims if d)  # the first dimension of the data counts slices
    data = g.data.sum(inside, keepdim=True)
    if wide == shape and 0 not in dims:
        return Slices(g.row, g.sample, data, shape)
    dense = to_dense(count, Slices(g.row, g.sample, data, (g.shape[0], *wide[1:])))
    if 0 in dims:
        dense = dense.sum((1,), keepdim=True)
    return from_dense(dense.map(lambda t: t.reshape(count, *shape)), shape)
