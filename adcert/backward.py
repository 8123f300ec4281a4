"""The batched partial backward engine: gradients of many unit differences at once, with rigorous error bounds.

A difference ``e_plus - e_minus`` of units of y is carried backwards through the step's graph down to every parameter
above it. All differences go together: the gradient at a tensor is a stack of :class:`Slices`, one for each (row,
sample) pair that is not zero, so that work and memory follow the samples involved. Arithmetic is float64 with
error radii (:mod:`adcert.balls`); each operation needs a rule here, an operation without one raises
:class:`Unsupported` by name. The user's graph is only read: no hook fires, ``.grad`` is not touched, nothing
upstream is freed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import balls, normalization
from .balls import Ball
from .differences import Differences
from .equality import cell_inputs
from .layers import Graph, kind_of, shape_of
from .records import Node, OpRecord

BUDGET = 256 << 20  # bytes a batch of rows may take


class Unsupported(Exception):
    """The partial backward pass met an operation without a registered error bound."""


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


@dataclass(frozen=True, eq=False)
class Gradients:
    """For rows ``start .. start + count``: leaf name -> Ball [count, numel]; leaves not reached are exactly zero."""

    start: int
    count: int
    leaves: dict[str, Ball]


def gradients(graph: Graph, edge: tuple[Node, int], differences: Differences) -> Iterator[Gradients]:
    """Partial backward passes from differences of units of the tensor at ``edge``, in batches of bounded memory.

    Raises:
        Unsupported: an operation upstream has no rule; the message names it.
    """
    per_row = _bytes_per_row(graph, edge)
    step = max(1, BUDGET // per_row)
    for start in range(0, len(differences), step):
        batch = Differences(differences.plus[start : start + step], differences.minus[start : start + step])
        yield Gradients(start, len(batch), _Pass(graph, len(batch)).run(edge, batch))


def _bytes_per_row(graph: Graph, edge: tuple[Node, int]) -> int:
    """An estimate from above of what one row takes: parameters, and activations of the samples involved."""
    total, seen, stack = 0, {edge[0]}, [edge[0]]
    coupled = False
    largest = 1
    while stack:
        node = stack.pop()
        leaf = graph.leaf(node)
        if leaf is not None:
            total += graph.leaves.tensor(leaf).numel()
        elif node not in graph.record_of:
            shape = shape_of(node, 0)
            largest = max(largest, math.prod(shape) // (1 if coupled else max(1, shape[0] if shape else 1)))
            coupled = coupled or _couples(node)
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                stack.append(source)
    if coupled:
        largest = max((math.prod(shape_of(n, 0)) for n in seen if graph.leaf(n) is None), default=largest)
    return 16 * (total + 8 * largest)


def _couples(node: Node) -> bool:
    return kind_of(node) == "NativeBatchNormBackward" and bool(node._saved_training)


class _Pass:
    """One batch: pending gradients by graph edge, taken in the graph's topological order."""

    def __init__(self, graph: Graph, count: int) -> None:
        self.graph = graph
        self.count = count
        self.pending: dict[Node, dict[int, list[Slices]]] = defaultdict(lambda: defaultdict(list))
        self.leaves: dict[str, Ball] = {}

    def run(self, edge: tuple[Node, int], differences: Differences) -> dict[str, Ball]:
        if edge[0] is None:
            return {}
        with torch.no_grad():
            return self._run(edge, differences)

    def _run(self, edge: tuple[Node, int], differences: Differences) -> dict[str, Ball]:
        self.send(edge, seeds(differences, shape_of(*edge)))
        start = self.graph.position[edge[0]]
        for node in self.graph.nodes[start:]:
            waiting = self.pending.pop(node, None)
            if waiting is None:
                continue
            for number, stacks in waiting.items():
                self.visit(node, number, concatenate(stacks))
        return self.leaves

    def send(self, edge: tuple[Node, int], slices: Slices) -> None:
        if edge[0] is None or len(slices.row) == 0:
            return
        alive = ~slices.data.zero().flatten(1).all(1) if slices.data.value.dim() > 1 else ~slices.data.zero()
        if not bool(alive.all()):
            slices = Slices(slices.row[alive], slices.sample[alive], slices.data.map(lambda t: t[alive]), slices.shape)
        if len(slices.row):
            self.pending[edge[0]][edge[1]].append(slices)

    def visit(self, node: Node, number: int, g: Slices) -> None:
        record = self.graph.record_of.get(node)
        leaf = self.graph.leaf(node)
        if record is not None:
            self.send(record.edge, through_record(record, g))
        elif leaf is not None:
            shape = padded(tuple(self.graph.leaves.tensor(leaf).shape))
            full = g.data.value.new_zeros(self.count, shape[0], *shape[1:])
            radius = torch.zeros_like(full)
            full[g.row, g.sample] = g.data.value
            if g.data.radius is not None:
                radius[g.row, g.sample] = g.data.radius
            self.add_leaf(leaf, Ball(full.flatten(1), radius.flatten(1) if g.data.radius is not None else None))
        else:
            rule = _RULES.get(kind_of(node))
            if rule is None or number != 0:
                raise Unsupported(node.name())
            rule(self, node, g)

    def add_leaf(self, leaf: str, gradient: Ball) -> None:
        """``gradient``: [count, numel]."""
        known = self.leaves.get(leaf)
        self.leaves[leaf] = gradient if known is None else known + gradient

    def weight(self, edge: tuple[Node, int], node: Node) -> str | None:
        """Leaf behind a weight's edge; None if frozen; Unsupported if it is computed."""
        if edge[0] is None:
            return None
        leaf = self.graph.leaf(edge[0])
        if leaf is None:
            raise Unsupported(f"{node.name()} with a computed weight ({edge[0].name()})")
        return leaf


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


