"""Theorem E4's joint system: weight tying, recurrence, layers without parameters, second tries; by hand and by oracle.

Rows below are gradients over all parameters of a difference that has to become positive; a touch of y is ``0 - y``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import random_network
from test_gallery import BY_NUMBER
from tied import KINDS, tied_network
from torch import Tensor, nn

import adcert
from adcert import Certificate, Verdict, analysis, backward, certify, joint, layers, oracle
from adcert.systems import System, solve

CERTIFIED, UNCERTIFIED, UNDECIDED = Verdict.CERTIFIED, Verdict.UNCERTIFIED, Verdict.UNDECIDED
r = torch.relu


class Function(nn.Module):
    """A scalar function of named parameters."""

    def __init__(self, function: Callable[[Any], Tensor], **parameters: list[Any]) -> None:
        super().__init__()
        self.function = function
        for name, values in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(values, dtype=torch.float64)))

    def forward(self) -> Tensor:
        return self.function(self).sum()


def certified(model: nn.Module, strict: bool = False) -> Certificate:
    """The verified certificate of one step; where it is certified, the witness replays and the oracle agrees."""
    certificate = certify(model, model, strict=strict)
    certificate.verify()
    assert certificate.system != "joint" or (not strict and set(certificate.scales.values()) <= {1})
    if certificate.verdict is CERTIFIED:
        assert certificate.replay(model, model).converges
        assert oracle.judge(model, model).member is not False
    return certificate


def rows(certificate: Certificate) -> list[list[float]]:
    """All rows of the certificate, over the parameters in their order."""
    starts, total = {}, 0
    for name, shape in certificate.shapes.items():
        starts[name] = total
        total += int(np.prod(shape))
    found = []
    for block in certificate.blocks:
        places = np.concatenate([starts[column.parameter] + column.indices for column in block.columns])
        full = np.zeros((len(block.rows), total))
        full[:, places] = block.rows if block.minus is None else block.rows - block.minus
        found += full.tolist()
    return sorted(found)


@pytest.fixture
def no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no network's parameters could be ordered by depth."""
    monkeypatch.setattr(
        analysis, "order_layers", lambda taus: replace(layers.order_layers(taus), problem="no layers today")
    )


@pytest.fixture
def no_combinations() -> Iterator[None]:
    """The systems alone, without Theorem H."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "combine", lambda graph, edge: None)
        yield


# ---- parameters that are used again downstream, by hand ------------------------------------------------------


def test_a_parameter_used_twice() -> None:
    """y = w relu(w + 1) - 2 touches at w = 1; dy = 2 w + 1 = 3, of which the own layer sees 2."""
    certificate = certified(Function(lambda m: r(m.w * r(m.w + 1) - 2), w=[1.0]))
    assert (certificate.verdict, certificate.system, rows(certificate)) == (CERTIFIED, "joint", [[-3.0]])
    report = certificate.layers[-1]
    assert (report.name, report.rows, report.blocks) == ("all parameters", 1, 1)
    assert sum(layer.touches for layer in certificate.layers) == 1


def test_a_parameter_used_twice_in_a_wrong_gradient() -> None:
    """relu(y) - relu(-y) = y: the truth is 3, AD's gradient 0."""
    model = Function(lambda m: r(m.w * r(m.w + 1) - 2) - r(2 - m.w * r(m.w + 1)), w=[1.0])
    certificate = certified(model)
    assert (certificate.verdict, certificate.system, rows(certificate)) == (UNCERTIFIED, "joint", [[-3.0], [3.0]])
    assert "joint system" in certificate.reasons[0] and oracle.judge(model, model).member is False
    strict = certified(model, strict=True)
    assert strict.verdict is UNDECIDED and strict.system == "paper" and "weight tying" in strict.reasons[0]


def test_gradients_that_cancel_need_no_row() -> None:
    """y = relu(w) - w has gradient 0 at w = 1 and is 0 near it, though its own part is -1: E1."""
    certificate = certified(Function(lambda m: r(r(m.w) - m.w) - r(m.w - r(m.w)), w=[1.0]))
    assert (certificate.verdict, certificate.system, certificate.blocks) == (CERTIFIED, "joint", ())
    exempt = sum((Counter(layer.exemptions) for layer in certificate.layers), Counter())
    assert exempt["zero gradient"] == 2 and sum(layer.touches for layer in certificate.layers) == 2


def autoencoder(m: Any, x: Tensor, target: Tensor) -> Tensor:
    """relu(W^T relu(W x) - target), W one row."""
    hidden = r(m.w[0] * x[:, :1] + m.w[1] * x[:, 1:])
    return r(m.w * hidden - target)


