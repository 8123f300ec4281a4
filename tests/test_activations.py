"""Kinked activations: the table against the running torch, and what a step makes of their touches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert import Verdict, activations, certify
from adcert.activations import Activation

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TABLE = [
    activations.relu(), activations.hardtanh(0.0, 6.0), activations.hardtanh(-1.0, 1.0),
    activations.hardtanh(-0.1, 0.1), activations.clamp(0.0, None), activations.clamp(None, 0.1),
    activations.clamp(-0.1, 0.2), activations.magnitude(),
    activations.leaky_relu(0.01), activations.leaky_relu(-0.5), activations.prelu(), activations.hardsigmoid(),
    activations.hardswish(), activations.softshrink(0.5), activations.softshrink(0.1), activations.threshold(0.1),
    activations.elu(2.0), activations.elu(0.5), activations.elu(*activations.SELU),
]  # fmt: skip
table = pytest.mark.parametrize("rho", TABLE, ids=lambda rho: f"{rho.name}{rho.arguments}")


def derivative(rho: Activation, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(rho.compute(x).sum(), x)[0]


@table
@pytest.mark.parametrize("dtype", DTYPES)
def test_slopes_are_those_of_torch(rho: Activation, dtype: torch.dtype) -> None:
    """At random points, at every kink and next to it; the exact slope lies within the radius of what AD computes."""
    kinks = torch.tensor(rho.kinks, dtype=torch.float64).to(dtype)
    points = [torch.linspace(-7, 7, 301, dtype=torch.float64).to(dtype), kinks]
    points += [torch.nextafter(kinks, torch.tensor(end, dtype=dtype)) for end in (-math.inf, math.inf)]
    x = torch.cat(points)
    left = torch.full_like(x, 0.25) if rho.name == "prelu" else None
    found = rho.slope(rho.code(x), x, x, left)
    away = (derivative(rho, x).to(torch.float64) - found.value).abs()
    slack = 2.0**-6 if dtype in (torch.bfloat16, torch.float16) else 2.0**-21  # AD rounds its product
    assert (away <= (0.0 if found.radius is None else found.radius) + (found.value.abs() + 1) * slack).all()
    flat = found.value == 0
    assert torch.equal(derivative(rho, x)[flat].abs().to(torch.float64), found.value[flat].abs())


@table
def test_one_sided_derivatives_are_limits_of_slopes(rho: Activation) -> None:
    for kink, (below, above) in zip(rho.kinks, rho.ends, strict=True):
        for sign, expected in ((-1, below), (1, above)):
            x = torch.tensor([kink + sign * 1e-9], dtype=torch.float64)
            assert abs(float(derivative(rho, x)) - expected) < 1e-6
            near = torch.tensor([kink + sign * 1e-6, kink], dtype=torch.float64)
            assert abs(float(rho.compute(near).diff()) / (-sign * 1e-6) - expected) < 1e-4


@table
def test_sides_are_measured(rho: Activation) -> None:
    """A proxy is the derivative of the side it is said to be of."""
    for dtype in DTYPES:
        like = torch.zeros(1, dtype=dtype)
        sides = rho.sides(like)
        assert sides is not None
        for side, proxy, ends in zip(sides, rho.proxies(like), rho.ends, strict=True):
            assert side == 0 or abs(proxy - ends[(side + 1) // 2]) <= 0.01 * max(map(abs, ends))


def test_a_kink_that_lies_elsewhere_is_noticed() -> None:
    moved = Activation("moved", (), (1.0,), (0.0, 1.0), ((0.0, 1.0),), torch.relu)
    assert moved.sides(torch.zeros(1)) is None
    same = Activation("smooth", (), (1.0,), (1.0, 1.0), ((1.0, 1.0),), lambda x: x * 1)
    assert same.sides(torch.zeros(1)) == (0,)


MODULES: list[tuple[nn.Module, float, int]] = [  # module, a kink, which of its kinks
    (nn.ReLU(), 0.0, -1), (nn.ReLU6(), 0.0, -1), (nn.ReLU6(), 6.0, 1),
    (nn.Hardtanh(), -1.0, -1), (nn.Hardtanh(), 1.0, 1),
    (nn.LeakyReLU(0.5), 0.0, -1), (nn.PReLU(dtype=torch.float64), 0.0, -1), (nn.RReLU(), 0.0, -1),
    (nn.Hardsigmoid(), -3.0, -1), (nn.Hardsigmoid(), 3.0, 1), (nn.Hardswish(), -3.0, -1), (nn.Hardswish(), 3.0, 1),
    (nn.Softshrink(1.0), -1.0, 1), (nn.Softshrink(1.0), 1.0, -1), (nn.ELU(2.0), 0.0, -1), (nn.SELU(), 0.0, -1),
    (nn.Threshold(1.0, 1.0), 1.0, -1),
]  # fmt: skip


@pytest.mark.parametrize(("module", "kink", "side"), MODULES, ids=lambda value: str(value)[:24])
def test_a_touch_by_hand(module: nn.Module, kink: float, side: int) -> None:
    """rho(w) at its kink is certified by a direction to the proxy's side; rho(w) - rho(2 kink - w) is not."""
    w = nn.Parameter(torch.tensor([kink], dtype=torch.float64))
    holder = nn.Module()
    holder.w, holder.rho = w, adcert.convert(copy.deepcopy(module))
    alone = certify(lambda: holder.rho(w).sum(), holder)
    assert alone.verdict is Verdict.CERTIFIED, alone.reasons
    assert math.copysign(1, float(alone.directions["w"])) == side
    alone.verify()
    against = certify(lambda: (holder.rho(w) - holder.rho(2 * kink - w)).sum(), holder)
    assert against.verdict is Verdict.UNCERTIFIED, against.reasons
    against.verify()


