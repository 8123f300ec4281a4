"""The function mode: what changes a gradient, or comes back into the graph, out of autograd's sight."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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


def doubled(net: Net) -> Tensor:
    return (net.w * 2).view(2, 2)


def mask_into_a_view(net: Net) -> Tensor:
    h = doubled(net)
    h[0].mul_(net.w[:2] > 0)
    return h.sum()


def mask_copied_into_a_view(net: Net) -> Tensor:
    h = doubled(net)
    h[0] = net.w[:2] > 0
    return h.sum()


def fill_of_a_view_steered(net: Net) -> Tensor:
    h = doubled(net)
    h[0].masked_fill_(net.w[:2] > 0, 0)
    return h.sum()


def kink_in_a_view(net: Net) -> Tensor:
    h = doubled(net)
    h[0].abs_()
    return h.sum()


def kink_in_a_view_by_an_overload(net: Net) -> Tensor:
    h = doubled(net)
    torch.ops.aten.relu_(h[0])
    return h.sum()


def element_of_a_view_written_twice(net: Net) -> Tensor:
    h = doubled(net)
    view = h[0]
    view[torch.tensor([0, 0])] = net.w[:2]
    return h.sum()


def division_in_a_view(net: Net) -> Tensor:
    h = doubled(net)
    h[0].div_(net.w[2:])
    return h.sum()


def view_written_out_of_sight(net: Net) -> Tensor:
    h = doubled(net)
    view = h[0]
    with torch._C.DisableTorchFunction(), torch.no_grad():
        h.mul_(0)
    view.add_(1)
    return h.sum()


def view_written_through_another(net: Net) -> Tensor:
    h = doubled(net)
    with torch._C.DisableTorchFunction():
        with torch.no_grad():
            h.mul_(0)
        view = h[0]
    view.add_(1)
    return h.sum()


def view_chosen_out_of_sight(net: Net) -> Tensor:
    h = doubled(net)
    with torch._C.DisableTorchFunction():
        view = h[int(net.w.argmax()) // 2]
    view.mul_(3)
    return h.sum()


def clamp_inside_cosine_similarity(net: Net) -> Tensor:
    return F.cosine_similarity(net.w * 1e-10, torch.ones(4), dim=0)


def clamp_inside_an_overload(net: Net) -> Tensor:
    return torch.ops.aten.cosine_similarity.default(net.w * 1e-10, torch.ones(4), 0)


def norm_at_zero(net: Net) -> Tensor:
    return (net.w * 0).norm()


class Other(Tensor):
    """Multiplies in a way of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.mul:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0] * (args[0] > 0)
        return super().__torch_function__(func, types, args, kwargs or {})


def tensor_of_another_class(net: Net) -> Tensor:
    return torch.mul(net.w, torch.ones(4).as_subclass(Other)).as_subclass(Tensor).sum()


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def operators_dispatched_elsewhere(net: Net) -> Tensor:
    with Dispatched():
        return (net.w * 2).sum()


