"""One small network around every layer kind: what the engine, the exact rows and the audit are tested on.

Every case is a function of a parameter-free input h [2, 4, 6, 6], [2, 4, 6] or [2, 3, 4] and a module; the engine is
asked for rows of its output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """``make()`` gives a module or None, ``call(module, h)`` the tensor whose units are differenced.

    ``exact``: on small integers nothing rounds, and the engine has to know. ``positive``: inputs above 1/2.
    """

    shape: Shape
    call: Callable[[nn.Module | None, Tensor], Tensor]
    make: Callable[[], nn.Module | None] = lambda: None
    exact: bool = False
    positive: bool = False


IMAGE, SIGNAL, VOLUME, TOKENS = (2, 4, 6, 6), (2, 4, 6), (1, 2, 4, 4, 4), (2, 3, 4)


def layer(shape: Shape, make: Callable[[], nn.Module], exact: bool = False) -> Case:
    return Case(shape, lambda m, h: m(h), make, exact)  # type: ignore[misc]


def function(shape: Shape, call: Callable[[Tensor], Tensor], exact: bool = False, positive: bool = False) -> Case:
    return Case(shape, lambda _, h: call(h), exact=exact, positive=positive)


CONVOLUTIONS = {
    "conv1d": layer(SIGNAL, lambda: nn.Conv1d(4, 2, 3, 2, 1), True),
    "conv1d dilated": layer(SIGNAL, lambda: nn.Conv1d(4, 2, 2, dilation=3, bias=False), True),
    "conv1d depthwise": layer(SIGNAL, lambda: nn.Conv1d(4, 8, 3, padding=2, groups=4), True),
    "conv2d grouped": layer(IMAGE, lambda: nn.Conv2d(4, 6, 3, (2, 1), (0, 1), groups=2), True),
    "conv2d depthwise, dilated": layer(IMAGE, lambda: nn.Conv2d(4, 4, 2, dilation=2, groups=4), True),
    "conv2d circular": layer(IMAGE, lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), True),
    "conv2d reflect": layer(IMAGE, lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), True),
    "conv2d replicate": layer(IMAGE, lambda: nn.Conv2d(4, 2, 3, padding=2, padding_mode="replicate"), True),
    "conv2d same": layer(IMAGE, lambda: nn.Conv2d(4, 2, 2, padding="same"), True),
    "conv1d circular": layer(SIGNAL, lambda: nn.Conv1d(4, 2, 3, padding=2, padding_mode="circular"), True),
    "conv3d": layer(VOLUME, lambda: nn.Conv3d(2, 3, 2, (2, 1, 2), (1, 0, 1), (1, 2, 1)), True),
    "conv3d grouped": layer(VOLUME, lambda: nn.Conv3d(2, 2, 2, groups=2), True),
    "conv3d circular": layer(VOLUME, lambda: nn.Conv3d(2, 2, 3, padding=1, padding_mode="circular"), True),
    "transposed 1d": layer(SIGNAL, lambda: nn.ConvTranspose1d(4, 2, 3, 2, 1, 1), True),
    "transposed 2d": layer(IMAGE, lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 0)), True),
    "transposed 2d grouped": layer(IMAGE, lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), True),
    "transposed 2d dilated": layer(IMAGE, lambda: nn.ConvTranspose2d(4, 2, 2, 1, 1, 1, dilation=2), True),
    "transposed 3d": layer(VOLUME, lambda: nn.ConvTranspose3d(2, 3, 2, 2), True),
    "transposed depthwise": layer(IMAGE, lambda: nn.ConvTranspose2d(4, 4, 2, 2, groups=4), True),
}


def _affine(module: nn.Module) -> nn.Module:
    """Scales and shifts that are not all alike."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.linspace(-1.0, 2.0, parameter.numel()).reshape(parameter.shape) + index)
    return module


