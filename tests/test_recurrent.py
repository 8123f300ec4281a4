"""torch's recurrent networks of ReLUs, step by step: equal to its own to the last bit, and decided."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adcert
from adcert import Verdict, certify, oracle

FORMS = [
    {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias, "dropout": dropout}
    for layers, both, first, bias in itertools.product((1, 2), (False, True), (False, True), (False, True))
    for dropout in (0.0, 0.5)[: 1 + (layers > 1)]
]


def gradients(model: nn.Module, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor | None]:
    found = [t.grad for t in (x, *model.parameters())]
    model.zero_grad()
    x.grad = None
    return found


def same(model: nn.Module, x: Tensor, loss: Callable[[], Tensor]) -> adcert.Certificate:
    """The certificate of a step, whose loss and gradients are those of a plain one."""
    values = []

    def closure() -> Tensor:
        torch.manual_seed(3)
        values.append(loss())
        return values[-1]

    closure().backward()
    plain = gradients(model, x, loss)
    certificate = certify(closure, model)
    assert torch.equal(*values)
    for ours, theirs in zip(gradients(model, x, loss), plain, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)  # type: ignore[arg-type]
    return certificate


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks(form: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.RNN(3, 2, nonlinearity="relu", dtype=dtype, **form)
    x = torch.randn(4, 5, 3, dtype=dtype, requires_grad=True)

    def loss() -> Tensor:
        outputs, last = model(x)
        return (outputs**2).sum() + last.sin().sum()

    certificate = same(model, x, loss)
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons
    steps = x.shape[1 if form["batch_first"] else 0]
    assert len(certificate.fingerprints) == steps * form["num_layers"] * (1 + form["bidirectional"])


@pytest.mark.parametrize("bias", [False, True])
def test_cells(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.RNNCell(3, 2, bias=bias, nonlinearity="relu")
    x = torch.randn(5, 3, requires_grad=True)
    certificate = same(model, x, lambda: (model(x, model(x)) ** 2).sum())
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons


def test_a_cell_of_one_weight_and_one_tensor() -> None:
    """The gradients of both uses add up in torch's order."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.RNNCell(4, 4, nonlinearity="relu")
        model.weight_hh = model.weight_ih
        x = torch.randn(6, 4, requires_grad=True)

        def loss(model: nn.Module = model, x: Tensor = x) -> Tensor:
            h = x.sin()
            return (model(h, h) * h.exp()).sum()

        same(model, x, loss)


def test_wrong_arguments_are_torchs_to_refuse() -> None:
    model = nn.RNN(3, 2, nonlinearity="relu")
    x, h = torch.randn(4, 5, 3), torch.zeros(2, 5, 2)
    with pytest.raises(RuntimeError):
        certify(lambda: torch.rnn_relu(x, h, model._flat_weights, True, 2, 0.0, True, False, False)[0].sum(), model)


def test_without_a_batch_and_with_an_initial_state() -> None:
    torch.manual_seed(0)
    model, h = nn.RNN(3, 2, nonlinearity="relu"), torch.randn(1, 2, requires_grad=True)
    x = torch.randn(4, 3, requires_grad=True)
    assert same(model, x, lambda: model(x, h)[0].sum()).verdict is Verdict.CERTIFIED


def test_touches_of_a_network_without_bias() -> None:
    """States (1, 0), then (0, -1): one unit touches in each step. The weights are leaves that are used again."""
    model = nn.RNN(2, 2, nonlinearity="relu", bias=False).double()
    x = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]], dtype=torch.float64)
    with torch.no_grad():
        model.weight_ih_l0.copy_(torch.eye(2))
        model.weight_hh_l0.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))

    def loss() -> Tensor:
        return model(x)[0].sum()  # type: ignore[no-any-return]

    certificate = certify(loss, model)
    certificate.verify()
    assert sum(layer.touches for layer in certificate.layers) == 2
    assert certificate.verdict is Verdict.CERTIFIED, certificate.reasons
    assert oracle.judge(loss, model).member is True


def test_packed_sequences_are_named() -> None:
    """Their steps have different batches, inside one kernel: undecided, as before."""
    model = nn.RNN(2, 2, nonlinearity="relu")
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 2, 2), torch.tensor([3, 2]))
    certificate = certify(lambda: model(packed)[0].data.sum(), model)
    assert certificate.verdict is Verdict.UNDECIDED
    assert "Relu" in certificate.reasons[0]
