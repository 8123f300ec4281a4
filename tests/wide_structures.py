"""Modules of wide random networks that are more than a chain: branches, steps in time, one weight used twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Concat(nn.Module):
    """``torch.cat`` of several bodies over the channels."""

    def __init__(self, *bodies: nn.Module) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([body(x) for body in self.bodies], dim=1)


class Skip(nn.Module):
    """``x + body(x)``, or in place: ``y = body(x); y += x``."""

    def __init__(self, body: nn.Module, inplace: bool) -> None:
        super().__init__()
        self.body = body
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        if self.inplace:
            y += x
            return y
        return x + y

    def extra_repr(self) -> str:
        return f"inplace={self.inplace}"


class UNet(nn.Module):
    """Down, around the bottom, up, and beside what went down."""

    def __init__(self, down: nn.Module, pool: nn.Module, bottom: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.pool, self.bottom, self.up = down, pool, bottom, up

    def forward(self, x: Tensor) -> Tensor:
        side = self.down(x)
        up = self.up(self.bottom(self.pool(side)))
        return torch.cat([side, F.interpolate(up, size=side.shape[2:])], dim=1)


class Attention(nn.Module):
    """Self-attention of [B, T, D]."""

    def __init__(self, width: int, heads: int, bias: bool, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.attention(x, x, x, need_weights=self.weights)[0]
        return values


class Twice(nn.Module):
    """One body, used several times: weight tying along the depth."""

    def __init__(self, body: nn.Module, times: int) -> None:
        super().__init__()
        self.body = body
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.body(x)
        return x

    def extra_repr(self) -> str:
        return f"times={self.times}"


class Recurrent(nn.Module):
    """``h = act(W x_t + U h)`` over the steps of [B, T, D], from h = 0; the last h, or all."""

    def __init__(self, width: int, hidden: int, activation: nn.Module, bias: bool, every: bool) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, hidden, bias=bias)
        self.hidden = nn.Linear(hidden, hidden, bias=False)
        self.activation = activation
        self.every = every

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.hidden.in_features)
        states = []
        for t in range(x.shape[1]):
            h = self.activation(self.inputs(x[:, t]) + self.hidden(h))
            states.append(h)
        return torch.stack(states, dim=1) if self.every else h

    def extra_repr(self) -> str:
        return f"every={self.every}"


class StockRecurrent(nn.Module):
    """``nn.RNN`` with ReLU."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.body = nn.RNN(width, hidden, nonlinearity="relu", bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.body(x)[0]
        return states


class Autoencoder(nn.Module):
    """``W^T act(W x + b) + c``: the decoder is the encoder's transpose."""

    def __init__(self, width: int, hidden: int, activation: nn.Module, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden, width))
        self.bias = nn.Parameter(torch.zeros(hidden)) if bias else None
        self.offset = nn.Parameter(torch.zeros(width)) if bias else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activation(F.linear(x, self.weight, self.bias)), self.weight.t(), self.offset)


class TiedHead(nn.Module):
    """An embedding whose table is the output layer too."""

    def __init__(self, words: int, width: int, body: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(self.embedding(x)), self.embedding.weight)