NORMALISATIONS = {
    "layer norm": layer(TOKENS, lambda: _affine(nn.LayerNorm(4))),
    "layer norm, two dimensions": layer(IMAGE, lambda: _affine(nn.LayerNorm((6, 6), eps=0.25))),
    "layer norm of everything": layer((3, 4), lambda: _affine(nn.LayerNorm((3, 4)))),
    "layer norm without weight": layer(TOKENS, lambda: nn.LayerNorm(4, elementwise_affine=False)),
    "layer norm without bias": layer(TOKENS, lambda: _affine(nn.LayerNorm(4, bias=False))),
    "layer norm of channels": Case(
        IMAGE, lambda m, h: m(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), lambda: _affine(nn.LayerNorm(4))
    ),  # type: ignore[misc]
    "group norm": layer(IMAGE, lambda: _affine(nn.GroupNorm(2, 4))),
    "group norm without weight": layer(SIGNAL, lambda: nn.GroupNorm(4, 4, affine=False)),
    "group norm of vectors": layer((3, 6), lambda: _affine(nn.GroupNorm(2, 6))),
    "instance norm": layer(IMAGE, lambda: _affine(nn.InstanceNorm2d(4, affine=True))),
    "instance norm 1d": layer(SIGNAL, lambda: nn.InstanceNorm1d(4)),
    "instance norm 3d": layer(VOLUME, lambda: _affine(nn.InstanceNorm3d(2, affine=True))),
    "rms norm": layer(TOKENS, lambda: _affine(nn.RMSNorm(4, eps=1e-5))),
    "rms norm, two dimensions": layer(TOKENS, lambda: _affine(nn.RMSNorm((3, 4)))),
    "batch norm": layer(IMAGE, lambda: _affine(nn.BatchNorm2d(4))),
    "batch norm, evaluated": layer(IMAGE, lambda: _affine(nn.BatchNorm2d(4)).eval()),
    "local response": function(IMAGE, lambda h: F.local_response_norm(h, 3)),
    "normalize": function(TOKENS, lambda h: h / h.norm(dim=1, keepdim=True)),
    "variance": function(IMAGE, lambda h: h.var((2, 3))),
    "variance of all": function(TOKENS, lambda h: h.var(correction=0)),
    "standard deviation": function(IMAGE, lambda h: h.std(1, correction=0)),
    "variance and mean": function(IMAGE, lambda h: torch.cat(torch.var_mean(h, (1, 2)))),
    "deviation and mean": function(IMAGE, lambda h: torch.cat(torch.std_mean(h, 1, keepdim=True))),
    "vector norm": function(IMAGE, lambda h: torch.linalg.vector_norm(h, dim=(1, 3))),
    "norm of all": function(TOKENS, lambda h: h.norm()),
}


def _attention(batch_first: bool = True, need_weights: bool = False) -> Case:
    def call(m: nn.Module | None, h: Tensor) -> Tensor:
        return m(h, h, h, need_weights=need_weights)[0]  # type: ignore[misc]

    return Case(TOKENS, call, lambda: nn.MultiheadAttention(4, 2, batch_first=batch_first))


def _heads(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Case:
    def heads(h: Tensor) -> Tensor:
        q = h.reshape(2, 3, 2, 2).transpose(1, 2)
        return call(q, q.flip(2) * 0.5, q.roll(1, 3) + q)

    return function(TOKENS, heads)


_MASK = torch.tensor([[0.0, -torch.inf, -1.0], [0.0, 0.0, -torch.inf], [0.5, 0.0, 0.0]])
ATTENTION = {
    "softmax": function(IMAGE, lambda h: h.softmax(1)),
    "softmax over samples": function(TOKENS, lambda h: h.softmax(0)),
    "softmax of a vector": function((5,), lambda h: h.softmax(0)),
    "softmin": function(IMAGE, lambda h: F.softmin(h, 3)),
    "log_softmax": function(IMAGE, lambda h: h.log_softmax(-1)),
    "logsumexp": function(IMAGE, lambda h: h.logsumexp((1, 2))),
    "attention": _attention(),
    "attention, sequence first": _attention(batch_first=False),
    "attention with weights": _attention(need_weights=True),
    "scaled dot product": _heads(F.scaled_dot_product_attention),
    "causal": _heads(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    "masked": _heads(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=_MASK.to(q.dtype))),
    "masked by truth": _heads(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=_MASK == 0)),
    "scaled otherwise": _heads(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3)),
    "unbatched": function((3, 4), lambda h: F.scaled_dot_product_attention(h, h, h)),
    "encoder layer": layer(TOKENS, lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.gelu, batch_first=True)),
    "encoder layer, norm first": layer(
        TOKENS, lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.silu, norm_first=True).eval()
    ),
    "decoder layer": Case(
        TOKENS,
        lambda m, h: m(h, h * 2.0),  # type: ignore[misc]
        lambda: nn.TransformerDecoderLayer(4, 2, 8, 0.0, torch.tanh, batch_first=True),
    ),
}

SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "exp2": torch.exp2,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "atan": torch.atan,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "gelu": F.gelu,
    "gelu by tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus 2": lambda h: F.softplus(h, 2.0, 3.0),
    "logsigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "elu": F.elu,
    "celu": lambda h: F.celu(h, 2.0),
    "celu in place": lambda h: F.celu_(h * 1.0, 2.0),
    "pow 5": lambda h: h**5,
    "reciprocal": torch.reciprocal,
    "pow -2": lambda h: h**-2,
    "glu": lambda h: F.glu(h, 1),
    "glu over samples": lambda h: F.glu(h, 0),
}
POSITIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "log10": torch.log10,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "pow 1.5": lambda h: h**1.5,
    "pow -0.7": lambda h: h**-0.7,
    "power of numbers": lambda h: 1.7**h,
    "power of tensors": lambda h: h**h.flip(0),
    "power of a vector": lambda h: h ** h[:1, :, :1],
    "divide": lambda h: h / h.flip(0),
    "divide by a row": lambda h: h / h[:1],
    "divided": lambda h: h[:, :1] / h,
    "one over": lambda h: 2 / h,
    "addcdiv": lambda h: torch.addcdiv(h, h.flip(0), h, value=0.5),
}
ELEMENTWISE = {name: function(TOKENS if "glu" not in name else IMAGE, call) for name, call in SMOOTH.items()} | {
    name: function(TOKENS, call, positive=True) for name, call in POSITIVE.items()
}

KINKED: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "clamp": lambda h: h.clamp(-0.7, 0.4),
    "clamp below": lambda h: h.clamp_min(0.1),
    "clamp above": lambda h: h.clamp_max(0.1),
    "clamp by tensors": lambda h: torch.clamp(h, h.flip(0) * 2.0, h[:1] + 0.5),
    "clamp by a tensor": lambda h: torch.clamp(h, max=h.roll(1, 2)),
    "leaky_relu": lambda h: F.leaky_relu(h, 0.3),
    "relu6": F.relu6,
    "hardtanh": lambda h: F.hardtanh(h, -0.3, 0.9),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": lambda h: F.hardswish(3.0 * h),
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda h: F.threshold(h, 0.2, 0.2),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "rrelu, evaluated": F.rrelu,
    "prelu": lambda h: F.prelu(h, h[0, 0, :3]),
    "maximum": lambda h: torch.maximum(h, h.flip(0) * 0.5 + 0.2),
    "minimum": lambda h: torch.minimum(h, h[:1] + 0.3),
    "fmax": lambda h: torch.fmax(h, h.roll(1, 2)),
    "amax": lambda h: h.amax((1, 2)),
    "amin": lambda h: h.amin(-1, keepdim=True),
    "softsign": F.softsign,
    "elu 2": lambda h: F.elu(h, 2.0),
    "selu": F.selu,
}
KINKS = {name: function(TOKENS, call) for name, call in KINKED.items()}

