"""torch.compile: converted models outside a step are one graph, and so are the operators with a capacity."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import adcert
from adcert import Monitor, ops
from adcert.certificate import Verdict

BACKENDS = ("eager", "aot_eager")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2),
    )  # fmt: skip


X = torch.randint(0, 3, (4, 1, 8, 8), generator=torch.Generator().manual_seed(1)).float()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_converted_model_is_one_graph(backend: str, training: bool) -> None:
    plain, ours = network().train(training), adcert.convert(network()).train(training)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for _ in range(2):
        expected, found = plain(X), compiled(X)
        assert torch.equal(found, expected)
        expected.sum().backward()
        found.sum().backward()
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad)
    assert all(torch.equal(p, q) for p, q in zip(plain.buffers(), ours.buffers(), strict=True))


@pytest.mark.parametrize("capacity", [0, 3, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_with_a_capacity_are_one_graph(backend: str, capacity: int) -> None:
    def look(x: Tensor) -> tuple[Tensor, tuple[ops.PoolResult, ops.ReluResult, ops.TouchResult]]:
        pooled = ops.max_pool2d(x, 2, relu=True, capacity=capacity)
        rectified = ops.relu(x, capacity)
        return pooled.output.sum() + rectified.output.sum(), (pooled, rectified, ops.touches(x, 1.0, capacity))

    x = X.clone().requires_grad_()
    loss, expected = look(x)
    loss.backward()
    gradient, x.grad = x.grad, None
    loss, found = torch.compile(look, fullgraph=True, backend=backend)(x)
    loss.backward()
    assert gradient is not None and x.grad is not None
    assert torch.equal(x.grad, gradient)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.counts, theirs.counts)
        touches = int(mine.counts[1])
        assert mine.touches.shape == (capacity,)
        if touches <= capacity:
            assert torch.equal(mine.touches[:touches], theirs.touches[:touches])
    assert found[0].members.shape == (capacity, 1)
    windows = int(found[0].counts[0])
    if windows <= capacity:
        assert torch.equal(found[0].windows[:windows], expected[0].windows[:windows])


@pytest.mark.parametrize("first", ["outside", "inside"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_never_believes_what_it_did_not_see(backend: str, first: str) -> None:
    """Compiled code that knows of no step must not run in one unseen, nor the other way round."""
    model = adcert.convert(network())
    eager = Monitor(model)
    with eager.step() as step:
        model(X).sum().backward()
    expected = step.certificate()
    compiled = torch.compile(model, backend=backend)
    if first == "outside":
        compiled(X).sum().backward()
    with Monitor(model) as monitor:
        with monitor.step() as step:
            compiled(X).sum().backward()
        found = step.certificate()
    if found.verdict is Verdict.UNDECIDED:
        assert found.reasons
    else:
        assert [(layer.name, layer.ties, layer.touches) for layer in found.layers] == [
            (layer.name, layer.ties, layer.touches) for layer in expected.layers
        ]
        assert found.fingerprints.keys() == expected.fingerprints.keys()
    model.eval()
    assert torch.equal(compiled(X), model(X))
