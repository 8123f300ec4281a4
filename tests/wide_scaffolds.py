"""The shapes of wide random networks: vectors, images, sequences, and structures such as U-Nets and recurrences.

Each takes a builder and returns False where something did not fit: then the caller draws again.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from wide_builder import CONVOLUTIONS, NORMS, Builder
from wide_parts import MIXINGS, POOLINGS, SELECTIONS, Call, build, spatial
from wide_sequences import autoencoder, dropout, embedding, recurrent, rnn, sequence, tied
from wide_structures import Concat, Skip, UNet


def _vector(b: Builder) -> bool:
    source = b.source
    b.start(source.choice((1, 2, 2, 3, 4)))
    for number in range(source.choice((1, 2, 2, 3))):
        if not b.linear(source.integer(2 if b.focus in (*SELECTIONS, *NORMS) else 1, 4)):
            return False
        if (b.focus in NORMS and number == 0) or source.chance(1, 10):
            b.norm()
        if not b.activation():
            return False
        if source.chance(1, 12):
            b.add(Call(source.choice(MIXINGS)), "parameter_free")
    if (b.focus in SELECTIONS or source.chance(1, 8)) and not b.selection() and b.focus in SELECTIONS:
        return False
    return b.head()


def _image_start(b: Builder) -> None:
    source = b.source
    n = int(b.focus[-2]) if b.focus in POOLINGS and b.focus[-1] == "d" else source.choice((1, 1, 2, 2, 2, 3))
    sizes = {1: (4, 6), 2: (3, 4), 3: (2, 3)}[n]
    low = 3 if "fractional" in b.focus or b.focus == "circular" else 0
    channels = 2 if b.focus in ("grouped", "depthwise") else source.choice((1, 1, 2))
    b.start(channels, *(max(low, source.choice(sizes)) for _ in range(n)))


def _image(b: Builder) -> bool:
    source = b.source
    _image_start(b)
    stages = source.choice((1, 1, 2))
    for number in range(stages):
        if not b.convolution():
            return False
        if number == 0 and (b.focus in NORMS or source.chance(1, 8)) and not b.norm() and b.focus in NORMS:
            return False
        if not _act_and_pool(b, number):
            return False
    if (b.focus in SELECTIONS or source.chance(1, 10)) and not b.selection() and b.focus in SELECTIONS:
        return False
    return b.head()


def _act_and_pool(b: Builder, number: int) -> bool:
    """An activation, and then or before a pooling, where it fits."""
    source = b.source
    before = source.chance(1, 4)
    pools = b.focus in POOLINGS and number == 0
    if before and not b.pooling() and pools:
        return False
    if not b.activation():
        return False
    return before or not (pools or source.chance(2, 3)) or b.pooling() or not pools


def _norm(b: Builder) -> bool:
    ok = _vector(b) if b.focus != "instance_norm" and b.source.chance(1, 2) else _image(b)
    return ok and b.focus in b.labels


def _residual(b: Builder) -> bool:
    source = b.source
    image = source.chance(1, 2)
    if image:
        _image_start(b)
        ok = b.convolution("conv")
    else:
        b.start(source.integer(1, 3))
        ok = b.linear(source.integer(1, 3))
    if not ok or (source.chance(1, 3) and not b.activation()):
        return False
    inner = b.branch()
    order = [
        inner.activation,
        (lambda: inner.convolution("conv", keep=True)) if image else lambda: inner.linear(b.shape[-1]),
    ]
    if source.chance(1, 2):
        order.reverse()
    if source.chance(1, 3):
        order.append(inner.activation)
    if not all(step() for step in order):
        return False
    if not b.add(Skip(inner.body(), inner.layer is not None and source.chance(1, 3)), "residual"):
        return False
    if source.chance(2, 3) and not b.activation():
        return False
    if image and source.chance(2, 3):
        b.pooling()
    return b.head()


def _concat(b: Builder) -> bool:
    source = b.source
    b.start(source.integer(1, 3))
    bodies = []
    for _ in range(2):
        inner = b.branch()
        if not (inner.linear(source.integer(1, 2)) and (source.chance(1, 5) or inner.activation())):
            return False
        bodies.append(inner.body())
    if not b.add(Concat(*bodies), "concat"):
        return False
    if source.chance(1, 3) and not (b.selection() if source.chance(1, 2) else b.activation()):
        return False
    return b.head()


def _inception(b: Builder) -> bool:
    source = b.source
    _image_start(b)
    n = spatial(b.shape)
    bodies = []
    for kind in ("one", "three", "pool"):
        inner = b.branch()
        if kind == "pool":
            ok = inner.add(
                build(source.choice((f"nn.MaxPool{n}d(3, 1, 1)", f"F.max_pool{n}d(x, 3, 1, 1)"))), f"max_pool{n}d"
            )
        else:
            width = 1 if kind == "one" or n == 3 else 3
            made = getattr(nn, f"Conv{n}d")(b.channels(), 1, width, padding=width // 2, bias=b.bias())
            ok = inner._layer(made, f"conv{n}d") and inner.activation()
        if not ok:
            return False
        bodies.append(inner.body())
    return b.add(Concat(*bodies), "inception", "concat") and (source.chance(1, 2) or b.pooling()) and b.head()


def _unet(b: Builder) -> bool:
    source = b.source
    n = source.choice((1, 1, 2))
    b.start(source.integer(1, 2), *(4 for _ in range(n)))
    down = b.branch()
    if not (
        down._layer(getattr(nn, f"Conv{n}d")(b.channels(), 1, 1, bias=b.bias()), f"conv{n}d") and down.activation()
    ):
        return False
    pool = down.branch()
    if not pool.add(build(source.choice((f"nn.MaxPool{n}d(2)", f"F.max_pool{n}d(x, 2)"))), f"max_pool{n}d"):
        return False
    bottom = pool.branch()
    if not (bottom.convolution("conv", keep=True) and bottom.activation()):
        return False
    up = bottom.branch()
    made = getattr(nn, f"ConvTranspose{n}d")(bottom.channels(), 1, 2, stride=2, bias=b.bias())
    if not up._layer(made, f"transposed{n}d", "transposed"):
        return False
    whole = UNet(down.body(), pool.body(), bottom.body(), up.body())
    return b.add(whole, "unet", "concat") and (source.chance(1, 2) or b.activation()) and b.head()


def _pool_after_pool(b: Builder) -> bool:
    source = b.source
    b.start(1, *(source.integer(4, 5) for _ in range(source.integer(1, 2))))
    n = spatial(b.shape)
    if not b.convolution("conv") or not (source.chance(1, 3) or b.activation()):
        return False
    forms = (
        f"nn.MaxPool{n}d(2, 1)",
        f"F.max_pool{n}d(x, 2, 1)",
        f"nn.MaxPool{n}d(2)",
        f"F.adaptive_max_pool{n}d(x, 1)",
    )
    for number in range(2):
        form = source.choice(forms[: 3 if number == 0 else 4])
        if not b.add(build(form), f"{'adaptive_' if 'adaptive' in form else ''}max_pool{n}d"):
            return False
        if number == 0 and source.chance(1, 4):
            b.activation()
    b.labels.add("pool_after_pool")
    return b.head()


def _parameter_free(b: Builder) -> bool:
    source = b.source
    image = source.chance(1, 2)
    if image:
        _image_start(b)
    else:
        b.start(source.integer(2, 3))
    if not (b.convolution("conv") if image else b.linear(source.integer(2, 3))):
        return False
    if not (source.chance(1, 3) or b.activation()):
        return False
    if not b.add(Call(source.choice(MIXINGS)), "parameter_free"):
        return False
    return b.activation() and (not image or source.chance(1, 2) or b.pooling()) and b.head()


SCAFFOLDS: dict[str, Callable[[Builder], bool]] = {
    "vector": _vector,
    "image": _image,
    "sequence": sequence,
    **dict.fromkeys(CONVOLUTIONS[1:], _image),
    **dict.fromkeys(NORMS, _norm),
    "residual": _residual,
    "concat": _concat,
    "inception": _inception,
    "unet": _unet,
    "embedding": embedding,
    "attention": sequence,
    "transformer": sequence,
    "dropout": dropout,
    "tied": tied,
    "recurrent": recurrent,
    "rnn": rnn,
    "autoencoder": autoencoder,
    "pool_after_pool": _pool_after_pool,
    "parameter_free": _parameter_free,
}
