"""The networks of the training job, in plain torch.nn.

Every ReLU that is pooled sits right before its MaxPool2d in one nn.Sequential, which is the pattern that
:func:`adcert.convert` fuses. No module is used twice and no activation works in place.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn

from .errors import AdcertError

__all__ = ["MODELS", "BasicBlock", "Bottleneck", "build"]

VGG11: Final = (32, "M", 64, "M", 128, 128, "M", 256, 256, "M", 256, 256, "M")
RESNET18: Final = (64, 128, 256, 512)
RESNET50: Final = ((64, 3), (128, 4), (256, 6), (512, 3))  # channels and blocks of each stage


class BasicBlock(nn.Module):
    """Residual block `relu(branch(x) + shortcut(x))`, branch = 3x3 conv, [BN], ReLU, 3x3 conv, [BN].

    He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016), form "basic", with the
    1x1 convolution as shortcut where the shape changes (option B). Convolutions have no bias.

    Arguments:
        channels_in: channels of the input, [N, channels_in, H, W].
        channels: channels of the output, [N, channels, ceil(H / stride), ceil(W / stride)].
        stride: of the first convolution and of the shortcut.
        normalise: BatchNorm2d after each convolution.

    Example:
        >>> BasicBlock(4, 8, stride=2)(torch.zeros(1, 4, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
    """

    def __init__(self, channels_in: int, channels: int, stride: int = 1, normalise: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels) if normalise else nn.Identity()
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels) if normalise else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False))
            if normalise:
                self.shortcut.append(nn.BatchNorm2d(channels))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """Residual block `relu(branch(x) + shortcut(x))`, branch = 1x1 conv, BN, ReLU, 3x3 conv, BN, ReLU, 1x1 conv, BN.

    He et al. 2016, form "bottleneck", with the stride in the 3x3 convolution, as in torchvision. Convolutions have no
    bias.

    Arguments:
        channels_in: channels of the input, [N, channels_in, H, W].
        channels: channels of the 3x3 convolution; the output, [N, 4 channels, ceil(H / stride), ceil(W / stride)].
        stride: of the 3x3 convolution and of the shortcut.

    Example:
        >>> Bottleneck(4, 8, stride=2)(torch.zeros(1, 4, 6, 6)).shape
        torch.Size([1, 32, 3, 3])
    """

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != 4 * channels:
            conv = nn.Conv2d(channels_in, 4 * channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * channels))
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + self.shortcut(x))  # type: ignore[no-any-return]


def _resnet18(num_classes: int, channels: int, size: int, normalise: bool) -> nn.Sequential:
    stem: list[nn.Module] = [nn.Conv2d(channels, RESNET18[0], 3, 1, 1, bias=False)]
    stem += [nn.BatchNorm2d(RESNET18[0])] if normalise else []
    stem += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks: list[nn.Module] = []
    width = RESNET18[0]
    for stage, planes in enumerate(RESNET18):
        blocks.append(BasicBlock(width, planes, 1 if stage == 0 else 2, normalise))
        blocks.append(BasicBlock(planes, planes, 1, normalise))
        width = planes
    head = nn.Linear(width, num_classes, bias=normalise)
    model = _assembled(stem, blocks, head)
    if not normalise:
        _scale_branches(blocks)
        nn.init.normal_(head.weight, std=1 / math.sqrt(width))
    return model


def _resnet50(num_classes: int, channels: int, size: int) -> nn.Sequential:
    width = RESNET50[0][0]
    stem = [nn.Conv2d(channels, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks: list[nn.Module] = []
    for stage, (planes, count) in enumerate(RESNET50):
        for block in range(count):
            blocks.append(Bottleneck(width, planes, 2 if stage and not block else 1))
            width = 4 * planes
    return _assembled(stem, blocks, nn.Linear(width, num_classes))


def _assembled(stem: list[nn.Module], blocks: list[nn.Module], head: nn.Linear) -> nn.Sequential:
    """A residual network, its convolutions initialised after He et al."""
    for module in nn.ModuleList([*stem, *blocks]).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            stem=nn.Sequential(*stem),
            blocks=nn.Sequential(*blocks),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=head,
        )
    )


def _scale_branches(blocks: list[nn.Module]) -> None:
    """Divide the last convolution of each residual branch by the number of blocks L.

    Plain He initialisation doubles the variance in every block. Activations stay bounded when the scales of
    the branches have a bounded sum (Hanin, Rolnick, "How to start training", NeurIPS 2018). Fixup (Zhang,
    Dauphin, Ma, ICLR 2019) sets that convolution to zero instead; here that would put every block whose
    shortcut is inactive exactly on the kink of its ReLU.
    """
    with torch.no_grad():
        for block in blocks:
            assert isinstance(block, BasicBlock)
            block.conv2.weight.div_(len(blocks))


def _vgg11(num_classes: int, channels: int, size: int, normalise: bool) -> nn.Sequential:
    pools = VGG11.count("M")
    if size < 2**pools:
        raise AdcertError(
            f"vgg11 pools {pools} times and needs images of at least {2**pools} pixels a side, got {size}"
        )
    features: list[nn.Module] = []
    width = channels
    for entry in VGG11:
        if isinstance(entry, str):
            features.append(nn.MaxPool2d(2, 2))
            continue
        conv = nn.Conv2d(width, entry, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        features += [conv, nn.BatchNorm2d(entry), nn.ReLU()] if normalise else [conv, nn.ReLU()]
        width = entry
    head = nn.Linear(width * (size // 2**pools) ** 2, num_classes)
    return nn.Sequential(
        OrderedDict[str, nn.Module](features=nn.Sequential(*features), flatten=nn.Flatten(), head=head)
    )


FNN: Final = MappingProxyType[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]](
    {
        "fnn-relu": (nn.ReLU, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")),
        "fnn-relu6": (nn.ReLU6, lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")),
        "fnn-hardtanh": (nn.Hardtanh, nn.init.xavier_normal_),
        "fnn-hardsigmoid": (nn.Hardsigmoid, lambda w: nn.init.xavier_normal_(w, gain=4.0)),
    }
)  # activation, and an initialisation that fits its slope


def _fnn(name: str, num_classes: int, channels: int, size: int) -> nn.Sequential:
    activation, initialise = FNN[name]
    layers: list[nn.Module] = [nn.Flatten()]
    width = channels * size * size
    for hidden in (256, 64):
        linear = nn.Linear(width, hidden)
        initialise(linear.weight)
        layers += [linear, activation()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


_Builder = Callable[[int, int, int], nn.Sequential]
MODELS: Final = MappingProxyType[str, _Builder](
    {
        "resnet18": lambda k, c, s: _resnet18(k, c, s, normalise=True),
        "resnet18-nobias": lambda k, c, s: _resnet18(k, c, s, normalise=False),
        "resnet50": _resnet50,
        "vgg11": lambda k, c, s: _vgg11(k, c, s, normalise=False),
        "vgg11-bn": lambda k, c, s: _vgg11(k, c, s, normalise=True),
        **{name: partial(_fnn, name) for name in FNN},
    }
)


def build(name: str, num_classes: int, channels: int = 3, size: int = 32, seed: int = 0) -> nn.Sequential:
    """The named network, [N, channels, size, size] -> [N, num_classes], initialised from `seed`.

    * `resnet18`: He et al. 2016, four stages of two blocks, 64 to 512 channels, with the CIFAR stem (3x3,
      stride 1) followed by the 3x3/2 max pooling of the ImageNet form, as in the experiments of Park, Chun,
      Lee (ICLR 2024). BatchNorm; convolutions without bias.
    * `resnet18-nobias`: the same without normalisation and without any bias, after those experiments, whose
      convolutions have neither (here the linear layer has no bias either). Initialised so that it trains:
      He, with the last convolution of each residual branch divided by 8.
    * `resnet50`: He et al. 2016 in the ImageNet form, 7x7/2 stem and four stages of 3, 4, 6 and 3 bottleneck
      blocks, with the stride in the 3x3 convolutions, as in torchvision; for images of 224 pixels a side.
    * `vgg11`, `vgg11-bn`: Simonyan, Zisserman, "Very Deep Convolutional Networks" (ICLR 2015), configuration
      A with the channels halved and one linear layer, as in the same experiments; He initialisation.
      Convolutions have a bias (under train-mode BatchNorm it has no effect: BatchNorm's beta is the bias).
    * `fnn-relu`, `fnn-relu6`, `fnn-hardtanh`, `fnn-hardsigmoid`: inputs-256-64-classes with that activation, the fully
      connected network of the same experiments.

    The random state of the program is left as it was.

    Errors:
        AdcertError: unknown name, or an image too small for the poolings.

    Example:
        >>> build("fnn-relu", 10, channels=1, size=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if name not in MODELS:
        raise AdcertError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    if min(num_classes, channels, size) < 1:
        raise AdcertError(f"classes, channels and size must be positive: {num_classes}, {channels}, {size}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return MODELS[name](num_classes, channels, size)