FUNCTIONS: list[tuple[str, Callable[[Tensor], Tensor], float]] = [
    ("relu6", lambda y: F.relu6(y, inplace=True), 6.0),
    ("hardtanh", lambda y: F.hardtanh_(y, -2.0, 2.0), -2.0),
    ("leaky_relu", lambda y: F.leaky_relu(y, 0.1, True), 0.0),
    ("leaky_relu", lambda y: F.leaky_relu_(y, 0.1), 0.0),
    ("elu", lambda y: F.elu(y, 2.0, inplace=True), 0.0),
    ("selu", lambda y: torch.selu_(y), 0.0),
    ("hardswish", lambda y: F.hardswish(y, True), 3.0),
    ("hardsigmoid", lambda y: F.hardsigmoid(y, inplace=True), -3.0),
    ("threshold", lambda y: F.threshold(y, 1.0, 1.0, True), 1.0),
    ("rrelu", lambda y: F.rrelu(y, 0.1, 0.3, True, True), 0.0),
    ("clamp", lambda y: y.clamp_(min=1), 1.0),
    ("clip", lambda y: torch.clip(y, -5, 1), 1.0),
    ("clamp_max", lambda y: y.clamp_max(2.0), 2.0),
]


@pytest.mark.parametrize(("name", "function", "kink"), FUNCTIONS)
def test_functional_and_in_place_calls(name: str, function: Callable[[Tensor], Tensor], kink: float) -> None:
    """Bitwise torch's value and gradient, and every touch is seen, whatever memory is overwritten."""
    values = torch.tensor([kink, kink - 1, kink + 1, kink], dtype=torch.float64)
    plain, ours = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    torch.manual_seed(3)
    function(plain * 1.0).sum().backward()
    torch.manual_seed(3)
    certificate = certify(lambda: function(ours * 1.0).sum(), nn.ParameterList([ours]))
    assert torch.equal(plain.grad, ours.grad)  # type: ignore[arg-type]
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons
    assert certificate.layers[0].touches == 2
    assert certificate.layers[0].name.startswith(name)


@pytest.mark.parametrize("module", [nn.Hardshrink(), nn.Threshold(1.0, 0.0)])
def test_discontinuous_activations_are_refused(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), module)
    with pytest.raises(adcert.AdcertError, match=r"2 is a .* discontinuous"):
        adcert.convert(model)
    assert type(model[1]) is nn.ReLU  # nothing was swapped


def test_abs_needs_a_choice_of_both_sides() -> None:
    """|w| at 0: AD says 0, dC = [-1, 1]; |w| - relu(w) - relu(-w) is 0, and only with sides of its own choice."""
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    model = nn.ParameterList([w])
    assert certify(lambda: w.abs().sum(), model).verdict is Verdict.CERTIFIED
    with torch.no_grad():
        w[0] = 0
    touched = certify(lambda: w.abs().sum(), model)
    assert (touched.verdict, touched.claim) == (Verdict.CERTIFIED, "clarke")
    mixed = certify(lambda: (w.abs() - torch.relu(w) - torch.relu(-w)).sum(), model)
    assert (mixed.verdict, mixed.theorem) == (Verdict.CERTIFIED, "Theorem H")
    wrong = certify(lambda: (w.abs() - 2 * torch.relu(w) + w).sum(), model)
    assert wrong.verdict is not Verdict.CERTIFIED


def test_prelu_slopes_take_part() -> None:
    """relu(prelu(w, a)) at w = -1, a = 0: y = 0 moves with a alone; relu(-prelu(w, a)) asks the opposite.

    The sum of both is |y|, with AD's 0 in the middle; their difference is y, whose derivative in a is -1.
    """
    w = nn.Parameter(torch.tensor([-1.0], dtype=torch.float64))
    a = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    model = nn.ParameterDict({"w": w, "a": a})
    one = certify(lambda: torch.relu(F.prelu(w, a)).sum(), model)
    assert one.verdict is Verdict.CERTIFIED, one.reasons
    assert float(one.directions["a"]) > 0  # relu's proxy 0 is the left side: -<g, p> = p_a > 0
    both = certify(lambda: (torch.relu(F.prelu(w, a)) + torch.relu(-F.prelu(w, a))).sum(), model)
    assert (both.verdict, both.theorem) == (Verdict.CERTIFIED, "Theorem H"), both.reasons
    both = certify(lambda: (torch.relu(F.prelu(w, a)) - torch.relu(-F.prelu(w, a))).sum(), model)
    assert both.verdict is Verdict.UNCERTIFIED, both.reasons


