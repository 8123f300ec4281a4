"""Functions with a known Clarke subdifferential on which autodiff may be wrong: the gallery, as data.

Each :class:`Row` is a closed computation of a few parameters at a point where it is not differentiable: its
Clarke subdifferential dC as the convex hull of finitely many vertices, the gradient that stock PyTorch 2.13
returns there, and the verdicts that the theory allows. :func:`measure` computes gradient and verdict afresh.
Sources: Kakade, Lee (NeurIPS 2018); Bolte, Pauwels (NeurIPS 2020); Khan, Barton (2013); Park, Chun, Lee
(ICLR 2024: Lemmas 2, 3 and 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from .errors import AdcertError

__all__ = ["OUTSIDE", "ROWS", "Case", "Measurement", "Row", "autodiff", "contains", "measure"]

Vector = tuple[float, ...]
CERTIFIED: Final = frozenset({"certified"})
UNCERTIFIED: Final = frozenset({"uncertified"})
OUTSIDE: Final = frozenset({"undecided", "refused"})


def _swapped_network() -> nn.Module:
    """Row 19's network: a 1x2 convolution of stride 2 with filter (1, 1) and bias 0, ReLU, max pooling."""
    conv = nn.Conv2d(1, 1, (1, 2), (1, 2), dtype=torch.float64)
    for leaf, value in zip(conv.parameters(), (1, 0), strict=True):
        nn.init.constant_(leaf, value)
    return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d((1, 2)))


_LAYERS: Final = MappingProxyType[str, Callable[[], nn.Module]](
    {"relu": nn.ReLU, "pool": lambda: nn.MaxPool2d((1, 2)), "network": _swapped_network}
)


class Case(nn.Module):
    """One function of the gallery: a parameter `w` (float64) and distinct modules for its nonsmooth pieces.

    `forward()` takes no argument and returns the scalar loss, so that the module is its own closure. Without
    a point there is no `w`: the parameters are those of the modules.
    """

    def __init__(self, function: Callable[..., Tensor], point: Vector, layers: tuple[str, ...]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.tensor(point, dtype=torch.float64)) if point else None
        self.layers = nn.ModuleList(_LAYERS[layer]() for layer in layers)

    def forward(self) -> Tensor:
        leaves = [] if self.w is None else [self.w]
        return self.function(*leaves, *self.layers).sum()


@dataclass(frozen=True)
class Row:
    """A function, a point, and what is true there.

    Arguments:
        number: the row's name in the gallery.
        text: the function and the point, for people.
        truth: dC, for people.
        vertices: affinely independent points whose convex hull is dC.
        autodiff: what stock PyTorch 2.13 on the CPU returns (NaN included).
        allowed: verdicts that the theory allows for this gradient; OUTSIDE for functions the theory does not
            cover or adcert does not record.
        function, point, layers: the arguments of :class:`Case`.

    Example:
        >>> ROWS[0].number, contains(ROWS[0].vertices, ROWS[0].autodiff)
        ('1', False)
    """

    number: str
    text: str
    truth: str
    vertices: tuple[Vector, ...]
    autodiff: Vector
    allowed: frozenset[str]
    function: Callable[..., Tensor]
    point: Vector = (0.0,)
    layers: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """Whether PyTorch 2.13's gradient is in dC."""
        return contains(self.vertices, self.autodiff)

    def build(self) -> Case:
        """A fresh module of this function with its parameters at the point."""
        return Case(self.function, self.point, self.layers)


@dataclass(frozen=True)
class Measurement:
    """What one row gave on this machine.

    Arguments:
        row: the row.
        autodiff: the gradient of the unconverted module.
        right: whether it is in dC.
        verdict: "certified", "uncertified", "undecided", or "refused" where adcert raised an AdcertError.
        reasons: adcert's reasons; empty iff certified.
    """

    row: Row
    autodiff: Vector
    right: bool
    verdict: str
    reasons: tuple[str, ...]

    @property
    def contradiction(self) -> str:
        """Why the verdict contradicts the theory; empty if it does not.

        A certificate for a gradient outside dC always does. The verdict is compared with `row.allowed` only
        where PyTorch still returns the gradient of the table: another release may use other proxies.
        """
        if self.verdict == "certified" and not self.right:
            return "certified, but the gradient is not in dC"
        if not self.reasons and self.verdict != "certified":
            return f"{self.verdict} without a reason"
        if same(self.autodiff, self.row.autodiff) and self.verdict not in self.row.allowed:
            return f"{self.verdict}, where the theory says {' or '.join(sorted(self.row.allowed))}"
        return ""


