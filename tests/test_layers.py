"""From the graph of a step to layers: leaves of tau_l, sources, own and upstream leaves, order, problems."""

from __future__ import annotations

import pytest
import torch
from core_helpers import Probe, Seen, fill, look, param
from hypothesis import given
from hypothesis import strategies as st
from networks import random_network
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert.layers import Graph, Leaves, kind_of, shape_of
from adcert.recorder import Recorder, recording

ONES = torch.ones(2, 2, dtype=torch.float64)


def linears(*names: str, bias: bool = False) -> nn.ModuleDict:
    """Square linear layers of width 2."""
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(2, 2, bias=bias, dtype=torch.float64) for name in names})


def own(seen: Seen) -> list[list[str]]:
    order = seen.order()
    return [sorted(order.own[record]) for record in seen.records]


def layers(seen: Seen) -> list[tuple[list[str], tuple[str, ...]]]:
    """(names of the records, leaves) of every layer, in order."""
    return [([record.name for record in layer.records], layer.leaves) for layer in seen.order().layers]


# ---- the graph -----------------------------------------------------------------------------------


def test_leaves_know_the_models_names_and_number_the_others():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    leaves = Leaves(model)
    stranger, other = torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)
    assert leaves.name(model[1].weight) == "1.weight"
    assert leaves.name(stranger) == "leaf0"
    assert leaves.name(other) == "leaf1"
    assert leaves.name(stranger) == "leaf0"
    assert leaves.tensor("leaf1") is other
    model[0].bias.requires_grad_(False)
    assert set(leaves.trainable()) == {"0.weight", "1.weight", "1.bias", "leaf0", "leaf1"}


def test_a_parameter_called_leaf0_keeps_its_name():
    model = nn.Module()
    model.leaf0 = param([1.0])
    leaves = Leaves(model)
    stranger = torch.zeros(1, requires_grad=True)
    assert leaves.name(stranger) != "leaf0"
    assert leaves.tensor("leaf0") is model.leaf0
    assert leaves.tensor(leaves.name(stranger)) is stranger


def test_kind_and_shape_of_a_node():
    w = param([[1.0, 2.0, 3.0]])
    node = (w + w).grad_fn
    assert node.name() == "AddBackward0"
    assert kind_of(node) == "AddBackward"
    assert shape_of(node, 0) == (1, 3)
    assert kind_of(w.sum(1).grad_fn) == "SumBackward"


def test_every_consumer_comes_before_what_it_consumes():
    m = linears("a", "b", "c")

    def forward(probe: Probe) -> Tensor:
        h = probe.relu(m["a"](ONES))
        return m["c"](h + m["b"](h)) * h

    seen = look(forward, m)
    nodes = seen.graph.nodes
    assert len(set(nodes)) == len(nodes)
    for node in nodes:
        for slot, (source, number) in enumerate(node.next_functions):
            if source is not None:
                assert seen.graph.position[node] < seen.graph.position[source]
                assert (node, slot, number) in seen.graph.consumers[source]
    assert sum(map(len, seen.graph.consumers.values())) == sum(
        source is not None for node in nodes for source, _ in node.next_functions
    )


def test_a_root_may_lie_above_another_root():
    w = param([1.0, -1.0])
    inner = w * 2.0
    outer = inner.sum()
    graph = Graph([inner.grad_fn, outer.grad_fn], [], Leaves(None))
    assert graph.nodes.index(outer.grad_fn) < graph.nodes.index(inner.grad_fn)
    assert len(graph.nodes) == 3


def test_a_node_that_is_used_twice_by_one_consumer_counts_twice():
    w = param([3.0])
    h = w * 1.0
    seen = look(lambda probe: probe.relu(h * h), w=w)
    assert len(seen.graph.consumers[h.grad_fn]) == 2
    assert len(seen.graph.nodes) == len(set(seen.graph.nodes))


