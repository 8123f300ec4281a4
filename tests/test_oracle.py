"""The oracle against hand-derived cases first, then against torch's autograd and against itself."""

from __future__ import annotations

import copy
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from networks import Network, Residual, random_network
from torch import nn
from torch.nn.utils import skip_init

from adcert import oracle
from adcert.oracle.arcs import Arcs
from adcert.oracle.cells import Cells, enumerate_cells
from adcert.oracle.hull import alternative, in_hull, null_vector
from adcert.oracle.localize import localized
from adcert.oracle.program import Array, Program
from adcert.oracle.replay import moved
from adcert.oracle.subdifferential import Evidence


def trace(case: Network) -> Program:
    return oracle.trace(case.closure, case.model)


def ad_gradient(case: Network) -> Array:
    return np.concatenate([g.flatten().numpy() for g in oracle.ad_gradient(case.closure, case.model).values()])


def cells_of(case: Network, budget: int = 2000, seed: int = 0) -> Cells:
    return enumerate_cells(localized(trace(case)), budget, seed)


def exact_elements(case: Network) -> Array | None:
    """All elements of dB f(w), integers [m, P]; None when that is not certain."""
    known = oracle.subdifferential(case.closure, case.model, samples=0)
    return whole(known.matrix) if known.complete and not known.possible else None


def bouligand_elements(case: Network, samples: int = 240, directions: Array | tuple = ()) -> Array:
    """The elements met along random arcs, integers [m, P]."""
    evidence = Evidence(trace(case), case.seed)
    evidence.sample(samples, directions, 0)
    return whole(evidence.known().matrix)


def whole(matrix: Array) -> Array:
    assert all(x.denominator == 1 for x in matrix.ravel())
    return matrix.astype(np.int64)


def judge(case: Network, **settings: int) -> oracle.Judgement:
    return oracle.judge(case.closure, case.model, **settings)


def replays(case: Network, directions: dict, scales: dict) -> oracle.Replay:
    return oracle.replays(case.closure, case.model, directions, scales)


def confirm(case: Network, directions: dict, scales: dict) -> oracle.Confirmation:
    return oracle.confirm(case.closure, case.model, directions, scales)


def linear(rows: list[list[float]], frozen: bool = True) -> nn.Linear:
    """A linear layer with these weight rows, no bias, constant unless said otherwise."""
    module = skip_init(nn.Linear, len(rows[0]), len(rows), bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(rows))
    return module.requires_grad_(not frozen)


def parameters(*values: float) -> nn.Linear:
    """Trainable numbers (x_1, ..., x_n), as a linear layer with one input: input 1 yields them, -1 minus
    them."""
    return linear([[value] for value in values], frozen=False)


class LogGamma(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.lgamma(x)


def convolution(weight: float, bias: float | None) -> nn.Conv2d:
    module = skip_init(nn.Conv2d, 1, 1, 1, bias=bias is not None, dtype=torch.float64)
    with torch.no_grad():
        module.weight.fill_(weight)
        if bias is not None:
            module.bias.fill_(bias)
    return module


def network(model: nn.Module, inputs: list, weights: list) -> Network:
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (inputs, weights)]
    return Network(0, "hand-made", model, *tensors)


def pooled(weights: list[float], images: list, bias: float | None) -> Network:
    model = nn.Sequential(convolution(0.0, bias), nn.MaxPool2d(2))
    return network(model, [[image] for image in images], [[[[c]]] for c in weights])


def branches(*body: nn.Module) -> nn.Sequential:
    return nn.Sequential(*body)


PLUS_MINUS = [[1.0], [-1.0]]
SKIP = Residual(branches(linear([[-1], [1]]), nn.ReLU(), linear([[1, -1]])))  # t + relu(-t) - relu(t)