def through_record(record: OpRecord, g: Slices) -> Slices:
    """AD's backward of a recorded operation: scatter to the selected member, times the proxy of rho."""
    shape = padded(tuple(record.output.shape))
    data = g.data
    if record.relu:
        slope = (_rows(record.output, g.sample) > 0).to(torch.float64)
        data = data.map(lambda t: t * slope)  # times 0 or 1: exact
    if record.ties is None:
        return Slices(g.row, g.sample, data, shape)
    inner = math.prod(shape[1:])
    units = g.sample[:, None] * inner + torch.arange(inner)
    cells = _rows(record.ties.offsets, g.sample).reshape(len(g.row), -1).to(torch.int64)
    in_shape = padded(record.input_shape)
    in_inner = math.prod(in_shape[1:])
    target = cell_inputs(record, units, cells) - g.sample[:, None] * in_inner
    flat = data.map(lambda t: t.reshape(len(g.row), -1))
    # Overlapping windows may select one unit twice: add in the order of the cells, with bounds.
    value = torch.zeros(len(g.row), in_inner, dtype=torch.float64).scatter_add_(1, target, flat.value)
    total = torch.zeros_like(value).scatter_add_(1, target, flat.value.abs())
    inherited = None if flat.radius is None else torch.zeros_like(value).scatter_add_(1, target, flat.radius)
    exact = balls.exact_sum(flat.value, total)
    kernel = record.ties.window.kernel[0] * record.ties.window.kernel[1]
    radius = inherited if exact else total * balls.gamma(kernel) + (0.0 if inherited is None else inherited)
    ball = Ball(value, radius if radius is None else radius * balls.SLACK)
    return Slices(g.row, g.sample, ball.map(lambda t: t.reshape(len(g.row), *in_shape[1:])), in_shape)


def _rows(t: Tensor, sample: Tensor) -> Tensor:
    return (t if t.dim() else t.reshape(1))[sample]


# ---- rules: one for each operation, each sending to node.next_functions -----------------------------------


def _reshape(walk: _Pass, node: Node, g: Slices) -> None:
    edge = node.next_functions[0]
    walk.send(edge, reshaped(walk, g, padded(shape_of(*edge))))


def reshaped(walk: _Pass, g: Slices, shape: tuple[int, ...]) -> Slices:
    """The same units seen in another shape; a changed first dimension is cut anew."""
    if shape[0] == g.shape[0]:
        return Slices(g.row, g.sample, g.data.map(lambda t: t.reshape(len(t), *shape[1:])), shape)
    return from_dense(to_dense(walk, g).map(lambda t: t.reshape(walk.count, *shape)), shape)


