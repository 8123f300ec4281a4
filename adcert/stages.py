"""The straight part of a network above a max pooling, spelled out for the native resolver (:func:`ops.resolve_ties`).

A stage is a recorded operation, a batch normalisation or a two-dimensional convolution; each keeps the samples, all but
the convolution keep the channels. Where the graph leaves this pattern (a sum, a view with another shape, a computed
weight) the stages end with one that proves nothing, and :mod:`adcert.rows` goes on.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from torch import Tensor

from . import ops
from .choices import Ties, Window
from .layers import Graph, kind_of, shape_of, spacing
from .nodes import Node
from .normalization import BATCH_NORM
from .records import OpRecord
from .rows import SAME_UNITS


class Kind(enum.IntEnum):
    """First integer of a stage; csrc/stages.h has the same numbers."""

    CONSTANT = 0
    UNKNOWN = 1
    RELU = 2
    POOL = 3
    NORM = 4
    CONV = 5


@dataclass(eq=False)
class Stages:
    """Stages from the input of a pooling upwards, consumers first.

    ``base``: the record whose y the first normalisation or convolution makes. ``norm`` and ``conv``: that first
    normalisation (or None) and the convolution right above it.
    """

    base: OpRecord
    numbers: list[int] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    norm: Node | None = None
    conv: Node | None = None
    patches: tuple[int, ...] = ()

    def channel(self, units: Tensor) -> Tensor:
        """Channel of flat units of the first convolution's output."""
        channels, rows, columns = self.patches[6], self.patches[12], self.patches[18]
        return units // (rows * columns) % channels

    def add(
        self,
        kind: Kind,
        axes: tuple[int, ...],
        channels: tuple[int, int, int],
        values: Tensor | None = None,
        offsets: Tensor | None = None,
        relu: bool = False,
    ) -> None:
        """``channels``: of the input, groups, of the output; ``axes``: twelve integers (:func:`axes_of`)."""
        places = []
        for tensor in (values, offsets):
            places.append(-1 if tensor is None else len(self.tensors))
            if tensor is not None:
                self.tensors.append(tensor.detach())
        self.numbers += [kind, relu, *places, *channels, *axes]

    def end(self, kind: Kind) -> None:
        self.numbers += [kind, *[0] * (ops.STAGE_INTS - 1)]


def axes_of(window: Window, size: tuple[int, ...], count: tuple[int, ...]) -> tuple[int, ...]:
    """(size, kernel, stride, padding, dilation, count) of the height, then of the width."""
    rows = zip(size, window.kernel, window.stride, window.padding, window.dilation, count, strict=True)
    return tuple(int(number) for row in rows for number in row)


_POINT = Window((1, 1), (1, 1), (0, 0), (1, 1))


def stages_above(graph: Graph, record: OpRecord, base: OpRecord, own: frozenset[str]) -> Stages | None:
    """The stages between a pooling and the network's input; None if there is no convolution to start from.

    ``base``: the last of the recorded operations that feed ``record`` directly (``record`` itself, usually). ``own``:
    its own parameters w_l. None too if one of them lies above the first convolution (two convolutions in a row, say):
    a patch difference is then not the whole own row.
    """
    if len(record.input_shape) != 4:
        return None
    stages, current = Stages(base), record
    shape: tuple[int, ...] = record.input_shape
    (node, number), after = record.edge, Kind.UNKNOWN
    while node is not None:
        kind, source = kind_of(node), graph.record_of.get(node)
        if node in graph.dropped:
            break
        if source is not None and after is not Kind.NORM:
            if not _known(source):
                break
            if stages.conv is None and current is base:
                return None
            current, (node, number), after = source, source.edge, _record(stages, source, shape)
            shape = source.input_shape
        elif kind in SAME_UNITS and source is None:
            node, number = graph.edges[node][0]
            if node is not None and shape_of(node, number) != shape:
                break
        elif kind in BATCH_NORM and number == 0 and after not in (Kind.NORM, Kind.CONV):
            if stages.conv is None and not _sloped(node):
                return None
            stages.norm = node if stages.conv is None else stages.norm
            stages.add(Kind.NORM, axes_of(_POINT, shape[2:], shape[2:]), (shape[1], 1, shape[1]), node._saved_input)
            (node, number), after = graph.edges[node][0], Kind.NORM
        elif kind == "ConvolutionBackward" and after is not Kind.CONV and _plain(graph, node, shape):
            shape = _convolution(stages, node, shape)
            (node, number), after = graph.edges[node][0], Kind.CONV
        else:
            break
    if stages.conv is None or graph.reaches(graph.edges[stages.conv][0][0], own):
        return None
    if len({tensor.device for tensor in (record.output, *stages.tensors)}) > 1:
        return None  # a model on several devices
    stages.end(Kind.CONSTANT if node is None and after is Kind.CONV else Kind.UNKNOWN)
    return stages


def _known(record: OpRecord) -> bool:
    """Does the native resolver know this operation?"""
    here = record.signs is None
    return here and (record.rho is None or record.relu) and (record.ties is None or isinstance(record.ties, Ties))


def _record(stages: Stages, source: OpRecord, shape: tuple[int, ...]) -> Kind:
    channels = (shape[1], 1, shape[1])
    if source.ties is None:
        stages.add(Kind.RELU, axes_of(_POINT, shape[2:], shape[2:]), channels, source.output)
        return Kind.RELU
    assert isinstance(source.ties, Ties)
    axes = axes_of(source.ties.window, source.input_shape[2:], shape[2:])
    stages.add(Kind.POOL, axes, channels, source.output if source.relu else None, source.ties.offsets, source.relu)
    return Kind.POOL


def _sloped(norm: Node) -> bool:
    """Every gamma has a sign: none is 0 or NaN."""
    weight = norm._saved_weight
    return weight is None or bool(((weight < 0) | (weight > 0)).all())


def _plain(graph: Graph, node: Node, shape: tuple[int, ...]) -> bool:
    """A convolution of images whose weight and bias are leaves or frozen, and input or weight differentiable."""
    source, *parameters = (edge[0] for edge in graph.edges[node])
    computed = any(edge is not None and graph.leaf(edge) is None for edge in parameters)
    return len(shape) == 4 and not node._saved_transposed and not computed and (source, parameters[0]) != (None, None)


def _convolution(stages: Stages, node: Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Adds the convolution whose output has this shape; returns the shape of its input."""
    source, weight = node.next_functions[:2]
    x = None if weight[0] is None else node._saved_input
    kernel = tuple(node._saved_weight.shape)[2:] if weight[0] is None else shape_of(*weight)[2:]
    origin = shape_of(*source) if x is None else tuple(x.shape)
    stride, padding, dilation = ((v[0], v[1]) for v in spacing(node))
    axes = axes_of(Window((kernel[0], kernel[1]), stride, padding, dilation), origin[2:], shape[2:])
    channels = (origin[1], int(node._saved_groups), shape[1])
    stages.add(Kind.CONV, axes, channels, x)
    if stages.conv is None:
        stages.conv, stages.patches = node, (Kind.CONV, 0, 0, -1, *channels, *axes)
    return origin