def test_slopes_that_are_equal_numbers_are_not_one_parameter() -> None:
    """max(a1 w, a2 w) - max(a2 w, a1 w) is 0; AD gives a1 and a2 the gradients -1 and 1 at a1 = a2."""
    w = nn.Parameter(torch.tensor([[-1.0]], dtype=torch.float64))
    a = nn.Parameter(torch.tensor([0.5, 0.5], dtype=torch.float64))

    def loss() -> Tensor:
        z = F.prelu(w.expand(1, 2), a)
        return (z.max(1).values - z.flip(1).max(1).values).sum()

    certificate = certify(loss, nn.ParameterDict({"w": w, "a": a}))
    assert a.grad is not None
    assert a.grad.tolist() == [-1.0, 1.0]
    assert certificate.verdict is Verdict.UNCERTIFIED, certificate.reasons


def test_a_scale_of_elu_is_not_taken_for_another_argument() -> None:
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    certificate = certify(lambda: F.elu_(w * 1.0, 2.0, -3.0).sum(), nn.ParameterList([w]))
    assert certificate.verdict is Verdict.UNDECIDED


def test_no_slopes_for_no_units() -> None:
    w, a = nn.Parameter(torch.zeros(3, 0)), nn.Parameter(torch.zeros(0))
    certify(lambda: F.prelu(w, a).sum() + w.sum(), nn.ParameterList([w, a]))
    assert w.grad is not None  # the program goes on
    assert w.grad.shape == (3, 0)


# ---- proxies of the user's own ---------------------------------------------------------------------


def test_proxies_change_the_gradient_and_the_side() -> None:
    for proxy, side in ((0.0, -1), (1.0, 1)):
        holder = nn.Module()
        holder.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        holder.rho = adcert.nn.ReLU(proxy=proxy)
        certificate = certify(lambda holder=holder: holder.rho(holder.w).sum(), holder)
        assert float(holder.w.grad) == proxy
        assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons
        assert float(certificate.directions["w"]) * side > 0


def test_a_proxy_in_between_is_not_covered_by_theorem_8() -> None:
    holder = nn.Module()
    holder.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    holder.rho = adcert.nn.ReLU(proxy=0.5)
    certificate = certify(lambda: (holder.rho(2 * holder.w) - holder.rho(holder.w)).sum(), holder)
    assert float(holder.w.grad) == 0.5
    assert certificate.verdict is Verdict.UNDECIDED
    with torch.no_grad():
        holder.w += 1
    assert certify(lambda: holder.rho(holder.w).sum(), holder).verdict is Verdict.CERTIFIED


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adcert.nn.ReLU(proxy=1.5), "not between"),
        (lambda: adcert.nn.ReLU(True, proxy=0.5), "in place"),
        (lambda: adcert.nn.Hardtanh(proxy=0.5), "2 numbers"),
        (lambda: adcert.nn.ELU(2.0, proxy=0.5), "not between"),
    ],
)
def test_impossible_proxies(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(adcert.AdcertError, match=message):
        make()


def test_two_kinks_take_two_proxies() -> None:
    module = adcert.nn.Hardtanh(proxy=(1.0, 0.0))
    assert "proxy=(1.0, 0.0)" in repr(module)
    x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0]


# ---- kinks inside torch's own functions ------------------------------------------------------------


def test_a_kink_inside_a_function_is_found_in_the_graph() -> None:
    """|prediction - target| of l1_loss: AD says 0 where they agree, which is between the sides."""
    linear = nn.Linear(1, 2, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.bias.zero_()
    x, target = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    certificate = certify(lambda: F.l1_loss(linear(x), target), linear)
    assert (certificate.verdict, certificate.claim) == (Verdict.CERTIFIED, "clarke"), certificate.reasons
    assert certificate.layers[0].touches == 1
    assert certificate.layers[0].name.startswith("abs (l1_loss at test_activations.py")


def test_a_clamp_inside_normalize_is_found_where_it_is_touched() -> None:
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    model = nn.ParameterList([w])
    assert certify(lambda: F.normalize(w).sum(), model).verdict is Verdict.CERTIFIED
    touched = certify(lambda: F.normalize(w, eps=5.0).sum(), model)
    assert touched.layers[0].touches == 1, touched.reasons
    assert touched.verdict is Verdict.CERTIFIED, touched.reasons