def to_dense(walk: _Pass, g: Slices) -> Ball:
    """[count, *shape]."""

    def fill(t: Tensor) -> Tensor:
        full = torch.zeros(walk.count, *g.shape, dtype=torch.float64)
        full[g.row, g.sample] = t
        return full

    return g.data.map(fill)


def from_dense(ball: Ball, shape: tuple[int, ...]) -> Slices:
    """Every slice that is not exactly zero."""
    count, length = ball.value.shape[:2]
    zero = ball.zero().reshape(count, length, -1).all(2)
    row, sample = torch.nonzero(~zero, as_tuple=True)
    return Slices(row, sample, ball.map(lambda t: t[row, sample]), shape)


def _moved(walk: _Pass, node: Node, g: Slices) -> None:
    """Data movement and sums of copies: the node itself maps float64 gradients, row by row, without rounding."""
    _by_node(walk, node, g, rounds=False)


def _positive(walk: _Pass, node: Node, g: Slices) -> None:
    """Linear maps with weights >= 0 (means, average pooling): the node itself, plus its own rounding."""
    _by_node(walk, node, g, rounds=True)


def _by_node(walk: _Pass, node: Node, g: Slices, rounds: bool) -> None:
    dense = to_dense(walk, g)
    out = shape_of(node, 0)

    def apply(t: Tensor) -> list[Tensor | None]:
        try:
            result = node(t.reshape(out))
        except RuntimeError as error:
            raise Unsupported(f"{node.name()}: {error}") from error
        return list(result) if isinstance(result, (tuple, list)) else [result]

    values = [apply(row) for row in dense.value]
    totals = [apply(row) for row in dense.value.abs()] if rounds else None
    radii = None if dense.radius is None else [apply(row) for row in dense.radius]
    for slot, edge in enumerate(node.next_functions):
        if edge[0] is None or values[0][slot] is None:
            continue
        value = torch.stack([_double(row[slot]) for row in values])
        radius = None if radii is None else torch.stack([_double(row[slot]) for row in radii])
        if totals is not None:
            rounding = torch.stack([_double(row[slot]) for row in totals]) * balls.gamma(math.prod(padded(out)) + 8)
            radius = rounding if radius is None else radius + rounding
        shape = padded(shape_of(*edge))
        ball = Ball(value, None if radius is None else radius * balls.SLACK)
        walk.send(edge, from_dense(ball.map(lambda t, s=shape: t.reshape(walk.count, *s)), shape))  # type: ignore[misc]


def _double(t: Tensor | None) -> Tensor:
    if t is None or t.dtype != torch.float64:
        raise Unsupported("a node that does not keep float64 gradients")
    return t


def _cast(walk: _Pass, node: Node, g: Slices) -> None:
    walk.send(node.next_functions[0], g)


def _sum_of(walk: _Pass, node: Node, g: Slices) -> None:
    if node._saved_alpha != 1:
        raise Unsupported(f"{node.name()} with alpha {node._saved_alpha}")
    signs = {"AddBackward": (1, 1), "SubBackward": (1, -1), "RsubBackward": (-1, 1)}[kind_of(node)]
    for edge, sign in zip(node.next_functions, signs, strict=False):
        if edge[0] is not None:
            term = g if sign > 0 else Slices(g.row, g.sample, -g.data, g.shape)
            walk.send(edge, reduced(walk, term, padded(shape_of(*edge))))


def reduced(walk: _Pass, g: Slices, shape: tuple[int, ...]) -> Slices:
    """Sum over the dimensions along which an operand of this shape was broadcast."""
    if shape == g.shape:
        return g
    dense = to_dense(walk, g)
    extra = len(g.shape) - len(shape)
    wide = (1,) * extra + shape
    dims = tuple(1 + i for i, (a, b) in enumerate(zip(g.shape, wide, strict=True)) if a != b)
    if dims:
        dense = dense.sum(dims, keepdim=True)
    return from_dense(dense.map(lambda t: t.reshape(walk.count, *shape)), shape)


def _neg(walk: _Pass, node: Node, g: Slices) -> None:
    walk.send(node.next_functions[0], Slices(g.row, g.sample, -g.data, g.shape))