def contains(vertices: tuple[Vector, ...], point: Vector, tolerance: float = 1e-12) -> bool:
    """Whether `point` lies in the simplex with the affinely independent `vertices`, by barycentric weights.

    Example:
        >>> contains(((-1.0,), (0.0,)), (-0.25,)), contains(((1.0,),), (math.nan,))
        (True, False)
    """
    if not all(map(math.isfinite, point)):
        return False
    matrix = np.vstack([np.array(vertices, dtype=np.float64).T, np.ones(len(vertices))])
    target = np.array([*point, 1.0])
    weights = np.linalg.lstsq(matrix, target, rcond=None)[0]
    slack = tolerance * (1 + float(np.abs(target).max()))
    return bool(np.abs(matrix @ weights - target).max() <= slack and weights.min() >= -slack)


def same(left: Vector, right: Vector) -> bool:
    """Equality of vectors in which NaN equals NaN."""
    return len(left) == len(right) and all(
        a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(left, right, strict=True)
    )


def autodiff(row: Row) -> Vector:
    """The gradient that the installed PyTorch returns for the row, stock modules, float64.

    Example:
        >>> autodiff(ROWS[0])
        (0.0,)
    """
    case = row.build()
    gradients = torch.autograd.grad(case(), list(case.parameters()))
    return tuple(torch.cat([gradient.flatten() for gradient in gradients]).tolist())


def measure(row: Row) -> Measurement:
    """Run the row through stock autodiff and through `adcert.certify(model, model)`."""
    from adcert import certify, convert  # at the top this would be a circular import

    gradient = autodiff(row)
    model = convert(row.build())
    right = contains(row.vertices, gradient)
    try:
        certificate = certify(model, model)
    except AdcertError as error:
        return Measurement(row, gradient, right, "refused", (str(error),))
    return Measurement(row, gradient, right, certificate.verdict.value, tuple(certificate.reasons))


def _lemma7(w: Tensor, p: nn.Module, q: nn.Module) -> Tensor:
    u, b = w[:1], w[1:]
    first: Tensor = p(torch.cat([u + b, b]).view(1, 1, 2))
    second: Tensor = q(torch.cat([b - u, b]).view(1, 1, 2))
    return first - second


def _hard_sigmoids(w: Tensor) -> Tensor:
    return nn.functional.hardsigmoid(3 + w) + nn.functional.hardsigmoid(w - 3)


def _hard_tanhs(w: Tensor) -> Tensor:
    return nn.functional.hardtanh(1 + w) + nn.functional.hardtanh(w - 1)


def _pool_minus_amax(w: Tensor) -> Tensor:
    return nn.functional.max_pool1d(w.view(1, 1, 2), 2).view(()) - w.amax()


def _even_lemma7(w: Tensor) -> Tensor:
    u, b = w[0], w[1]
    return torch.maximum(u + b, b) - torch.maximum(b - u, b)


def _khan_barton(w: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(w[0], -w[1]), w[1] - w[0])


def _swapped(*signs: float) -> Callable[[nn.Module], Tensor]:
    """Row 19: the sum of the pooled values of both samples times `signs`; a sample with sign 0 is left out.

    Sample 1 shows the patches (1, 2) and (2, 1), sample 2 the same in swapped order; the filter (1, 1) ties
    them at 3. The tie rows of the filter are (-1, 1) and (1, -1). The gradient lists filter, then bias.
    """
    images = torch.tensor([[1, 2, 2, 1], [2, 1, 1, 2]], dtype=torch.float64).view(2, 1, 1, 4)
    chosen = [k for k, sign in enumerate(signs) if sign]
    weights = torch.tensor([signs[k] for k in chosen], dtype=torch.float64)

    def loss(network: nn.Module) -> Tensor:
        device = next(network.parameters()).device
        return weights.to(device) @ torch.flatten(network(images[chosen].to(device)))

    return loss


TWO: Final = ("relu", "relu")

