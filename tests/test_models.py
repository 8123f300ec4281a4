"""The networks: shapes, structure, determinism. Parameter counts come by hand from the layer shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adcert.errors import AdcertError
from adcert.models import FNN as FNN_MODELS
from adcert.models import MODELS, BasicBlock, Bottleneck, build

# weights: 3x3 stem; per stage the 3x3 convolutions and the 1x1 shortcut
STEM = 27 * 64
STAGES = 4 * 9 * 64**2 + sum(9 * (c // 2) * c + 3 * 9 * c * c + (c // 2) * c for c in (128, 256, 512))
# gamma and beta: stem, four per stage-one block pair, five per later stage
NORMS = 2 * (64 + 4 * 64 + 5 * (128 + 256 + 512))
# per stage: the first block reads c channels, the others four times its width w; each has 9 w^2 and 4 w^2 more
RESNET50 = 147 * 64 + 2 * 64 + sum(
    c * w + 4 * c * w + 2 * 4 * w + (n - 1) * 4 * w * w + n * (13 * w * w + 2 * 6 * w)
    for c, w, n in ((64, 64, 3), (256, 128, 4), (512, 256, 6), (1024, 512, 3))
)
VGG_WIDTHS = ((3, 32), (32, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256), (256, 256))
FNN = 3072 * 256 + 256 + 256 * 64 + 64 + 64 * 10 + 10
VGG = sum(9 * a * b + b for a, b in VGG_WIDTHS) + 256 * 10 + 10
PARAMETERS = {
    "resnet18": STEM + STAGES + NORMS + 512 * 10 + 10,
    "resnet18-nobias": STEM + STAGES + 512 * 10,
    "resnet50": RESNET50 + 2048 * 10 + 10,
    "vgg11": VGG,
    "vgg11-bn": VGG + 2 * sum(b for _, b in VGG_WIDTHS),
    **dict.fromkeys(("fnn-relu", "fnn-relu6", "fnn-hardtanh", "fnn-hardsigmoid"), FNN),
}


@pytest.mark.parametrize("name", MODELS)
def test_shape_and_number_of_parameters(name: str) -> None:
    model = build(name, 10)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_resnet50_has_as_many_parameters_as_the_published_one() -> None:
    assert RESNET50 + 2048 * 1000 + 1000 == 25_557_032


@pytest.mark.parametrize("name", MODELS)
def test_grey_images_and_other_class_counts(name: str) -> None:
    assert build(name, 7, channels=1)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_no_bias_and_no_normalisation_anywhere() -> None:
    model = build("resnet18-nobias", 10)
    assert all(name.endswith("weight") for name, _ in model.named_parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_no_bias_network_maps_zero_to_zero() -> None:
    assert torch.equal(build("resnet18-nobias", 10)(torch.zeros(1, 3, 32, 32)), torch.zeros(1, 10))


@pytest.mark.parametrize("name", ["resnet18", "resnet18-nobias", "resnet50", "vgg11", "vgg11-bn"])
def test_every_pool_follows_its_relu_in_one_sequential(name: str) -> None:
    model = build(name, 10)
    pools = 0
    for module in model.modules():
        children = list(module.children())
        for before, child in zip([None, *children], children, strict=False):
            if isinstance(child, nn.MaxPool2d):
                assert isinstance(module, nn.Sequential)
                assert isinstance(before, nn.ReLU)
                pools += 1
    assert pools == (1 if name.startswith("resnet") else 5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_stem_pool_is_three_by_three_with_stride_two(name: str) -> None:
    (pool,) = (m for m in build(name, 10).modules() if isinstance(m, nn.MaxPool2d))
    assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)


def test_vgg_channels_are_halved() -> None:
    convs = [m for m in build("vgg11", 10).modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [32, 64, 128, 128, 256, 256, 256, 256]
    assert all(c.bias is not None for c in convs)


def test_basic_block_by_hand() -> None:
    """Identity branch weights: relu(relu(x) + x) is 2x for x > 0 and 0 for x < 0."""
    block = BasicBlock(1, 1, normalise=False)
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1, 1] = 1
    block.conv1.weight.data = kernel
    block.conv2.weight.data = kernel
    x = torch.tensor([[[[1.0, -2.0], [3.0, 0.0]]]])
    assert torch.equal(block(x), torch.tensor([[[[2.0, 0.0], [6.0, 0.0]]]]))


def test_bottleneck_by_hand() -> None:
    """Identity weights in evaluation mode: relu(relu(relu(x)) + x) at every second cell, four times over."""
    block = Bottleneck(1, 1, stride=2).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        for norm in (block.bn1, block.bn2, block.bn3, block.shortcut[1]):
            norm.weight.fill_((1 + norm.eps) ** 0.5)
        for conv in (block.conv1, block.conv3, block.shortcut[0]):
            conv.weight.fill_(1.0)
        block.conv2.weight[0, 0, 1, 1] = 1.0
    x = torch.tensor([[[[1.0, 9.0, -2.0], [9.0, 9.0, 9.0], [3.0, 9.0, 0.0]]]])
    expected = torch.tensor([[2.0, 0.0], [6.0, 0.0]]).expand(1, 4, 2, 2)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_same_weights_and_random_state_untouched(name: str) -> None:
    state = torch.get_rng_state()
    first, second, other = build(name, 10, seed=3), build(name, 10, seed=3), build(name, 10, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", FNN_MODELS)
def test_fully_connected_networks_leave_their_kinks_room(name: str) -> None:
    """784-256-64-10; the first layer works on both sides of a kink, but not mostly beyond it."""
    model = build(name, 10, channels=1, size=28)
    assert [m.in_features for m in model if isinstance(m, nn.Linear)] == [784, 256, 64]
    x = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = model[1](model[0](x))
    (slope,) = torch.autograd.grad(model[2](y).sum(), y)
    assert 0.3 < float((slope != 0).float().mean()) < 1


def test_no_bias_blocks_neither_grow_nor_vanish() -> None:
    """Plain He initialisation multiplies the deviation several times over the eight blocks."""
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = build("resnet18-nobias", 10)
    with torch.no_grad():
        before = model[0](x)
        after = model[1](before)
        growth = float(after.std() / before.std())
        for block in model[1]:
            block.conv2.weight.mul_(8)
        unscaled = float(model[1](before).std() / before.std())
    assert 0.25 < growth < 2
    assert unscaled > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet99", 10), "unknown model 'resnet99'; known: resnet18"),
        (("vgg11", 10, 1, 8), "at least 32 pixels a side, got 8"),
        (("fnn-relu", 0), "must be positive"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(AdcertError, match=message):
        build(*arguments)  # type: ignore[arg-type]
