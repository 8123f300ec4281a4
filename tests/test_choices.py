"""Selections of any kind: which pairs decide them, by hand and by brute force, and what a step makes of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert import Verdict, certify, choices
from adcert.choices import Choice


def listed(choice: Choice) -> list[tuple[int, int, int]]:
    """(output, unit that has to become larger, other unit), sorted."""
    return sorted(zip(*(t.tolist() for t in choice.pairs()), strict=True))


# ---- by hand ------------------------------------------------------------------------------------


def test_maximum_along_a_dimension() -> None:
    """Columns of [[1, 5], [1, 4], [0, 5]]: 1 ties in units 0 and 2, 5 in units 1 and 5; the first wins."""
    x = torch.tensor([[1.0, 5.0], [1.0, 4.0], [0.0, 5.0]])
    values, indices = x.max(0, keepdim=True)
    choice = choices.along(x, values, indices, 0, largest=True)
    assert choice.chosen.flatten().tolist() == [0, 1]
    assert choice.windows.tolist() == [0, 1]
    assert listed(choice) == [(0, 0, 2), (1, 1, 5)]


def test_minimum_turns_the_pairs_round() -> None:
    x = torch.tensor([[2.0, 1.0, 1.0]])
    values, indices = x.min(1, keepdim=True)
    assert listed(choices.along(x, values, indices, 1, largest=False)) == [(0, 2, 1)]


def test_a_sort_orders_neighbours() -> None:
    """Ascending 3 1 1 1: the three ones in torch's order, each below the next."""
    x = torch.tensor([3.0, 1.0, 1.0, 1.0])
    values, indices = torch.sort(x, stable=True)
    choice = choices.ordered(x, values, indices, 0, descending=False)
    assert indices.tolist() == [1, 2, 3, 0]
    assert listed(choice) == [(1, 2, 1), (2, 3, 2)]
    assert choice.linked


def test_topk_keeps_out_what_was_left_out() -> None:
    """The two largest of 1 1 1: the selected ones in their order, and the third below both."""
    x = torch.tensor([1.0, 1.0, 1.0])
    values, indices = torch.topk(x, 2)
    first, second = indices.tolist()
    (third,) = {0, 1, 2} - {first, second}
    choice = choices.ordered(x, values, indices, 0, descending=True)
    assert listed(choice) == [(1, first, second), (1, second, third)]


def test_an_unsorted_topk_is_a_sort_in_other_places() -> None:
    """The three largest of 5 2 2 9 2 4, stored as ranks 2, 0, 1: the outputs are 4, 9, 5, and nothing is tied."""
    x, indices = torch.tensor([5.0, 2.0, 2.0, 9.0, 2.0, 4.0]), torch.tensor([5, 3, 0])

    def again(line: torch.Tensor) -> torch.Tensor:
        return line.topk(3).indices[[2, 0, 1]]

    choice = choices.unordered(x, indices, 0, again, descending=True)
    assert (listed(choice), choice.chosen.tolist()) == ([], [5, 3, 0])


def test_an_unsorted_topk_with_ties() -> None:
    """The two largest of 1 3 1 1, stored as ranks 1, 0: the second one has to beat the ones that were left out."""
    x, indices = torch.tensor([1.0, 3.0, 1.0, 1.0]), torch.tensor([2, 1])
    choice = choices.unordered(x, indices, 0, lambda line: line.topk(2).indices.flip(0), descending=True)
    assert listed(choice) == [(0, 2, 0), (0, 2, 3)]


def by_first(line: torch.Tensor) -> torch.Tensor:
    """The two largest, the one at place 0 first if it is one of them: its place depends on more than its rank."""
    found = line.topk(2).indices
    return found if int(found[1]) else found.flip(0)


