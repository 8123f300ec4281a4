"""E2 and E3: which units the loss may depend on near w; irrelevance is proved, never guessed from zero gradients."""

from __future__ import annotations

import torch
from core_helpers import Probe, Seen, look, param
from hypothesis import given
from hypothesis import strategies as st
from networks import random_network
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert.choices import Window
from adcert.records import OpRecord
from adcert.relevance import relevant_inputs, relevant_outputs

PAIRS = Window((1, 2), (1, 2), (0, 0), (1, 1))  # windows {0 1}, {2 3}, ... of a row
STEPS = Window((1, 2), (1, 1), (0, 0), (1, 1))  # windows {0 1}, {1 2}, ... of a row


def row(*values: float) -> nn.Parameter:
    return param([[[list(values)]]])


def outputs(seen: Seen, record: OpRecord) -> list[bool]:
    return relevant_outputs(seen.graph, record, torch.arange(record.output.numel())).tolist()


def inputs(seen: Seen, record: OpRecord) -> list[bool]:
    return relevant_inputs(seen.graph, record, torch.arange(seen.y(record).numel())).tolist()


# ---- one operation -------------------------------------------------------------------------------


def test_a_root_is_relevant():
    """z = relu(w) is the loss itself: every output counts; of the inputs, those that are not strictly negative."""
    w = param([-1.0, 0.0, 2.0])
    seen = look(lambda probe: probe.relu(w).sum(), w=w)
    assert outputs(seen, seen.records[0]) == [True, True, True]
    assert inputs(seen, seen.records[0]) == [False, True, True]
    scalar = param(-1.0)
    alone = look(lambda probe: probe.relu(scalar), w=scalar)
    assert alone.records[0].node in alone.graph.roots
    assert outputs(alone, alone.records[0]) == [True]


def test_a_root_that_is_consumed_as_well_is_relevant():
    """Two losses in one step: relu(w) itself and a pooling of it."""
    from adcert.layers import Graph

    w = row(1.0, 2.0)
    seen = look(lambda probe: probe.max_pool2d(probe.relu(w, "relu"), "pool", PAIRS), w=w)
    relu = seen.record("relu")
    assert outputs(seen, relu) == [False, True]
    both = Graph([seen.loss.grad_fn, relu.node], seen.records, seen.leaves)
    assert relevant_outputs(both, relu, torch.arange(2)).tolist() == [True, True]


def test_strict_losers_of_a_window_are_irrelevant():
    """E2: 1 < 3, 2 = 2, 5 > 4."""
    w = row(1.0, 3.0, 2.0, 2.0, 5.0, 4.0)
    seen = look(lambda probe: probe.max_pool2d(w, "pool", PAIRS), w=w)
    assert inputs(seen, seen.records[0]) == [False, True, True, True, True, False]


def test_one_window_that_is_won_is_enough():
    """Overlapping windows of 1 3 2 4: 2 loses to 3 and to 4; 3 wins the first two; 1 loses its only one."""
    w = row(1.0, 3.0, 2.0, 4.0)
    seen = look(lambda probe: probe.max_pool2d(w, "pool", STEPS), w=w)
    assert inputs(seen, seen.records[0]) == [False, True, False, True]


def test_units_in_no_window_are_irrelevant():
    w = row(1.0, 2.0, 9.0)
    seen = look(lambda probe: probe.max_pool2d(w, "pool", PAIRS), w=w)
    assert inputs(seen, seen.records[0]) == [False, True, False]


def test_no_units():
    w = row(1.0, 2.0)
    seen = look(lambda probe: probe.max_pool2d(w, "pool", PAIRS), w=w)
    none = torch.zeros(0, dtype=torch.int64)
    assert relevant_inputs(seen.graph, seen.records[0], none).tolist() == []
    assert relevant_outputs(seen.graph, seen.records[0], none).tolist() == []