# row of the gallery -> network, AD's gradient, the Bouligand elements, AD in dC?, AD in dB?
GALLERY = {
    "1": (
        network(nn.Sequential(parameters(0), nn.ReLU()), PLUS_MINUS, [[1.0], [-1.0]]),
        [0],
        [[1]],
        False,
        False,
    ),
    "2": (
        network(
            nn.Sequential(
                parameters(0),
                linear([[10], [1]]),
                Residual(branches(linear([[0, 1], [0, -1]]), nn.ReLU(), linear([[-9, 9], [0, 0]]))),
            ),
            [[1.0]],
            [[1.0, 0.0]],
        ),
        [10],
        [[1]],
        False,
        False,
    ),
    "3b": (
        network(nn.Sequential(parameters(0), nn.ReLU()), [[1.0], [1.0]], [[1.0], [-1.0]]),
        [0],
        [[0]],
        True,
        True,
    ),
    "4": (network(nn.Sequential(parameters(0), SKIP), [[1.0]], [[1.0]]), [1], [[0]], False, False),
    "5": (
        network(
            nn.Sequential(
                parameters(0),
                linear([[1], [1]]),
                Residual(branches(linear([[0, -1], [0, 1]]), nn.ReLU(), linear([[0, 0], [1, -1]]))),
            ),
            [[1.0]],
            [[1.0, -1.0]],
        ),
        [0],
        [[1]],
        False,
        False,
    ),
    "6b": (
        network(nn.Sequential(parameters(0), nn.ReLU(), linear([[-1]]), nn.ReLU()), [[1.0]], [[1.0]]),
        [0],
        [[0]],
        True,
        True,
    ),
    "7": (
        network(nn.Sequential(parameters(0), nn.ReLU()), [[1.0], [2.0]], [[1.0], [-1.0]]),
        [0],
        [[-1], [0]],
        True,
        True,
    ),
    "10": (
        pooled([1.0, -1.0], [[[1, 0], [0, 0]], [[-1, 0], [0, 0]]], bias=0.0),
        [2, 0],
        [[1, 0]],
        False,
        False,
    ),
    "18": (
        network(nn.Sequential(parameters(0), nn.ReLU()), PLUS_MINUS, [[1.0], [1.0]]),
        [0],
        [[-1], [1]],
        True,
        False,
    ),
    # max(w, 2w) - max(2w, w): the tied patches in swapped order; together wrong, each sample alone right
    "19": (
        pooled([1.0, -1.0], [[[1, 2], [1, 1]], [[2, 1], [1, 1]]], bias=None),
        [-1],
        [[0]],
        False,
        False,
    ),
    "19, first sample": (pooled([1.0], [[[1, 2], [1, 1]]], bias=None), [1], [[1], [2]], True, True),
    "19, second sample": (pooled([-1.0], [[[2, 1], [1, 1]]], bias=None), [-2], [[-2], [-1]], True, True),
    # relu(relu(w)) - relu(w) through a residual sum: -h + relu(h) with h = relu(w)
    "nested": (
        network(
            nn.Sequential(
                parameters(0),
                nn.ReLU(),
                linear([[1], [1]]),
                Residual(branches(nn.ReLU(), linear([[0, 0], [1, 0]]))),
            ),
            [[1.0]],
            [[-2.0, 1.0]],
        ),
        [0],
        [[0]],
        True,
        True,
    ),
}


def as_rows(elements: Array) -> list[list[int]]:
    return sorted(map(list, elements.tolist()))


@pytest.mark.parametrize("row", GALLERY)
def test_gallery(row: str) -> None:
    case, gradient, elements, clarke, bouligand = GALLERY[row]
    assert ad_gradient(case).tolist() == gradient
    assert as_rows(bouligand_elements(case)) == elements
    assert as_rows(exact_elements(case)) == elements
    judgement = judge(case)
    assert judgement.member is clarke
    assert judgement.bouligand is bouligand


