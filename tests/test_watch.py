"""The function mode: what changes a gradient, or comes back into the graph, out of autograd's sight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import adcert
from adcert import Monitor, Verdict


class Net(nn.Module):
    """A leaf, a buffer, and modules that the recorder runs."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 3.0]))
        self.register_buffer("buffer", torch.zeros(4))
        self.relu = adcert.nn.ReLU()
        self.pool = adcert.nn.MaxPool2d(2)
        self.norm = nn.BatchNorm1d(4)
        self.plain = nn.BatchNorm1d(4, affine=False)


X = torch.arange(20.0).reshape(5, 4).sin()


def hooks_around_relu(net: Net) -> Tensor:
    with saved_tensors_hooks(lambda t: t, torch.zeros_like):
        h = net.relu(net.w)
    return h.sum()


def hooks_around_pool(net: Net) -> Tensor:
    with saved_tensors_hooks(lambda t: t, torch.zeros_like):
        h = net.pool(net.w.reshape(1, 1, 2, 2))
    return h.sum()


def leaf_written_after_a_module(net: Net) -> Tensor:
    h = net.relu(net.w)
    with torch.no_grad():
        net.w.add_(1.0)
    return h.sum() + (net.w * net.w).sum()


def gradient_without_a_graph(net: Net) -> Tensor:
    (g,) = torch.autograd.grad((net.w**3).sum(), net.w)
    return (g * net.w).sum()


def statistics_written_after_eval(net: Net) -> Tensor:
    net.norm.eval()
    loss = net.norm(X * net.w).pow(2).sum()
    net.norm.train()
    net.norm(X + 3)
    return loss


def statistics_written_by_constants(net: Net) -> Tensor:
    net.plain.eval()
    loss = net.plain(X * net.w).pow(2).sum()
    net.plain.train()
    net.plain(X + 3)
    return loss


def hidden_weight_of_a_native_norm(net: Net) -> Tensor:
    weight = net.w.detach() ** 2
    return torch.batch_norm(X * net.w, weight, None, None, None, True, 0.1, 1e-5, False).pow(2).sum()


def statistics_of_a_native_norm(net: Net) -> Tensor:
    h = torch.batch_norm(X * net.w, None, None, net.buffer, torch.ones(4), True, 0.1, 1e-5, False)
    return h.pow(2).sum() + (net.buffer * net.w).sum()


def statistics_of_an_aten_norm(net: Net) -> Tensor:
    operator = torch.ops.aten.native_batch_norm.default
    h = operator(X * net.w, None, None, net.buffer, torch.ones(4), True, 0.1, 1e-5)[0]
    return h.pow(2).sum() + (net.buffer * net.w).sum()


def written_by_an_overload(net: Net) -> Tensor:
    view = net.buffer.view(2, 2)
    torch.ops.aten.copy_.default(net.buffer, net.w.detach())
    return (view.flatten() * net.w).sum()


def written_into_views(net: Net) -> Tensor:
    torch.split_copy(net.w.detach(), 2, out=[net.buffer[:2], net.buffer[2:]])
    return (net.buffer * net.w).sum()


def written_by_foreach(net: Net) -> Tensor:
    view = net.buffer.view(2, 2)
    torch._foreach_copy_([net.buffer], [net.w.detach()])
    return (view.flatten() * net.w).sum()


def detached_in_place(net: Net) -> Tensor:
    h = net.w * 2
    h.detach_()
    return (h * net.w).sum()


HIDDEN: list[Callable[[Net], Tensor]] = [
    hooks_around_relu,
    hooks_around_pool,
    leaf_written_after_a_module,
    gradient_without_a_graph,
    statistics_written_after_eval,
    statistics_written_by_constants,
    hidden_weight_of_a_native_norm,
    statistics_of_a_native_norm,
    statistics_of_an_aten_norm,
    written_by_an_overload,
    written_into_views,
    written_by_foreach,
    detached_in_place,
]


def observe(loss: Callable[[Net], Tensor]) -> adcert.Certificate:
    net = Net()
    with Monitor(net, queue=0).step() as step:
        loss(net).backward()
    return step.certificate()


@pytest.mark.parametrize("loss", HIDDEN, ids=lambda loss: loss.__name__)
def test_out_of_sight_is_undecided(loss: Callable[[Net], Tensor]) -> None:
    assert observe(loss).verdict is Verdict.UNDECIDED


def two_normalisations_in_eval(net: Net) -> Tensor:
    net.norm.eval()
    return net.norm(X * net.w).sum() + net.norm(net.w * X + 1).sum()


def two_normalisations_in_train(net: Net) -> Tensor:
    return net.norm(X * net.w).pow(3).sum() + net.norm(net.w * X + 1).pow(3).sum()


def validation_before_training(net: Net) -> Tensor:
    net.norm.eval()
    with torch.no_grad():
        net.norm(X)
    net.norm.train()
    return net.norm(X * net.w).pow(3).sum()


def native_norm_in_train(net: Net) -> Tensor:
    return torch.batch_norm(X * net.w, net.norm.weight, net.norm.bias, None, None, True, 0.1, 1e-5, False).sum()


def gradient_that_is_only_looked_at(net: Net) -> Tensor:
    loss = (net.w**3).sum()
    torch.autograd.grad(loss, net.w, retain_graph=True)
    return F.relu(net.w).sum()


SEEN: list[Callable[[Net], Tensor]] = [
    two_normalisations_in_eval,
    two_normalisations_in_train,
    validation_before_training,
    native_norm_in_train,
    gradient_that_is_only_looked_at,
]


@pytest.mark.parametrize("loss", SEEN, ids=lambda loss: loss.__name__)
def test_in_sight_is_certified(loss: Callable[[Net], Tensor]) -> None:
    certificate = observe(loss)
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons


def test_node_hooks_are_an_assumption() -> None:
    def loss(net: Net) -> Tensor:
        h = net.w * 2
        h.grad_fn.register_prehook(lambda gradients: tuple(g * 0 for g in gradients))
        return h.sum()

    assert any("hooks on nodes" in assumption for assumption in observe(loss).assumptions)
    assert not any("hooks on nodes" in assumption for assumption in observe(two_normalisations_in_eval).assumptions)


def test_two_outputs_of_one_node_are_two_losses() -> None:
    net = Net()
    with Monitor(net, queue=0).step() as step:
        first, second = torch.stack([net.w.sum(), net.w.sum() + torch.inf]).unbind()
        first.backward(retain_graph=True)
        second.backward()
    assert list(step.certificate().reasons) == ["the loss is not finite"]


@pytest.mark.parametrize("before", [False, True])
def test_values_of_a_frozen_parameter_are_an_assumption(before: bool) -> None:
    net = Net()
    net.w.requires_grad = before
    with Monitor(net, queue=0).step() as step:
        net.w.requires_grad_(False)
        h = net.w * 2
        net.w.requires_grad = True
        (h * net.w).sum().backward()
    assert any("did not require grad" in assumption for assumption in step.certificate().assumptions)


@pytest.mark.parametrize("reach", [lambda c: c.data, lambda c: c.numpy(), lambda c: c.untyped_storage()])
def test_memory_of_a_constant_that_was_handed_out_is_an_assumption(reach: Callable[[Tensor], object]) -> None:
    constant = torch.ones(4)

    def loss(net: Net) -> Tensor:
        product = (net.w * constant).sum()
        reach(constant)
        return product

    assert any("memory was handed out" in assumption for assumption in observe(loss).assumptions)
    assert not any("memory was handed out" in a for a in observe(lambda net: (net.w * constant).sum()).assumptions)
