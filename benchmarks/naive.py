"""Algorithm 2 of Park, Chun, Lee (ICLR 2024) written down directly in PyTorch: what adcert is measured against.

For every pooled ReLU layer l, z_j = max_{i in I_j} relu(y_i): unfold the activations, compare the cells of each window
with its maximum to find S_j, settle T_j with two backward passes for every tied pair, and decide the layer's joint
system of the rows of S_j \\ T_j with one linear program.

All of it in floating point: it measures and proves nothing. Gradients are compared exactly, so wherever they are sums
(behind batch normalisation, in deeper layers) rounding parts units that are one function: S_j \\ T_j comes out large.

A step on photographs ties tens of thousands of pairs. ``limit`` settles that many pairs of each layer, evenly spread;
the others are extrapolated at the median time of a pair, and reported as such.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOLERANCE = 1e-6  # HiGHS works to 1e-7; rows are scaled to largest entry 1


@dataclass(frozen=True, eq=False)
class Pooled:
    """A pooled ReLU of one forward pass. ``own``: w_l, its layer's parameters; ``upto``: w_1, ..., w_l."""

    name: str
    y: Tensor
    pool: nn.MaxPool2d
    own: tuple[nn.Parameter, ...]
    upto: tuple[nn.Parameter, ...]


@dataclass
class Walk:
    """A forward pass through nested Sequentials that keeps y of every ReLU right before a MaxPool2d."""

    pooled: list[Pooled] = field(default_factory=list)
    own: list[nn.Parameter] = field(default_factory=list)
    upto: list[nn.Parameter] = field(default_factory=list)

    def run(self, module: nn.Module, x: Tensor, name: str = "") -> Tensor:
        if not isinstance(module, nn.Sequential):
            self.own += module.parameters()
            self.upto += module.parameters()
            x = module(x)
            if any(isinstance(part, nn.ReLU) for part in module.modules()):
                self.own = []  # here the next layer begins
            return x
        children = [*((f"{name}{key}", child) for key, child in module.named_children()), ("", nn.Identity())]
        for (key, child), (follower, pool) in pairwise(children):
            if isinstance(child, nn.ReLU) and isinstance(pool, nn.MaxPool2d):
                self.pooled.append(Pooled(follower, x, pool, tuple(self.own), tuple(self.upto)))
                self.own, x = [], F.relu(x)  # never in place: y is needed
            else:
                x = self.run(child, x, f"{key}.")
        return x


@dataclass(frozen=True, eq=False)
class Ties:
    """Windows j (flat output indices) with two or more members in S_j and max > 0, and their pairs.

    Pair k belongs to ``windows[owner[k]]``: flat indices into y of the member AD selects, the first in row-major order,
    and of another one.
    """

    windows: Tensor
    owner: Tensor
    selected: Tensor
    other: Tensor


def find_ties(pooled: Pooled) -> Ties:
    """S_j by comparing every cell of every window with the window's maximum."""
    pool = pooled.pool
    if pool.ceil_mode:
        raise ValueError(f"{pooled.name}: unfold knows no ceil_mode, so the naive step does not either")
    a = F.relu(pooled.y.detach())
    a = a if a.dtype == torch.float64 else a.float()  # bfloat16 is exact in float32
    n, c, h, w = a.shape

    def unfold(image: Tensor) -> Tensor:
        return F.unfold(image, pool.kernel_size, pool.dilation, pool.padding, pool.stride)

    cells = unfold(a.reshape(n * c, 1, h, w))  # [planes, K, L]; padding is 0 and never the maximum of a window > 0
    position = unfold(torch.arange(float(h * w), device=a.device).reshape(1, 1, h, w))[0].long()  # [K, L]
    best = cells.amax(1)
    equal = (cells == best.unsqueeze(1)) & (best > 0).unsqueeze(1)
    plane, place = torch.nonzero(equal.sum(1) > 1, as_tuple=True)
    members = equal[plane, :, place]  # [T, K]
    number = torch.arange(members.shape[1], device=a.device)
    first = torch.where(members, number, len(number)).amin(1)
    owner, cell = torch.nonzero(members & (number != first.unsqueeze(1)), as_tuple=True)
    unit = (plane * h * w).unsqueeze(1) + position[:, place].T  # [T, K]
    return Ties(plane * best.shape[1] + place, owner, unit[owner, first[owner]], unit[owner, cell])


