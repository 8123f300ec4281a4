"""Activation checkpointing: decided where no dropped value is needed, never run again by us, never counted twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import adcert
from adcert import Certificate, Monitor, Verdict, certify
from adcert.recomputed import Dropped, DroppedError

pytestmark = pytest.mark.filterwarnings("ignore:.*requires_grad=True")
X = (torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 8).floor() / 8
X[:, :, :8] = 0
Y = torch.arange(8) % 4


def again(function: Any, *args: Any, **more: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, **more)


class Net(nn.Module):
    """A stem, a block that may be checkpointed, a head. ``runs``: how often the block has run."""

    def __init__(self, checkpointed: bool, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed, self.runs = checkpointed, 0
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        layers = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout)
        self.block = nn.Sequential(*layers, nn.Conv2d(4, 8, 3, padding=1), nn.LeakyReLU(0.1))
        self.head = nn.Linear(8 * 64, 4)
        with torch.no_grad():
            self.block[0].weight[0] = 0  # type: ignore[index]  # a channel of nothing but touches
            self.block[0].bias[0] = 0  # type: ignore[index]

    def run(self, x: Tensor) -> Tensor:
        self.runs += 1
        out: Tensor = self.block(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        out: Tensor = self.head((again(self.run, h) if self.checkpointed else self.run(h)).flatten(1))
        return out


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_a_checkpointed_network_is_decided_as_without(precision: torch.dtype | None) -> None:
    """Touches by their biases, ties of the stem by congruence; two micro-batches, in which each layer counts once."""
    seen, gradients = [], []
    for checkpointed in (False, True):
        for monitored in (False, True):
            model = Net(checkpointed, 0.5)
            model = adcert.convert(model) if monitored else model
            torch.manual_seed(1)
            with Monitor(model).step() if monitored else torch.enable_grad() as step:
                for part in (slice(0, 4), slice(4, 8)):
                    with torch.autocast("cpu", precision, enabled=precision is not None):
                        loss = F.cross_entropy(model(X[part]), Y[part])
                    loss.backward()
            assert model.runs == (4 if checkpointed else 2)
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            if monitored:
                found: Certificate = step.certificate()  # type: ignore[union-attr]
                assert any("computes again" in text for text in found.assumptions) == checkpointed
                layers = [(layer.name, layer.windows, layer.ties, layer.touches) for layer in found.layers]
                seen.append((found.verdict, found.reasons, layers))
    assert seen[0] == seen[1] and seen[0][0] is Verdict.CERTIFIED
    assert sum(touches for *_, touches in seen[0][2]) > 500
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def wrong(w: Tensor) -> Tensor:
    return F.relu(w) - F.relu(-w)


def test_contradictions_are_found_inside() -> None:
    """relu(w) - relu(-w) at 0: the two rows need no dropped value."""
    w = nn.Parameter(torch.zeros(1))
    assert certify(lambda: again(wrong, w).sum(), nn.ParameterList([w])).verdict is Verdict.UNCERTIFIED


def test_a_row_that_needs_a_dropped_value_is_named() -> None:
    """y = x w at a touch: the row is x, which only the checkpoint could tell."""
    layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, -1.0]])
    nn.init.zeros_(layer.weight)
    found = certify(lambda: again(lambda t: F.relu(layer(t)), x).sum(), layer)
    assert found.verdict is Verdict.UNDECIDED
    assert "torch.utils.checkpoint has dropped its values" in found.reasons[0]
    assert certify(lambda: F.relu(layer(x)).sum(), layer).verdict is Verdict.CERTIFIED


def test_what_is_recorded_inside_does_not_keep_activations() -> None:
    model, held = adcert.convert(Net(True)), []
    with Monitor(model).step() as step:
        loss = model(X).sum()
        for record in step._recorder.records:
            held.append((record.name, record.output.untyped_storage().nbytes(), record.output.numel()))
        loss.backward()
    inside = {name: size for name, size, _ in held if name.startswith("block")}
    assert len(inside) == 2 and set(inside.values()) == {4}
    assert all(size >= units for name, size, units in held if name.startswith("stem"))


# ---- what would make another gradient of it ----------------------------------------------------------------------


def look(loss: Callable[[Tensor], Tensor]) -> Certificate:
    w = nn.Parameter(torch.ones(3))
    return certify(lambda: loss(w), nn.ParameterList([w]))


def overwritten_constant(w: Tensor) -> Tensor:
    mask = torch.ones(3)
    y = again(lambda t: F.relu(t * mask), w * 1)
    mask.zero_()
    return y.sum()


def overwritten_source_of_a_constant(w: Tensor) -> Tensor:
    mask = torch.ones(3)
    y = again(lambda t: F.relu(t * (1 - mask * 0.5)), w * 1)
    mask.zero_()
    return y.sum()


def written_inside(w: Tensor) -> Tensor:
    def block(t: Tensor) -> Tensor:
        u = t * t
        v = F.relu(u * u)
        u.add_(1)
        return v

    return again(block, w * 1).sum()


def state_inside(w: Tensor) -> Tensor:
    state = torch.ones(3)

    def block(t: Tensor) -> Tensor:
        return F.relu(t * state.mul_(2))

    return again(block, w * 1).sum()


def relu_in_place(w: Tensor) -> Tensor:
    return again(lambda t: F.relu(t * t, inplace=True), w * 1).sum()


def module_in_place(w: Tensor) -> Tensor:
    return again(lambda t: adcert.nn.ReLU(inplace=True)(t * t), w * 1).sum()


def other_numbers(w: Tensor) -> Tensor:
    return again(lambda t: F.dropout(F.relu(t * t), 0.5) * t, w * 1, preserve_rng_state=False).sum()


def reentrant(w: Tensor) -> Tensor:
    return checkpoint(lambda t: F.relu(t * t), w * 1, use_reentrant=True).sum()


def offloaded(w: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return F.relu(w * w).sum()


REFUSED = {
    overwritten_constant: "was written to after torch.utils.checkpoint",
    overwritten_source_of_a_constant: "was written to after torch.utils.checkpoint",
    written_inside: "writes in place under torch.utils.checkpoint",
    state_inside: "writes in place under torch.utils.checkpoint",
    relu_in_place: "writes in place under torch.utils.checkpoint",
    module_in_place: "writes in place under torch.utils.checkpoint",
    other_numbers: "may draw other numbers",
    reentrant: "use_reentrant=False can be followed",
    offloaded: "saved-tensor hooks other than those of torch.utils.checkpoint",
}


@pytest.mark.parametrize("loss", REFUSED, ids=lambda loss: loss.__name__)
def test_what_a_checkpoint_would_compute_differently_is_undecided(loss: Callable[[Tensor], Tensor]) -> None:
    found = look(loss)
    assert found.verdict is Verdict.UNDECIDED
    assert any(REFUSED[loss] in reason for reason in found.reasons)


def test_the_same_programs_without_what_is_wrong_are_certified() -> None:
    for loss in (
        lambda w: again(lambda t: F.relu(t * t), w * 2).sum(),
        lambda w: again(lambda t: F.dropout(F.relu(t * t), 0.5), w * 1).sum(),
        lambda w: again(lambda t: F.relu(F.batch_norm(torch.stack([t, 2 * t]), None, None, training=True)), w).sum(),
    ):
        found = look(loss)
        assert found.verdict is Verdict.CERTIFIED, found.reasons


def test_measuring_a_proxy_saves_nothing_for_the_checkpoint() -> None:
    """The first look at a new activation runs autograd; the checkpoint counts what its own forward pass saves."""
    slope = 0.123456  # nobody has measured this one
    found = look(lambda w: again(lambda t: F.leaky_relu(t * t, slope), w * 1).sum())
    assert found.verdict is Verdict.CERTIFIED


PLAIN = {
    "max": lambda t: t.max(0).values,
    "maximum": lambda t: torch.maximum(t, 1 - t),
    "relu_": torch.relu_,
    "max_pool1d": lambda t: F.max_pool1d(t[None], 2),
    "max_pool2d": lambda t: adcert.nn.MaxPool2d(1)(adcert.nn.ReLU()(t.reshape(1, 1, 3))),
    "fused": lambda t: adcert.nn.Sequential(adcert.nn.ReLU(), adcert.nn.MaxPool2d(1))(t.reshape(1, 1, 3)),
    "prelu": lambda t: F.prelu(t, t[:1]),
    "hardswish": F.hardswish,
    "adaptive": lambda t: F.adaptive_max_pool1d(t[None], 1),
    "abs": torch.abs,
}


@pytest.mark.parametrize("operation", PLAIN.values(), ids=PLAIN)
def test_programs_go_on(operation: Callable[[Tensor], Tensor]) -> None:
    """A checkpoint insists that the second forward pass saves what the first one did."""
    gradients = []
    for monitored in (False, True):
        w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

        def loss(w: Tensor = w) -> Tensor:
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16):
                return again(lambda t: operation(t * 3) * 2, w).sum()

        if monitored:
            certify(loss, nn.ParameterList([w]))
        else:
            loss().backward()  # type: ignore[no-untyped-call]
        gradients.append(w.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


def test_a_dropped_node_shows_its_structure() -> None:
    w = torch.ones(3, requires_grad=True)
    node: Any = again(lambda t: t * t, w).grad_fn
    seen = Dropped(node)
    assert seen == node and hash(seen) == hash(node) and {node: 1}[seen] == 1  # type: ignore[index]
    assert seen.name() == "MulBackward0" and seen.next_functions == node.next_functions
    with pytest.raises(DroppedError, match="has dropped its values"):
        getattr(seen, "_saved_self", None)
    with pytest.raises(DroppedError):
        seen(torch.ones(3))
