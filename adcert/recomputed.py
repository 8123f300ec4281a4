"""Nodes whose saved tensors ``torch.utils.checkpoint`` has dropped and computes again in backward.

Reading one of them would run the user's forward pass once more, outside of backward. So rules see such a node through
:class:`Dropped`: structure, shapes and numbers are there, tensors are refused. What needs none is decided as anywhere.
"""

from __future__ import annotations

from typing import Any

import torch

_saved_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class DroppedError(RuntimeError):
    """A rule needs a tensor that a checkpoint has dropped."""


class Dropped:
    """A node of the graph without the tensors it saved; equal to the node itself as a key."""

    __slots__ = ("_node",)

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_saved_") and hasattr(self._node, f"_raw{name}"):
            self._refuse()
        return getattr(self._node, name)

    def __call__(self, *gradients: Any) -> Any:
        self._refuse()

    def __hash__(self) -> int:
        return hash(self._node)

    def __eq__(self, other: object) -> bool:
        return bool(self._node == (other._node if isinstance(other, Dropped) else other))

    def _refuse(self) -> None:
        raise DroppedError("torch.utils.checkpoint has dropped its values; without it this step could be decided")


def dropping() -> bool:
    """Are saved-tensor hooks active, so that autograd does not keep what nodes save?"""
    return _saved_hooks(True) is not None


def checkpointing() -> bool:
    """Are these hooks those of a non-reentrant checkpoint?"""
    hooks = _saved_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def same_numbers() -> bool:
    """Does the checkpoint begin its second forward pass with the random state of the first one?"""
    hooks = _saved_hooks(True)
    frame = None if hooks is None else _cell(hooks[0], "frame")
    return _cell(getattr(frame, "recompute_fn", None), "preserve_rng_state") is True


def _cell(function: Any, name: str) -> Any:
    """What a function holds under a free name; None if it has no such name."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return function.__closure__[names.index(name)].cell_contents if name in names else None
