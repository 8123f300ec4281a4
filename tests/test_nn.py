"""Modules and conversion: the same model, bit for bit, that also records."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import adcert
from adcert.recorder import Recorder, recording
from adcert.records import OpRecord


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def train(model: nn.Module, monitored: bool, steps: int = 5, layout: torch.memory_format | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    monitor = adcert.Monitor(model)
    for _ in range(steps):
        x = torch.randint(0, 3, (4, 3, 8, 8), generator=generator).float()
        if layout is not None:
            x = x.to(memory_format=layout)
        optimizer.zero_grad()
        if monitored:
            with monitor.step():
                nn.functional.cross_entropy(model(x), torch.arange(4) % 3).backward()
        else:
            nn.functional.cross_entropy(model(x), torch.arange(4) % 3).backward()
        optimizer.step()
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


@pytest.mark.parametrize("layout", [None, torch.channels_last])
@pytest.mark.parametrize("converted", [True, False])
def test_monitored_training_is_bitwise_plain_training(layout: torch.memory_format | None, converted: bool) -> None:
    plain, monitored = small(), small()
    if layout is not None:
        plain, monitored = plain.to(memory_format=layout), monitored.to(memory_format=layout)
    if converted:
        adcert.convert(monitored)
    for a, b in zip(train(plain, False, layout=layout), train(monitored, True, layout=layout), strict=True):
        assert torch.equal(a, b)


def test_convert_keeps_everything_users_rely_on() -> None:
    model = small()
    model.eval()
    seen = []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    keys, parameters, relu = list(model.state_dict()), list(model.parameters()), model[2]
    assert adcert.convert(model) is model
    assert model[2] is relu
    assert isinstance(relu, nn.ReLU)
    assert type(relu) is adcert.nn.ReLU
    assert relu.inplace
    assert isinstance(model[3], nn.MaxPool2d)
    assert (model[3].kernel_size, model[3].stride, model[3].padding) == (3, 2, 1)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model[2].training
    model(torch.zeros(1, 3, 8, 8))
    assert seen == [1]


def test_convert_twice_and_back() -> None:
    model = adcert.convert(adcert.convert(small()))
    adcert.unconvert(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in small().modules()]


def test_subclasses_and_own_forwards_are_left_alone() -> None:
    class Odd(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return input.relu() + 1

    patched = nn.ReLU()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    model = adcert.convert(nn.Sequential(Odd(), patched))
    assert type(model[0]) is Odd
    assert type(model[1]) is nn.ReLU


def test_convert_refuses_what_is_no_module() -> None:
    with pytest.raises(adcert.AdcertError, match=r"torch\.nn\.Module"):
        adcert.convert("model")  # type: ignore[arg-type]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_converted_modules_copy_and_pickle(copied: object) -> None:
    model = adcert.convert(small())
    twin = copied(model)  # type: ignore[operator]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), twin.eval()(x))
    assert type(twin[2]) is adcert.nn.ReLU


def recorded(model: nn.Module, x: Tensor) -> list[OpRecord]:
    recorder = Recorder({id(module): name for name, module in model.named_modules()})
    with recording(recorder):
        model(x)
    return list(recorder.records)


def test_adjacent_relu_and_pool_run_fused() -> None:
    seen = recorded(adcert.convert(small()), torch.randn(2, 3, 8, 8))
    assert [(record.name, record.relu, record.ties is not None) for record in seen] == [
        ("3", True, True),
        ("6", True, True),
    ]


@pytest.mark.parametrize("position", [2, 3])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_hook_switches_fusion_off(position: int, kind: str) -> None:
    model = adcert.convert(small())
    model[2].inplace = False
    getattr(model[position], kind)(lambda *_: None)
    seen = recorded(model, torch.randn(2, 3, 8, 8))
    assert [record.name for record in seen] == ["2", "3", "6"]


def test_in_place_relu_whose_input_others_hold_stays_in_place() -> None:
    model = adcert.convert(nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2)))
    w = torch.tensor([[[[-1.0, 2.0], [3.0, -4.0]]]], requires_grad=True)
    y = w * 1.0
    recorder = Recorder()
    with recording(recorder):
        model(y)
    assert y.tolist() == [[[[0.0, 2.0], [3.0, 0.0]]]]  # as torch leaves it


def test_outside_a_step_nothing_is_recorded() -> None:
    model = adcert.convert(small())
    y = model(torch.randn(2, 3, 8, 8))
    names = set()
    stack = [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            names.add(node.name())
            stack += [source for source, _ in node.next_functions]
    assert not any("adcert" in name for name in names)
    assert "ReluBackward0" in names


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_bitwise_torch(dtype: torch.dtype) -> None:
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)).to(dtype)
    ours = adcert.convert(copy.deepcopy(plain))
    x = torch.randint(-2, 3, (2, 2, 8, 8)).to(dtype)
    expected, recorder = plain(x), Recorder()
    with recording(recorder):
        y = ours(x)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(y, expected)
    assert len(recorder.records) == 1
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