@dataclass(frozen=True)
class Checked:
    """What a layer's check found. ``pairs`` were counted, ``settled`` of them run, in ``seconds`` each (median).

    Of the settled pairs, ``differing``: windows whose S_j \\ T_j is nonempty, ``rows`` their rows, ``nonempty``: P_l.
    """

    name: str
    windows: int
    pairs: int
    settled: int
    seconds: float
    differing: int
    rows: int
    nonempty: bool

    @property
    def missing_seconds(self) -> float:
        """Time of the pairs that were not run, if each takes what the others took."""
        return self.seconds * (self.pairs - self.settled)


def check(model: nn.Module, x: Tensor, layers: Sequence[Pooled], limit: int | None = None) -> list[Checked]:
    """Algorithm 2 for the pooled layers of the forward pass ``model(x)``.

    Without batch normalisation a sample's units depend on that sample alone: each sample then has a graph of its own,
    and a backward pass costs a batch of one.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        graphs = [list(layers)]
    else:
        graphs = [_walk(model, sample) for sample in x.split(1)]
    return [_check(layer, [graph[index] for graph in graphs], limit) for index, layer in enumerate(layers)]


def _walk(model: nn.Module, x: Tensor) -> list[Pooled]:
    walk = Walk()
    walk.run(model, x)
    return walk.pooled


def _check(layer: Pooled, graphs: Sequence[Pooled], limit: int | None) -> Checked:
    ties = find_ties(layer)
    pairs = len(ties.owner)
    settled = pairs if limit is None else min(limit, pairs)
    chosen = torch.linspace(0, pairs - 1, settled).long() if pairs else torch.arange(0)
    units = [graph.y.flatten() for graph in graphs]

    def gradient(unit: int) -> tuple[Tensor, ...]:
        sample, offset = divmod(unit, len(units[0]))
        return torch.autograd.grad(units[sample][offset], layer.upto, retain_graph=True, materialize_grads=True)

    own = [index for index, p in enumerate(layer.upto) if any(p is q for q in layer.own)]
    rows, differing, seconds = [], set(), []
    for k in chosen.tolist():
        start = time.perf_counter()
        plus, minus = gradient(int(ties.selected[k])), gradient(int(ties.other[k]))
        if not all(map(torch.equal, plus, minus)):  # not in T_j
            rows.append(torch.cat([(plus[i].double() - minus[i].double()).flatten() for i in own]).cpu().numpy())
            differing.add(int(ties.owner[k]))
        seconds.append(time.perf_counter() - start)
    each = median(seconds) if seconds else 0.0
    return Checked(layer.name, len(ties.windows), pairs, settled, each, len(differing), len(rows), nonempty(rows))


def nonempty(rows: Sequence[np.ndarray]) -> bool:
    """Whether some p has <row, p> > 0 for every row: maximise c with <row, p> >= c, |p| <= 1.

    >>> nonempty([np.array([1.0, -1.0]), np.array([1.0, 2.0])]), nonempty([np.array([1.0]), np.array([-2.0])])
    (True, False)
    """
    if not rows:
        return True
    matrix = np.stack(rows)
    matrix = matrix[:, matrix.any(axis=0)]
    scale = np.abs(matrix).max(axis=1, initial=0.0)
    if not scale.all():
        return False
    matrix = np.unique(matrix / scale[:, None], axis=0)
    count, columns = matrix.shape
    objective = np.zeros(columns + 1)
    objective[-1] = -1.0
    system = np.hstack([-matrix, np.ones((count, 1))])
    result = scipy.optimize.linprog(objective, system, np.zeros(count), bounds=[(-1, 1)] * columns + [(None, 1)])
    if result.status != 0:
        raise RuntimeError(f"linprog: {result.message}")
    return bool(result.x[-1] > TOLERANCE)


@dataclass(frozen=True)
class Step:
    """A checked training step: ``measured`` seconds, and the layers' counts."""

    measured: float
    layers: list[Checked]

    @property
    def seconds(self) -> float:
        """Time of the whole step, extrapolated over the pairs that were not run; linear programs as measured."""
        return self.measured + sum(layer.missing_seconds for layer in self.layers)

    @property
    def note(self) -> str:
        """How far ``seconds`` was measured."""
        settled, pairs = (sum(getattr(layer, key) for layer in self.layers) for key in ("settled", "pairs"))
        return f"extrapolated from {settled:,} of {pairs:,} pairs" if settled < pairs else f"all {pairs:,} pairs run"


def trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, limit: int | None = None, low: bool = False
) -> Callable[[Tensor, Tensor], Step]:
    """A training step with the check between forward and backward pass; ``low``: under bfloat16 autocast."""

    def step(x: Tensor, y: Tensor) -> Step:
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            walk = Walk()
            loss = F.cross_entropy(walk.run(model, x), y)
            layers = check(model, x, walk.pooled, limit)
        loss.backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return Step(time.perf_counter() - start, layers)

    return step
