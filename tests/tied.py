"""Random tiny networks whose parameters are used again downstream, with integer data, made like :mod:`networks`."""

from __future__ import annotations

import networks
from networks import ATTEMPTS, MAX_PARAMETERS, Network, Residual
from torch import nn

KINDS = ("recurrent", "recurrent residual", "recurrent convolution")


def tied_network(seed: int) -> Network:
    """Network number ``seed``: one linear layer (or convolution) with ReLU, applied two or three times.

    * ``recurrent``: perhaps a linear layer of its own first, then ``relu(W h + b)`` two or three times;
    * ``recurrent residual``: ``h + relu(W h + b)`` or ``h + W relu(h)``, perhaps with a ReLU between the steps;
    * ``recurrent convolution``: the same convolution twice, each with ReLU, the last one pooled.

    >>> tied_network(3).closure().item() == tied_network(3).closure().item()
    True
    """
    source = networks._Source(10_000 + seed)
    for _ in range(ATTEMPTS):
        network = _draw(source, seed)
        if not networks._is_flat(source, network):
            break
    return network


def _draw(source: networks._Source, seed: int) -> Network:
    kind = source.choice(KINDS)
    while True:
        model, shape = _convolution(source) if kind == KINDS[2] else _linear(source, kind == KINDS[1])
        if sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS:
            break
    networks._fill(source, model)
    inputs, disguised = networks._minibatch(source, shape)
    weights = source.table(networks.LOSS, model(inputs).shape)
    if disguised and source.chance(2, 3):
        weights[1:] = -weights[:1]
    return Network(seed, kind, model, inputs, weights)


def _linear(source: networks._Source, residual: bool) -> tuple[nn.Module, tuple[int, ...]]:
    odds, width = source.choice((0, 0, 1, 2)), source.choice((1, 1, 2, 2, 3))
    own = source.chance(1, 2)
    features = source.integer(1, 3) if own else width
    modules: list[nn.Module] = [networks._linear(source, features, width, odds)] if own else []
    shared = networks._linear(source, width, width, odds)
    if own and source.chance(1, 2):
        modules.append(nn.ReLU())
    last = source.chance(1, 3)
    for _ in range(source.integer(2, 3)):
        body = [nn.ReLU(), shared] if residual and last else [shared, nn.ReLU()]
        modules += [Residual(nn.Sequential(*body))] if residual else body
        if residual and source.chance(1, 2):
            modules.append(nn.ReLU())
    modules.append(networks._linear(source, width, source.integer(1, 2), odds))
    return nn.Sequential(*modules), (features,)


def _convolution(source: networks._Source) -> tuple[nn.Module, tuple[int, ...]]:
    odds, channels = source.choice((0, 0, 1, 2)), source.integer(1, 2)
    kernel, padding = source.choice(((1, 0), (3, 1), (3, 1)))
    shared = networks._convolution(source, channels, channels, kernel, padding, 1, odds)
    height = width = source.integer(3, 4)
    modules = [shared, nn.ReLU(), shared, nn.ReLU(), nn.MaxPool2d(2, source.choice((1, 2))), nn.Flatten()]
    final = networks._output_shape(modules, (channels, height, width))
    assert final is not None
    modules.append(networks._linear(source, final[0] * final[1] * final[2], 1, odds))
    return nn.Sequential(*modules), (channels, height, width)