def test_windows_of_a_unit_by_hand():
    """3x3 windows of stride 2 and padding 1 over 4x4: unit (1, 1) is in all four and attains two, (0, 0) is in one."""
    w = nn.Parameter(torch.tensor([[[[0, 0, 2, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 3]]]], dtype=torch.float64))
    seen = look(lambda probe: probe.max_pool2d(w, "pool", Window((3, 3), (2, 2), (1, 1), (1, 1))), w=w)
    assert seen.records[0].ties is not None
    owner, windows, attains = seen.records[0].ties.places(torch.tensor([5, 0]))
    found = sorted(zip(owner.tolist(), windows.tolist(), attains.tolist(), strict=True))
    assert found == [(0, 0, True), (0, 1, False), (0, 2, True), (0, 3, False), (1, 0, False)]


# ---- consumers -----------------------------------------------------------------------------------


def test_losing_in_the_pooling_above_a_relu():
    """relu(w) = 0 0 1 0 2 0: the touch at unit 1 ties with 0 in a window of maximum 0; that of unit 3 loses to 1."""
    w = row(-1.0, 0.0, 1.0, 0.0, 2.0, -3.0)
    seen = look(lambda probe: probe.max_pool2d(probe.relu(w, "relu"), "pool", PAIRS), w=w)
    relu = seen.record("relu")
    assert outputs(seen, relu) == [True, True, True, False, True, False]
    assert inputs(seen, relu) == [False, True, True, False, True, False]


def test_fused_pooling_agrees_with_the_pair():
    w = row(-1.0, 0.0, 1.0, 0.0, 2.0, -3.0, -1.0, -1.0)
    seen = look(lambda probe: probe.max_pool2d(w, "pool", PAIRS, relu=True), w=w)
    assert inputs(seen, seen.records[0]) == [False, True, True, False, True, False, False, False]


def test_a_window_inside_the_flat_piece_of_its_relu():
    """E3: windows -1 -1 (below 0), 0 0 (at the kink), 1 1: the first tie needs no row."""
    w = row(-1.0, -1.0, 0.0, 0.0, 1.0, 1.0)
    seen = look(lambda probe: probe.relu(probe.max_pool2d(w, "pool", PAIRS), "relu"), w=w)
    assert outputs(seen, seen.record("pool")) == [False, True, True]
    assert inputs(seen, seen.record("pool")) == [False, False, True, True, True, True]


def test_a_skip_connection_is_a_consumer():
    """The relu output feeds a window and a sum: the loser of the window still counts."""
    w = row(0.0, 3.0)

    def forward(probe: Probe) -> Tensor:
        r = probe.relu(w, "relu")
        return probe.max_pool2d(r, "pool", PAIRS).sum() + r.sum()

    seen = look(forward, w=w)
    assert outputs(seen, seen.record("relu")) == [True, True]
    assert inputs(seen, seen.record("relu")) == [True, True]


def test_views_that_keep_the_order_are_looked_through():
    w = param([0.0, 3.0])
    seen = look(lambda p: p.max_pool2d(p.relu(w, "relu").view(1, 1, 1, 2), "pool", PAIRS), w=w)
    assert outputs(seen, seen.record("relu")) == [False, True]
    turned = look(lambda p: p.max_pool2d(p.relu(w, "relu").flip(0).view(1, 1, 1, 2), "pool", PAIRS), w=w)
    assert outputs(turned, turned.record("relu")) == [True, True]


def test_a_view_that_is_read_twice_counts_all_its_readers():
    w = param([0.0, 3.0])

    def forward(probe: Probe) -> Tensor:
        view = probe.relu(w, "relu").view(1, 1, 1, 2)
        return probe.max_pool2d(view, "pool", PAIRS).sum() + view.sum()

    seen = look(forward, w=w)
    assert outputs(seen, seen.record("relu")) == [True, True]


def test_two_windows_decide_together():
    """A unit that loses in one pooling and wins in another counts."""
    w = row(1.0, 2.0, 3.0)

    def forward(probe: Probe) -> Tensor:
        r = probe.relu(w, "relu")
        three = Window((1, 3), (1, 3), (0, 0), (1, 1))
        return probe.max_pool2d(r, "a", PAIRS).sum() + probe.max_pool2d(r, "b", three).sum()

    seen = look(forward, w=w)
    assert outputs(seen, seen.record("relu")) == [False, True, True]