def test_weight_tied_autoencoder() -> None:
    """W = (1, 0), x = (1, 0), target (1, 0): h = 1, y = (W_1^2 - 1, W_1 W_2) = 0 with gradients (2, 0) and (0, 1)."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    certificate = certified(Function(lambda m: autoencoder(m, x, x), w=[1.0, 0.0]))
    assert (certificate.verdict, certificate.system) == (CERTIFIED, "joint")
    assert rows(certificate) == [[-2.0, 0.0], [0.0, -1.0]]


@pytest.mark.usefixtures("no_combinations")
def test_weight_tied_autoencoder_of_opposite_samples() -> None:
    """W = (1, 1): x and -x touch in the encoder with opposite rows; the decoder's touches have gradient 0 (h = 0)."""
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    one = certified(Function(lambda m: autoencoder(m, x[:1], torch.zeros(1)), w=[1.0, 1.0]))
    assert (one.verdict, one.system, rows(one)) == (CERTIFIED, "joint", [[-1.0, 1.0]])
    both = certified(Function(lambda m: autoencoder(m, x, torch.zeros(1)), w=[1.0, 1.0]))
    assert (both.verdict, both.system, rows(both)) == (UNCERTIFIED, "joint", [[-1.0, 1.0], [1.0, -1.0]])


def cell(m: Any, inputs: list[float]) -> Tensor:
    """h <- relu(a h + x), from 0; the sum of all states."""
    h = total = torch.zeros(1, dtype=torch.float64)
    for x in inputs:
        h = r(m.a * h + x)
        total = total + h
    return total


def test_recurrent_cell() -> None:
    """a = 1: h_1 = 1; y_2 = a h_1 - 1 = 0 with gradient 1; y_3 = a h_2 = 0 with gradient 0, since h_2 = 0 is flat."""
    certificate = certified(Function(lambda m: cell(m, [1.0, -1.0, 0.0]), a=[1.0]))
    assert (certificate.verdict, certificate.system, rows(certificate)) == (CERTIFIED, "joint", [[-1.0]])


def test_recurrent_cell_through_time() -> None:
    """a = 2: h = 1, 2, 4 and y_4 = a^3 - 8 = 0 with gradient 3 a^2 = 12: all steps add up."""
    certificate = certified(Function(lambda m: cell(m, [1.0, 0.0, 0.0, -8.0]), a=[2.0]))
    assert (certificate.verdict, certificate.system, rows(certificate)) == (CERTIFIED, "joint", [[-12.0]])


def test_tied_matrices() -> None:
    """The autoencoder by F.linear with W and W^T."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)

    def forward(m: Any) -> Tensor:
        linear = nn.functional.linear
        return r(linear(r(linear(x, m.w)), m.w.t()) - x)

    certificate = certified(Function(forward, w=[[1.0, 0.0]]))
    assert (certificate.verdict, certificate.system) == (CERTIFIED, "joint")
    assert rows(certificate) == [[-2.0, 0.0], [0.0, -1.0]]


def test_parameters_that_belong_to_no_layer() -> None:
    """a - relu(a - w) with a = relu(w) at 0 is w: the rows -1 and 1 are in two layers, each of them alone solvable."""
    model = Function(lambda m: r(m.w) - r(r(m.w) - m.w), w=[0.0])
    certificate = certified(model)
    assert (certificate.verdict, certificate.system, rows(certificate)) == (UNCERTIFIED, "joint", [[-1.0], [1.0]])
    assert oracle.judge(model, model).member is False


# ---- functions of the gallery, by the joint system -----------------------------------------------------------


@pytest.mark.usefixtures("no_layers")
@pytest.mark.parametrize("number", ["1", "2", "3b", "4", "5", "6b", "7", "10", "19", "19.1", "19.2"])
def test_gallery(number: str) -> None:
    row = BY_NUMBER[number]
    certificate = certified(adcert.convert(row.build()))
    assert certificate.system == "joint" and certificate.verdict.value in row.allowed


@pytest.mark.usefixtures("no_layers")
def test_one_relu_minus_its_double() -> None:
    certificate = certified(Function(lambda m: r(m.w) - r(2 * m.w), w=[0.0]))
    assert certificate.verdict is CERTIFIED and all(row[0] < 0 for row in rows(certificate))  # -1 and -2, up to scale


def test_a_touch_of_a_touch() -> None:
    """relu(relu(w)) - relu(w) at 0: the outer touch follows the inner one, and AD's 0 is right."""
    assert certified(Function(lambda m: r(r(m.w)) - r(m.w), w=[0.0])).verdict is CERTIFIED
    assert certified(Function(lambda m: r(r(m.w)) - r(-m.w), w=[0.0])).verdict is UNCERTIFIED