_AT = torch.tensor([2, 0, 0, 1])
MOVES = {
    "split": function(IMAGE, lambda h: h.split(3, 1)[0] + h.split(1, 1)[2], True),
    "split over samples": function(IMAGE, lambda h: h.split(1)[1] * h.split(1)[0], True),
    "split by sizes": function(IMAGE, lambda h: h.split([1, 3], 1)[1], True),
    "chunk": function(IMAGE, lambda h: h.chunk(2, 3)[1] - h.chunk(2, 3)[0], True),
    "unbind": function(IMAGE, lambda h: torch.stack(h.unbind(2)[1:3], 1), True),
    "unbind samples": function(IMAGE, lambda h: h.unbind(0)[1] + h.unbind(0)[0], True),
    "circular": function(IMAGE, lambda h: F.pad(h, (1, 2, 0, 1), mode="circular"), True),
    "reflect": function(IMAGE, lambda h: F.pad(h, (1, 2, 0, 1), mode="reflect"), True),
    "replicate": function(SIGNAL, lambda h: F.pad(h, (3, 2), mode="replicate"), True),
    "reflect 3d": function(VOLUME, lambda h: F.pad(h, (1, 2, 0, 1, 1, 1), mode="reflect"), True),
    "replicate, unbatched": function(SIGNAL, lambda h: F.pad(h, (1, 2, 1, 0), mode="replicate"), True),
    "index": function(IMAGE, lambda h: h[:, _AT[:, None], :, _AT], True),
    "index samples": function(TOKENS, lambda h: h[torch.tensor([1, 1, 0])], True),
    "index_select": function(IMAGE, lambda h: h.index_select(-2, _AT), True),
    "gather": function(TOKENS, lambda h: h.gather(1, _AT.expand(2, 2, 4)), True),
    "take": function(TOKENS, lambda h: h.take(_AT), True),
    "masked_select": function(TOKENS, lambda h: h.masked_select(torch.arange(12).reshape(3, 4) % 2 == 0), True),
    "where": function(TOKENS, lambda h: torch.where(torch.arange(4) % 2 == 0, h, h.flip(0)), True),
    "masked_fill": function(TOKENS, lambda h: h.masked_fill(torch.arange(4) == 1, 7.0), True),
    "repeat": function(TOKENS, lambda h: h.repeat(2, 1, 3), True),
    "repeat_interleave": function(TOKENS, lambda h: h.repeat_interleave(2, 1), True),
    "expand": function(TOKENS, lambda h: h[:, :1].expand(-1, 5, -1), True),
    "unfold": function(IMAGE, lambda h: F.unfold(h, 2, 2, 1, 3), True),
    "fold": function((2, 8, 4), lambda h: F.fold(h, (3, 3), 2), True),
    "windows": function(TOKENS, lambda h: h.unfold(2, 2, 1), True),
    "pixel_shuffle": function(IMAGE, lambda h: F.pixel_shuffle(h, 2), True),
    "pixel_unshuffle": function(IMAGE, lambda h: F.pixel_unshuffle(h, 2), True),
    "channel_shuffle": function(IMAGE, lambda h: F.channel_shuffle(h, 2), True),
    "tril": function(TOKENS, lambda h: h.tril() + h.triu(1) * 2.0, True),
    "diagonal": function(IMAGE, lambda h: h.diagonal(0, 2, 3), True),
    "diag_embed": function(TOKENS, torch.diag_embed, True),
    "rot90": function(IMAGE, lambda h: h.rot90(1, (2, 3)), True),
    "scatter_add": function(
        TOKENS, lambda h: torch.zeros(2, 3, 4, dtype=h.dtype).scatter_add(1, _AT.expand(2, 3, 4), h), True
    ),
    "written slices": function(TOKENS, lambda h: _write(h), True),
    "cumsum": function(TOKENS, lambda h: h.cumsum(1), True),
    "sum": function(IMAGE, lambda h: h.sum((1, 3)), True),
    "sum over samples": function(IMAGE, lambda h: h.sum(0), True),
    "mean of four": function(TOKENS, lambda h: h.mean(2), True),
    "mean of all": function(TOKENS, lambda h: h.mean().reshape(1) * h.sum()),
    "mean of three": function(TOKENS, lambda h: h.mean(1, keepdim=True)),
    "avg_pool1d": function(SIGNAL, lambda h: F.avg_pool1d(h, 3, 2, 1)),
    "avg_pool2d": function(IMAGE, lambda h: F.avg_pool2d(h, 3, 2, 1, ceil_mode=True, count_include_pad=False)),
    "avg_pool2d, unbatched": function(SIGNAL, lambda h: F.avg_pool2d(h, 2, 1, divisor_override=3)),
    "avg_pool3d": function(VOLUME, lambda h: F.avg_pool3d(h, 2, 1)),
    "adaptive 1d": function(SIGNAL, lambda h: F.adaptive_avg_pool1d(h, 4)),
    "adaptive 2d": function(IMAGE, lambda h: F.adaptive_avg_pool2d(h, (4, 5))),
    "adaptive 3d": function(VOLUME, lambda h: F.adaptive_avg_pool3d(h, 3)),
    "nearest 1d": function(SIGNAL, lambda h: F.interpolate(h, 9)),
    "nearest 2d": function(IMAGE, lambda h: F.interpolate(h, scale_factor=1.5)),
    "nearest 3d": function(VOLUME, lambda h: F.interpolate(h, scale_factor=2)),
    "linear": function(SIGNAL, lambda h: F.interpolate(h, scale_factor=2, mode="linear"), True),
    "linear, fractions": function(SIGNAL, lambda h: F.interpolate(h, 7, mode="linear", align_corners=True)),
    "bilinear": function(IMAGE, lambda h: F.interpolate(h, scale_factor=2, mode="bilinear"), True),
    "bilinear, smaller": function(IMAGE, lambda h: F.interpolate(h, (4, 5), mode="bilinear")),
    "bilinear, odd scale": function(IMAGE, lambda h: F.interpolate(h, scale_factor=1.3, mode="bilinear")),
    "trilinear": function(VOLUME, lambda h: F.interpolate(h, (5, 8, 4), mode="trilinear")),
}