def test_gallery_17_khan_barton() -> None:
    """max(min(x1, -x2), x2 - x1) at 0, from max(a, b) = b + relu(a - b): elements (1,0), (0,-1), (-1,1)."""
    case = network(
        nn.Sequential(
            parameters(0, 0),
            linear([[0, 1], [-1, 1], [-1, -1]]),  # x2, x2 - x1, -x1 - x2
            Residual(branches(linear([[0, 0, 1]]), nn.ReLU(), linear([[1], [0], [0]]))),  # -min in place 0
            Residual(branches(linear([[-1, -1, 0]]), nn.ReLU(), linear([[0], [1], [0]]))),
        ),
        [[1.0]],
        [[0.0, 1.0, 0.0]],
    )
    assert as_rows(bouligand_elements(case)) == [[-1, 1], [0, -1], [1, 0]]
    assert as_rows(exact_elements(case)) == [[-1, 1], [0, -1], [1, 0]]
    # The table's AD value lies in the hull, with equal fourths and a half; a point outside is separated.
    assert in_hull(4 * exact_elements(case), np.array([-1, 1])).member is True
    assert in_hull(exact_elements(case), np.array([1, 1])).member is False


def cusp() -> Network:
    """relu(a w + b v) - relu(c w + d v) at w = v = b = d = 0, a = c = 1.

    To first order both arguments are w. The cell {a w + b v > 0 > c w + d v} lies inside |w| < |(b, d)|
    |v|: a cusp.
    """
    model = nn.Sequential(parameters(0, 0), linear([[1, 0], [1, 0]], frozen=False), nn.ReLU())
    return network(model, [[1.0]], [[1.0, -1.0]])


def test_element_of_a_narrow_cell_is_found() -> None:
    unit = [1, 0, 0, 0, 0, 0]
    minus = [-1, 0, 0, 0, 0, 0]
    assert as_rows(bouligand_elements(cusp())) == [minus, [0] * 6, unit]
    cells = cells_of(cusp())
    assert cells.complete
    assert as_rows(cells.certain) == [[0] * 6]
    assert as_rows(cells.possible) == [minus, unit]
    assert exact_elements(cusp()) is None, "first-order analysis cannot tell: it must say so"


def test_element_near_the_boundary_of_the_hull() -> None:
    """max(x, 0) + max(999 x - y, 0) at 0: (1, 0) is the element of the wedge 0 < x < y / 999 only."""
    case = network(nn.Sequential(parameters(0, 0), linear([[1, 0], [999, -1]]), nn.ReLU()), [[1.0]], [[1.0, 1.0]])
    expected = [[0, 0], [1, 0], [999, -1], [1000, -1]]
    assert as_rows(exact_elements(case)) == expected
    assert [1, 0] in as_rows(bouligand_elements(case))


def test_separated_without_all_cells_is_not_claimed() -> None:
    """With no budget for cells, a sampled hull that misses g yields unknown, never False."""
    case = GALLERY["1"][0]
    assert judge(case, budget=0).member is None
    assert judge(case).member is False


# ---- hull and alternatives -----------------------------------------------------------------------


def test_in_hull_returns_exact_proofs() -> None:
    elements = np.array([[0, 0, 1], [3, 0, 1], [0, 7, 1]])
    inside = in_hull(elements, np.array([1, 2, 1]))
    assert inside.member is True
    assert inside.weights == {0: Fraction(8, 21), 1: Fraction(1, 3), 2: Fraction(2, 7)}
    outside = in_hull(elements, np.array([3, 7, 1]))
    assert outside.member is False
    assert all((elements - np.array([3, 7, 1])) @ np.array(outside.separator) > 0)
    assert in_hull(elements, np.array([1, 2, 0])).member is False, "off the affine hull"
    assert in_hull(elements, np.array([0, 7, 1])).member is True, "a vertex"


def test_hull_of_many_elements_is_searched_by_subsets() -> None:
    angle = np.arange(400) * (2 * np.pi / 400)
    circle = np.rint(10**6 * np.stack([np.cos(angle), np.sin(angle)], axis=1)).astype(np.int64)
    assert in_hull(circle, np.array([999_000, 0])).member is True
    assert in_hull(circle, np.array([1_000_001, 0])).member is False