@pytest.mark.usefixtures("no_layers")
def test_a_touch_of_a_touch_jointly() -> None:
    assert certified(Function(lambda m: r(r(m.w)) - r(m.w), w=[0.0])).verdict is CERTIFIED
    assert certified(Function(lambda m: r(r(m.w)) - r(-m.w), w=[0.0])).verdict is UNCERTIFIED


KHAN_BARTON = [  # max(min(x, -y), y - x) at 0 by ReLUs that prefer one branch each; the touches' gradients by hand
    (lambda a, b: a - r(a - b), lambda c, d: c + r(d - c), [1.0, 0.0], [[-1.0, -1.0], [2.0, -1.0]]),
    (lambda a, b: a - r(a - b), lambda c, d: d + r(c - d), [-1.0, 1.0], [[-2.0, 1.0], [-1.0, -1.0]]),
    (lambda a, b: b - r(b - a), lambda c, d: c + r(d - c), [0.0, -1.0], [[1.0, -2.0], [1.0, 1.0]]),
]


@pytest.mark.usefixtures("no_layers")
@pytest.mark.parametrize(("least", "most", "gradient", "expected"), KHAN_BARTON)
def test_khan_barton(least: Any, most: Any, gradient: list[float], expected: list[list[float]]) -> None:
    model = Function(lambda m: most(least(m.w[0], -m.w[1]), m.w[1] - m.w[0]), w=[0.0, 0.0])
    certificate = certified(model)
    assert certificate.verdict is CERTIFIED and rows(certificate) == expected
    (found,) = torch.autograd.grad(model(), list(model.parameters()))
    assert found.tolist() == gradient


@pytest.mark.parametrize("jointly", [False, True])
def test_a_pooling_after_a_pooling_through_a_permutation(jointly: bool, request: pytest.FixtureRequest) -> None:
    """A layer without parameters: the second pooling sees two tied maxima of the first, w_1 and w_2, and picks w_1."""
    if jointly:
        request.getfixturevalue("no_layers")
    pool = nn.MaxPool2d((1, 2))

    def forward(m: Any) -> Tensor:
        return pool(pool(m.w.reshape(1, 1, 2, 2)).permute(0, 1, 3, 2))

    model = adcert.convert(Function(forward, w=[5.0, 1.0, 5.0, 2.0]))
    certificate = certified(model)
    assert certificate.verdict is CERTIFIED and rows(certificate) == [[1.0, 0.0, -1.0, 0.0]]
    assert certificate.system == ("joint" if jointly else "lexicographic")


# ---- a second try where the layered system is empty ----------------------------------------------------------

FIRST, SECOND = (lambda m: r(m.v + r(m.u) - 1)), (lambda m: r(r(m.u) - m.v - 1))


def pair(function: Callable[[Any], Tensor]) -> Function:
    return Function(function, u=[1.0], v=[0.0])


def test_empty_by_layers_but_not_jointly() -> None:
    """y = relu(u) - 1 +- v touch: in v alone the rows are -1 and 1; jointly u goes down."""
    model = pair(lambda m: FIRST(m) + SECOND(m))
    certificate = certified(model)
    assert (certificate.verdict, certificate.system) == (CERTIFIED, "joint")
    assert rows(certificate) == [[-1.0, -1.0], [-1.0, 1.0]]
    assert certified(model, strict=True).verdict is UNCERTIFIED


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = pair(lambda m: FIRST(m) + SECOND(m))
    certified(model).save(tmp_path / "joint.adcert")
    loaded = Certificate.load(tmp_path / "joint.adcert")
    loaded.verify()
    assert loaded.system == "joint" and float(loaded.directions["u"]) < -abs(float(loaded.directions["v"]))
    assert loaded.replay(model, model).converges


@pytest.mark.parametrize("seed", [1304, 2479, 2708])
def test_pinned_networks_that_only_the_joint_system_certifies(seed: int) -> None:
    network = random_network(seed)
    certificate = certify(network.closure, adcert.convert(network.model))
    certificate.verify()
    assert (certificate.verdict, certificate.system) == (CERTIFIED, "joint")
    assert oracle.replays(network.closure, network.model, certificate.directions, certificate.scales).reproduces
    assert oracle.judge(network.closure, network.model).member is True


