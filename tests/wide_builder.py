"""A chain of random modules that grows, and knows its shape, its labels, and which biases lie before which kinks."""

from __future__ import annotations

import math

import torch
from networks import _Source as Source
from torch import Tensor, nn
from wide_parts import (
    ACTIVATIONS,
    POOLINGS,
    SELECTIONS,
    build,
    spatial,
)

CONVOLUTIONS = ("conv", "grouped", "depthwise", "dilated", "circular", "transposed")
NORMS = ("layer_norm", "group_norm", "instance_norm", "rms_norm", "batch_norm_train", "batch_norm_eval")


class Builder:
    """A chain of modules that grows, with the shape of one sample at its end.

    ``focus``: the kind that has to occur; ``labels``: what does occur; ``first``: the shape of an input sample;
    ``words``: size of the vocabulary if inputs are indices; ``batched``: one sample alone would be refused.
    """

    def __init__(self, source: Source, focus: str, parent: Builder | None = None) -> None:
        self.source = source
        self.focus = focus
        self.modules: list[nn.Module] = []
        self.labels: set[str] = set() if parent is None else parent.labels
        self.targets: list[tuple[nn.Module, nn.Module, tuple[float, ...]]] = [] if parent is None else parent.targets
        self.first: tuple[int, ...] = ()
        self.shape: tuple[int, ...] = () if parent is None else parent.shape
        self.words = 0
        self.batched = False
        self.bias_odds = source.choice((0, 0, 1, 2)) if parent is None else parent.bias_odds
        self.layer: nn.Module | None = None  # the last module, if it is a layer whose output nobody else holds
        self.whole: nn.Module | None = None

    @property
    def model(self) -> nn.Module:
        return nn.Sequential(*self.modules) if self.whole is None else self.whole

    def start(self, *shape: int, words: int = 0) -> None:
        self.first = self.shape = shape
        self.words = words

    def add(self, module: nn.Module, *labels: str) -> bool:
        """Append a module; False, and nothing appended, if it does not fit the shape."""
        x = torch.zeros(2, *self.shape, dtype=torch.int64 if self.words and not self.modules else torch.float64)
        try:
            with torch.no_grad():
                shape = tuple(module.double()(x).shape[1:])
        except (RuntimeError, IndexError, ValueError):
            return False
        if 0 in shape:
            return False
        self.shape = shape
        self.modules.append(module)
        self.labels.update(labels)
        self.layer = None
        return True

    def bias(self) -> bool:
        return self.source.chance(self.bias_odds, 2)

    def branch(self) -> Builder:
        return Builder(self.source, self.focus, self)

    def body(self) -> nn.Module:
        return self.modules[0] if len(self.modules) == 1 else nn.Sequential(*self.modules)

    def activation(self, kind: str = "") -> bool:
        """The focus if it is an activation, else half of the time ReLU and otherwise any kind."""
        source = self.source
        if not kind:
            other = source.choice(tuple(ACTIVATIONS)) if source.chance(1, 3) else "relu"
            kind = self.focus if self.focus in ACTIVATIONS else other
        forms = ACTIVATIONS[kind]
        options = forms.plain
        if self.layer is not None and forms.inplace and source.chance(1, 3):
            options = forms.inplace
        elif forms.random and source.chance(1, 3):
            options = forms.random
        layer, module = self.layer, build(source.choice(options), C=self.channels())
        if not self.add(module, kind):
            return False
        if layer is not None and isinstance(getattr(layer, "bias", None), Tensor):
            self.targets.append((layer, module, forms.kinks))
        return True

    def channels(self) -> int:
        return self.shape[0] if self.shape else 1

    def linear(self, width: int) -> bool:
        return self._layer(nn.Linear(self.shape[-1], width, bias=self.bias()), "linear")

    def convolution(self, kind: str = "", keep: bool = False) -> bool:
        """A convolution in as many dimensions as the shape has; ``keep``: of the same shape."""
        source, n, channels = self.source, spatial(self.shape), self.channels()
        if not kind:
            other = source.choice(CONVOLUTIONS) if source.chance(1, 4) else "conv"
            kind = self.focus if self.focus in CONVOLUTIONS else other
        out = channels if keep else source.integer(1, 3)
        kernel = 3 if keep else source.choice((1, 2, 2, 3))
        options: dict[str, object] = {"padding": 1 if keep else source.integer(0, kernel - 1), "bias": self.bias()}
        label = f"{kind}{n}d"
        if kind == "transposed":
            options["stride"] = 1 if keep else source.integer(1, 2)
            options["groups"] = math.gcd(channels, out) if source.chance(1, 4) else 1
        elif kind in ("depthwise", "grouped"):
            options["groups"] = channels if kind == "depthwise" else math.gcd(channels, out)
            out = channels * (1 if keep else source.integer(1, 2)) if kind == "depthwise" else out
            if channels == 1 or options["groups"] == 1:
                return False
        elif kind == "dilated":
            options |= {"dilation": 2, "padding": kernel - 1}
        elif kind == "circular":
            options |= {"padding_mode": source.choice(("circular", "circular", "reflect", "replicate")), "padding": 1}
        elif source.chance(1, 6) and not keep:
            options["stride"] = 2
        name = f"ConvTranspose{n}d" if kind == "transposed" else f"Conv{n}d"
        return self._layer(getattr(nn, name)(channels, out, kernel, **options), label, kind)

    def norm(self, kind: str = "") -> bool:
        source, n, channels = self.source, spatial(self.shape), self.channels()
        kind = kind or (self.focus if self.focus in NORMS else source.choice(NORMS))
        eps = source.choice((1.0, 1.0, 3.0, 1e-5))
        affine = source.chance(2, 3)
        if kind in ("layer_norm", "rms_norm"):
            shape = self.shape if source.chance(1, 2) else self.shape[-1:]
            make = nn.LayerNorm if kind == "layer_norm" else nn.RMSNorm
            return self._layer(make(shape, eps=eps, elementwise_affine=affine), kind)
        if kind == "group_norm":
            groups = channels if source.chance(1, 2) else 1
            self.batched = self.batched or groups == math.prod(self.shape)
            return self._layer(nn.GroupNorm(groups, channels, eps=eps, affine=affine), kind)
        if kind == "instance_norm":
            if n < 1 or math.prod(self.shape[1:]) == 1:
                return False
            return self._layer(getattr(nn, f"InstanceNorm{n}d")(channels, eps=eps, affine=affine), kind)
        module = getattr(nn, f"BatchNorm{max(1, n)}d")(channels, eps=eps, affine=affine)
        self.batched = self.batched or kind == "batch_norm_train"
        return self._layer(module.train(kind == "batch_norm_train"), kind)

    def _layer(self, module: nn.Module, *labels: str) -> bool:
        if not self.add(module, *labels):
            return False
        self.layer = module
        return True

    def pooling(self) -> bool:
        source, n = self.source, spatial(self.shape)
        kind = self.focus
        if kind not in POOLINGS:
            kinds = [k for k in POOLINGS if k.endswith(f"{n}d")] + ["return_indices"]
            kind = source.choice(kinds) if source.chance(1, 4) else f"max_pool{n}d"
        return self.add(build(source.choice(POOLINGS[kind]), n=n), kind)

    def selection(self) -> bool:
        kind = self.focus if self.focus in SELECTIONS else self.source.choice(tuple(SELECTIONS))
        return self.add(build(self.source.choice(SELECTIONS[kind])), kind)

    def head(self) -> bool:
        """Flatten, a quarter of the time a hidden layer, and the last linear layer."""
        source = self.source
        if len(self.shape) != 1:
            self.add(nn.Flatten())
        if source.chance(1, 4) and not (self.linear(source.integer(1, 3)) and self.activation()):
            return False
        return self.linear(source.integer(1, 2))

    def centre(self, inputs: Tensor) -> None:
        """Half of the biases before an activation, moved so that one unit lies exactly on a kink."""
        for layer, activation, kinks in self.targets:
            if not self.source.chance(1, 2):
                continue
            seen: list[Tensor] = []
            handle = activation.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].clone()))
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self.model(inputs)
            handle.remove()
            if seen:
                self._move(layer.bias, seen[0], self.source.choice(kinks))

    def _move(self, bias: Tensor, y: Tensor, kink: float) -> None:
        axis = 1 if y.dim() > 1 and y.shape[1] == bias.numel() else y.dim() - 1
        if bias.dim() != 1 or y.shape[axis] != bias.numel():
            return
        units = y.movedim(axis, 0).flatten(1)
        with torch.no_grad():
            for channel in range(len(units)):
                if self.source.chance(1, 2):
                    unit = self.source.integer(0, units.shape[1] - 1)
                    bias[channel] += kink - units[channel, unit]
