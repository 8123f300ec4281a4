"""torch.compile: one graph outside a step and in it, where the compiled program's own values are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from networks import random_network
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn import functional as F

import adcert
from adcert import Certificate, Monitor, ops, reference
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


# ---- inside a step ---------------------------------------------------------------------------------------------


def certificate(model: nn.Module, loss: Callable[[], Tensor]) -> Certificate:
    for parameter in model.parameters():
        parameter.grad = None
    with Monitor(model) as monitor:
        with monitor.step() as step:
            loss().backward()
        return step.certificate()


def seen(certificate: Certificate) -> list[tuple[str, int, int, int, int]]:
    return [(layer.name, layer.windows, layer.ties, layer.touches, layer.rows) for layer in certificate.layers]


class Block(nn.Module):
    """A residual block as many people write it: in place throughout, one ReLU for all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm, self.relu, self.pool = nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.stem(x)))
        y = self.norm(self.conv(x))
        y += x
        return self.head(F.adaptive_avg_pool2d(self.relu(y), 1).flatten(1))


def test_writes_in_place() -> None:
    model, target = adcert.convert(Block()), torch.tensor([0, 1, 0, 1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = certificate(model, lambda: F.cross_entropy(model(X), target))
    gradients = [p.grad for p in model.parameters()]
    found = certificate(model, lambda: F.cross_entropy(compiled(X), target))
    assert found.verdict is expected.verdict is Verdict.CERTIFIED
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("first", ["outside", "inside"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_sees_what_eager_code_sees(backend: str, first: str) -> None:
    """One graph inside, one outside, whichever is compiled first; the same records, gradients and statistics."""
    counters.clear()
    plain, ours = adcert.convert(network()), adcert.convert(network())
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    if first == "outside":
        compiled(X).sum().backward()
        plain(X).sum().backward()
    for _ in range(3):
        expected, found = certificate(plain, lambda: plain(X).sum()), certificate(ours, lambda: compiled(X).sum())
        assert found.verdict is expected.verdict is Verdict.CERTIFIED
        assert seen(found) == seen(expected)
        assert found.fingerprints == expected.fingerprints
        assert found.assumptions == expected.assumptions
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert torch.equal(p.grad, q.grad)
    assert all(torch.equal(p, q) for p, q in zip(plain.buffers(), ours.buffers(), strict=True))
    plain.eval(), ours.eval()
    assert torch.equal(compiled(X), plain(X))
    assert counters["stats"]["unique_graphs"] == (3 if first == "outside" else 2)  # eval mode is one of them
    assert torch._dynamo.eval_frame._stance.backend is None


def test_inductor() -> None:
    """Records are those of the reference on inductor's values; gradients are torch's but for rounding."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
            nn.init.constant_(self.norm.bias, 1.0)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(self.conv(x))
            return y, F.max_pool2d(torch.relu(y), 2)

    model, x, values = adcert.convert(Model()), torch.cat([X, torch.ones_like(X)]), []

    def loss(forward: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        y, z = forward(x)
        values.append(y.detach())
        return z.square().sum() + y.sum()

    compiled = torch.compile(model, fullgraph=True)
    found = certificate(model, lambda: loss(compiled))
    gradients = [p.grad for p in model.parameters()]
    expected = certificate(model, lambda: loss(model))
    assert found.verdict is expected.verdict is Verdict.CERTIFIED
    known = reference.max_pool2d(values[0], 2, relu=True)
    assert [(layer.ties, layer.touches) for layer in found.layers] == [(len(known.windows), len(known.touches))]
    assert len(known.windows)
    torch.testing.assert_close(values[0], values[1])
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-3)


def test_random_networks() -> None:
    """Integers in float64: what is compiled computes the same numbers, so every verdict is that of the eager step."""
    for seed in range(4):
        net = random_network(seed)
        model = adcert.convert(net.model)
        expected = adcert.certify(net.closure, model)
        found = adcert.certify(torch.compile(net.closure, backend="eager"), model)
        assert (found.verdict, found.claim, found.system) == (expected.verdict, expected.claim, expected.system)
        torch._dynamo.reset()


OUTPUTS: dict[str, tuple[Callable[[Tensor], Tensor | tuple[Tensor, ...]], bool]] = {
    "itself": (lambda z: z, True),
    "twice": (lambda z: (z, z), True),
    "flat": (lambda z: z.flatten(1), True),
    "both": (lambda z: (z, z.flatten(1)), True),
    "copy": (lambda z: z.clone(), True),
    "sum with 0": (lambda z: z + 0, True),
    "part": (lambda z: z[:, 1:], False),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_program_that_returns_a_recorded_value(case: str) -> None:
    """What a program shows may be an output of its own already; the output keeps its graph."""
    function, decided = OUTPUTS[case]
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 2, 3)

    def loss(x: Tensor) -> Tensor:
        found = function(torch.relu(conv(x)))
        return sum((t.square().sum() for t in (found if isinstance(found, tuple) else (found,))), torch.zeros(()))

    expected = certificate(conv, lambda: loss(X))
    gradients = [p.grad for p in conv.parameters()]
    outputs = torch.compile(lambda x: function(torch.relu(conv(x))), backend="aot_eager")

    def compiled() -> Tensor:
        found = outputs(X)
        return sum((t.square().sum() for t in (found if isinstance(found, tuple) else (found,))), torch.zeros(()))

    found = certificate(conv, compiled)
    assert found.verdict is (expected.verdict if decided else Verdict.UNDECIDED), found.reasons
    assert all(torch.equal(p.grad, g) for p, g in zip(conv.parameters(), gradients, strict=True))


class Difference(nn.Module):
    """``relu(w x) - relu(-w x)``, which is ``w x``; autodiff's gradient is 0 where both touch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.relu(torch.conv2d(x, self.w)) - torch.relu(torch.conv2d(-x, self.w))).sum()


def zeroing(module: fx.GraphModule, inputs: list[Any]) -> Any:
    """A compiler whose convolutions round to 0: values other than eager's, derivatives the same."""
    for node in list(module.graph.nodes):
        if node.target is torch.conv2d:
            with module.graph.inserting_after(node):
                value = module.graph.call_method("detach", (node,))
            with module.graph.inserting_after(value):
                zero = module.graph.call_function(torch.sub, (node, value))
            node.replace_all_uses_with(zero, delete_user_cb=lambda user, kept=(value, zero): user not in kept)
    module.recompile()
    return lookup_backend("aot_eager")(module, inputs)


def test_touches_are_those_of_the_compiled_values() -> None:
    """Eager code is far from the kinks. The compiled program sits on both, where its gradient, 0, is wrong."""
    model, x = Difference(), torch.ones(1, 1, 1, 1)
    eager = certificate(model, lambda: model(x))
    assert (eager.verdict, model.w.grad.item()) == (Verdict.CERTIFIED, 1.0)
    compiled = torch.compile(model, backend=zeroing, fullgraph=True)
    found = certificate(model, lambda: compiled(x))
    assert (found.verdict, model.w.grad.item()) == (Verdict.UNCERTIFIED, 0.0)
    assert sum(layer.touches for layer in found.layers) == 2


def test_ties_are_those_of_the_compiled_values() -> None:
    """``max(u + b, b) - max(-u + b, b)`` at 0 (Lemma 7), but only in what the compiler makes of it."""

    class Lemma7(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = nn.Parameter(torch.full((1, 1, 1, 1), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            pooled = [F.max_pool2d(torch.conv2d(side * x, self.u), 2) for side in (1, -1)]
            return (pooled[0] - pooled[1]).sum()

    model, x = Lemma7(), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert certificate(model, lambda: model(x)).verdict is Verdict.CERTIFIED
    found = certificate(model, lambda: torch.compile(model, backend=zeroing)(x))
    assert found.verdict is Verdict.UNCERTIFIED
    assert sum(layer.ties for layer in found.layers) == 2


def test_several_programs_and_eager_code_in_one_step() -> None:
    """Edges cross from eager code into a replay, from one replay into another, and back."""
    torch.manual_seed(0)
    lower = adcert.convert(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)))
    upper = adcert.convert(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.MaxPool2d(2)))
    head = nn.Linear(8, 1)
    model, x = nn.Sequential(lower, upper, head), torch.ones(4, 1, 8, 8)
    a, b = torch.compile(lower, backend="aot_eager"), torch.compile(upper, backend="aot_eager")
    expected = certificate(model, lambda: head(upper(lower(x)).flatten(1)).sum())
    assert [layer.ties > 0 for layer in expected.layers] == [True, True]
    for first, second in ((a, b), (a, upper), (lower, b)):
        found = certificate(model, lambda f=first, g=second: head(g(f(x)).flatten(1)).sum())
        assert (found.verdict, seen(found)) == (expected.verdict, seen(expected))

    def twice(f: nn.Module, g: nn.Module) -> Tensor:
        return head(g(f(x)).flatten(1)).sum() + head(g(f(2 * x)).flatten(1)).sum()

    expected, found = certificate(model, lambda: twice(lower, upper)), certificate(model, lambda: twice(a, b))
    assert (found.verdict, seen(found)) == (expected.verdict, seen(expected))


W = torch.tensor([0.0, 1.0, -1.0])


def no_grad_write(w: Tensor, buffer: Tensor) -> Tensor:
    with torch.no_grad():
        buffer.copy_(w)
    return w * buffer


def hooked(w: Tensor, _: Tensor) -> Tensor:
    y = w * 2
    y.register_hook(lambda g: g * 0)
    return torch.relu(y)


UNDECIDED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "mask": (lambda w, _: w * (w > 0) + w * (-w > 0), "gt in compiled code"),
    "where": (lambda w, _: torch.where(w > 0, w, torch.zeros_like(w)), "gt in compiled code"),
    "abs": (lambda w, _: w.abs(), "abs in compiled code"),
    "leaky": (lambda w, _: F.leaky_relu(w), "leaky_relu in compiled code"),
    "max": (lambda w, _: torch.max(w, dim=0).values, "max in compiled code"),
    "l1": (lambda w, b: F.l1_loss(w, b), "in compiled code"),
    "norm": (lambda w, _: w.norm(), "linalg_vector_norm in compiled code"),
    "dropout": (lambda w, _: F.dropout(w, 0.5), "bernoulli_ in compiled code"),
    "floor of data": (lambda w, b: w * torch.floor(b + 0.5), "floor in compiled code"),
    "integers": (lambda w, _: w * w.detach().long(), "makes integers of computed numbers"),
    "quotient": (lambda w, b: w / (b + 1), "div in compiled code"),
    "detach": (lambda w, _: w * torch.relu(w.detach()), "detach has hidden"),
    "straight through": (lambda w, _: w + (torch.relu(w) - w).detach(), "steers the differentiable add"),
    "data": (lambda w, _: w * w.data, "_get_data_attr in compiled code"),
    "buffer": (no_grad_write, "_set_grad_enabled in compiled code"),
    "in place": (lambda w, _: torch.relu((w * 1).add_(1)), "add_ in compiled code"),
    "hook": (hooked, "in compiled code"),
    "nonzero": (lambda w, _: (w * 2).index_select(0, (w > 0).nonzero().flatten()), "steers|gt in compiled code"),
}


@pytest.mark.parametrize("case", UNDECIDED)
def test_what_a_second_evaluation_might_decide_otherwise_is_named(case: str) -> None:
    function, reason = UNDECIDED[case]
    model = nn.Module()
    model.w = nn.Parameter(W.clone())
    compiled = torch.compile(lambda: function(model.w, torch.zeros(3)).sum(), backend="aot_eager")
    found = certificate(model, compiled)
    assert found.verdict is Verdict.UNDECIDED
    assert any(part in text for part in reason.split("|") for text in found.reasons), found.reasons


def test_values_that_leave_a_program() -> None:
    """A program's outputs outside the graph, and what it writes, are functions of the parameters."""
    model = nn.Module()
    model.w = nn.Parameter(W.clone())
    model.register_buffer("mask", torch.zeros(3))

    def write() -> None:
        with torch.no_grad():
            model.mask.copy_(model.w > 0)

    returned = torch.compile(lambda: (model.w > 0).float(), backend="aot_eager")
    written = torch.compile(write, backend="aot_eager")
    for loss in (lambda: (model.w * returned()).sum(), lambda: (written(), (model.w * model.mask).sum())[1]):
        found = certificate(model, loss)
        assert found.verdict is Verdict.UNDECIDED
        assert any("a compiled program" in reason and "steers" in reason for reason in found.reasons)


def test_calls_between_two_graphs_are_seen() -> None:
    """Dynamo would compile the function mode's own frame where a call breaks the graph."""
    model = nn.Module()
    model.w = nn.Parameter(W.clone())
    found = certificate(model, torch.compile(lambda: (model.w * model.w.sum().item()).sum(), backend="aot_eager"))
    assert any("read into Python by item" in text for text in found.assumptions)

    def train() -> None:
        torch.relu(model.w * 2).sum().backward()

    compiled = torch.compile(train, backend="aot_eager")
    with Monitor(model) as monitor:
        with monitor.step() as step:
            compiled()
        assert seen(step.certificate())[0][3] == 1


def test_programs_that_ran_elsewhere_are_unknown() -> None:
    model = adcert.convert(network())
    compiled = torch.compile(model, backend="aot_eager")
    before = compiled(X)
    with Monitor(model) as monitor:
        with monitor.step():
            other = compiled(X)
        for output in (before, other):
            with monitor.step() as step:
                output.sum().backward()
            found = step.certificate()
            assert found.verdict is Verdict.UNDECIDED
            assert any("CompiledFunctionBackward was made out of adcert's sight" in text for text in found.reasons)


@pytest.mark.parametrize("dynamic", [None, True])
def test_lists_grow(dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model = adcert.convert(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)))
    compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic)
    verdicts = []
    for count in (64, 64, 48):
        x = torch.ones(count, 1, 32, 32)  # a third of the windows tie, or all of them
        found, expected = (certificate(model, lambda f=f, x=x: f(x).sum()) for f in (compiled, model))
        verdicts.append(found.verdict)
        if found.verdict is Verdict.UNDECIDED:
            assert "more than compiled code has room for" in found.reasons[0]
        else:
            assert seen(found) == seen(expected)
    assert verdicts[1:] == [Verdict.CERTIFIED] * 2
    assert (verdicts[0] is Verdict.UNDECIDED) == (dynamic is None)


def test_backward_selects_by_what_forward_recorded() -> None:
    """The partitioner keeps the results of recording operators; where it may compute them again, nothing is decided."""
    graphs: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(module)
        return make_boxed_func(module.forward)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    model = adcert.convert(network())
    assert certificate(model, lambda: torch.compile(model, backend=backend)(X).sum()).verdict is Verdict.CERTIFIED
    forward, backward = ({str(node.target) for node in graph.graph.nodes} for graph in graphs)
    assert {"adcert.relu.default", "adcert.max_pool2d.default"} <= forward
    assert not {"adcert.relu.default", "adcert.max_pool2d.default"} & backward
    torch._dynamo.reset()
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        found = certificate(model, lambda: torch.compile(model, backend="aot_eager")(X).sum())
    assert found.verdict is Verdict.UNDECIDED
    assert "activation_memory_budget" in found.reasons[0]


def test_a_witness_of_compiled_code_replays() -> None:
    model = adcert.convert(network()).double()
    compiled, x = torch.compile(model, backend="aot_eager"), X.double()
    found = certificate(model, lambda: compiled(x).sum())
    assert found.replay(lambda: compiled(x).sum(), model).converges


def test_the_stance_of_the_user() -> None:
    """It is put back after a step that fails, too; another one than the default is left as it is."""
    model = adcert.convert(network())
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(ZeroDivisionError), Monitor(model) as monitor, monitor.step():
        compiled(X).sum().backward()
        raise ZeroDivisionError
    assert torch._dynamo.eval_frame._stance == torch._dynamo.eval_frame.DynamoStance()
    with torch.compiler.set_stance("force_eager"):
        assert certificate(model, lambda: compiled(X).sum()).verdict is Verdict.CERTIFIED
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"


# ---- what a program may hide ---------------------------------------------------------------------


class Held(nn.Module):
    """A weight, a convolution, a buffer, and a compiled body over them."""

    def __init__(self, body: Callable[[Any], Tensor], backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.tensor([1.0, 2.0, -3.0]))
        self.conv = nn.Conv2d(1, 2, 3)
        self.register_buffer("b", torch.zeros(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))
        self.compiled = lambda f: torch.compile(f, backend=backend)
        self.body = body

    def forward(self) -> Tensor:
        return self.body(self)


def fused_past_no_grad(m: Any) -> Tensor:
    y = m.conv(X)
    with torch.no_grad():
        z = torch.relu(y)
    return F.max_pool2d(z, 2).sum() * m.w[0]


def fused_past_a_write(m: Any) -> Tensor:
    y = m.conv(X)
    z = torch.relu(y)
    y.add_(1)
    return F.max_pool2d(z, 2).sum() + y.sum()


def written_under_no_grad(m: Any) -> Tensor:
    y = m.conv(X)
    with torch.no_grad():
        y += 1
    return y.sum() * m.w[0]


def rectified_under_no_grad(m: Any) -> Tensor:
    y = m.conv(X)
    with torch.no_grad():
        y = F.relu_(y)
    return y.sum() * m.w[0]


def a_leaf_that_was_computed(m: Any) -> Tensor:
    y = (m.w * m.w).detach().requires_grad_()
    return torch.relu(y).sum() + m.w.sum()


def written_once(m: Any) -> Tensor:
    with torch.no_grad():
        torch.add(m.b, 1.0, out=m.b)
    return torch.relu(m.conv(X)).sum()


def an_alias_that_is_given(m: Any) -> Tensor:
    y = m.w * 1.0
    m.compiled(lambda t, s: t.copy_(s * s))(y.data, m.w.detach())
    return y.sum()


def a_leaf_through_an_alias(m: Any) -> Tensor:
    a = m.w.sum()
    m.compiled(lambda t: t.mul_(2))(m.w.data)
    return a + (m.w * m.w).sum()


def a_buffer_through_data(m: Any) -> Tensor:
    m.compiled(lambda w, b: b.data.copy_(w.data * 2))(m.w, m.b)
    return (m.w * m.b).sum()


def statistics(m: Any) -> Tensor:
    x = lambda w: w * torch.tensor([[1.0], [2.0]])  # noqa: E731
    m.compiled(lambda w: F.batch_norm(x(w), m.mean, m.variance, training=True, momentum=1.0).detach().sum())(m.w)
    return F.batch_norm(x(m.w), m.mean, m.variance, training=False).square().sum()


def two_outputs_in_one_memory(m: Any) -> Tensor:
    y, d = m.compiled(lambda w: (lambda y: (y, y.data))(w * 1.0))(m.w)
    d.mul_(m.w.detach())
    return y.sum()  # type: ignore[no-any-return]


WHOLE = (
    fused_past_no_grad, fused_past_a_write, written_under_no_grad, rectified_under_no_grad, a_leaf_that_was_computed,
    written_once,
)  # fmt: skip
PARTS = (
    an_alias_that_is_given, a_leaf_through_an_alias, a_buffer_through_data, statistics, two_outputs_in_one_memory,
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("body", [*WHOLE, *PARTS], ids=lambda body: body.__name__)
def test_a_hidden_dependence_is_undecided_and_nothing_is_changed(body: Any, backend: str) -> None:
    """Loss, gradients and buffers are those of the same compiled program outside of a step."""
    results = []
    for inside in (False, True):
        torch._dynamo.reset()
        model = Held(body, backend)
        call = model.compiled(lambda m=model: body(m)) if body in WHOLE else model
        if inside:
            with Monitor(model, queue=0) as monitor, monitor.step() as step:
                loss = call()
                loss.backward()
            assert step.certificate().verdict is Verdict.UNDECIDED
        else:
            loss = call()
            loss.backward()
        grads = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
        results.append((loss.item(), grads, [buffer.tolist() for buffer in model.buffers()]))
    assert results[0] == results[1]


def test_numbers_that_a_program_returns_are_constants() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0, -3.0]))
    count = torch.compile(lambda w: int((w > 0).sum()), backend="aot_eager")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        found = adcert.certify(lambda: (w * count(w)).sum(), nn.ParameterList([w]))
    assert any("read into Python" in text for text in found.assumptions)
