"""Rules for softmax and attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import enclosures
from .balls import SLACK, Ball, matmul
from .enclosures import reciprocal
from .layers import kind_of
from .movement import signed
from .nodes import Node
from .slices import Slices, from_dense, to_dense
from .transfer import pick
from .vjp import Rule, Unsupported, by_sample, needed, rows_at, saved, send

if TYPE_CHECKING:
    from .backward import Pass


def _softmax(walk: Pass, node: Node, g: Slices) -> None:
    """``p (g - sum p g)``; its logarithm: ``g - p sum g``."""
    dim = signed(node._saved_dim) % len(g.shape)
    if dim == 0:  # over the samples: they are one
        g = _one_sample(walk, g)
    logarithm = kind_of(node) == "LogSoftmaxBackward"
    result = needed(node, "result").reshape(g.shape)
    axis = dim + (dim == 0)
    read = _from_logarithms if logarithm else _from_results
    p = by_sample(g, lambda samples: read(rows_at(result, samples), g.shape[axis]))
    if logarithm:
        data = g.data - p * g.data.sum((axis,), keepdim=True)
    else:
        data = p * (g.data - (p * g.data).sum((axis,), keepdim=True))
    if dim == 0:
        full = Slices(g.row, g.sample, data, g.shape)
        dense = to_dense(walk.count, full).map(lambda t: t[:, 0])
        walk.send(node.next_functions[0], from_dense(dense, g.shape[1:]))
    else:
        send(walk, node.next_functions[0], g, data)


def _one_sample(walk: Pass, g: Slices) -> Slices:
    return from_dense(to_dense(walk.count, g).map(lambda t: t[:, None]), (1, *g.shape))


def _from_results(result: Tensor, terms: int) -> Ball:
    """Probabilities whose computed values these are: of e^(x - max) and of a sum of so many terms, each rounded."""
    held, inner = _precisions(result)
    p = result.to(torch.float64)
    size = torch.where(p > 0, -p.clamp(min=1e-300).log(), 0.0)  # at least max - x
    radius = p * (held + inner * (2 * enclosures.ULPS + 2 * size + 2 * terms)) + 4 * torch.finfo(result.dtype).tiny
    return Ball(p, radius * SLACK)


def _from_logarithms(result: Tensor, terms: int) -> Ball:
    held, inner = _precisions(result)
    p = result.to(torch.float64).exp()
    size = result.to(torch.float64).abs()
    # In 16 bits a kernel may round the sum and its logarithm, too.
    error = held * (size + math.log(terms) + 1) + inner * (2 * enclosures.ULPS + 4 * size + 2 * terms)
    return Ball(p, (p * error.expm1() + 4 * torch.finfo(torch.float64).tiny) * SLACK)


def _precisions(result: Tensor) -> tuple[float, float]:
    """(relative rounding of the stored values, of what they were computed in)."""
    held = torch.finfo(result.dtype)
    inner = torch.finfo(torch.float32) if held.bits == 16 else held
    return (2 * held.eps if held.bits == 16 else 0.0), inner.eps


def softmax(scores: Ball) -> Ball:
    """Over the last dimension; minus infinity is an exact 0."""
    top = scores.value.amax(-1, keepdim=True)
    e = enclosures.exp(scores - Ball(top))
    return e * reciprocal(e.sum((e.value.dim() - 1,), keepdim=True))


def _attention(walk: Pass, node: Node, g: Slices) -> None:
    """``softmax(scale q k^T + mask) v``, computed again from the recorded q, k and v; samples are independent."""
    query, key, value = (needed(node, name) for name in ("query", "key", "value"))
    if float(node._saved_dropout_p) or query.shape[:-2] != key.shape[:-2] or key.shape[:-1] != value.shape[:-1]:
        raise Unsupported(f"{node.name()} with dropout or shared heads")
    q, k, v = (Ball(pick(t, g.sample).to(torch.float64)) for t in (query, key, value))
    given = saved(node, "scale")
    width = query.shape[-1]
    scale = Ball(torch.full((), float(given), dtype=torch.float64)) if given is not None else _root_of(width)
    scores = matmul(q, _turned(k)) * scale
    if not bool(torch.isfinite(scores.value).all()):  # minus infinity is to mean hidden, and nothing else
        raise Unsupported(f"{node.name()} with infinite scores")
    hidden = _hidden(node, g, query, key)
    if hidden is not None:
        scores = _masked(scores, hidden)
    p = softmax(scores)
    dp = matmul(g.data, _turned(v))
    ds = p * (dp - (dp * p).sum((dp.value.dim() - 1,), keepdim=True)) * scale
    terms = (ds, k), (_turned(ds), q), (_turned(p), g.data)
    for edge, (first, second) in zip(node.next_functions, terms, strict=False):
        if edge[0] is not None:
            send(walk, edge, g, matmul(first, second))


def _turned(a: Ball) -> Ball:
    return a.map(lambda t: t.transpose(-2, -1))


def _root_of(width: int) -> Ball:
    return enclosures.inverse_root(Ball(torch.full((), float(width), dtype=torch.float64)))


def _hidden(node: Node, g: Slices, query: Tensor, key: Tensor) -> Tensor | None:
    """What is added to the scores of the slices, or None."""
    shape = (*query.shape[:-1], key.shape[-2])
    mask = saved(node, "attn_mask")
    added = None
    if mask is not None:
        added = pick(mask.detach().expand(shape), g.sample).to(torch.float64)
    if node._saved_is_causal:
        kept = torch.ones(shape[-2:], dtype=torch.bool).tril()
        causal = torch.zeros(kept.shape, dtype=torch.float64).masked_fill(~kept, -math.inf)
        added = causal if added is None else added + causal
    if added is not None and bool((added.amax(-1) == -math.inf).any()):
        raise Unsupported(f"{node.name()} with a query that sees nothing")
    return added


def _masked(scores: Ball, added: Tensor) -> Ball:
    """Scores plus a mask, with minus infinity exact."""
    gone = added == -math.inf
    total = scores + Ball(torch.where(gone, 0.0, added).expand(scores.value.shape))
    radius = total.radius
    if radius is not None:
        radius = torch.where(gone, 0.0, radius)
    return Ball(torch.where(gone, -math.inf, total.value), radius)


RULES: dict[str, Rule] = {
    **dict.fromkeys(["SoftmaxBackward", "LogSoftmaxBackward", "SafeSoftmaxBackward"], _softmax),
    "ScaledDotProductFlashAttentionForCpuBackward": _attention,
}