@pytest.mark.parametrize(
    ("x", "indices", "again", "why"),
    [
        ([1.0, 1.0, 0.0], [0, 1], by_first, "how ties are broken"),
        ([1.0] * 6, [0, 1], lambda line: line.topk(2).indices, "orders"),
        ([2.0, 1.0, 1.0], [1, 2], lambda line: line.topk(2).indices, "not the entries of their ranks"),
    ],
)
def test_an_unsorted_topk_that_is_no_sort(
    x: list[float], indices: list[int], again: Callable[[torch.Tensor], torch.Tensor], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        choices.unordered(torch.tensor(x), torch.tensor(indices), 0, again, descending=True)


def test_ranks_have_to_fit_into_the_dtype() -> None:
    x = torch.arange(-200.0, 200.0).clamp(min=-199).to(torch.bfloat16)
    with pytest.raises(ValueError, match="400 ranks do not fit"):
        choices.unordered(x, x.topk(3).indices, 0, lambda line: line.topk(3).indices, descending=True)


def test_weak_orders() -> None:
    """1, 3, 13 and 75 of them (Fubini), a total one first."""
    assert [len(choices._weak_orders(n)) for n in (1, 2, 3, 4)] == [1, 3, 13, 75]
    assert choices._weak_orders(2) == [(0, 1), (1, 0), (0, 0)]


LAYOUTS: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    "transposed": lambda m, f: f(m.x.t(), m.b[:, None]) * m.x.t().exp(),
    "a number": lambda m, f: f(m.x.t(), m.c) * m.x.t().exp(),
    "channels last": lambda m, f: f(m.i.to(memory_format=torch.channels_last), m.b[:5, None, None]).sin(),
    "not a number": lambda m, f: f(m.x.where(m.x > 0, torch.nan), m.b),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [torch.maximum, torch.minimum, torch.fmax, torch.fmin])
def test_two_tensors_of_several_layouts(layout: str, function: Any) -> None:
    """A sum over a broadcast dimension adds up in the order of the layout: gradients are torch's, bit for bit."""
    torch.manual_seed(0)
    model = nn.Module()
    for name, shape in {"x": (37, 53), "b": (53,), "c": (), "i": (4, 5, 17, 19)}.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    LAYOUTS[layout](model, function).sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    certify(lambda: LAYOUTS[layout](model, function).sum(), model)
    assert plain and all(
        torch.equal(p.grad.nan_to_num(7.0), plain[name].nan_to_num(7.0))  # type: ignore[union-attr]
        for name, p in model.named_parameters()
        if name in plain
    )


def test_a_median_has_members_on_both_sides() -> None:
    """The median of 0 0 0 1 1 is the third zero in rank: of the two other zeros both go below it."""
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    values, indices = x.median(0, keepdim=True)
    chosen = int(indices)
    below = [k for k in (0, 2, 4) if k != chosen]
    assert listed(choices.ranked(x, values, indices, 0, 2)) == [(0, chosen, k) for k in below]


def test_places_of_adaptive_windows_overlap() -> None:
    """5 places in 3 windows: [0, 2), [1, 4), [3, 5)."""
    w = nn.Parameter(torch.tensor([[[1.0, 2.0, 2.0, 2.0, 0.0]]], dtype=torch.float64))
    weights = torch.tensor([1.0, 2.0, 4.0])
    certificate = certify(lambda: (F.adaptive_max_pool1d(w, 3) * weights).sum(), nn.ParameterList([w]))
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons
    assert (certificate.layers[0].windows, certificate.layers[0].ties, certificate.layers[0].rows) == (3, 1, 2)


# ---- by brute force --------------------------------------------------------------------------------