def test_alternative_opposite_and_zero_rows() -> None:
    assert alternative(np.array([[1], [-1]])).weights == {0: 1, 1: 1}
    assert alternative(np.array([[1, 0], [0, 0]])).weights == {1: 1}
    assert alternative(np.zeros((0, 3), dtype=np.int64)).direction == (0, 0, 0)
    rows = np.array([[1, -1000], [-1, 1001]])
    direction = np.array(alternative(rows).direction)
    assert (rows @ direction > 0).all()
    assert null_vector(np.array([[1, 0], [0, 1]])) is None
    assert null_vector(np.array([[1, 1], [1, -1], [4, 2]])) == [3, 1, -1]


# ---- the interpreter against torch ---------------------------------------------------------------


def with_parameters(case: Network, theta: list) -> Network:
    slices = trace(case).slices
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.tensor([float(x) for x in theta[slices[name]]], dtype=torch.float64)
            parameter.copy_(values.reshape(parameter.shape))
    return Network(case.seed, case.kind, model, case.inputs, case.weights)


@pytest.mark.parametrize("seed", range(60))
def test_interpreter_equals_torch_at_generic_points(seed: int) -> None:
    case = random_network(seed)
    program = trace(case)
    theta = np.random.default_rng(seed).integers(-999, 1000, len(program.parameters)).tolist()
    here = moved(program, [Fraction(x) for x in theta])
    there = with_parameters(case, theta)
    assert there.closure().item() == pytest.approx(float(here.value(here.output)), rel=1e-13)
    cells = enumerate_cells(localized(here))
    assert cells.complete and len(cells.certain) == 1 and len(cells.possible) == 0
    assert np.array_equal(cells.certain[0].astype(np.float64), ad_gradient(there))


@pytest.mark.parametrize("seed", range(100, 160))
def test_limits_are_torch_gradients_near_w(seed: int) -> None:
    """At w + 2^-30 p every float64 product is nearly exact; torch's gradient is close to the limit."""
    case = random_network(seed)
    program = trace(case)
    rng = np.random.default_rng(seed)
    arcs = rng.integers(-999, 1000, (1, 3, len(program.parameters)))
    limits, valid = Arcs(localized(program)).limits(arcs, rng)
    assert valid.sum() >= 2, "an integer arc is generic but for rare coincidences"
    for limit, step in zip(limits[valid], arcs[0][valid], strict=True):
        there = with_parameters(case, [w + Fraction(int(x), 2**30) for w, x in zip(program.point, step, strict=True)])
        assert np.abs(ad_gradient(there) - limit).max() < 2.0**-12


@pytest.mark.parametrize("seed", range(200, 280))
def test_cells_explain_every_sample_and_are_met_by_arcs(seed: int) -> None:
    """Two independent methods: no sampled element escapes a complete enumeration, each certain cell is a
    true limit."""
    case = random_network(seed)
    cells = cells_of(case, budget=600, seed=seed)
    sampled = set(map(tuple, bouligand_elements(case, 90).tolist()))
    if cells.complete:
        known = set(map(tuple, np.concatenate([cells.certain, cells.possible]).tolist()))
        assert sampled <= known
    met = set(map(tuple, bouligand_elements(case, 3, directions=cells.directions[:40]).tolist()))
    assert set(map(tuple, cells.certain[:40].tolist())) <= met


# ---- witnesses -----------------------------------------------------------------------------------


def test_witness_of_gallery_7() -> None:
    case = GALLERY["7"][0]
    right = replays(case, {"0.weight": torch.tensor([[-1.0]])}, {"0.weight": 1})
    assert right.reproduces
    assert right.limit == (0,)
    assert right.distances[-1] == 0.0
    wrong = replays(case, {"0.weight": torch.tensor([[1.0]])}, {"0.weight": 1})
    assert not wrong.reproduces
    assert wrong.limit == (-1,)
    assert not confirm(case, {"0.weight": torch.tensor([[1.0]])}, {}).false_certificate


def test_larger_rank_moves_more() -> None:
    """relu(u + b) at 0 with u up by 1 and b down by 1/8: AD's 0 is the limit iff b outranks u."""
    case = network(nn.Sequential(convolution(0.0, 0.0), nn.ReLU()), [[[[1.0]]]], [[[[1.0]]]])
    step = {"0.weight": torch.ones(1, 1, 1, 1), "0.bias": torch.tensor([-0.125])}
    assert replays(case, step, {"0.weight": 1, "0.bias": 2}).limit == (0, 0)
    assert replays(case, step, {"0.weight": 2, "0.bias": 1}).limit == (1, 1)
    assert replays(case, step, {"0.weight": 1, "0.bias": 1}).limit == (1, 1)