def _mul(walk: _Pass, node: Node, g: Slices) -> None:
    for edge, factor in zip(node.next_functions, (node._saved_other, node._saved_self), strict=False):
        if edge[0] is None:
            continue
        if factor is None:
            raise Unsupported(f"{node.name()} without its saved factor")
        wide = factor.detach().to(torch.float64).expand(g.shape)[g.sample]
        product = Slices(g.row, g.sample, g.data * Ball(wide), g.shape)
        walk.send(edge, reduced(walk, product, padded(shape_of(*edge))))


def _convolution(walk: _Pass, node: Node, g: Slices) -> None:
    if node._saved_transposed or len(g.shape) not in (3, 4, 5):
        raise Unsupported(f"{node.name()} (transposed)")
    weight, bias = walk.weight(node.next_functions[1], node), walk.weight(node.next_functions[2], node)
    spatial = tuple(range(2, len(g.shape)))
    if bias is not None:
        add_rows(walk, bias, g.row, g.data.sum(spatial))
    if weight is not None:
        _conv_weight(walk, node, g, weight)
    edge = node.next_functions[0]
    if edge[0] is not None:
        shape = shape_of(*edge)
        kernel = node._saved_weight.detach().to(torch.float64)
        options = dict(
            stride=list(node._saved_stride),
            padding=list(node._saved_padding),
            dilation=list(node._saved_dilation),
            groups=node._saved_groups,
        )
        back: Any = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[len(g.shape)]
        base = [
            (o - 1) * s - 2 * p + d * (k - 1) + 1
            for o, s, p, d, k in zip(
                g.shape[2:], options["stride"], options["padding"], options["dilation"], kernel.shape[2:], strict=True
            )
        ]
        extra = [size - b for size, b in zip(shape[2:], base, strict=True)]

        def apply(t: Tensor, w: Tensor) -> Tensor:
            result: Tensor = back(t, w, output_padding=extra, **options)
            return result

        terms = kernel.shape[0] // node._saved_groups * math.prod(kernel.shape[2:])
        walk.send(edge, Slices(g.row, g.sample, balls.linear(apply, g.data, kernel, terms), shape))