def test_a_leaf_is_found_through_casts_only():
    w = param([1.0], dtype=torch.float32)
    cast = w.to(torch.bfloat16).to(torch.float64)
    seen = look(lambda probe: probe.relu(cast), w=w)
    assert seen.graph.leaf(cast.grad_fn) == "w"
    assert seen.graph.leaf(None) is None
    doubled = w * 2.0
    assert look(lambda probe: probe.relu(doubled), w=w).graph.leaf(doubled.grad_fn) is None


def test_records_that_do_not_reach_the_root_are_left_out():
    w = param([1.0, -1.0])
    recorder = Recorder()
    with recording(recorder):
        used = recorder.relu(w * 2.0, "used")
        recorder.relu(w * 3.0, "unused")
    graph = Graph([used.sum().grad_fn], recorder.records, Leaves(None))
    assert [record.name for record in graph.record_of.values()] == ["used"]


# ---- tau -----------------------------------------------------------------------------------------


def test_tau_of_a_chain():
    m = linears("a", "b", bias=True)
    seen = look(lambda probe: probe.relu(m["b"](probe.relu(m["a"](ONES), "first")), "second"), m)
    first, second = (seen.graph.tau(seen.record(name)) for name in ("first", "second"))
    assert set(first.leaves) == {"a.weight", "a.bias"}
    assert first.sources == ()
    assert set(second.leaves) == {"b.weight", "b.bias"}
    assert second.sources == (seen.record("first"),)


def test_tau_counts_every_use_of_a_leaf():
    w = param([1.0])
    once = look(lambda probe: probe.relu(w * 2.0), w=w)
    twice = look(lambda probe: probe.relu(w * 2.0 + w), w=w)
    same = look(lambda probe: probe.relu(w + w), w=w)
    itself = look(lambda probe: probe.relu(w), w=w)
    uses = [len(seen.graph.tau(seen.records[0]).leaves["w"]) for seen in (once, twice, same, itself)]
    assert uses == [1, 2, 2, 1]


def test_tau_of_a_constant_has_no_leaves():
    w, x = param([1.0]), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    frozen = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)
    seen = look(lambda probe: probe.relu(w * frozen), w=w, frozen=frozen)
    assert set(seen.graph.tau(seen.records[0]).leaves) == {"w"}
    of_input = look(lambda probe: probe.relu(x), w=w)
    assert set(of_input.graph.tau(of_input.records[0]).leaves) == {"leaf0"}


# ---- layers and their order ----------------------------------------------------------------------


def test_a_chain_is_ordered_from_the_input():
    m = linears("z", "y", "x")

    def forward(probe: Probe) -> Tensor:
        h = probe.relu(m["z"](ONES), "first")
        h = probe.relu(m["y"](h), "second")
        return probe.relu(m["x"](h), "third")

    seen = look(forward, m)
    assert layers(seen) == [(["first"], ("z.weight",)), (["second"], ("y.weight",)), (["third"], ("x.weight",))]
    order = seen.order()
    assert order.problem == ""
    assert order.upstream[seen.record("third")] == {"z.weight", "y.weight"}
    assert order.upstream[seen.record("first")] == set()
    assert order.layers[0].name == "first"


def test_relu_and_pooling_over_it_belong_together_by_order_only():
    """The pooling's tau is empty: its own layer has no parameters, and everything is upstream."""
    conv = nn.Conv2d(1, 1, 1, dtype=torch.float64)
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    seen = look(lambda probe: probe.max_pool2d(probe.relu(conv(x))), conv)
    relu, pool = seen.records
    order = seen.order()
    assert order.own[pool] == set()
    assert order.upstream[pool] == {"weight", "bias"}
    assert order.own[relu] == {"weight", "bias"}
    assert order.problem == ""


def test_residual_from_a_relu():
    """y2 = r + B r with r = relu(A x): r is the output of the first layer, nothing of A is in tau_2."""
    m = linears("a", "b")

    def forward(probe: Probe) -> Tensor:
        r = probe.relu(m["a"](ONES), "first")
        return probe.relu(r + m["b"](r), "second")

    seen = look(forward, m)
    assert set(seen.graph.tau(seen.record("second")).leaves) == {"b.weight"}
    assert own(seen) == [["a.weight"], ["b.weight"]]
    assert seen.order().problem == ""


