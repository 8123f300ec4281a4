"""The pinned generator: deterministic, within its documented bounds, and rich in ties and touches."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from networks import KINDS, MAX_PARAMETERS, Network, Residual, random_network
from torch import nn

from adcert import oracle
from adcert.oracle.program import Select
from adcert.oracle.subdifferential import Evidence

# Parameters, inputs, loss weights and gradients of networks 0..49, as little-endian int64.
DIGEST = "07333fac103fcacd85550be076258f19422f59897fa8c777a0aaf48cf7baed57"
SEEDS = range(200)


@pytest.fixture(scope="module")
def networks() -> list[Network]:
    return [random_network(seed) for seed in SEEDS]


def modules(network: Network, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in network.model.modules() if isinstance(module, kind)]


def ad_gradient(network: Network) -> np.ndarray:
    return np.concatenate([g.flatten().numpy() for g in oracle.ad_gradient(network.closure, network.model).values()])


def has_decision(network: Network) -> bool:
    """A ReLU input that is exactly 0, or a window whose maximum is attained by two units."""
    program = oracle.trace(network.closure, network.model)
    for op in program.ops:
        if isinstance(op, Select):
            for members, value in zip(op.members, program.values[op.out], strict=True):
                if (program.values[np.unique(members)] == value).sum() > 1:
                    return True
    return False


def test_digest_of_first_fifty() -> None:
    digest = hashlib.sha256()
    for seed in range(50):
        network = random_network(seed)
        for name, parameter in network.model.named_parameters():
            digest.update(name.encode() + parameter.detach().numpy().astype("<i8").tobytes())
        digest.update(network.inputs.numpy().astype("<i8").tobytes())
        digest.update(network.weights.numpy().astype("<i8").tobytes())
        for gradient in torch.autograd.grad(network.closure(), list(network.model.parameters())):
            digest.update(gradient.numpy().astype("<i8").tobytes())
    assert digest.hexdigest() == DIGEST


def test_global_random_state_is_neither_read_nor_advanced() -> None:
    torch.manual_seed(1)
    first = random_network(3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = random_network(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.inputs, second.inputs)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_data_are_small_integers(networks: list[Network]) -> None:
    for network in networks:
        parameters = [p.detach() for p in network.model.parameters()]
        assert 1 <= sum(p.numel() for p in parameters) <= MAX_PARAMETERS
        for tensor in [*parameters, network.inputs, network.weights]:
            assert tensor.dtype == torch.float64
            assert torch.equal(tensor, tensor.round())
            assert tensor.abs().max() <= 2
        assert all(p.requires_grad for p in network.model.parameters())
        assert 1 <= len(network.inputs) <= 3
        assert network.closure().shape == ()


def test_every_documented_feature_occurs(networks: list[Network]) -> None:
    assert {network.kind for network in networks} == set(KINDS)
    pools = [m for network in networks for m in modules(network, nn.MaxPool2d)]
    assert {(p.kernel_size, p.stride < p.kernel_size, p.padding) for p in pools} == {
        (k, overlapping, padding) for k in (2, 3) for overlapping in (True, False) for padding in (0, 1)
    }
    layers = [m for network in networks for m in modules(network, nn.Conv2d)]
    assert {m.groups for m in layers} == {1, 2}
    assert {m.padding for m in layers} == {(0, 0), (1, 1)}
    for kind in (nn.Conv2d, nn.Linear):
        biases = {m.bias is None for network in networks for m in modules(network, kind)}
        assert biases == {True, False}
    pairs = set()
    for network in networks:
        children = list(network.model.children())
        pairs |= {(type(a), type(b)) for a, b in pairwise(children)}
    assert {(nn.ReLU, nn.MaxPool2d), (nn.MaxPool2d, nn.ReLU), (nn.MaxPool2d, nn.MaxPool2d)} <= pairs
    assert (Residual, nn.ReLU) in pairs


def test_most_networks_have_a_tie_or_a_touch(networks: list[Network]) -> None:
    assert sum(map(has_decision, networks)) >= 0.7 * len(networks)


def test_decisions_matter_on_many_networks(networks: list[Network]) -> None:
    """On at least four in ten networks a tie or touch changes the gradient: dB has two elements or AD's is
    not in it."""
    matter = 0
    for network in networks:
        evidence = Evidence(oracle.trace(network.closure, network.model))
        evidence.sample(60, (), 0)
        elements = evidence.known().matrix.astype(np.float64)
        matter += len(elements) > 1 or not (elements == ad_gradient(network)).all()
    assert matter >= 0.4 * len(networks)


def test_float32_copy_has_the_same_gradient_and_shares_nothing(networks: list[Network]) -> None:
    for network in networks[:40]:
        single = network.to(torch.float32)
        assert all(p.dtype == torch.float32 for p in single.model.parameters())
        assert np.array_equal(ad_gradient(single), ad_gradient(network))
    with torch.no_grad():
        next(single.model.parameters()).add_(1.0)
    assert not torch.equal(next(single.model.parameters()).double(), next(network.model.parameters()))


def test_samples_sum_to_the_minibatch(networks: list[Network]) -> None:
    for network in networks[:20]:
        parts = [ad_gradient(network.sample(b)) for b in range(len(network.inputs))]
        assert np.array_equal(sum(parts), ad_gradient(network))
