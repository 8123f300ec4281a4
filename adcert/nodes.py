"""Nodes and edges of torch's autograd graph: which node an operation has made, and where a tensor stands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COPY_SLICES = "torch::autograd::CopySlices"  # an in-place function on a view, as a node of the view's base
Node = Any  # torch.autograd.graph.Node; C++ nodes are not instances of the Python class
Edge = tuple[Node, int]
Links = dict[Edge, Edge]
_VIEWS = ("Squeeze", "Unsqueeze", "View", "UnsafeView", "ReshapeAlias", "Alias")


def linked(links: Links, edge: Edge) -> Edge:
    """The edge itself, or where it leads instead."""
    while edge in links:
        edge = links[edge]
    return edge


def whole(x: Tensor) -> Tensor:
    """The base of a view that shows all of it, unit by unit (as linear layers return), else the tensor itself."""
    base = x._base
    if base is None or x.numel() != base.numel() or x.storage_offset() != base.storage_offset():
        return x
    return base if x.is_contiguous() and base.is_contiguous() else x


def node_in_place(x: Tensor, source: tuple[Any, int]) -> Node | None:
    """The node of an operation in place on a view: autograd puts it on the base, whose edge was ``source``.

    None if the view does not show all of its base: then the node is about other units, too.
    """
    base = whole(x)
    node = base.grad_fn
    if base is x or node is None or node.name() != COPY_SLICES or not _is(node.next_functions[0], source):
        return None
    return node


def edge_of(x: Tensor) -> tuple[Any, int]:
    """The autograd edge of a tensor: (node, or a leaf itself, or None for a constant; output number)."""
    return (x.grad_fn, x.output_nr) if x.grad_fn is not None else (x if x.requires_grad else None, 0)


def node_from(output: Tensor, source: tuple[Any, int], widened: bool = False) -> Node | None:
    """The node that made ``output`` from the tensor at ``source``, itself or between views; None if it did otherwise.

    A cast in between (autocast) that rounds would mean that the operation saw other values than we did. ``widened``:
    one that does not is no matter, as for a selection, which compares entries with each other only.
    """
    node = output.grad_fn
    while node is not None:
        above = node.next_functions[0]
        while above[0] is not None and not _is(above, source) and _passes(above[0], widened):
            above = above[0].next_functions[0]
        if _kind(node) not in _VIEWS:
            return node if _is(above, source) else None
        node = node.next_functions[0][0]
    return None


def _passes(node: Node, widened: bool) -> bool:
    """A view, or a cast that rounds nothing."""
    if _kind(node) in _VIEWS:
        return True
    if not widened or _kind(node) != "ToCopy":
        return False
    source, number = node.next_functions[0]
    given, made = source._input_metadata[number].dtype, node._input_metadata[0].dtype
    return bool(torch.promote_types(given, made) == made)


def _kind(node: Node) -> str:
    name: str = node.name().rstrip("0123456789")
    return name.removesuffix("Backward")


def _is(edge: tuple[Node, int], source: tuple[Any, int]) -> bool:
    if isinstance(source[0], Tensor):
        return edge[0] is not None and getattr(edge[0], "variable", None) is source[0]
    return edge == source or (edge[0] is None and source[0] is None)
