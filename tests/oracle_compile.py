"""From a module tree to the index tables of ``oracle_program``: convolutions, windows and padding by ``unfold``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from networks import Network, Residual
from oracle_program import Add, Affine, Array, Op, Pool, Program, Relu, forward
from torch import nn


class _Compiler:
    def __init__(self, network: Network) -> None:
        self.ops: list[Op] = []
        self.slices: dict[str, slice] = {}
        self.start: dict[int, int] = {}
        parts, trainable, total = [], [], 0
        for name, parameter in network.model.named_parameters():
            self.start[id(parameter)] = total
            self.slices[name] = slice(total, total + parameter.numel())
            total += parameter.numel()
            parts.append(_integers(parameter))
            trainable.append(np.full(parameter.numel(), parameter.requires_grad))
        self.theta = np.concatenate([*parts, np.zeros(1, dtype=np.int64)])
        self.trainable = np.concatenate(trainable)
        self.zero = total

    def emit(self, op: Op) -> int:
        self.ops.append(op)
        return len(self.ops)

    def table(self, parameter: torch.Tensor) -> Array:
        start = self.start[id(parameter)]
        return np.arange(start, start + parameter.numel()).reshape(parameter.shape)

    def module(self, module: nn.Module, source: int, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """Append the module's ops; the register and the shape of its output."""
        match module:
            case nn.Sequential():
                for child in module:
                    source, shape = self.module(child, source, shape)
                return source, shape
            case Residual():
                other, inner = self.module(module.body, source, shape)
                assert inner == shape
                return self.emit(Add(source, other)), shape
            case nn.Flatten():
                return source, (shape[0], int(np.prod(shape[1:])))
            case nn.ReLU():
                return self.emit(Relu(source)), shape
            case nn.Linear():
                return self.linear(module, source, shape)
            case nn.Conv2d():
                return self.convolution(module, source, shape)
            case nn.MaxPool2d():
                return self.pooling(module, source, shape)
        raise TypeError(f"the oracle does not know {type(module).__name__}")

    def linear(self, module: nn.Linear, source: int, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        batch, features, outputs = shape[0], shape[1], module.out_features
        weights = np.tile(self.table(module.weight), (batch, 1))
        inputs = np.repeat(np.arange(batch * features).reshape(batch, features), outputs, axis=0)
        bias = self.bias(module.bias, np.tile(np.arange(outputs), batch))
        return self.emit(Affine(source, weights, inputs, bias)), (batch, outputs)

    def bias(self, bias: torch.Tensor | None, channels: Array) -> Array:
        return np.full(channels.shape, self.zero) if bias is None else self.table(bias)[channels]

    def convolution(self, module: nn.Conv2d, source: int, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        batch, channels = shape[:2]
        kernel, stride, padding, dilation = (
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
        )
        patches, size = _patches(shape, kernel, stride, padding, dilation)  # [B, L, C, KH*KW]
        positions, groups = patches.shape[1], module.groups
        table = self.table(module.weight).reshape(module.out_channels, -1)  # [O, C/G * KH*KW]
        inputs, weights = [], []
        for b in range(batch):
            for o in range(module.out_channels):
                first = o // (module.out_channels // groups) * (channels // groups)
                units = patches[b, :, first : first + channels // groups].reshape(positions, -1)
                inputs.append(np.maximum(units, 0))
                weights.append(np.where(units < 0, self.zero, table[o]))
        outputs = np.tile(np.repeat(np.arange(module.out_channels), positions), batch)
        op = Affine(source, np.concatenate(weights), np.concatenate(inputs), self.bias(module.bias, outputs))
        return self.emit(op), (batch, module.out_channels, *size)

    def pooling(self, module: nn.MaxPool2d, source: int, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        assert not module.ceil_mode
        patches, size = _patches(shape, module.kernel_size, module.stride, module.padding, module.dilation)
        members = patches.transpose(0, 2, 1, 3).reshape(-1, patches.shape[-1])
        members = np.where(members < 0, members.max(axis=1, keepdims=True), members)
        return self.emit(Pool(source, members)), (*shape[:2], *size)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _patches(
    shape: tuple[int, ...], kernel: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[Array, tuple[int, int]]:
    """Flat indices of every window, [B, L, C, KH*KW], -1 in the padding; and the output size."""
    batch, channels = shape[:2]
    kernel, stride, padding, dilation = map(_pair, (kernel, stride, padding, dilation))
    index = torch.arange(1, int(np.prod(shape)) + 1, dtype=torch.float64).reshape(shape)
    columns = F.unfold(index, kernel, dilation, padding, stride)  # [B, C*KH*KW, L], 0 in the padding
    columns = columns.reshape(batch, channels, kernel[0] * kernel[1], -1).permute(0, 3, 1, 2)
    size = tuple((shape[2 + a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in (0, 1))
    return columns.to(torch.int64).numpy() - 1, (size[0], size[1])


def _integers(tensor: torch.Tensor) -> Array:
    values = tensor.detach().to(torch.float64).flatten().numpy()
    if not np.array_equal(values, np.rint(values)):
        raise ValueError("the oracle needs integer data")
    return values.astype(np.int64)


def compile_network(network: Network) -> Program:
    """Index tables of a network of Sequential, Residual, Flatten, Linear, Conv2d, ReLU and MaxPool2d.

    Raises ``TypeError`` for another module and ``ValueError`` for data that are not integers.
    """
    compiler = _Compiler(network)
    register, _ = compiler.module(network.model, 0, tuple(network.inputs.shape))
    if register != len(compiler.ops):
        raise TypeError("the network must end in its last operation")
    program = Program(
        tuple(compiler.ops),
        compiler.theta,
        compiler.trainable,
        compiler.slices,
        _integers(network.inputs),
        _integers(network.weights),
        (),
    )
    registers, _ = forward(program, compiler.theta[None, None])
    values = tuple(np.broadcast_to(r[0, 0], r.shape[2:]) for r in registers)
    return Program(*(getattr(program, f) for f in list(Program.__dataclass_fields__)[:-1]), values)