def test_a_witness_of_many_ranks_is_followed_as_far_as_it_takes() -> None:
    """relu(w v) at (0, 0) along noise of size t^13: what decides is t^26."""
    case = network(nn.Sequential(parameters(0), linear([[0]], frozen=False), nn.ReLU()), [[1.0]], [[1.0]])
    replay = replays(case, {}, {"0.weight": 6})
    assert replay.limit == (0, 0)
    assert replay.reproduces


def test_distances_shrink_with_the_scale() -> None:
    """w2 relu(w1) at (0, 3) with w1 < 0 is constant; with w1 > 0 the gradient (w2, w1) differs by 3."""
    model = nn.Sequential(parameters(0), nn.ReLU(), linear([[3]], frozen=False))
    case = network(model, [[1.0]], [[1.0]])
    down = replays(case, {"0.weight": torch.tensor([[-1.0]]), "2.weight": torch.tensor([[1.0]])}, {})
    assert down.distances == (0.0,) * len(down.distances)
    up = replays(case, {"0.weight": torch.tensor([[1.0]])}, {})
    assert up.limit == (3, 0)
    assert up.distances[-1] == pytest.approx(3.0)
    shifted = network(nn.Sequential(parameters(1), nn.ReLU(), linear([[3]], frozen=False)), [[1.0]], [[1.0]])
    distances = replays(shifted, {"2.weight": torch.tensor([[1.0]])}, {}).distances
    assert distances[0] > 0.0
    assert distances[-1] == 0.0, "below the resolution of float64"
    assert all(a > b or a == b == 0 for a, b in pairwise(distances))


def test_a_false_certificate_is_confirmed_as_such() -> None:
    confirmation = confirm(GALLERY["1"][0], {"0.weight": torch.tensor([[-1.0]])}, {"0.weight": 1})
    assert confirmation.false_certificate
    assert confirmation.replay.limit == (1,)


def test_unknown_parameter_and_unknown_module_are_errors() -> None:
    with pytest.raises(KeyError, match="nothing"):
        replays(GALLERY["1"][0], {"nothing": torch.zeros(1)}, {})
    with pytest.raises(oracle.OracleError, match="lgamma"):
        judge(network(nn.Sequential(parameters(1), LogGamma()), [[1.0]], [[1.0]]))


def test_judge_is_deterministic_and_its_hull_is_a_proof() -> None:
    for seed in range(25):
        case = random_network(seed)
        first, second = judge(case, budget=300), judge(case, budget=300)
        assert first.member is second.member
        assert np.array_equal(first.elements, second.elements)
        if first.member:
            total = sum(w * first.elements[k].astype(object) for k, w in first.hull.weights.items())
            assert all(total == first.gradient)
        if first.member is False:
            separator = np.array(first.hull.separator)
            assert ((first.elements - first.gradient) @ separator > 0).all()


def test_a_point_between_floats_is_not_rounded() -> None:
    """relu(w + v) on both sides of w + v = 0 by 2^-80, and the gradient (v, w) of w v at such a point."""
    model = nn.Sequential(parameters(1, -1), linear([[1, 1]]), nn.ReLU())
    program = trace(network(model, [[1.0]], [[1.0]]))
    e = Fraction(1, 2**80)
    for shift, gradient in ((e, [1, 1]), (-e, [0, 0])):
        cells = enumerate_cells(localized(moved(program, [Fraction(1), shift - 1])))
        assert as_rows(cells.certain) == [gradient]
    product = trace(network(nn.Sequential(parameters(1), nn.ReLU(), linear([[3]], frozen=False)), [[1.0]], [[1.0]]))
    cells = enumerate_cells(localized(moved(product, [1 + e, 3 - e])))
    assert [x * cells.scale for x in cells.certain[0]] == [3 - e, 1 + e]