def perturbed(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    """Which input each output is at x + t p for a tiny t: the gradient of a sum with generic weights."""
    y = (x + 2.0**-20 * direction).requires_grad_()
    output = function(y)
    weights = torch.arange(1, output.numel() + 1, dtype=torch.float64).reshape(output.shape)
    (gradient,) = torch.autograd.grad((output * weights).sum(), y)
    return gradient


PLACES = torch.full((1, 1, 2), 0.4)
DRAWN = torch.tensor([[[0.1, 0.4, 0.8]]])
SELECTIONS: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("max", lambda x: torch.max(x, 1).values),
    ("max, kept", lambda x: x.max(dim=0, keepdim=True).values),
    ("min", lambda x: x.min(-1).values),
    ("sort", lambda x: x.sort(0).values),
    ("sort down", lambda x: torch.sort(x, 1, descending=True).values),
    ("topk", lambda x: x.topk(2, 1).values),
    ("least k", lambda x: torch.topk(x, 2, 0, largest=False).values),
    ("median", lambda x: x.median(1).values),
    ("median, kept", lambda x: torch.median(x, 0, keepdim=True).values),
    ("kthvalue", lambda x: x.kthvalue(2, 1).values),
    ("msort", lambda x: torch.msort(x)),
    ("cummax", lambda x: x.cummax(1).values),
    ("cummin", lambda x: torch.cummin(x, 0).values),
    ("max_pool1d", lambda x: F.max_pool1d(x[None], 3, 1, 1)),
    ("max_pool1d with indices", lambda x: F.max_pool1d(x[None], 2, return_indices=True)[0]),
    ("max_pool2d with indices", lambda x: F.max_pool2d(x[None], 2, 1, return_indices=True)[0]),
    ("max_pool3d", lambda x: F.max_pool3d(x[None, None], (1, 2, 2), 1)),
    ("max_pool3d, dilated", lambda x: F.max_pool3d(x[None, None, None], (1, 2, 2), (1, 1, 2), (0, 1, 1), (1, 2, 1))),
    ("adaptive 1", lambda x: F.adaptive_max_pool1d(x[None], 3)),
    ("adaptive 2", lambda x: F.adaptive_max_pool2d(x[None], (2, 3))),
    ("adaptive 2 with indices", lambda x: F.adaptive_max_pool2d(x[None], 2, return_indices=True)[0]),
    ("adaptive 3", lambda x: F.adaptive_max_pool3d(x[None, None], (1, 2, 3))),
    ("fractional", lambda x: F.fractional_max_pool2d(x[None], 2, (2, 3), _random_samples=PLACES.to(x.dtype))),
    ("fractional 3", lambda x: F.fractional_max_pool3d(
        torch.stack([x, x.flip(0), x - 1])[None], 2, (1, 2, 3), _random_samples=DRAWN.to(x.dtype))),
    ("topk unsorted", lambda x: x.topk(2, 1, sorted=False).values),
    ("least k unsorted", lambda x: torch.topk(x, 2, 0, largest=False, sorted=False).values),
    ("fmax", lambda x: torch.fmax(x, x.roll(1, 1))),
    ("fmin", lambda x: torch.fmin(x.flip(0), x)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function"), SELECTIONS)
@pytest.mark.parametrize("seed", range(6))
def test_a_direction_leads_to_autodiffs_choice(name: str, function: Callable[[Tensor], Any], seed: int) -> None:
    """Ties of integer data: along the certificate's direction every output is the input that AD selected, exactly."""
    generator = torch.Generator().manual_seed(seed)
    w = nn.Parameter(torch.randint(0, 3, (4, 5), generator=generator).to(torch.float64))
    weights = torch.arange(1, 1 + function(w.detach()).numel(), dtype=torch.float64).reshape(function(w.detach()).shape)
    certificate = certify(lambda: (function(w) * weights).sum(), nn.ParameterList([w]))
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons
    certificate.verify()
    assert certificate.layers[0].ties > 0
    assert torch.equal(perturbed(function, w.detach(), certificate.directions["0"]), w.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "function"), SELECTIONS)
def test_values_and_gradients_are_bitwise_torchs(name: str, function: Callable[[Tensor], Any]) -> None:
    for dtype, seed in itertools.product((torch.float32, torch.bfloat16), range(3)):
        x = torch.randint(0, 3, (4, 5), generator=torch.Generator().manual_seed(seed)).to(dtype)
        plain, ours = nn.Parameter(x.clone()), nn.Parameter(x.clone())
        outputs = []
        function(plain).sum().backward()

        def loss(ours: Tensor = ours, outputs: list[Tensor] = outputs) -> Tensor:
            outputs.append(function(ours))
            return outputs[0].sum()

        certify(loss, nn.ParameterList([ours]))
        assert torch.equal(outputs[0], function(plain))
        assert torch.equal(plain.grad, ours.grad)  # type: ignore[arg-type]


NUMPY: list[tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
    ("max", lambda x: x.max(axis=1, keepdims=True).values, lambda x: x.max(1, keepdim=True).values),
    ("amax", lambda x: torch.amax(x, axis=1), lambda x: torch.amax(x, 1)),
    ("amin of all", lambda x: torch.amin(x, dim=None), lambda x: torch.amin(x, ())),
    ("sort", lambda x: x.sort(axis=0, stable=True).values, lambda x: x.sort(0).values),
    ("kthvalue", lambda x: torch.kthvalue(x, 2, axis=0).values, lambda x: torch.kthvalue(x, 2, 0).values),
    ("cummax", lambda x: x.cummax(axis=0).values, lambda x: x.cummax(0).values),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spelt", "plain"), NUMPY)
def test_numpy_names_of_arguments(name: str, spelt: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]):
    """Taken for other dimensions, ties would be missed: columns and rows tie in different places here."""
    found = []
    for function in (spelt, plain):
        w = nn.Parameter(torch.tensor([[1.0, 1.0, 0.0], [5.0, 1.0, 6.0]], dtype=torch.float64))
        certificate = certify(lambda f=function, w=w: f(w).sum(), nn.ParameterList([w]))
        found.append((certificate.verdict, [block.rows.tolist() for block in certificate.blocks], w.grad.tolist()))
    assert found[0] == found[1]


def test_a_tie_in_a_numpy_dimension_counts() -> None:
    """x.max(axis=1) - y.max(axis=1) with two entries exchanged: AD (1, -1), the function is 0."""
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    certificate = certify(
        lambda: torch.stack([w, w + 5]).max(axis=1).values[0] - torch.stack([w.flip(0), w + 5]).max(axis=1).values[0],
        nn.ParameterList([w]),
    )
    assert certificate.verdict is Verdict.UNCERTIFIED, certificate.reasons


def test_nothing_to_choose_from() -> None:
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    certificate = certify(lambda: w[:0].sort().values.sum() + w.sum(), nn.ParameterList([w]))
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons


def test_a_fractional_pooling_that_is_asked_for_indices_gives_them() -> None:
    w = nn.Parameter(torch.arange(16.0).reshape(1, 1, 4, 4))
    outputs = []

    def loss() -> Tensor:
        outputs.append(F.fractional_max_pool2d_with_indices(w, 2, (2, 2)))
        return outputs[0][0].sum()

    certificate = certify(loss, nn.ParameterList([w]))
    assert torch.equal(outputs[0][0].detach().flatten(), w.detach().flatten()[outputs[0][1].flatten()])
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons


def test_opposite_choices_are_uncertified() -> None:
    """max(a, b) - max(b, a), the first wins: AD (1, -1) at a = b, the function is 0."""
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    certificate = certify(lambda: w.max(0).values - w.flip(0).max(0).values, nn.ParameterList([w]))
    assert w.grad is not None
    assert w.grad.tolist() == [1.0, -1.0]
    assert certificate.verdict is Verdict.UNCERTIFIED, certificate.reasons


def test_a_median_with_rows_of_the_maximum_only_would_be_wrong() -> None:
    """median(x, -x, 0) is 0; AD says +-1 at 0 (or 0): one member has to go below the selected one, one above."""
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    certificate = certify(lambda: torch.cat([x, -x, 0 * x]).median(0).values, nn.ParameterList([x]))
    if float(x.grad) != 0:  # type: ignore[arg-type]
        assert certificate.verdict is not Verdict.CERTIFIED


def test_even_splits() -> None:
    """Equal gradients, or a direction to every selection; with another choice of the same tie there is none.

    That each element has a direction is enough where the combination is seen to be AD's gradient.
    """
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model = nn.ParameterList([w])
    alone = certify(lambda: w.amax(0), model)
    assert (alone.verdict, alone.claim) == (Verdict.CERTIFIED, "clarke"), alone.reasons
    alone.verify()
    mixed = certify(lambda: w.max(0).values - w.amax(0), model)
    assert mixed.verdict is Verdict.UNDECIDED
    twice = certify(lambda: torch.maximum(w[:1], w[1:]).sum() - torch.maximum(w[:1], w[1:]).sum(), model)
    assert (twice.verdict, twice.theorem) == (Verdict.CERTIFIED, "Theorem H")  # ties that go the same way
    same = certify(lambda: w[:1].expand(2).amax(0), model)
    assert same.verdict is Verdict.CERTIFIED, same.reasons
    with torch.no_grad():
        w[0] = 2
    assert certify(lambda: w.max() + w.min() + w.amax(0), model).verdict is Verdict.CERTIFIED


def test_selections_across_samples() -> None:
    """A maximum over the batch is one output of several samples; behind it a ReLU touches."""
    linear = nn.Linear(2, 2, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        linear.bias.zero_()
    x = torch.tensor([[1.0, -1.0], [1.0, -2.0], [-1.0, -1.0]], dtype=torch.float64)

    def loss() -> Tensor:
        return torch.relu(linear(x).max(0).values + 1).sum()

    certificate = certify(loss, linear)
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons
    assert sum(layer.ties for layer in certificate.layers) == 2
    assert certificate.replay(loss, linear).converges


def test_nested_maxima_are_not_certified() -> None:
    """m(m(x)) - m(x) at 0 with m = maximum(., 0): AD -1/4, the function is 0."""
    x, zero = nn.Parameter(torch.zeros(1, dtype=torch.float64)), torch.zeros(1, dtype=torch.float64)

    def loss() -> Tensor:
        once = torch.maximum(x, zero)
        return (torch.maximum(once, zero) - once).sum()

    certificate = certify(loss, nn.ParameterList([x]))
    assert certificate.verdict is not Verdict.CERTIFIED
    assert "evenly" in certificate.reasons[0]


def test_maximum_is_bitwise_torchs() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(4)
        a, b = (torch.randint(-2, 3, shape, generator=generator).to(dtype) for shape in ((4, 5), (5,)))
        results = []
        for monitored in (False, True):
            x, y = nn.Parameter(a.clone()), nn.Parameter(b.clone())
            outputs: list[Tensor] = []

            def loss(x: Tensor = x, y: Tensor = y, outputs: list[Tensor] = outputs) -> Tensor:
                outputs.append(torch.maximum(x, y) + torch.min(x, y))
                return (outputs[0] * torch.arange(5)).sum()

            if monitored:
                certify(loss, nn.ParameterList([x, y]))
            else:
                loss().backward()
            results.append((outputs[0], x.grad, y.grad))
        for plain, ours in zip(*results, strict=True):
            assert torch.equal(plain, ours)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "module",
    [
        nn.MaxPool1d(2), nn.MaxPool1d(2, return_indices=True), nn.AdaptiveMaxPool1d(2),
        nn.AdaptiveMaxPool1d(2, return_indices=True),
    ],
)  # fmt: skip
def test_modules_bear_their_names(module: nn.Module) -> None:
    model = adcert.convert(nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), module))

    def loss() -> Tensor:
        found = model(torch.ones(1, 2, 3, dtype=torch.float64))
        return (found if isinstance(found, Tensor) else found[0]).sum()

    certificate = certify(loss, model)
    assert certificate.layers[0].name == "1"
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons


@pytest.mark.parametrize("function", [torch.maximum, torch.minimum, torch.max])
def test_extrema_of_two_tensors_are_torchs_to_the_bit(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Signs of zeros, strides, and gradients of 0 beside a NaN and at the smaller one of an infinite gradient."""
    first = torch.tensor([-0.0, 0.0, 1.0, 2.0, float("nan"), 3.0]).repeat(12).reshape(2, 3, 4, 3)
    second = torch.tensor([0.0, -0.0, 1.0, 5.0, 1.0, 4.0]).repeat(12).reshape(2, 3, 4, 3)
    incoming = torch.tensor([1.0, 1.0, 1.0, float("inf"), 0.0, float("-inf")]).repeat(12).reshape(2, 3, 4, 3)
    found = []
    for monitored in (False, True):
        w = nn.ParameterList([nn.Parameter(first.clone()), nn.Parameter(second.clone())])
        with adcert.Monitor(w).step() if monitored else contextlib.nullcontext():
            images = [(p * 1).to(memory_format=torch.channels_last) for p in w]
            output = function(*images)
            output.backward(incoming)
        tensors = (output, w[0].grad, w[1].grad)
        found.append((output.stride(), *(t.detach().view(torch.int32).tolist() for t in tensors)))
    assert found[0] == found[1]