def test_both_empty_names_the_layer_and_says_so() -> None:
    certificate = certified(pair(lambda m: FIRST(m) - r(1 - m.v - r(m.u))))
    assert (certificate.verdict, certificate.system) == (UNCERTIFIED, "lexicographic")
    assert len(certificate.reasons) == 2 and "the joint system of Theorem E4 is empty" in certificate.reasons[1]


@pytest.mark.parametrize(
    ("deeper", "why"), [(FIRST, "have directions"), (lambda m: FIRST(m) + SECOND(m), "whatever else moves")]
)
def test_rows_that_are_whole_need_no_second_try(deeper: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contradictory rows of the first layer contradict each other in every system, whatever the deeper ones do."""
    monkeypatch.setattr(joint, "EAGER", 0)
    monkeypatch.setattr(backward, "gradients", _refuse)
    certificate = certified(pair(lambda m: r(m.u - 1) - r(1 - m.u) + deeper(m)))
    assert certificate.verdict is UNCERTIFIED and "not tried" in certificate.reasons[-1]
    assert why in certificate.reasons[-1]


def test_no_partial_backward_where_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is not tiny: its layered directions are enough."""
    monkeypatch.setattr(joint, "EAGER", 0)
    monkeypatch.setattr(backward, "gradients", _refuse)
    assert certified(pair(lambda m: FIRST(m) + r(m.v + r(2 * m.u) - 2))).system == "lexicographic"


def _refuse(*args: object, **options: object) -> object:
    raise AssertionError("a partial backward pass ran")


# ---- several backward passes in a step -----------------------------------------------------------------------


def accumulated(model: nn.Module, *losses: Callable[[Any], Tensor]) -> Certificate:
    with adcert.Monitor(model) as monitor, monitor.step() as step:
        for loss in losses:
            loss(model).sum().backward()
    step.certificate().verify()
    return step.certificate()


def test_micro_batches_are_joined() -> None:
    """Each is certified by its layers; together the layers are empty, and the joint system is not."""
    model = pair(FIRST)
    for loss in (FIRST, SECOND):
        assert accumulated(model, loss).system == "lexicographic"
    certificate = accumulated(model, FIRST, SECOND)
    assert (certificate.verdict, certificate.system) == (CERTIFIED, "joint")
    assert rows(certificate) == [[-1.0, -1.0], [-1.0, 1.0]]


def test_micro_batches_that_contradict_each_other() -> None:
    model = pair(FIRST)
    certificate = accumulated(model, FIRST, lambda m: r(1 - m.v - r(m.u)))
    assert certificate.verdict is UNCERTIFIED and len(certificate.reasons) == 2


def test_rows_of_an_earlier_backward_pass_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a larger network the first micro-batch keeps nothing: no joint system, rather than half of one."""
    monkeypatch.setattr(joint, "EAGER", 0)
    certificate = accumulated(pair(FIRST), FIRST, SECOND)
    assert (certificate.verdict, certificate.system) == (UNCERTIFIED, "lexicographic")
    assert "not tried" in certificate.reasons[-1]
    assert accumulated(pair(FIRST), lambda m: FIRST(m) + SECOND(m)).verdict is CERTIFIED


def test_tying_in_a_later_micro_batch() -> None:
    """The rows of the first one, [-1, -1], are kept, and joined with those of the tied one."""
    model = pair(FIRST)
    certificate = accumulated(model, FIRST, lambda m: r(m.u * r(m.u + 1) - 2))
    assert (certificate.verdict, certificate.system) == (CERTIFIED, "joint")
    assert rows(certificate) == [[-3.0, 0.0], [-1.0, -1.0]]


def test_tying_in_an_earlier_micro_batch() -> None:
    certificate = accumulated(pair(FIRST), lambda m: r(m.u * r(m.u + 1) - 2), FIRST)
    assert (certificate.verdict, certificate.system) == (CERTIFIED, "joint")
    assert rows(certificate) == [[-3.0, 0.0], [-1.0, -1.0]]


# ---- hostile ---------------------------------------------------------------------------------------------------


def rounded(m: Any) -> Tensor:
    """y = 0.1 w relu(0.3 w), whose gradient 0.06 w is no float."""
    return 0.1 * m.w * r(0.3 * m.w)


def test_rounded_rows_certify() -> None:
    at = rounded(Function(rounded, w=[0.7])).detach()
    certificate = certified(Function(lambda m: r(rounded(m) - at), w=[0.7]))
    assert (certificate.verdict, certificate.system) == (CERTIFIED, "joint")
    assert certificate.blocks[0].radius is not None and 0 < certificate.blocks[0].radius[0, 0] < 1e-14


def test_rounded_rows_never_prove_emptiness() -> None:
    """relu(y) - relu(-y) is wrong, but its rows are known up to rounding only."""
    at = rounded(Function(rounded, w=[0.7])).detach()
    certificate = certified(Function(lambda m: r(rounded(m) - at) - r(at - rounded(m)), w=[0.7]))
    assert certificate.verdict is UNDECIDED and certificate.system == "joint"
    assert all(block.proof is None for block in certificate.blocks)


def test_a_row_within_its_radius_of_zero_is_a_doubt() -> None:
    """y = 0.1 w relu(0.3 w) - relu(0.3 w) 0.1 w: zero, but computed with rounding."""
    certificate = certified(Function(lambda m: r(rounded(m) - r(0.1 * m.w) * (0.3 * m.w)), w=[0.7]))
    assert certificate.verdict is UNDECIDED
    assert any("within rounding error of zero" in reason for reason in certificate.reasons)


@pytest.mark.usefixtures("no_combinations")
@pytest.mark.parametrize(("name", "value"), [("MANY", 0), ("ENTRIES", 0), ("SECONDS", -1.0)])
def test_what_is_too_large_is_refused(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, name, value)
    certificate = certified(Function(lambda m: r(m.w * r(m.w + 1) - 2), w=[1.0]))
    assert certificate.verdict is UNDECIDED and "weight tying" in certificate.reasons[0]
    assert "not tried" in certificate.reasons[1]


def test_a_block_beyond_its_limit_is_not_decided() -> None:
    from adcert.differences import Part, RowSet

    value = torch.ones(2, 3, dtype=torch.float64)
    part = Part("w", torch.arange(2), torch.zeros(2, dtype=torch.int64), value, torch.zeros_like(value))
    rowsets = [RowSet("op", "tie", 2, (part,))]
    for limit, decided in ((6, True), (5, False)):
        (block,) = solve(System("op", 1, rowsets, {"w": (1, 3)}, limit)).blocks
        assert (block.direction is not None) is decided
        assert decided or (block.proof is None and "limit" in block.reason)


def test_an_operation_without_a_bound_is_named() -> None:
    certificate = certified(Function(lambda m: r(torch.fft.fft(m.w * r(m.w + 1)).real - 2), w=[1.0]))
    assert certificate.verdict is UNDECIDED and certificate.reasons


# ---- random networks ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_layers", "no_combinations")
def test_what_the_layers_certify_the_joint_system_certifies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theorem E4 contains Theorem 8: p = sum of eps_l p_l. And what it proves empty no layer certifies."""
    forced = {}
    for seed in range(150):
        network = random_network(seed)
        certificate = certify(network.closure, adcert.convert(network.model))
        certificate.verify()
        assert certificate.system == "joint" and certificate.verdict is not UNDECIDED
        forced[seed] = certificate.verdict
    monkeypatch.undo()
    for seed, verdict in forced.items():
        network = random_network(seed)
        for strict in (False, True):
            layered = certify(network.closure, adcert.convert(network.model), strict=strict)
            assert layered.verdict is verdict or (layered.verdict, verdict) == (UNCERTIFIED, CERTIFIED)


@pytest.mark.usefixtures("no_combinations")
def test_tied_networks() -> None:
    """0 false certificates; every step decided; most of the gradients that are Clarke certified, nearly all jointly."""
    counts: Counter[tuple[str, str, bool]] = Counter()
    systems: Counter[str] = Counter()
    for seed in range(120):
        network = tied_network(seed)
        closure, model = network.closure, network.model
        certificate = certify(closure, adcert.convert(model))
        certificate.verify()
        member = oracle.judge(closure, model).member
        assert certificate.verdict is not UNDECIDED, f"network {seed}: {certificate.reasons}"
        if certificate.verdict is CERTIFIED:
            assert member is not False, f"network {seed}: a false certificate"
            assert oracle.replays(closure, model, certificate.directions, certificate.scales).reproduces, seed
            assert certificate.replay(closure, model).converges, seed
            member = True
        counts[network.kind, certificate.verdict.value, member is True] += 1
        systems[certificate.system] += 1
    print({" ".join(map(str, key)): count for key, count in sorted(counts.items())}, dict(systems))
    assert systems["joint"] >= 100
    for kind in KINDS:
        clarke = counts[kind, "certified", True] + counts[kind, "uncertified", True]
        assert counts[kind, "certified", True] >= (0.5 if "convolution" in kind else 0.75) * clarke