def _conv_weight(walk: _Pass, node: Node, g: Slices, leaf: str) -> None:
    """Per slice: (output gradient) x (unfolded input)^T, then summed over the slices of a row."""
    if len(g.shape) != 4:
        raise Unsupported(f"{node.name()} in {len(g.shape) - 2} dimensions")
    shape = tuple(walk.graph.leaves.tensor(leaf).shape)
    groups = node._saved_groups
    samples, index = torch.unique(g.sample, return_inverse=True)
    x = node._saved_input.detach()[samples].to(torch.float64)
    columns = F.unfold(x, shape[2:], tuple(node._saved_dilation), tuple(node._saved_padding), tuple(node._saved_stride))
    columns = columns.reshape(len(samples), groups, -1, columns.shape[-1])
    step = max(1, BUDGET // (64 * max(1, columns[0].numel())))

    def apply(t: Tensor, w: Tensor) -> Tensor:
        out = t.reshape(len(t), groups, shape[0] // groups, -1)
        return (out @ w.transpose(2, 3)).reshape(len(t), *shape)

    for start in range(0, len(g.row), step):
        part = slice(start, start + step)
        data = g.data.map(lambda t, p=part: t[p])  # type: ignore[misc]
        add_rows(walk, leaf, g.row[part], balls.linear(apply, data, columns[index[part]], columns.shape[-1]))


def add_rows(walk: _Pass, leaf: str, row: Tensor, data: Ball) -> None:
    """Sum per-slice gradients [M, *leaf shape] into the leaf's [count, numel]."""
    flat = data.map(lambda t: t.reshape(len(row), -1))
    order = torch.argsort(row, stable=True)
    ranks = torch.arange(len(order)) - torch.searchsorted(row[order], row[order])
    for rank in range(int(ranks.max()) + 1 if len(ranks) else 0):
        picked = order[ranks == rank]

        def fill(t: Tensor, picked: Tensor = picked) -> Tensor:
            full = torch.zeros(walk.count, t.shape[1], dtype=torch.float64)
            full[row[picked]] = t[picked]
            return full

        walk.add_leaf(leaf, flat.map(fill))


def _linear(walk: _Pass, node: Node, g: Slices) -> None:
    biased = kind_of(node) == "AddmmBackward"
    if biased and (node._saved_alpha != 1 or node._saved_beta != 1):
        raise Unsupported(f"{node.name()} with alpha or beta")
    if biased and node.next_functions[0][0] is not None:
        shape = padded(shape_of(*node.next_functions[0]))
        walk.send(node.next_functions[0], reduced(walk, g, shape))
    x_edge, w_edge = node.next_functions[biased], node.next_functions[1 + biased]
    if w_edge[0] is not None:
        if kind_of(w_edge[0]) != "TBackward":
            raise Unsupported(f"{node.name()} with a computed weight ({w_edge[0].name()})")
        leaf = walk.weight(w_edge[0].next_functions[0], node)
        assert leaf is not None
        x = (node._saved_mat1 if biased else node._saved_self).detach().to(torch.float64)[g.sample]

        def outer(t: Tensor, w: Tensor) -> Tensor:
            return t[:, :, None] * w[:, None, :]

        add_rows(walk, leaf, g.row, balls.linear(outer, g.data, x, 1))
    if x_edge[0] is not None:
        weight = node._saved_mat2.detach().to(torch.float64)

        def apply(t: Tensor, w: Tensor) -> Tensor:
            return t @ w.T

        data = balls.linear(apply, g.data, weight, weight.shape[1])
        walk.send(x_edge, Slices(g.row, g.sample, data, shape_of(*x_edge)))


def _batch_norm(walk: _Pass, node: Node, g: Slices) -> None:
    """``y = gamma (x - mean) / sigma + beta``; in train mode mean and sigma are functions of x and couple samples."""
    gamma, beta = walk.weight(node.next_functions[1], node), walk.weight(node.next_functions[2], node)
    dims = tuple(range(2, len(g.shape)))
    if beta is not None:
        add_rows(walk, beta, g.row, g.data.sum(dims) if dims else g.data)
    stats = normalization.statistics(node)
    scale = stats.scale
    if node._saved_weight is not None:
        scale = scale * Ball(stats.channels(node._saved_weight.detach().to(torch.float64)))
    if not node._saved_training:
        if gamma is not None:
            product = g.data * stats.normalized.map(lambda t: t[g.sample])
            add_rows(walk, gamma, g.row, product.sum(dims) if dims else product)
        walk.send(node.next_functions[0], Slices(g.row, g.sample, g.data * scale, g.shape))
        return
    dense = to_dense(walk, g)
    easy = normalization.cancels(dense, stats.x)
    plain = Slices(g.row, g.sample, g.data * scale, g.shape)
    keep = easy[g.row]
    kept = Slices(plain.row[keep], plain.sample[keep], plain.data.map(lambda t: t[keep]), g.shape)
    walk.send(node.next_functions[0], kept)
    hard = torch.nonzero(~easy).flatten()
    if len(hard):
        part, along = normalization.coupled(dense.map(lambda t: t[hard]), stats, scale)
        stack = from_dense(part, g.shape)
        walk.send(node.next_functions[0], Slices(hard[stack.row], stack.sample, stack.data, g.shape))
        if gamma is not None:
            add_rows(walk, gamma, hard, along)


_Rule = Callable[[_Pass, Node, Slices], None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ["ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "SqueezeBackward", "UnsqueezeBackward"], _reshape
    ),
    **dict.fromkeys(["CloneBackward", "AliasBackward", "ToCopyBackward"], _cast),
    **dict.fromkeys(
        [
            "PermuteBackward",
            "TransposeBackward",
            "TBackward",
            "SliceBackward",
            "SelectBackward",
            "CatBackward",
            "StackBackward",
            "ConstantPadNdBackward",
            "FlipBackward",
            "RollBackward",
        ],
        _moved,
    ),
    **dict.fromkeys(
        ["ExpandBackward", "MeanBackward", "SumBackward", "AvgPool2DBackward", "AdaptiveAvgPool2DBackward"], _positive
    ),
    **dict.fromkeys(["AddBackward", "SubBackward", "RsubBackward"], _sum_of),
    "NegBackward": _neg,
    "MulBackward": _mul,
    "ConvolutionBackward": _convolution,
    "AddmmBackward": _linear,
    "MmBackward": _linear,
    "NativeBatchNormBackward": _batch_norm,
}