def test_residual_from_an_affine_skip_keeps_the_leaf_in_its_first_layer():
    """t = A x, y2 = t + B relu(t): A reaches tau_2 past the relu, in the node that tau_1 has too."""
    m = linears("a", "b")

    def forward(probe: Probe) -> Tensor:
        t = m["a"](ONES)
        return probe.relu(t + m["b"](probe.relu(t, "first")), "second")

    seen = look(forward, m)
    assert set(seen.graph.tau(seen.record("second")).leaves) == {"a.weight", "b.weight"}
    assert own(seen) == [["a.weight"], ["b.weight"]]
    order = seen.order()
    assert order.upstream[seen.record("second")] == {"a.weight"}
    assert order.problem == ""
    assert [leaves for _, leaves in layers(seen)] == [("a.weight",), ("b.weight",)]


def test_a_skip_over_two_operations():
    m = linears("a", "b", "c")

    def forward(probe: Probe) -> Tensor:
        t = m["a"](ONES)
        return probe.relu(t + m["c"](probe.relu(m["b"](probe.relu(t)))))

    seen = look(forward, m)
    assert own(seen) == [["a.weight"], ["b.weight"], ["c.weight"]]
    assert seen.order().upstream[seen.records[2]] == {"a.weight", "b.weight"}
    assert seen.order().problem == ""


def test_siamese_use_is_one_layer_without_a_problem():
    """One module on two inputs: both relus are the same depth, w_l is shared, no weight tying."""
    m = linears("a", "b")

    def forward(probe: Probe) -> Tensor:
        left, right = (probe.relu(m["a"](x)) for x in (ONES, -ONES))
        return probe.relu(m["b"](left - right), "top")

    seen = look(forward, m)
    assert layers(seen) == [(["relu", "relu#2"], ("a.weight",)), (["top"], ("b.weight",))]
    assert seen.order().problem == ""


def test_layers_that_share_a_leaf_join_transitively():
    """{u}, {u, v}, {v}: one layer."""
    u, v = param([1.0]), param([1.0])
    seen = look(lambda p: p.relu(u * 1.0) + p.relu(u * 2.0 + v * 3.0) + p.relu(v * 4.0), u=u, v=v)
    assert layers(seen) == [(["relu", "relu#2", "relu#3"], ("u", "v"))]
    assert seen.order().problem == ""


def test_recurrent_use_is_weight_tying():
    m = linears("w")
    seen = look(lambda probe: probe.relu(m["w"](probe.relu(m["w"](ONES), "first")), "second"), m)
    problem = seen.order().problem
    assert "weight tying" in problem
    for word in ("w.weight", "first", "second"):
        assert word in problem


def test_weight_tying_across_an_operation_in_between():
    m = linears("w", "b")
    seen = look(lambda p: p.relu(m["w"](p.relu(m["b"](p.relu(m["w"](ONES)))))), m)
    assert "w.weight" in seen.order().problem


def test_lemma_2_over_two_layers_is_weight_tying():
    """relu(relu(w)) - relu(w + relu(w)): the second use of w is downstream of the first, in another node."""
    w = param([0.0])
    seen = look(lambda probe: probe.relu(w + probe.relu(w)), w=w)
    assert own(seen)[0] == ["w"]
    assert "weight tying" in seen.order().problem


def test_layers_in_a_circle():
    """A before B on one path and B before A on another: no leaf is tied to itself, yet no order exists."""
    m = linears("a", "b")

    def forward(probe: Probe) -> Tensor:
        one = probe.relu(m["b"](probe.relu(m["a"](ONES))))
        two = probe.relu(m["a"](probe.relu(m["b"](-ONES))))
        return one + two

    seen = look(forward, m)
    assert seen.order().problem != ""
    assert {leaf for layer in seen.order().layers for leaf in layer.leaves} == {"a.weight", "b.weight"}


