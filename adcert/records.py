"""What a forward pass saw: touches and ties, as structs of tensors.

A :class:`~adcert.recorder.Recorder` keeps one :class:`OpRecord` for each call that it has recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .activations import Activation
from .balls import Ball
from .choices import Choice, Ties
from .nodes import Edge, Links, Node, linked
from .transfer import take


@dataclass(eq=False)
class OpRecord:
    """One nonsmooth operation of the step: ``z = phi(rho(y))`` in the notation of Park, Chun, Lee (2024).

    ``rho``: the activation, None for the identity. ``ties``: what phi chose, None where phi is the identity. ``node``
    is the autograd node of the output; its first input edge leads to y, a second one to PReLU's slopes. ``touches``:
    int64 [M], ``K unit + k`` for every flat unit of y that equals the k-th of the K kinks of rho. ``output`` shares its
    memory with z, at version ``version``, or with relu(z) if a recorded ReLU has overwritten it: only its sign may be
    read. It is let go when the last backward pass starts. ``signs``: where z > 0, if a checkpoint is not to be kept
    from dropping z; ``output`` is then a stand-in of its shape.

    ``seen``: where AD's slopes are read for every rho but the ReLU: y itself, or codes of :meth:`Activation.code` where
    y has been overwritten. ``left``: PReLU's or RReLU's own slopes, broadcast to y.

    ``listed``: the lists and ``counts`` are on the host, whole and ascending. On a GPU they are not until
    :class:`adcert.lists.Coming` has brought them; ``room``: how many entries each has room for there, None if it is
    as long as what was found. ``overflow``: why the lists are missing, or "".
    """

    name: str
    node: Node
    rho: Activation | None
    ties: Ties | Choice | None
    touches: Tensor
    counts: Tensor
    output: Tensor
    version: int
    input_shape: tuple[int, ...]
    room: int | None = None
    listed: bool = True
    seen: Tensor | None = None
    seen_version: int = 0
    left: Tensor | None = None
    signs: Tensor | None = None
    sides: tuple[int, ...] = (-1,)
    released: bool = False
    overflow: str = ""
    links: Links = field(default_factory=dict)

    @property
    def relu(self) -> bool:
        """Is rho the ReLU with proxy 0?"""
        return self.rho is not None and self.rho.name == "relu" and self.rho.given is None

    @property
    def edge(self) -> tuple[Node, int]:
        """The autograd edge of y: (node, output number); the node is None where y is constant."""
        return linked(self.links, self.node.next_functions[0])

    @property
    def own_edge(self) -> tuple[Node, int]:
        """The edge of PReLU's slopes; the node is None for everything else."""
        edges: tuple[Edge, ...] = self.node.next_functions
        own = self.rho is not None and self.rho.name == "prelu" and len(edges) > 1
        return linked(self.links, edges[1]) if own else (None, 0)

    def values(self, units: Tensor) -> Tensor:
        """y, where it is kept, at flat units."""
        assert self.seen is not None
        return take(self.seen, units)

    def positive(self, units: Tensor) -> Tensor:
        """Which of these flat outputs are above 0; of a ReLU, or of a pooling."""
        return take(self.output if self.signs is None else self.signs, units) > 0

    def slopes(self, units: Tensor) -> Ball:
        """AD's rho' for flat outputs (of a fused ReLU and pooling: at the units they select)."""
        if self.rho is None:
            return Ball(torch.ones(units.shape, dtype=torch.float64))
        if self.relu:
            return Ball(self.positive(units).to(torch.float64))
        found = self.values(units)
        left = None if self.left is None else take(self.left.expand(self.input_shape), units)
        if found.dtype == torch.uint8:
            return self.rho.slope(found, self.output, None, left)
        return self.rho.slope(self.rho.code(found), self.output, found, left)

    def decides(self) -> bool:
        """Is there a touch or a tie?"""
        return bool(len(self.touches)) or (self.ties is not None and bool(len(self.ties.windows)))

    def touched(self) -> tuple[Tensor, Tensor, Tensor]:
        """(flat unit, number of its kink, side of AD's proxy there) of every touch, int64 [M] each."""
        count = max(1, len(self.sides))
        kinks = self.touches % count
        return self.touches // count, kinks, torch.tensor(self.sides)[kinks]

    def release(self) -> None:
        """Let go of the activations; the counts stay."""
        self.released = True
        self.output = self.output.new_empty(0)
        self.seen = self.left = self.signs = None
        self.ties = None

    def altered(self) -> bool:
        """True if what has to be read was modified in place after it was recorded."""
        if self.seen is not None:
            return bool(self.seen._version != self.seen_version)
        return bool(self.output._version != self.version)
