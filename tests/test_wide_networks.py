"""The second pinned generator and its sampled oracle: deterministic, complete, rich in ties and touches."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from wide_networks import KINDS, MAX_PARAMETERS, WideNetwork, first_draw, wide_network
from wide_oracle import Point, hull_distance, sample, witness
from wide_parts import ACTIVATIONS, POOLINGS, SELECTIONS, Call, build

# Labels, parameters, inputs and weights of the first draws of networks 0..99, in multiples of 2^-10. Whether one is
# drawn again depends on how this processor rounds.
DIGEST = "18f81c944ac65f0605f963ddd198b9cdb2a76a760d707fd977b542e0cc5e570f"
SEEDS = range(4 * len(KINDS))


@pytest.fixture(scope="module")
def networks() -> list[WideNetwork]:
    return [wide_network(seed) for seed in SEEDS]


def test_digest_of_first_draws() -> None:
    digest = hashlib.sha256()
    for seed in range(100):
        network = first_draw(seed)
        digest.update(" ".join((*sorted(network.labels), network.loss)).encode())
        state = [t for _, t in sorted(network.model.state_dict().items())]
        for tensor in (*state, *(t for pair in network.batches for t in pair)):
            digest.update((tensor.double() * 1024).round().numpy().astype("<i8").tobytes())
    assert digest.hexdigest() == DIGEST


def test_global_random_state_is_neither_read_nor_advanced() -> None:
    for seed in (0, 11, 24):
        torch.manual_seed(1)
        first = wide_network(seed)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        second = wide_network(seed)
        gradients = [network.gradient() for network in (first, second)]
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(*gradients)


def test_every_kind_is_the_focus_of_its_share_and_in_its_labels(networks: list[WideNetwork]) -> None:
    assert Counter(network.focus for network in networks) == dict.fromkeys(KINDS, 4)
    for network in networks:
        assert network.focus in network.labels
    counts = Counter(label for network in networks for label in network.labels)
    assert {"mse_loss", "cross_entropy", "l1_loss", "conv1d", "conv2d", "conv3d", "linear"} <= counts.keys()


def test_every_kind_occurs_in_several_forms() -> None:
    seen: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for seed in range(8 * len(KINDS)):
        network = wide_network(seed)
        for module in network.model.modules():
            text = f"x: {module.code}" if isinstance(module, Call) else repr(module)
            if not list(module.children()):
                seen[network.focus].add(text)
    for kind in (*ACTIVATIONS, *POOLINGS, *SELECTIONS):
        assert len(seen[kind]) > 2, kind
    for kind in (kind for kind, forms in ACTIVATIONS.items() if forms.inplace):
        texts = " ".join(seen[kind])
        assert "inplace=True" in texts or "_(" in texts, kind


def test_data_are_dyadic_and_few(networks: list[WideNetwork]) -> None:
    for network in networks:
        parameters = [p.detach() for p in network.model.parameters()]
        assert 1 <= sum(p.numel() for p in parameters) <= MAX_PARAMETERS
        for tensor in (*parameters, *(t for pair in network.batches for t in pair)):
            assert tensor.dtype in (torch.float64, torch.int64)
        assert (network.focus == "accumulation") <= (len(network.batches) > 1)
        assert (network.focus == "several_losses") <= network.twice


def test_gradient_is_that_of_the_sum_of_losses(networks: list[WideNetwork]) -> None:
    for network in networks:
        network = network.copy()
        parameters = list(network.model.parameters())
        found = torch.autograd.grad(network.closure(), parameters, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        assert torch.allclose(torch.cat([t.flatten() for t in flat]), network.gradient(), rtol=1e-12, atol=1e-12)


def test_decisions_matter_on_most_networks(networks: list[WideNetwork]) -> None:
    """dB has two elements or more, or autodiff's gradient is not evidently in it."""
    some = networks[::3]
    matter = sum(sample(network, rounds=(12,)).kinked for network in some)
    assert matter >= 0.6 * len(some)


# ---- the sampled oracle --------------------------------------------------------------------------


class Line(nn.Module):
    def __init__(self, code: str, *start: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.call = Call(code)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.w) + 0 * x


def line(code: str, *start: float) -> WideNetwork:
    x = torch.zeros(1, dtype=torch.float64)
    return WideNetwork(0, "", frozenset(), Line(code, *start), ((x, x + 1),), "linear", False)


@pytest.mark.parametrize(
    ("code", "start", "elements", "gradient", "member"),
    [
        ("x.relu() - (-x).relu()", (0,), [[1]], [0], None),
        ("x.relu() + (-x).relu()", (0,), [[-1], [1]], [0], True),
        ("x.relu() - x.relu()", (0,), [[0]], [0], True),
        ("F.hardsigmoid(3 + x) + F.hardsigmoid(x - 3)", (0,), [[1 / 6]], [0], None),
        ("x.clamp(min=0) + x.clamp(max=0)", (0,), [[1]], [2], None),
        ("x.relu() - (2 * x).relu()", (0,), [[-1], [0]], [0], True),
        ("x.max(0).values", (1, 1), [[0, 1], [1, 0]], [1, 0], True),
        ("x.amax(0)", (1, 1), [[0, 1], [1, 0]], [0.5, 0.5], True),
        ("x.max(0).values - x.amax(0)", (1, 1), [[0, 0]], [0.5, -0.5], None),
    ],
)
def test_sampled_hull_of_known_functions(
    code: str, start: tuple[float, ...], elements: list[list[float]], gradient: list[float], member: bool | None
) -> None:
    found = sample(line(code, *start))
    assert np.allclose(sorted(found.elements.tolist()), elements, atol=1e-6)
    assert np.allclose(found.gradient, gradient)
    assert found.member is member
    assert found.kinked == (len(elements) > 1)


def test_hull_distance_and_separator() -> None:
    corners = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    assert hull_distance(corners, np.array([1.0, 1.0]))[0] == pytest.approx(0)
    distance, separator = hull_distance(corners, np.array([2.0, 2.0]))
    assert distance == pytest.approx(1)
    assert separator is not None
    assert abs(separator @ (corners - [2.0, 2.0]).T).min() > 0
    assert hull_distance(corners[:0], np.array([1.0, 1.0])) == (np.inf, None)


def test_witness_tells_a_direction_from_its_opposite() -> None:
    network = line("x.relu()", 0)
    down, up = torch.tensor([-1.0]), torch.tensor([1.0])
    assert witness(network, {"w": down}, {"w": 1}).tends
    assert not witness(network, {"w": up}, {"w": 1}).tends
    smooth = line("x.tanh()", 1)
    assert witness(smooth, {}, {}).tends


def test_point_puts_everything_back() -> None:
    for seed in range(len(KINDS)):
        network = wide_network(seed)
        before = {name: value.clone() for name, value in network.model.state_dict().items()}
        point = Point(network)
        first = point.gradient()
        point.gradient(np.ones(point.width))
        assert np.array_equal(first, point.gradient())
        assert all(torch.equal(value, before[name]) for name, value in network.model.state_dict().items())


def test_forms() -> None:
    x = torch.tensor([[-1.0, 2.0]])
    assert build("F.relu6(x)")(x).tolist() == [[0.0, 2.0]]
    assert build("nn.PReLU({C})", C=2).weight.shape == (2,)
    with pytest.raises(SyntaxError):
        build("F.relu(x")
