"""Theorem H: AD's gradient as a convex combination of Bouligand subgradients, each with a direction of its own.

A third try for tiny networks, where neither the layered nor the joint system certifies: relu(x) + relu(-x) at 0 has no
direction, but its gradient 0 is the mean of 1 and -1. Directions are sampled, each leads to an element
(:mod:`adcert.branches`), and exact arithmetic decides whether AD's gradient is among their convex combinations. By
Gordan, it is not if and only if some s has ``<G - g, s> > 0`` for every element G, and -s then is a direction to try.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from .backward import Unsupported
from .branches import Array, Element, Program, Uncertain, decisions
from .certificate import Block, Column, Combination
from .errors import AdcertError
from .feasibility import Proof, decide
from .layers import Graph, shape_of
from .nodes import Node

DECISIONS = 256  # touches and tied windows of a graph that is tried
ENTRIES = 100_000  # decisions x trainable parameters of it
UNITS = 1 << 18  # decisions x units
DIRECTIONS = 64
IDLE = 24  # directions in a row that lead nowhere new
SECONDS = 0.5  # of this thread: the answer should not depend on what else the machine does
_BITS = 20  # of a direction; the last half of them is noise


@dataclass(frozen=True, eq=False)
class Hull:
    """Elements with ``sum_k weights[k] elements[k] = target``, the weights being those of ``proof`` over their sum."""

    columns: tuple[Column, ...]
    elements: tuple[Element, ...]
    target: Array
    proof: Proof

    def blocks(self, layer: str) -> tuple[Block, ...]:
        """One block for each element."""
        return tuple(
            Block(layer, 1, self.columns, e.rows, None, None, e.rules, e.direction, None, "sampled")
            for e in self.elements
        )

    @property
    def combination(self) -> Combination:
        return Combination(np.stack([e.gradient for e in self.elements]), self.target, self.proof.weights)


def light(graph: Graph) -> bool:
    """Is the graph so small that this costs next to nothing?"""
    count = decisions(graph)
    parameters = sum(leaf.numel() for leaf in graph.leaves.trainable().values())
    units = sum(math.prod(record.input_shape) for record in graph.record_of.values())
    return 0 < count <= DECISIONS and count * parameters <= ENTRIES and count * units <= UNITS


def combine(graph: Graph, edge: tuple[Node, int]) -> Hull | None:
    """The gradient of the number at ``edge`` as such a combination; None where none is found."""
    if edge[0] is None or math.prod(shape_of(*edge)) != 1 or not light(graph):
        return None
    try:
        program = Program(graph, edge)
        target = program.autodiff()
        return None if target is None or program.width == 0 else _Search(program, target).run()
    except (Unsupported, Uncertain, AdcertError):
        return None


class _Search:
    """Samples directions until the elements they lead to contain the target, or the time is up."""

    def __init__(self, program: Program, target: Array) -> None:
        self.program = program
        self.target = target
        self.found: dict[bytes, Element] = {}
        self.generator = np.random.default_rng(0)
        self.separator: Array | None = None

    def run(self) -> Hull | None:
        deadline, last = time.thread_time() + SECONDS, 0
        for number in range(DIRECTIONS):
            if time.thread_time() > deadline or number > last + IDLE:
                break
            try:
                element = self.program.along(self._direction(number))
            except Uncertain:
                continue
            if element is None:
                continue
            key = (element.gradient + 0.0).tobytes()
            if key not in self.found:
                self.found[key], last = element, number
                hull = self._decided(deadline - time.thread_time())
                if hull is not None:
                    return hull
        return None

    def _decided(self, seconds: float) -> Hull | None:
        elements = list(self.found.values())
        rows = np.stack([element.gradient for element in elements])
        answer = decide(rows, np.tile(self.target, (len(rows), 1)), seconds=max(0.01, seconds))
        if answer.proof is None:
            self.separator = None if answer.direction is None else _scaled(answer.direction)
            return None
        used = tuple(_centred(elements[row]) for row in answer.proof.rows)
        proof = Proof(tuple(range(len(used))), answer.proof.weights)
        return Hull(self.program.columns, used, self.target, proof)

    def _direction(self, number: int) -> tuple[int, ...]:
        """Integers: noise, to which one of what seems to help is added, greater than it."""
        width = self.program.width
        half = 1 << (_BITS // 2)
        noise = self.generator.integers(-half, half + 1, width)
        special = self._special(number)
        if special is None:
            special = self.generator.uniform(-1, 1, width)
        found = np.rint(special * float(half * half)).astype(np.int64) + noise
        return tuple(found.tolist()) if found.any() else (1,) * width

    def _special(self, number: int) -> Array | None:
        elements = list(self.found.values())
        kind, sign = number % 4, 1 - 2 * (number // 4 % 2)
        if kind == 1 and self.separator is not None:
            return np.multiply(self.separator, -sign)
        if kind == 2 and elements:
            rows = elements[number // 4 % len(elements)].rows
            if len(rows):
                row: Array = rows[int(self.generator.integers(len(rows)))]
                scaled: Array = -row / max(float(np.abs(row).max()), 1e-300)
                return scaled
        if kind == 3:
            unit = np.zeros(self.program.width)
            unit[number // 8 % self.program.width] = sign
            return unit
        return None


def _centred(element: Element) -> Element:
    """With a direction that is as far from the kinks as it gets, if there is one at hand: it is easier to follow."""
    if not len(element.rows):
        return element
    found = decide(element.rows, seconds=0.1).direction
    return element if found is None else replace(element, direction=found)


def _scaled(direction: tuple[int, ...]) -> Array:
    """To largest entry 1."""
    unit = 1 << max((abs(x) for x in direction), default=0).bit_length()
    found = np.array([x / unit for x in direction])
    scaled: Array = found / max(float(np.abs(found).max()), 1e-300)
    return scaled