HIDDEN: list[Callable[[Net], Tensor]] = [
    mask_into_a_view,
    mask_copied_into_a_view,
    fill_of_a_view_steered,
    kink_in_a_view,
    kink_in_a_view_by_an_overload,
    element_of_a_view_written_twice,
    division_in_a_view,
    view_written_out_of_sight,
    view_written_through_another,
    view_chosen_out_of_sight,
    clamp_inside_cosine_similarity,
    clamp_inside_an_overload,
    norm_at_zero,
    tensor_of_another_class,
    operators_dispatched_elsewhere,
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


def dropout_in_a_view(net: Net) -> Tensor:
    h = doubled(net).flatten()
    F.dropout(h, 0.5, training=True, inplace=True)
    return (h * h).sum()


def views_written_by_slices(net: Net) -> Tensor:
    h = torch.zeros(2, 2)
    h[0] = net.w[:2] * net.w[2:]
    h[1, :] = net.w[:2]
    h[..., 1] /= 2
    return (h * h).sum()


def base_used_after_its_view(net: Net) -> Tensor:
    h = doubled(net)
    h[0].mul_(3).add_(net.w[2:])
    return (h * h).sum()


def another_view_of_what_was_written(net: Net) -> Tensor:
    h = doubled(net)
    first = h[0]
    h.view(4)[:3].add_(net.w[1:])
    h.mul_(2)
    return (first * first).sum()


def embedding_without_its_padding(net: Net) -> Tensor:
    return F.embedding(torch.tensor([1, 3]), net.w[:, None], padding_idx=0).sum()


def attention_with_a_mask(net: Net) -> Tensor:
    h = net.w.view(1, 1, 4, 1)
    return F.scaled_dot_product_attention(h, h, h, torch.ones(4, 4).tril().bool(), dropout_p=0.1).sum()


def norm_of_a_vector(net: Net) -> Tensor:
    return net.w.norm()


SEEN: list[Callable[[Net], Tensor]] = [
    dropout_in_a_view,
    views_written_by_slices,
    base_used_after_its_view,
    another_view_of_what_was_written,
    embedding_without_its_padding,
    attention_with_a_mask,
    norm_of_a_vector,
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


def test_an_embedding_that_meets_its_padding_is_undecided() -> None:
    """The gradient of that row is left out, though the function depends on it."""
    reasons = observe(lambda net: F.embedding(torch.tensor([0, 3]), net.w[:, None], padding_idx=0).sum()).reasons
    assert reasons and "EmbeddingBackward0" in reasons[0]


@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.LeakyReLU, lambda inplace: nn.ELU(0.5, inplace)]
)
def test_in_place_on_what_a_linear_layer_returns(activation: Callable[..., nn.Module]) -> None:
    """Of three or more dimensions it is a view, and autograd rewrites the base's node."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), activation(inplace=True), nn.Linear(4, 2))
    with torch.no_grad():
        plain[0].weight[0], plain[0].bias[0] = 0, -3 if activation is nn.Hardswish else 0
    x = torch.randn(2, 5, 3)
    (plain(x) ** 2).sum().backward()
    model = adcert.convert(copy.deepcopy(plain))
    model.zero_grad()
    with Monitor(model, queue=0).step() as step:
        (model(x) ** 2).sum().backward()
    assert step.summary["touches"] == 10
    assert step.certificate().verdict is Verdict.CERTIFIED, step.certificate().reasons
    for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, expected.grad)


def test_in_place_on_a_part_of_a_tensor_is_undecided() -> None:
    def loss(net: Net) -> Tensor:
        h = doubled(net)
        F.relu(h[0], inplace=True)
        return h.sum()

    assert "CopySlices" in observe(loss).reasons[0]


class Replaced(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return args[0] * (args[0] > 0) if func is torch.mul else func(*args, **(kwargs or {}))


def test_a_function_mode_around_the_step_is_undecided() -> None:
    """It gets every call after the step's own mode; one inside the step is seen."""
    with Replaced():
        around = observe(lambda net: torch.mul(net.w, 1).sum())
    assert "function mode test_watch.Replaced" in around.reasons[0]

    def inside(net: Net) -> Tensor:
        with Replaced():
            return torch.mul(net.w, 1).sum()

    assert "gt at test_watch.py" in observe(inside).reasons[0]
    with torch.device("cpu"):
        assert observe(lambda net: torch.mul(net.w, 1).sum()).verdict is Verdict.CERTIFIED


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


def _forward_mode(w: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w * 1, torch.ones_like(w))
        found = torch.autograd.forward_ad.unpack_dual(F.leaky_relu(torch.relu(dual), 0.1)).tangent
    assert found is not None
    return found.sum()


def _inference(w: Tensor) -> Tensor:
    with torch.inference_mode():
        teacher = torch.relu(w) + 1
    return (w + teacher).sum()


