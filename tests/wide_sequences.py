"""Scaffolds of wide random networks whose weights are used more than once, and those over sequences.

Each takes a builder and returns False where something did not fit: then the caller draws again.
"""

from __future__ import annotations

from torch import nn
from wide_builder import Builder
from wide_parts import Call, build, spatial
from wide_structures import Attention, Autoencoder, Recurrent, StockRecurrent, TiedHead, Twice


def sequence(b: Builder) -> bool:
    """Attention or a transformer's layer over [B, T, D], between a linear layer or an embedding and the head."""
    source = b.source
    transformer = b.focus == "transformer"
    width = 2
    if source.chance(1, 3):
        b.start(source.integer(2, 3), words=3)
        b.add(nn.Embedding(3, width), "embedding")
    else:
        b.start(source.integer(2, 3), width)
        if not transformer and source.chance(1, 2) and not (b.linear(width) and b.activation()):
            return False
    if transformer:
        options = {"norm_first": source.chance(1, 2), "bias": b.bias(), "batch_first": True}
        options["dropout"] = 0.5 if source.chance(1, 4) else 0.0
        layer = nn.TransformerEncoderLayer(width, source.integer(1, 2), 1, layer_norm_eps=1.0, **options)
        if source.chance(1, 2):
            layer = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        return b.add(layer, "transformer", "attention", "relu", "layer_norm") and b.add(nn.Flatten()) and b.linear(1)
    if not b.add(Attention(width, source.integer(1, 2), b.bias(), source.chance(1, 2)), "attention"):
        return False
    b.activation()
    return b.add(nn.Flatten()) and b.linear(1)


def embedding(b: Builder) -> bool:
    source = b.source
    b.start(source.integer(2, 3), words=source.integer(2, 4))
    width = source.integer(1, 2)
    if source.chance(1, 4):
        inner = b.branch()
        inner.words = 0
        inner.shape = (b.shape[0], width)
        if not (inner.activation() and inner.linear(width) and inner.activation()):
            return False
        b.whole = TiedHead(b.words, width, inner.body())
        b.labels |= {"embedding", "tied"}
        return True
    b.add(nn.Embedding(b.words, width), "embedding")
    if source.chance(1, 2) and not b.linear(source.integer(1, 3)):
        return False
    if not b.activation():
        return False
    if source.chance(1, 3):
        b.add(Call("x.transpose(1, 2)"))
        b.pooling()
    return b.head()


def dropout(b: Builder) -> bool:
    source = b.source
    b.start(source.integer(2, 4))
    forms = [
        "nn.Dropout(0.5)",
        "F.dropout(x, 0.5)",
        "nn.Dropout(0.25)",
        "nn.AlphaDropout(0.5)",
        "nn.Dropout(0.5).eval()",
    ]
    place = source.integer(0, 2)  # of the inputs, before the activation, after it
    steps = [lambda: b.linear(source.integer(2, 4)), b.activation]
    if place == 1:  # nobody else needs the layer's output
        forms += ["nn.Dropout(0.5, inplace=True)", "F.dropout(x, 0.5, inplace=True)"]
    steps.insert(place, lambda: b.add(build(source.choice(forms)), "dropout"))
    return all(step() for step in steps) and b.head()


def tied(b: Builder) -> bool:
    source = b.source
    inner = b.branch()
    if source.chance(1, 2):
        b.start(source.integer(1, 3))
        inner.shape = b.shape
        if not (inner.linear(b.shape[0]) and inner.activation()):
            return False
    else:
        b.start(1, *(source.integer(3, 4) for _ in range(source.integer(1, 2))))
        inner.shape = b.shape
        if not (inner.convolution("conv", keep=True) and inner.activation()):
            return False
        if source.chance(1, 3):
            n = spatial(b.shape)
            inner.add(build(f"F.max_pool{n}d(x, 3, 1, 1)"), f"max_pool{n}d")
    return b.add(Twice(inner.body(), source.integer(2, 3)), "tied") and b.head()


def recurrent(b: Builder) -> bool:
    source = b.source
    b.start(source.integer(2, 3), source.integer(1, 2))
    hidden = source.integer(1, 2)
    inner = b.branch()
    inner.shape = (hidden,)
    if not inner.activation():
        return False
    return b.add(Recurrent(b.shape[1], hidden, inner.body(), b.bias(), source.chance(1, 2)), "recurrent") and b.head()


def rnn(b: Builder) -> bool:
    source = b.source
    b.start(source.integer(2, 3), source.integer(1, 2))
    return b.add(StockRecurrent(b.shape[1], source.integer(1, 2), b.bias()), "rnn") and b.head()


def autoencoder(b: Builder) -> bool:
    source = b.source
    b.start(source.integer(2, 3))
    inner = b.branch()
    inner.shape = (source.integer(1, 3),)
    hidden = inner.shape[0]
    if not inner.activation():
        return False
    if not b.add(Autoencoder(b.shape[0], hidden, inner.body(), b.bias()), "autoencoder", "tied"):
        return False
    return source.chance(1, 2) or b.activation()
