"""Random programs (tests/theory_programs.py) as torch closures: what is certified is true, in exact arithmetic."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from theory_programs import Element, Point, Program, random_point
from torch import Tensor, nn
from torch.nn import functional as F

import adcert

STEP = Fraction(1, 10**14)  # eps between the ranks of a lexicographic witness


class Closure(nn.Module):
    """The program in float64, each kind of element written in one of the ways torch has for it; its own closure."""

    def __init__(self, program: Program, w: tuple[Fraction, ...], rng: random.Random) -> None:
        super().__init__()
        self.program = program
        self.way = [rng.randrange(4) for _ in program.elements]
        start = torch.tensor([float(x) for x in w], dtype=torch.float64)
        whole = rng.random() < 0.3  # one leaf, or one for each entry: then there are layers
        self.leaves = nn.ParameterList([nn.Parameter(part.clone()) for part in ([start] if whole else start.split(1))])

    def forward(self) -> Tensor:
        entries = [leaf[i] for leaf in self.leaves for i in range(len(leaf))]
        found: list[Tensor] = []
        for element, way in zip(self.program.elements, self.way, strict=True):
            if element.kind == "entry":
                found.append(entries[element.weights[0]])
            else:
                found.append(_WRITTEN[element.kind](element, way, [found[i] for i in element.inputs]))
        return found[-1] * 1.0


def affine(element: Element, way: int, u: list[Tensor]) -> Tensor:
    total = torch.tensor(float(element.weights[-1]), dtype=torch.float64)
    for c, x in zip(element.weights[:-1], u, strict=True):
        total = total + (x if c == 1 else -x if c == -1 else x * float(c))
    return total


def kink(element: Element, way: int, u: list[Tensor]) -> Tensor:
    (x,) = u
    written: dict[tuple[int, ...], list[Callable[[], Tensor]]] = {
        (0, 1): [
            lambda: F.relu(x), lambda: x.clamp(min=0.0), lambda: F.hardtanh(x, 0.0, 100.0),
            lambda: F.threshold(x, 0.0, 0.0),
        ],
        (1, 0): [lambda: x.clamp(max=0.0), lambda: -F.relu(-x)],
        (-1, 1): [lambda: F.leaky_relu(x, -1.0), lambda: x.abs()],
        (2, 1): [lambda: F.leaky_relu(x, 2.0)],
        (1, 1): [lambda: x * 1.0],
    }  # fmt: skip
    ways = written[element.weights]
    return ways[way % len(ways)]()


def maximum(element: Element, way: int, u: list[Tensor]) -> Tensor:
    x, size = torch.stack(u), len(u)
    if way == 0:
        return F.max_pool2d(x.view(1, 1, 1, -1), (1, size)).reshape(())
    if way == 1:
        return F.max_pool1d(x.view(1, 1, -1), size).reshape(())
    return x.amax(0) if way == 2 else x.max(0).values


def rank(element: Element, way: int, u: list[Tensor]) -> Tensor:
    x, size, k = torch.stack(u), len(u), element.weights[0]
    if way == 0:
        return x.kthvalue(size + 1 - k).values
    if way == 1:
        return x.sort(descending=True).values[k - 1]
    if way == 2:
        return x.topk(k).values[k - 1]
    if (size, k) == (3, 2):
        return x.median(0).values
    return x.min(0).values if k == size else x.sort().values[size - k]


_WRITTEN: dict[str, Callable[[Element, int, list[Tensor]], Tensor]] = {
    "affine": affine,
    "product": lambda element, way, u: u[0] * u[1],
    "kink": kink,
    "max": maximum,
    "rank": rank,
}


def certified_and_true(seed: int) -> tuple[str, bool]:
    """The verdict, and whether AD's gradient is what a certificate claims: a limit of true ones, or in their hull."""
    rng = random.Random(seed)
    point = random_point(rng)
    model = adcert.convert(Closure(point.program, point.w, rng))
    if not model().requires_grad:
        return "constant", True
    certificate = adcert.certify(model, model)
    if certificate.verdict is not adcert.Verdict.CERTIFIED:
        return certificate.verdict.value, True
    true = _limit if certificate.claim == "bouligand" else _combination
    return "certified", true(point, model, certificate, rng)


def _combination(point: Point, model: nn.Module, certificate: adcert.Certificate, rng: random.Random) -> bool:
    """Is AD's gradient in the hull of true gradients, sampled close to w in exact arithmetic?"""
    leaves = list(model.parameters())
    ours = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in leaves]).numpy()
    seen: set[tuple[float, ...]] = set()
    for _ in range(2000):
        sizes = [Fraction(1, 10 ** rng.choice((30, 30, 33, 36))) for _ in point.w]
        there = [w + t * rng.randint(-999, 999) for w, t in zip(point.w, sizes, strict=True)]
        true = point.program.gradient(there)
        found = None if true is None else tuple(round(float(x), 9) for x in true)
        if found is None or found in seen:
            continue
        seen.add(found)
        hull = np.vstack([np.array(sorted(seen)).T, np.ones(len(seen))])
        if linprog(np.zeros(len(seen)), A_eq=hull, b_eq=np.append(ours, 1.0)).status == 0:
            return True
    return False


def _limit(point: Point, model: nn.Module, certificate: adcert.Certificate, rng: random.Random) -> bool:
    """Gradients in exact arithmetic at w + t (sum_r eps^(R - r) p_r + smaller noise), t tiny, tend to AD's."""
    top = max(certificate.scales.values(), default=1)
    along: list[Fraction] = []
    gradient: list[Fraction] = []
    for name, leaf in model.named_parameters():
        p = certificate.directions.get(name, torch.zeros_like(leaf))
        along += [Fraction(x) * STEP ** (top - certificate.scales.get(name, 1)) for x in p.reshape(-1).tolist()]
        found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        gradient += [Fraction(x) for x in found.reshape(-1).tolist()]
    t, little = Fraction(1, 10 ** (80 * top)), STEP ** (top + 2)
    noise = [little * Fraction(rng.randint(-999, 999), 101) for _ in along]
    there = [w + t * (a + b) for w, a, b in zip(point.w, along, noise, strict=True)]
    true = point.program.gradient(there)
    assert true is not None, "the noise has to leave every kink"
    return all(abs(x - y) < Fraction(1, 10**20) for x, y in zip(true, gradient, strict=True))


@pytest.mark.parametrize("block", range(4))
def test_certified_programs_are_limits_or_combinations(block: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(75 * block, 75 * (block + 1)):
        verdict, true = certified_and_true(seed)
        assert true, f"program {seed}: a false certificate"
        counts[verdict] += 1
    print(dict(counts))
    assert counts["certified"] > 25
    assert counts["uncertified"] > 3
