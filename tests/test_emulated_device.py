"""The emulated CUDA device does what a real one does, and refuses what a real one refuses."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from emulation.device import Device, emulated_cuda, to_device, to_host
from torch import Tensor
from torch.nn import functional as F

from adcert import ops, reference


def network() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(36, 3),
    )


def trained(where: str, foreach: bool, layout: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    """State after three steps, and the last gradients."""
    model = network().to(where, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=foreach)
    random = torch.Generator().manual_seed(5)
    for _ in range(3):
        x, y = torch.randn(5, 2, 6, 6, generator=random), torch.randint(3, (5,), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(where, memory_format=layout)), y.to(where)).backward()
        optimizer.step()
    return [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]


# Tensors and autograd ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("foreach", [False, True])
def test_training_gives_the_weights_of_the_cpu(emulated: Device, foreach: bool, layout: torch.memory_format):
    ours, theirs = trained("cuda", foreach, layout), trained("cpu", foreach, layout)
    assert len(ours) == len(theirs) == 15
    for a, b in zip(ours, theirs, strict=True):
        assert a.is_cuda and torch.equal(to_host(a), b)


def test_moving_there_and_back(emulated: Device):
    x = torch.arange(6.0).reshape(2, 3).t()
    there = x.to("cuda")
    assert there.device == torch.device("cuda:0") and there.is_cuda and there.stride() == x.stride()
    assert there.to("cuda") is there and there.cuda() is there
    for back in (there.cpu(), there.to("cpu"), to_host(there)):
        assert not back.is_cuda and torch.equal(back, x)
    assert there.tolist() == x.tolist()
    with pytest.raises(TypeError, match=r"Tensor\.cpu"):
        there.numpy()
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(3, device="cuda:1")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda x: torch.zeros(2, device="cuda"), [0.0, 0.0]),
        (lambda x: torch.ones(2, device=x.device), [1.0, 1.0]),
        (lambda x: torch.full((2,), 3.0, device=x.device), [3.0, 3.0]),
        (lambda x: torch.arange(3, device="cuda"), [0, 1, 2]),
        (lambda x: torch.tensor([5, 7], device="cuda"), [5, 7]),
        (lambda x: torch.as_tensor([True], device="cuda"), [True]),
        (lambda x: x.new_zeros(1), [0.0]),
        (lambda x: x.new_tensor([2.0]), [2.0]),
        (lambda x: torch.zeros_like(x), [0.0, 0.0, 0.0, 0.0]),
        (lambda x: torch.cumsum(x, 0, out=torch.empty(0, device="cuda")), [0.0, 1.0, 3.0, 6.0]),
        (lambda x: x.long() % 3, [0, 1, 2, 0]),
        (lambda x: x.resize_(2), [0.0, 1.0]),
    ],
)
def test_factories(emulated: Device, make: Callable[[Tensor], Tensor], expected: list[object]):
    result = make(torch.arange(4.0).cuda())
    assert result.is_cuda and result.tolist() == expected


def test_fresh_memory_holds_garbage(emulated: Device):
    assert torch.empty(3, device="cuda").isnan().all() and torch.empty(3, device="cuda").half().isnan().all()
    assert torch.empty(3, device="cuda", dtype=torch.int64).tolist() == [-0xE000E000E000F] * 3


def test_a_module_keeps_its_parameters(emulated: Device):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    to_device(model)
    assert not emulated.waits
    assert all(parameter is before[name] and parameter.is_cuda for name, parameter in model.named_parameters())
    assert isinstance(model[0].weight, torch.nn.Parameter) and optimizer.param_groups[0]["params"][0].is_cuda
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert twin[0].weight.is_cuda and twin[0].weight.any()
    assert not to_host(model)[0].weight.is_cuda


def test_views_share_memory_and_storage(emulated: Device):
    base = torch.zeros(2, 3, device="cuda")
    for view in (base[0], base.t(), base.view(6), base.detach(), base.reshape(3, 2), base.unsqueeze(0)):
        assert view.untyped_storage()._cdata == base.untyped_storage()._cdata
        view.add_(1)
    assert base.tolist() == [[6.0] * 3, [5.0] * 3]
    assert base.clone().untyped_storage()._cdata != base.untyped_storage()._cdata


def test_versions_rise_with_writes(emulated: Device):
    base = torch.zeros(4, device="cuda")
    part = base[:2]
    part.mul_(2)
    base[0] = 1.0
    assert base._version == part._version == 2
    x = torch.ones(3, device="cuda", requires_grad=True)
    y = x.exp()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_graph_holds_device_tensors(emulated: Device):
    model = to_device(network())
    x = to_device(torch.randn(2, 2, 6, 6))
    y = model[0](x)
    assert y.grad_fn.name() == "ConvolutionBackward0"
    assert y.grad_fn._saved_input is x and y.grad_fn._saved_weight is model[0].weight
    z = y.relu()
    assert z.grad_fn._saved_result.is_cuda and torch.equal(to_host(z.grad_fn._saved_result), to_host(z))
    first = torch.autograd.grad(z.sum(), model[0].weight, retain_graph=True)[0]
    z.sum().backward()
    assert first.is_cuda and model[0].weight.grad.is_cuda
    assert torch.equal(to_host(first), to_host(model[0].weight.grad))


def test_backward_runs_on_a_thread_of_its_own(emulated: Device):
    """As with a real device: what is kept in a thread-local is not there."""
    seen = []
    x = torch.ones(1, device="cuda", requires_grad=True)
    y = x.exp()
    y.register_hook(lambda grad: seen.append(threading.current_thread()))
    y.backward()
    assert seen and seen[0] is not threading.current_thread()


@pytest.mark.parametrize(
    ("cudnn", "dtype", "node"),
    [
        (True, torch.float32, "CudnnBatchNormBackward0"),
        (True, torch.float64, "CudnnBatchNormBackward0"),
        (True, torch.bfloat16, "NativeBatchNormBackward0"),  # torch's own choice
        (False, torch.float32, "NativeBatchNormBackward0"),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_batch_normalisation_is_the_one_torch_chooses(cudnn: bool, dtype: torch.dtype, node: str, train: bool):
    layer = torch.nn.BatchNorm2d(3).to(dtype).train(train)
    here, x = copy.deepcopy(layer), torch.randn(4, 3, 2, 2).to(dtype)
    weights = torch.arange(48.0).reshape(4, 3, 2, 2).to(dtype)
    (here(x) * weights).sum().backward()
    with emulated_cuda(cudnn=cudnn):
        output = layer.cuda()(x.cuda())
        assert output.grad_fn.name() == node and output.grad_fn._saved_training is train
        assert output.grad_fn._saved_running_mean.is_cuda and len(output.grad_fn._saved_result1) == (3 if train else 0)
        (output * weights.cuda()).sum().backward()
        for ours, theirs in (*zip(layer.buffers(), here.buffers(), strict=True), (layer.weight.grad, here.weight.grad)):
            assert torch.equal(to_host(ours), theirs)


def test_autocast(emulated: Device):
    model, x = to_device(network()), to_device(torch.randn(2, 2, 6, 6))
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        y = model(x)
        assert model[0](x).dtype == torch.bfloat16 and y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32


def test_the_random_state_is_the_device_s_own(emulated: Device):
    before = torch.get_rng_state()
    x = torch.ones(100, device="cuda")
    state = torch.cuda.get_rng_state()
    first = F.dropout(x)
    assert first.tolist() != F.dropout(x).tolist()
    torch.cuda.set_rng_state(state)
    assert first.tolist() == F.dropout(x).tolist()
    assert torch.equal(torch.get_rng_state(), before)


# What it refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x, h: x + h,
        lambda x, h: h.add_(x),
        lambda x, h: x.add_(h),
        lambda x, h: x @ h,
        lambda x, h: torch.cat([x, h]),
        lambda x, h: torch.stack([x.sum(), h.sum()]),
        lambda x, h: F.conv2d(x[None, None], h[None, None]),
        lambda x, h: torch.where(x > 0, x, h),
        lambda x, h: h[x.long()],
        lambda x, h: x.index_add(0, torch.tensor([0, 1]), x),
        lambda x, h: h.sum().add_(x.sum()),
        lambda x, h: x.index_put_((torch.tensor([0], device=x.device),), h[:1]),
    ],
)
def test_tensors_of_two_devices_do_not_mix(emulated: Device, mixed: Callable[[Tensor, Tensor], Tensor]):
    host = torch.ones(2, 2)
    mixed(host.clone(), host.clone())  # all right on one device
    with pytest.raises(RuntimeError, match=r"same device|on cpu or|expected device|either on|cpu"):
        mixed(host.cuda(), host.clone())


def test_what_may_mix(emulated: Device):
    x = torch.arange(4.0).cuda()
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert torch.where(x > 1, x, torch.tensor(-1.0)).tolist() == [-1, -1, 2, 3]
    assert x[torch.tensor([2, 0])].tolist() == [2, 0]
    x[torch.tensor([1])] = torch.tensor([9.0]).cuda()
    assert x.tolist() == [0, 9, 2, 3]


def test_outside_the_block_there_is_no_device():
    with emulated_cuda():
        x = torch.ones(2).cuda()
    for use in (lambda: x + x, lambda: torch.ones(2, device="cuda")):
        with pytest.raises(RuntimeError, match=r"emulated_cuda\(\)"):
            use()
    assert not torch.cuda.is_available()


# Waits ------------------------------------------------------------------------------------------------------

WAITING: list[tuple[str, Callable[[Tensor], object]]] = [
    ("_local_scalar_dense", lambda x: x.sum().item()),
    ("_local_scalar_dense", lambda x: bool(x.any())),
    ("a copy to the host", lambda x: x.cpu()),
    ("a copy to the host", lambda x: torch.empty(4).copy_(x, non_blocking=True)),
    ("a copy from the host", lambda x: x.copy_(torch.ones(4))),
    ("a copy from the host", lambda x: torch.tensor([1], device="cuda")),
    ("a copy from the host", lambda x: x[torch.tensor([0])]),
    ("nonzero", lambda x: x.nonzero()),
    ("nonzero", lambda x: x[x > 1]),
    ("masked_select", lambda x: x.masked_select(x > 1)),
    ("_unique2", lambda x: x.unique()),
    ("unique_consecutive", lambda x: x.unique_consecutive()),
    ("equal", lambda x: torch.equal(x, x)),
    ("bincount", lambda x: torch.bincount(x.long())),
    ("repeat_interleave", lambda x: torch.repeat_interleave(x.long())),
    ("_index_put_impl_", lambda x: x.index_put_((x > 1,), x[:1] + x[1:2])),
    ("_index_put_impl_", lambda x: x.index_put_((x.long(),), torch.tensor(1.0))),
]


@pytest.mark.parametrize(("name", "use"), WAITING)
def test_waits_are_counted(emulated: Device, name: str, use: Callable[[Tensor], object]):
    x = to_device(torch.arange(4.0))
    assert not emulated.waits
    use(x)
    assert len(emulated.waits) == 1 and name in emulated.waits[0]
    assert "test_emulated_device.py:" in emulated.waits[0]


def test_a_block_without_waits(emulated: Device):
    x = to_device(torch.arange(4.0))
    index = x.long()
    with emulated.no_waits():
        x[index] = x * 2
        x[x > 3] = 0.5  # a fill under a mask
        torch.where(x > 1, x, 0.0).sort()
        torch.repeat_interleave(index, 2)
        torch.zeros(3, device="cuda")
        torch.isin(x, x)
        index.index_select(0, torch.arange(2, device="cuda"))
    assert not emulated.waits
    with (
        pytest.raises(RuntimeError, match=r"waits for the device: aten._local_scalar_dense.*test_emulated"),
        emulated.no_waits(),
    ):
        x.sum().item()


def test_a_wait_that_is_caught_still_counts(emulated: Device):
    x = to_device(torch.arange(4.0))
    with (
        pytest.raises(RuntimeError, match="the host waited"),
        emulated.no_waits(),
        contextlib.suppress(RuntimeError),
    ):
        x.tolist()


def test_a_wait_in_a_backward_pass_is_found(emulated: Device):
    class Impatient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * float(grad.sum())

    x = torch.ones(2, device="cuda", requires_grad=True)
    with pytest.raises(RuntimeError, match="waits for the device"), emulated.no_waits():
        Impatient.apply(x).sum().backward()


def test_another_thread_may_wait(emulated: Device):
    x = to_device(torch.ones(2))
    with emulated.no_waits():
        thread = threading.Thread(target=x.tolist)
        thread.start()
        thread.join()
    assert len(emulated.waits) == 1


def test_training_does_not_wait(emulated: Device):
    model = to_device(network())
    x, y = to_device(torch.randn(5, 2, 6, 6)), to_device(torch.tensor([0, 1, 2, 0, 1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with emulated.no_waits():
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


# Pinned memory, streams, events -----------------------------------------------------------------------------


def test_pinned_memory(emulated: Device):
    pinned = torch.zeros(3, pin_memory=True)
    assert pinned.is_pinned() and pinned[1:].is_pinned() and torch.ones(2).pin_memory().is_pinned()
    assert torch.empty(3, pin_memory=True).isnan().all()
    assert not torch.zeros(3).is_pinned()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8])
def test_a_copy_to_pinned_memory_arrives_after_its_event(emulated: Device, dtype: torch.dtype):
    x = to_device(torch.tensor([0, 1, 2], dtype=dtype)) + 1
    target = torch.zeros(3, dtype=dtype, pin_memory=True)
    early = torch.cuda.Event()
    early.record()
    target.copy_(x, non_blocking=True)
    version = target._version
    x.add_(1)  # too late for the copy
    early.synchronize()
    assert not torch.isin(target, torch.tensor([0, 1, 2, 3], dtype=dtype)).any()  # an early read is a wrong one
    event = torch.cuda.Event()
    event.record()
    assert [event.query() for _ in range(3)] == [False, False, True]
    assert target.tolist() == [1, 2, 3] and target._version == version
    assert len(emulated.waits) == 1 and "Event.synchronize" in emulated.waits[0]


@pytest.mark.parametrize(
    "wait",
    [
        lambda event: event.synchronize(),
        lambda event: torch.cuda.current_stream().synchronize(),
        lambda event: torch.cuda.synchronize(),
        lambda event: torch.ones(1, device="cuda").item(),  # waits for the same stream
    ],
)
def test_what_completes_a_copy(emulated: Device, wait: Callable[[torch.cuda.Event], object]):
    x = to_device(torch.ones(2))
    target = x.to("cpu", non_blocking=True)  # into pinned memory
    event = torch.cuda.Event()
    event.record()
    assert target.is_pinned() and target.isnan().all()
    wait(event)
    assert target.tolist() == [1.0, 1.0] and len(emulated.waits) == 1


def test_queries_are_configurable_and_an_unrecorded_event_has_passed():
    with emulated_cuda(queries=0) as device:
        x = to_device(torch.ones(2))
        target = x.to("cpu", non_blocking=True)
        assert torch.cuda.Event().query() and target.isnan().all()
        torch.cuda.Event().synchronize()
        assert target.isnan().all()
        assert torch.cuda.current_stream().query() and target.tolist() == [1.0, 1.0]
        assert not device.waits


def side_copy(x: Tensor, side: torch.cuda.Stream) -> tuple[Tensor, torch.cuda.Event]:
    """The right way."""
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side
        target = x.to("cpu", non_blocking=True)
    return target, side.record_event()


def test_a_side_stream_has_to_wait(emulated: Device):
    side = torch.cuda.Stream()
    x = to_device(torch.ones(2)) * 2
    with (
        pytest.raises(RuntimeError, match=r"on stream .* memory that was written on stream 0"),
        torch.cuda.stream(side),
    ):
        x.to("cpu", non_blocking=True)
    target, event = side_copy(x, side)
    torch.cuda.current_stream().synchronize()
    assert target.isnan().all()  # of another stream
    event.synchronize()
    assert target.tolist() == [2.0, 2.0]
    x.add_(1)  # the host knows that the copy is done


def test_what_a_side_stream_reads_must_stay(emulated: Device):
    side = torch.cuda.Stream()
    x = to_device(torch.ones(2)) * 2
    _, event = side_copy(x, side)
    with pytest.raises(RuntimeError, match="memory that was read on stream"):
        x.add_(1)
    torch.cuda.current_stream().wait_event(event)
    x.add_(1)


def test_memory_freed_too_early(emulated: Device):
    side = torch.cuda.Stream()
    x = to_device(torch.ones(2)) * 2
    _, event = side_copy(x, side)
    del x
    with pytest.raises(RuntimeError, match="without record_stream"):
        event.synchronize()


@pytest.mark.parametrize("way", ["record_stream", "wait", "same stream", "kept by a view"])
def test_memory_freed_in_time(emulated: Device, way: str):
    side = torch.cuda.current_stream() if way == "same stream" else torch.cuda.Stream()
    x = to_device(torch.ones(2)) * 2
    target, event = side_copy(x, side)
    if way == "record_stream":
        x.record_stream(side)
    if way == "wait":
        torch.cuda.current_stream().wait_event(event)
    view = x[:1] if way == "kept by a view" else None
    gone = weakref.ref(x)
    del x
    assert (gone() is None) == (view is None)  # a view holds its base
    event.synchronize()
    assert target.tolist() == [2.0, 2.0]
    del view


def test_memory_freed_too_early_is_told_at_the_end():
    with pytest.raises(RuntimeError, match="without record_stream"), emulated_cuda():
        x = torch.ones(2).cuda() * 2
        side_copy(x, torch.cuda.Stream())
        del x


def test_fresh_memory_belongs_to_its_stream(emulated: Device):
    """Another stream has to wait even to write: the allocator may have given it memory that is still in use."""
    torch.zeros(1, device="cuda")
    x = torch.empty(2, device="cuda")
    side = torch.cuda.Stream()
    with pytest.raises(RuntimeError, match="has not waited"), torch.cuda.stream(side):
        x.zero_()


def test_a_pinned_source_must_stay_as_it_is(emulated: Device):
    source = torch.ones(2).pin_memory()
    x = source.to("cuda", non_blocking=True)
    assert not emulated.waits and to_host(x).tolist() == [1.0, 1.0]
    source.zero_()
    with pytest.raises(RuntimeError, match="overwritten"):
        torch.cuda.synchronize()


def test_a_backward_pass_follows_the_streams_of_its_forward(emulated: Device):
    model, x, side = to_device(network()), to_device(torch.randn(5, 2, 6, 6)), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        hidden = model[:3](x)
    torch.cuda.current_stream().wait_stream(side)
    model[3:](hidden).sum().backward()
    assert to_host(model[0].weight.grad).isfinite().all()
    with pytest.raises(RuntimeError, match="has not waited"):
        with torch.cuda.stream(side):
            later = hidden * 2
        later.sum()


# adcert's operators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["cpu", "emulated"])
@pytest.mark.parametrize("relu", [False, True])
def test_max_pool2d_has_its_gradient(kernels: str, relu: bool):
    x = torch.randint(-2, 3, (2, 3, 6, 6)).float()
    weights = torch.arange(2.0 * 3 * 3 * 3).reshape(2, 3, 3, 3)
    here = x.clone().requires_grad_()
    (ops.max_pool2d(here, 2, relu=relu).output * weights).sum().backward()
    expected = reference.max_pool2d(x, 2, relu=relu)
    with emulated_cuda(kernels) as device:
        there, weights = to_device(x).requires_grad_(), to_device(weights)
        with device.no_waits():
            found = ops.max_pool2d(there, 2, relu=relu, capacity=64)
            (found.output * weights).sum().backward()
        assert torch.equal(to_host(there.grad), here.grad)
        assert torch.equal(to_host(found.output), expected.output)
        assert torch.equal(to_host(found.counts), expected.counts)
        ties = int(expected.counts[0])
        windows, order = to_host(found.windows)[:ties].sort()
        assert ties > 5 and torch.equal(windows, expected.windows)
        assert torch.equal(to_host(found.members)[:ties][order], expected.members)


@pytest.mark.parametrize("kernels", ["cpu", "emulated"])
def test_a_relu_leaves_no_negative_zero(kernels: str):
    with emulated_cuda(kernels):
        x = torch.full((1, 1, 2, 2), -0.0).cuda()
        pooled = ops.max_pool2d(x, 2, relu=True, capacity=4).output
        for output in (F.relu(x), F.relu(x.clone(), inplace=True), ops.relu(x, capacity=4).output, pooled):
            assert not torch.signbit(to_host(output)).any()
        assert torch.signbit(to_host(ops.max_pool2d(x, 2, capacity=4).output)).all()


def test_lists_come_in_no_order_with_undefined_ends(emulated: Device):
    x = to_device(torch.zeros(50))
    touches = to_host(ops.relu(x, capacity=60).touches)
    assert touches[:50].tolist() != list(range(50)) and touches[:50].sort().values.tolist() == list(range(50))
    assert (touches[50:] < -(10**18)).all()
    with pytest.raises(RuntimeError, match="capacity"):
        torch.ops.adcert.relu(x)


def test_where_the_answers_of_the_other_operators_lie(emulated: Device):
    rows = to_device(torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]))
    found = ops.distinct_rows(rows)
    assert found.is_cuda and to_host(found).tolist() == [0, 1] and len(emulated.waits) == 1