def _traced(w: Tensor) -> Tensor:
    return torch.jit.trace(torch.relu, (w * 1,))(w).sum()  # type: ignore[no-untyped-call, no-any-return]


STRANGE: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("forward mode", _forward_mode),
    ("inference tensors", _inference),
    ("tracing", _traced),
    ("torch.func", lambda w: (torch.func.grad(lambda v: torch.relu(v).sum())(w.detach()) * w).sum()),
    ("vmap", lambda w: torch.vmap(lambda v: torch.relu(v).max(0).values)(torch.stack([w, w])).sum()),
    ("nested", lambda w: torch.relu(torch.nested.as_nested_tensor([w * 1, w * 2])).to_padded_tensor(0.0).sum()),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "function"), STRANGE)
def test_programs_that_no_kernel_of_ours_can_run_go_on(name: str, function: Callable[[Tensor], Tensor]) -> None:
    plain, ours = (nn.Parameter(torch.tensor([1.0, -1.0, 0.5])) for _ in range(2))
    function(plain).backward()
    adcert.certify(lambda: function(ours), nn.ParameterList([ours]))
    assert plain.grad is not None
    assert ours.grad is not None
    assert torch.equal(plain.grad, ours.grad)


# ---- torch.func ----------------------------------------------------------------------------------


Losses = dict[str, Callable[[nn.Module], object]]


def _transforms() -> Losses:
    """Per-sample and other gradients of a network, by torch.func."""
    x, y = torch.arange(96.0).reshape(2, 3, 4, 4) % 7 - 3, torch.tensor([0, 1])

    def loss(model: nn.Module, p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, p, (x,)), y)

    def one(model: nn.Module) -> object:
        return torch.func.grad(lambda p: loss(model, p, x, y))(dict(model.named_parameters()))

    def each(model: nn.Module) -> object:
        single = torch.func.grad(lambda p, x, y: loss(model, p, x[None], y[None]))
        return torch.vmap(single, (None, 0, 0))(dict(model.named_parameters()), x, y)

    def back(model: nn.Module) -> object:
        _, pull = torch.func.vjp(lambda p: loss(model, p, x, y), dict(model.named_parameters()))
        return pull(torch.ones(()))

    def forward(model: nn.Module) -> object:
        p = dict(model.named_parameters())
        return torch.func.jvp(lambda p: loss(model, p, x, y), (p,), (p,))[1]

    return {"grad": one, "vmap of grad": each, "vjp": back, "jvp": forward}


def _small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("name", _transforms())
def test_torch_func_is_refused_in_a_step_and_right_outside(name: str) -> None:
    """Values are wrapped inside a transform, where no kernel of ours can look; results are torch's everywhere."""
    run = _transforms()[name]
    plain, model = _small(), adcert.convert(_small())
    expected, outside = run(plain), run(model)
    with adcert.Monitor(model).step() as step:
        inside = run(model)
        model(torch.ones(1, 3, 4, 4)).sum().backward()
    (reason, *_) = step.certificate().reasons
    assert reason.startswith("a transform of torch.func (grad, vjp, jvp, vmap) or forward mode computes part of")
    assert "test_watch.py" in reason and "outside of the step" in reason
    for found in (outside, inside):
        pairs = zip(*map(torch.utils._pytree.tree_leaves, (expected, found)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_step_of_transforms_alone_says_so() -> None:
    model = adcert.convert(_small())
    with adcert.Monitor(model).step() as step:
        _transforms()["grad"](model)
    (reason,) = step.certificate().reasons
    assert "torch.func" in reason


def test_functional_call_is_followed() -> None:
    """The parameters are those handed in: here the model's own."""
    model = adcert.convert(_small())
    parameters = dict(model.named_parameters())
    found = adcert.certify(lambda: torch.func.functional_call(model, parameters, torch.ones(2, 3, 4, 4)).sum(), model)
    assert found.verdict is adcert.Verdict.CERTIFIED and set(found.shapes) == set(parameters)
