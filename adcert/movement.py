"""Operations that move units: which unit of the output every unit of the input becomes, and the other way round."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layers import kind_of, shape_of
from .nodes import COPY_SLICES, Node
from .transfer import through

#: Every unit of the output is at most one of the input, and every unit of the input becomes at most one.
MOVES = frozenset(
    f"{name}Backward"
    for name in """
        Permute Transpose T Slice Select Cat Stack ConstantPadNd Flip Roll Tril Triu Diagonal DiagEmbed PixelShuffle
        PixelUnshuffle ChannelShuffle Rot90 IndexPut Scatter AsStrided
    """.split()
) | {COPY_SLICES, "DiagonalBackward0_copy"}
#: The same with several outputs.
PARTS = frozenset(
    f"{name}Backward" for name in ("Split", "SplitWithSizes", "UnsafeSplit", "UnsafeSplitWithSizes", "Unbind")
)

_BASE = 128  # digits below it are exact in every floating point type


def readers(node: Node, number: int) -> list[Tensor | None]:
    """For every edge: int64 [input units], the flat output unit each input unit goes to, -1 for none.

    The node's backward is asked with the numbers of its output units, digit by digit, since some nodes hand on
    gradients in the precision of the forward pass.

    Raises:
        ValueError: the node is not a movement: some input unit goes to several units, or is scaled on its way.
    """
    if kind_of(node) == COPY_SLICES and len(node.next_functions) < 2:
        raise ValueError(f"{node.name()} of a function of the tensor itself")  # whose derivative may round to 0 or 1
    shape = shape_of(node, number)
    size = math.prod(shape)
    try:
        found = [_table(t, node) for t in through(node, number, torch.ones(shape, dtype=torch.float64))]
        place, scale = torch.arange(size).reshape(shape), 1
        while scale < size:
            digits = through(node, number, (place // scale % _BASE).to(torch.float64))
            for table, digit in zip(found, digits, strict=True):
                if table is not None and digit is not None:
                    table += digit.reshape(-1).to(torch.int64) * scale
            scale *= _BASE
    except RuntimeError as error:
        raise ValueError(f"{node.name()}: {error}") from error
    tables = [None if table is None else torch.where(table >= 0, table, -1) for table in found]
    if kind_of(node) in MOVES and not all(table is None or _once(table) for table in tables):
        raise ValueError(f"{node.name()} of a tensor that overlaps itself")  # its backward takes a mean
    return tables


def _once(table: Tensor) -> bool:
    """No output unit is two input units."""
    claimed = table[table >= 0]
    return len(torch.unique(claimed)) == len(claimed)


def _table(ones: Tensor | None, node: Node) -> Tensor | None:
    """0 where the answer to ones was 1; far below 0 where it was 0."""
    if ones is None:
        return None
    if not bool(((ones == 0) | (ones == 1)).all()):
        raise ValueError(f"{node.name()} is more than a movement of data")
    return torch.where(ones.reshape(-1) == 1, 0, -(1 << 62))


PERMUTATIONS = frozenset(["PermuteBackward", "TransposeBackward", "TBackward"])


def permutation(node: Node) -> list[int]:
    """Which dimension of its input every dimension of a permutation's output is."""
    rank = len(shape_of(node, 0))
    order = list(range(rank))
    if kind_of(node) == "PermuteBackward":
        return [signed(d) % rank for d in node._saved_dims]
    if kind_of(node) == "TransposeBackward":
        first, second = signed(node._saved_dim0) % rank, signed(node._saved_dim1) % rank
        order[first], order[second] = order[second], order[first]
        return order
    return order[::-1]


# ---- copies: every unit of the output is one of the input, or a constant ---------------------------------------