def test_irrelevance_closes_recursively():
    """1 2 | 3 4, pooled to 2 4, pooled to 4: the 2 wins its first window and loses the second."""
    w = row(1.0, 2.0, 3.0, 4.0)

    def forward(probe: Probe) -> Tensor:
        return probe.max_pool2d(probe.max_pool2d(probe.relu(w, "relu"), "low", PAIRS), "high", PAIRS)

    seen = look(forward, w=w)
    assert outputs(seen, seen.record("low")) == [False, True]
    assert outputs(seen, seen.record("relu")) == [False, False, False, True]
    assert inputs(seen, seen.record("relu")) == [False, False, False, True]


def test_irrelevance_closes_through_a_relu_above():
    """max(-2, -1) = -1 is switched off by the relu above: nothing below counts."""
    w = row(-2.0, -1.0, 1.0, 0.0)

    def forward(probe: Probe) -> Tensor:
        return probe.relu(probe.max_pool2d(w, "pool", PAIRS), "relu")

    seen = look(forward, w=w)
    assert inputs(seen, seen.record("pool")) == [False, False, True, False]


def test_a_zero_weight_is_not_irrelevance():
    """0 * relu(w): the derivative is 0 today, not near today's weights."""
    w, v = param([0.0, 1.0]), param([0.0, 0.0])
    seen = look(lambda probe: probe.relu(w, "relu") * v, w=w, v=v)
    assert outputs(seen, seen.record("relu")) == [True, True]


def test_a_zero_backward_gradient_is_not_irrelevance():
    """relu(w) - relu(w): the gradient cancels exactly, yet both count."""
    w = param([0.0])
    seen = look(lambda probe: probe.relu(w, "a") - probe.relu(w, "b"), w=w)
    assert outputs(seen, seen.record("a")) == [True]
    assert outputs(seen, seen.record("b")) == [True]


# ---- property ------------------------------------------------------------------------------------


@given(st.integers(0, 2000))
def test_irrelevant_units_do_not_change_the_loss(seed: int):
    """Nudging any irrelevant unit of y, alone or with all others, by less than the gaps leaves the loss as it is."""
    network = random_network(seed)
    model = adcert.convert(network.model)
    seen = look(lambda _: network.closure(), model)
    loss = network.closure().item()
    for index, record in enumerate(seen.records):
        units = torch.arange(seen.y(record).numel())
        idle = ~relevant_inputs(seen.graph, record, units)
        if not bool(idle.any()):
            continue
        for sign in (0.25, -0.25):  # activations are integers
            nudge = (sign * idle).reshape(record.input_shape)
            assert _nudged(network, index, nudge) == loss


def _nudged(network: object, index: int, nudge: Tensor) -> float:
    """The loss with ``nudge`` added to y of record number ``index``."""
    count = 0

    class Nudging(Probe):
        def relu(self, x: Tensor, name: str = "relu", *, inplace: bool = False) -> Tensor:
            return super().relu(self._moved(x), name)

        def max_pool2d(self, x: Tensor, name: str = "pool", window: Window | int = 2, **options: bool) -> Tensor:
            return super().max_pool2d(self._moved(x), name, window, **options)

        def _moved(self, x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return x + nudge if count == index + 1 else x

    from adcert.recorder import recording

    with recording(Nudging()):
        return network.closure().item()


def test_the_nudge_reaches_the_loss():
    """The property above can fail: a relevant unit does change the loss."""

    class Two:
        w = param([1.0, 2.0])

        def closure(self) -> Tensor:
            return F.relu(self.w).sum() if adcert.recorder.active() is None else adcert.nn.ReLU()(self.w).sum()

    assert _nudged(Two(), 0, torch.tensor([0.25, 0.0], dtype=torch.float64)) == 3.25