def _write(h: Tensor) -> Tensor:
    out = torch.zeros(2, 4, 4, dtype=h.dtype)
    out[:, 1:] = h
    out[:, 0] = h[:, 2]
    return out


class Weights(nn.Module):
    """Matrices for products."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 5))
        self.v = nn.Parameter(torch.randn(4))
        self.b = nn.Parameter(torch.randn(2, 4, 3))


def product(call: Callable[[Weights, Tensor], Tensor], shape: Shape = TOKENS, exact: bool = True) -> Case:
    return Case(shape, call, Weights, exact)  # type: ignore[arg-type]


PRODUCTS = {
    "linear": layer(TOKENS, lambda: nn.Linear(4, 3), True),
    "matmul": product(lambda m, h: h @ m.a),
    "bmm": product(lambda m, h: torch.bmm(h, m.b)),
    "bmm of one": product(lambda m, h: h @ h.transpose(1, 2)),
    "baddbmm": product(lambda m, h: torch.baddbmm(h[:, :1, :3], h, m.b, beta=2, alpha=-3)),
    "addbmm": product(lambda m, h: torch.addbmm(h[0, :3, :3], h, m.b, beta=2, alpha=3)),
    "einsum": product(lambda m, h: torch.einsum("bij,bjk,jl->kl", h, m.b, m.a)),
    "mm": product(lambda m, h: h.flatten(0, 1) @ m.a),
    "mm of one": product(lambda m, h: h.t() @ h, (3, 4)),
    "addmm": product(lambda m, h: torch.addmm(m.a[0, :5], h, m.a, beta=2, alpha=3), (3, 4)),
    "mv": product(lambda m, h: h @ m.v, (3, 4)),
    "addmv": product(lambda m, h: torch.addmv(m.v[:3], h, m.v, beta=3, alpha=2), (3, 4)),
    "dot": product(lambda m, h: (h @ m.v).reshape(1) * h.sum(), (4,)),
    "addr": product(lambda m, h: torch.addr(m.a, m.v, h, beta=2, alpha=-1), (5,)),
    "outer": product(lambda m, h: torch.outer(h, m.v), (5,)),
    "addcmul": product(lambda m, h: torch.addcmul(h, h.flip(0), m.v, value=3)),
    "add with a factor": product(lambda m, h: torch.add(h, m.v, alpha=2) - torch.sub(m.v, h, alpha=4)),
    "add a number": product(lambda m, h: 1.0 - (h + 2.0) - 3.0 + m.v),
    "lerp": product(lambda m, h: torch.lerp(h, h.flip(0), 0.25) + torch.lerp(h, m.v, h)),
    "tied": product(lambda m, h: F.linear(F.linear(h, m.a.t(), m.a[0]), m.a)),
    "weight from a view": product(lambda m, h: F.linear(h, m.a[:, 1:].t())),
    "weight from a product": product(lambda m, h: F.linear(h, m.a.t() @ m.a[:, :4].t())),
    "weight expanded": product(lambda m, h: F.linear(h, m.v.expand(3, 4))),
    "filter from a view": product(lambda m, h: F.conv1d(h, m.a.t().reshape(5, 2, 2)[:, :, :1], groups=1)[:, :3],
                                  (2, 2, 6)),
    "bias from a product": product(lambda m, h: F.linear(h, m.a.t(), m.v @ m.a)),
    "weight norm": layer(TOKENS, lambda: parametrizations.weight_norm(nn.Linear(4, 3))),
    "weight norm of a filter": layer(IMAGE, lambda: parametrizations.weight_norm(nn.Conv2d(4, 2, 3))),
    "spectral norm": layer(TOKENS, lambda: parametrizations.spectral_norm(nn.Linear(4, 3))),
    "embedding": Case(
        (2, 3), lambda m, h: m(torch.tensor([[1, 2, 1], [0, 4, 4]])) + h[:, :, None],  # type: ignore[misc]
        lambda: nn.Embedding(5, 4), True,
    ),
    "embedding bag, sum": Case(
        (3, 4),
        lambda m, h: m(torch.tensor([1, 2, 1, 4, 4]), torch.tensor([0, 2, 2])) + h,  # type: ignore[misc]
        lambda: nn.EmbeddingBag(5, 4, mode="sum"), True,
    ),
    "embedding bag, mean": Case(
        (2, 4),
        lambda m, h: m(torch.tensor([[1, 2, 1], [0, 4, 4]])) + h,  # type: ignore[misc]
        lambda: nn.EmbeddingBag(5, 4, mode="mean"),
    ),
    "dropout": layer(TOKENS, lambda: nn.Dropout(0.5), True),
    "gru": Case(TOKENS, lambda m, h: m(h)[0], lambda: nn.GRU(4, 3, batch_first=True)),  # type: ignore[misc]
}  # fmt: skip

_CLASSES = torch.tensor([[1, 0], [3, -100]])
_SHARES = torch.tensor([1.0, 2.0, 4.0, 0.5])


def _nll(reduction: str = "mean", weighted: bool = False) -> Callable[[Tensor], Tensor]:
    def loss(h: Tensor) -> Tensor:
        weight = _SHARES.to(h.dtype) if weighted else None
        return F.nll_loss(h[:, :2].flatten(0, 1), _CLASSES.flatten(), weight, reduction=reduction)

    return loss


LOSSES = {
    "mse": function(TOKENS, lambda h: F.mse_loss(h, torch.ones_like(h))),
    "mse summed": function(TOKENS, lambda h: F.mse_loss(h, h.detach().flip(0), reduction="sum"), True),
    "mse of both": function(TOKENS, lambda h: F.mse_loss(h[:1], 2 * h[1:], reduction="sum"), True),
    "mse of each": function(TOKENS, lambda h: F.mse_loss(h, torch.ones_like(h), reduction="none"), True),
    "nll": function(TOKENS, _nll()),
    "nll summed, weighted": function(TOKENS, _nll("sum", True), True),
    "nll weighted": function(TOKENS, _nll(weighted=True)),
    "nll of each": function(TOKENS, _nll("none"), True),
    "cross entropy": function(TOKENS, lambda h: F.cross_entropy(h[:, 0], torch.tensor([3, 0]))),
}

CASES: dict[str, Case] = {
    **CONVOLUTIONS, **NORMALISATIONS, **ATTENTION, **ELEMENTWISE, **KINKS, **LOSSES,
    **{f"move: {k}": v for k, v in MOVES.items()}, **{f"product: {k}": v for k, v in PRODUCTS.items()},
}  # fmt: skip