ROWS: Final[tuple[Row, ...]] = (
    Row("1", "relu(x) - relu(-x), x = 0", "{1}", ((1,),), (0,), UNCERTIFIED,
        lambda w, r, s: r(w) - s(-w), layers=TWO),
    Row("2", "10x - 9(relu(x) - relu(-x)), x = 0", "{1}", ((1,),), (10,), UNCERTIFIED,
        lambda w, r, s: 10 * w - 9 * (r(w) - s(-w)), layers=TWO),
    Row("3", "relu(x) - clamp(x, min=0), x = 0", "{0}", ((0,),), (-1,), UNCERTIFIED,
        lambda w, r: r(w) - w.clamp(min=0), layers=("relu",)),
    Row("3b", "relu(x) - relu(x), x = 0", "{0}", ((0,),), (0,), CERTIFIED,
        lambda w, r, s: r(w) - s(w), layers=TWO),
    Row("4", "(relu(-t) + t) - relu(t), t = 0", "{0}", ((0,),), (1,), UNCERTIFIED,
        lambda w, r, s: (r(-w) + w) - s(w), layers=TWO),
    Row("5", "t - ((relu(-t) + t) - relu(t)), t = 0", "{1}", ((1,),), (0,), UNCERTIFIED,
        lambda w, r, s: w - ((r(-w) + w) - s(w)), layers=TWO),
    Row("6", "h(-h(x)), h = clamp(min=0), x = 0", "{0}", ((0,),), (-1,), UNCERTIFIED,
        lambda w: (-w.clamp(min=0)).clamp(min=0)),
    Row("6b", "relu(-relu(x)), x = 0", "{0}", ((0,),), (0,), CERTIFIED,
        lambda w, r, s: s(-r(w)), layers=TWO),
    Row("7", "relu(w) - relu(2w), w = 0", "[-1, 0]", ((-1,), (0,)), (0,), CERTIFIED,
        lambda w, r, s: r(w) - s(2 * w), layers=TWO),
    Row("8", "relu(x) + clamp(x, min=0) - clamp(x, min=0), x = 0", "[0, 1]", ((0,), (1,)), (0,), CERTIFIED,
        lambda w, r: r(w) + w.clamp(min=0) - w.clamp(min=0), layers=("relu",)),
    Row("9", "hardsigmoid(3+w) + hardsigmoid(-3+w), w = 0", "{1/6}", ((1 / 6,),), (0,), UNCERTIFIED,
        _hard_sigmoids),
    Row("9b.1", "hardtanh(1+w) + hardtanh(-1+w), w = 0", "{1}", ((1,),), (0,), UNCERTIFIED, _hard_tanhs),
    Row("9b.2", "relu6(6+w) + relu6(w), w = 0", "{1}", ((1,),), (0,), UNCERTIFIED,
        lambda w: nn.functional.relu6(6 + w) + nn.functional.relu6(w)),
    Row("10", "max(u+b, b) - max(-u+b, b) by MaxPool2d, (u, b) = (0, 0)", "{(1, 0)}", ((1, 0),), (2, 0),
        UNCERTIFIED, _lemma7, (0.0, 0.0), ("pool", "pool")),
    Row("10b", "the same by torch.maximum", "{(1, 0)}", ((1, 0),), (1, 0), CERTIFIED, _even_lemma7, (0.0, 0.0)),
    Row("11", "clamp(x, min=0) + clamp(x, max=0), x = 0", "{1}", ((1,),), (2,), UNCERTIFIED,
        lambda w: w.clamp(min=0) + w.clamp(max=0)),
    Row("12", "2 relu(x) - x - abs(x), x = 0", "{0}", ((0,),), (-1,), OUTSIDE,
        lambda w, r: 2 * r(w) - w - w.abs(), layers=("relu",)),
    Row("13", "max_pool1d(a, b) - amax(a, b), a = b = 1", "{(0, 0)}", ((0, 0),), (0.5, -0.5), OUTSIDE,
        _pool_minus_amax, (1.0, 1.0)),
    Row("14", "sqrt(x^2), x = 0", "[-1, 1]", ((-1,), (1,)), (math.nan,), OUTSIDE,
        lambda w: (w * w).sqrt()),
    Row("15", "where(x == 0, 0, x), x = 0", "{1}", ((1,),), (0,), OUTSIDE,
        lambda w: torch.where(w == 0, torch.zeros_like(w), w)),
    Row("16", "where(x > 0, sqrt(x), 0), x = -1", "{0}", ((0,),), (math.nan,), OUTSIDE,
        lambda w: torch.where(w > 0, w.sqrt(), torch.zeros_like(w)), (-1.0,)),
    Row("16b", "x*(x>0) - (-x)*(-x>0), x = 0", "{1}", ((1,),), (0,), OUTSIDE,
        lambda w: w * (w > 0) - (-w) * (-w > 0)),
    Row("16c", "x[x>0].sum() - (-x)[-x>0].sum(), x = 0", "{1}", ((1,),), (0,), OUTSIDE,
        lambda w: w[w > 0].sum() - (-w)[-w > 0].sum()),
    Row("17", "max(min(x1, -x2), x2 - x1), (x1, x2) = (0, 0)", "conv{(1,0), (0,-1), (-1,1)}",
        ((1, 0), (0, -1), (-1, 1)), (-0.25, 0.25), CERTIFIED, _khan_barton, (0.0, 0.0)),
    Row("18", "relu(x) + relu(-x), x = 0", "[-1, 1]", ((-1,), (1,)), (0,), CERTIFIED,
        lambda w, r, s: r(w) + s(-w), layers=TWO),
    Row("19", "conv + relu + max pool, two samples with the tied patches swapped, z1 - z2", "{(0, 0, 0)}",
        ((0, 0, 0),), (-1, 1, 0), UNCERTIFIED, _swapped(1, -1), (), ("network",)),
    Row("19.1", "the first sample of row 19 alone, z1", "conv{(1,2,1), (2,1,1)}", ((1, 2, 1), (2, 1, 1)),
        (1, 2, 1), CERTIFIED, _swapped(1, 0), (), ("network",)),
    Row("19.2", "the second sample of row 19 alone, -z2", "conv{(-1,-2,-1), (-2,-1,-1)}",
        ((-1, -2, -1), (-2, -1, -1)), (-2, -1, -1), CERTIFIED, _swapped(0, -1), (), ("network",)),
)