def test_frozen_parameters_are_constants():
    m = linears("a", "b", "c", bias=True)
    m["b"].requires_grad_(False)
    m["a"].bias.requires_grad_(False)

    def forward(probe: Probe) -> Tensor:
        h = probe.relu(m["a"](ONES))
        return probe.relu(m["c"](probe.relu(m["b"](h))))

    seen = look(forward, m)
    assert own(seen) == [["a.weight"], [], ["c.bias", "c.weight"]]
    assert seen.order().problem == ""


def test_tying_through_a_frozen_copy_is_none():
    m = linears("w")

    def forward(probe: Probe) -> Tensor:
        h = probe.relu(m["w"](ONES))
        return probe.relu(F.linear(h, m["w"].weight.detach()))

    assert look(forward, m).order().problem == ""


def test_a_frozen_first_layer_leaves_no_record():
    m = linears("a", "b")
    m["a"].requires_grad_(False)
    seen = look(lambda probe: probe.relu(m["b"](probe.relu(m["a"](ONES)))), m)
    assert len(seen.records) == 1
    assert own(seen) == [["b.weight"]]


def test_cat_joins_branches():
    """Branches a and b are independent layers; what reads their concatenation comes after both."""
    m = linears("a", "b", "c")
    m["c"] = nn.Linear(4, 2, bias=False, dtype=torch.float64)

    def forward(probe: Probe) -> Tensor:
        both = torch.cat([probe.relu(m["a"](ONES)), probe.relu(m["b"](ONES))], 1)
        return probe.relu(m["c"](both), "top")

    seen = look(forward, m)
    found = layers(seen)
    assert found[-1] == (["top"], ("c.weight",))
    assert {leaves for _, leaves in found[:2]} == {("a.weight",), ("b.weight",)}
    assert set(seen.graph.tau(seen.record("top")).sources) == set(seen.records[:2])


def test_cat_before_one_relu_is_one_layer_of_both():
    m = linears("a", "b")
    seen = look(lambda probe: probe.relu(torch.cat([m["a"](ONES), m["b"](ONES)], 1)), m)
    assert layers(seen) == [(["relu"], ("a.weight", "b.weight"))]


@pytest.mark.parametrize("depth", [1, 30])
def test_depth_does_not_matter(depth: int):
    modules = nn.ModuleList(nn.Linear(1, 1, dtype=torch.float64) for _ in range(depth))

    def forward(probe: Probe) -> Tensor:
        h = torch.ones(1, 1, dtype=torch.float64)
        for module in modules:
            h = probe.relu(module(h))
        return h

    seen = look(forward, modules)
    assert [leaves for _, leaves in layers(seen)] == [(f"{k}.bias", f"{k}.weight") for k in range(depth)]


@given(st.integers(0, 400))
def test_order_on_random_networks(seed: int):
    """own and upstream are disjoint, cover every leaf y depends on, and earlier layers come first."""
    network = random_network(seed)
    model = adcert.convert(network.model)
    seen = look(lambda _: network.closure(), model)
    graph, records, order = seen.graph, list(seen.graph.record_of.values()), seen.order()
    assert order.problem == ""
    place = {leaf: i for i, layer in enumerate(order.layers) for leaf in layer.leaves}
    assert sum(len(layer.leaves) for layer in order.layers) == len(place)
    for record in records:
        assert not order.own[record] & order.upstream[record]
        reached = {graph.leaf(node) for node in _above(record.edge[0])} - {None}
        assert order.own[record] | order.upstream[record] == reached
        for mine in order.own[record]:
            assert all(place[leaf] < place[mine] for leaf in order.upstream[record])


def _above(start: object) -> list:
    found, stack = {start}, [start]
    while stack:
        for source, _ in stack.pop().next_functions:
            if source is not None and source not in found:
                found.add(source)
                stack.append(source)
    return list(found)


def test_helpers_fill_every_parameter_with_integers():
    model = fill(nn.Linear(3, 2, dtype=torch.float64), 1)
    assert all(bool((p == p.round()).all()) and p.abs().max() <= 2 for p in model.parameters())