def sources(node: Node) -> Tensor:
    """Of a node of :data:`SOURCES`: int64 [output units], the flat input unit each of them is, -1 for none.

    Raises:
        ValueError: the node has not the expected form.
    """
    shape = shape_of(*node.next_functions[0])
    try:
        table = SOURCES[kind_of(node)](node, torch.arange(math.prod(shape)).reshape(shape)).reshape(-1)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{node.name()}: {error}") from error
    if table.numel() != math.prod(shape_of(node, 0)):
        raise ValueError(f"{node.name()} of an unknown form")
    return table


def signed(number: int) -> int:
    """A dimension as the node saved it: negative ones come as unsigned numbers."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _index(node: Node, marks: Tensor) -> Tensor:
    index = tuple(slice(None) if i is None else i.cpu() for i in node._saved_indices)
    return marks[index]


def _embedding(node: Node, marks: Tensor) -> Tensor:
    return marks[node._saved_indices.cpu()]


def _padding(mode: str) -> Callable[[Node, Tensor], Tensor]:
    def source(node: Node, marks: Tensor) -> Tensor:
        wide = marks.to(torch.float64)
        batched = wide if wide.dim() > len(node._saved_padding) // 2 + 1 else wide[None]
        return F.pad(batched, [signed(p) for p in node._saved_padding], mode=mode).to(torch.int64)

    return source


def _patches(node: Node, marks: Tensor) -> Tensor:
    options = (node._saved_dilation, node._saved_padding, node._saved_stride)
    columns = F.unfold((marks + 1).to(torch.float64), node._saved_kernel_size, *options)
    return columns.to(torch.int64) - 1


def _selected(node: Node, marks: Tensor) -> Tensor:
    return marks.expand(node._saved_self.shape).masked_select(node._saved_mask.cpu())


def _nearest(node: Node, marks: Tensor) -> Tensor:
    """The kernel itself, axis by axis, in the precision in which it computed its places."""
    shape, dims = marks.shape, marks.dim() - 2
    dtype = node._input_metadata[0].dtype
    dtype = torch.float32 if torch.finfo(dtype).bits == 16 else dtype
    names = ("scales",) if dims == 1 else ("scales_d", "scales_h", "scales_w")[3 - dims :]
    kernel: Any = getattr(torch._C._nn, f"upsample_nearest{dims}d")
    scales = [getattr(node, f"_saved_{name}") for name in names]
    for axis in range(dims):
        line = torch.arange(shape[2 + axis], dtype=dtype).reshape(-1, *[1] * (dims - 1 - axis))
        plane = kernel(line.expand(1, 1, *shape[2:]).contiguous(), list(node._saved_output_size), *scales)[0, 0]
        index = plane.movedim(axis, -1).reshape(-1, plane.shape[axis])[0].to(torch.int64)
        marks = marks.index_select(2 + axis, index)
    return marks


SOURCES: dict[str, Callable[[Node, Tensor], Tensor]] = {
    "ExpandBackward": lambda node, marks: marks.expand(shape_of(node, 0)),
    "RepeatBackward": lambda node, marks: marks.repeat(node._saved_repeats),
    "IndexBackward": _index,
    "IndexSelectBackward": lambda node, marks: marks.index_select(signed(node._saved_dim), node._saved_index.cpu()),
    "GatherBackward": lambda node, marks: marks.gather(signed(node._saved_dim), node._saved_index.cpu()),
    "TakeBackward": lambda node, marks: marks.take(node._saved_index.cpu()),
    "MaskedSelectBackward": _selected,
    "EmbeddingBackward": _embedding,
    "UnfoldBackward": lambda node, marks: marks.unfold(
        signed(node._saved_dimension), node._saved_size, node._saved_step
    ),
    "Im2ColBackward": _patches,
    **dict.fromkeys([f"UpsampleNearest{d}DBackward" for d in (1, 2, 3)], _nearest),
    **dict.fromkeys([f"ReflectionPad{d}DBackward" for d in (1, 2, 3)], _padding("reflect")),
    **dict.fromkeys([f"ReplicationPad{d}DBackward" for d in (1, 2, 3)], _padding("replicate")),
}
