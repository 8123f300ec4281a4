"""Forms that no list of kinds names: each ends undecided, or is right.

The odd parts of :mod:`test_wide_identities`, over losses with kinks, norms at 0, rounding, quantiles, reductions by
maximum, data-dependent selections and the raw operators: where autodiff is wrong there must be no certificate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from test_wide_identities import close, network, slopes
from torch import Tensor
from wide_campaign import certificate_of
from wide_networks import WideNetwork

import adcert

ELEMENTWISE = """
F.hardshrink(x, 1.0)
F.threshold(x, 1.0, 0.0)
x.clamp(min=torch.zeros_like(x))
x.clamp(max=x.detach())
torch.sign(x)*x
torch.where(x > 0, x, 0*x)
x*(x>0)
x.relu().sqrt()
x.square().sqrt()
(x*x).pow(0.5)
x.norm(dim=-1, keepdim=True)
torch.linalg.norm(x, dim=-1, keepdim=True)
F.normalize(x, dim=-1)
x.pow(2).sum(-1, keepdim=True).sqrt()
F.softplus(x, threshold=1.0)
F.softplus(x)
F.logsigmoid(x)
F.huber_loss(x, torch.zeros_like(x), reduction='none')
F.smooth_l1_loss(x, torch.zeros_like(x), reduction='none', beta=0.0)
F.smooth_l1_loss(x, torch.zeros_like(x), reduction='none')
F.l1_loss(x, torch.zeros_like(x), reduction='none')
F.hinge_embedding_loss(x, torch.ones_like(x), reduction='none')
F.hinge_embedding_loss(1 - x, -torch.ones_like(x), reduction='none')
F.margin_ranking_loss(x, -x, torch.ones_like(x), reduction='none')
F.soft_margin_loss(x, torch.ones_like(x), reduction='none')
x.fmod(1.0)
x.remainder(1.0)
x % 2
x.frac()
x - x.floor()
x.round() + x
torch.trunc(x) + x
x.ceil()*x
torch.nan_to_num(x)
torch.hypot(x, torch.zeros_like(x))
torch.hypot(x, x)
torch.atan2(x, x*0+1)
torch.sinc(x)
torch.copysign(x, x.detach()*0+1)
torch.copysign(x, x)
torch.xlogy(x.relu(), x.relu())
torch.logaddexp(x, -x)
x.abs().pow(1.5)
x.abs().sqrt()
torch.float_power(x, 3)
x.clamp(0, 0)
x.clamp(1, 0)
torch.clip(x, 0, 2)
F.hardtanh(x, 0.0, 0.5)
F.glu(torch.cat([x, x], -1))
F.silu(x)
F.mish(x)
F.gelu(x)
F.gelu(x, approximate='tanh')
F.tanhshrink(x)
F.softsign(x)
x / (1 + x.abs())
x.abs() / (x.abs() + 1)
x.relu() * (-x).relu()
x.relu()**2
torch.special.entr(x.abs()+1)
torch.sgn(x)*x
x.masked_fill(x < 0, 0.0)
torch.relu(x).masked_select(torch.ones_like(x, dtype=torch.bool))
torch.threshold(x, 0.0, 0.0)
F.rrelu(x, 0.25, 0.25)
F.leaky_relu(x, 1.0)
F.prelu(x, x.new_tensor([0.5]))
F.celu(x, -1.0)
F.elu(x, -1.0)
torch.ops.aten.elu(x, 1.0, 1.0, 2.0)
torch.ops.aten.elu(x, 1.0, 2.0, 1.0)
torch.ops.aten.relu(x)
torch.ops.aten.hardtanh(x, -1.0, 1.0)
torch.ops.aten.leaky_relu(x, 0.5)
torch.ops.aten.clamp_min(x, 0)
torch.ops.aten.threshold(x, 0.0, 0.0)
torch.ops.aten.abs(x)
torch._C._nn.relu6(x)
torch.ops.aten.relu6(x)
torch.square(x.relu())
x.addcmul(x.relu(), x)
torch.lerp(x.relu(), x, 0.5)
torch.lerp(x, -x, x.sigmoid())
x.positive().relu()
F.relu(x, True)
x.clone().clamp_(min=0)
x.clone().abs_()
torch.neg(F.threshold(-x, 0.0, 0.0))
torch.rsub(x.relu(), x)
torch.dropout(x.relu(), 0.5, True)
F.feature_alpha_dropout(x.relu(), 0.5, True)
F.gumbel_softmax(x, hard=True, dim=-1)
F.softmax(x, -1)
x.new_tensor([1.0])*x.relu()
x.relu().detach() + x
x - x.detach().relu() + x.relu()
torch.abs(x).exp()
x.abs().tanh()
x.sigmoid().round()*x
x.bool()*x
x.sign()*x
"""

TABLES = """
x.max()
x.min()
x.max(-1).values
x.amax((0, 1))
x.median()
x.nanmedian(-1).values
x.quantile(0.5, dim=-1)
x.quantile(0.25, dim=-1)
x.mode(-1).values
x.aminmax(dim=-1)[0]
x.aminmax(dim=-1)[1]
x.logcumsumexp(-1)
x.logsumexp(-1)
x.cumprod(-1)
x.prod(-1)
x.std(-1)
x.var(-1)
x.norm()
x.norm(p=1)
x.norm(p=float('inf'))
x.norm(p=float('inf'), dim=-1)
torch.linalg.vector_norm(x, ord=float('inf'))
torch.linalg.vector_norm(x, ord=1)
torch.linalg.vector_norm(x, ord=0)
torch.dist(x, torch.zeros_like(x))
torch.cdist(x, x)
torch.cdist(x, torch.zeros_like(x), p=1.0)
F.pdist(x)
F.pairwise_distance(x, torch.zeros_like(x), p=1)
F.cosine_similarity(x, torch.ones_like(x), dim=-1)
torch.scatter_reduce(torch.zeros_like(x), 1, torch.zeros_like(x, dtype=torch.int64), x, 'amax')
torch.zeros_like(x).scatter_reduce(1, torch.zeros_like(x, dtype=torch.int64), x, 'prod')
torch.zeros_like(x).index_reduce(1, torch.zeros(x.shape[1], dtype=torch.int64), x, 'amax')
x.argsort(-1)*x
x[x.argmax(-1)[0] % x.shape[0]]
x.gather(-1, x.argmax(-1, keepdim=True))
x.gather(-1, x.argsort(-1))
x.take_along_dim(x.argsort(-1), -1)
x.sort(-1)[0].diff()
torch.renorm(x, 2, 0, 1.0)
torch.renorm(x, 1, 0, 0.5)
F.multi_margin_loss(x, torch.zeros(x.shape[0], dtype=torch.int64))
F.multi_margin_loss(x, torch.zeros(x.shape[0], dtype=torch.int64), p=2)
F.triplet_margin_loss(x, -x, x * 2)
F.cosine_embedding_loss(x, -x, torch.ones(x.shape[0]))
F.lp_pool1d(x.unsqueeze(1), 2.0, 2)
F.max_pool1d(x.unsqueeze(1), 2, 1)
F.max_unpool1d(*F.max_pool1d(x.unsqueeze(1), 2, 1, return_indices=True), 2, 1)
F.adaptive_max_pool1d(x.unsqueeze(1), 2)
F.local_response_norm(x.unsqueeze(1), 2)
F.layer_norm(x, x.shape[-1:], eps=0.0)
F.layer_norm(x, x.shape[-1:])
F.rms_norm(x, x.shape[-1:], eps=1.0)
F.rms_norm(x, x.shape[-1:], eps=0.0)
F.grid_sample(x.reshape(1, 1, *x.shape), x.reshape(1, 1, -1, 2)[:, :, :1], align_corners=True)
torch.trapezoid(x.relu(), dim=-1)
F.embedding_bag(torch.tensor([[0, 1]]), x, mode='max')
F.embedding_bag(torch.tensor([[0, 1]]), x, mode='sum')
F.embedding(torch.tensor([0, 1]), x, padding_idx=0)
F.embedding(torch.tensor([0, 0]), x, scale_grad_by_freq=True)
torch.topk(x, 1, -1)[0]
torch.topk(x, 1, -1, False)[0]
torch.kthvalue(x, 1, -1)[0]
torch.msort(x)
torch.stack([x, x.flip(-1)]).max(0)[0]
torch.stack([x, x.flip(-1)]).amax(0)
torch.cat([x, x.flip(-1)], -1).max(-1)[0]
torch.max(x, x.flip(-1))
torch.min(x, x.flip(-1))
torch.fmin(x, x.flip(-1))
torch.where(x > x.flip(-1), x, x.flip(-1))
torch.cummin(x, -1)[0]
x.softmax(-1).max(-1)[0]
x.tril().max(-1)[0]
x.unfold(-1, 2, 1).max(-1)[0]
x.as_strided((2, 2), (1, 1)).max(-1)[0]
x.T.max(0)[0]
x.expand(2, *x.shape).max(0)[0]
x.repeat(2, 1).max(0)[0]
x.index_select(-1, torch.tensor([0, 0, 1])).max(-1)[0]
torch.einsum('ij->ji', x).max(0)[0]
torch.linalg.matrix_norm(x, 2)
torch.linalg.matrix_norm(x, 1)
torch.linalg.svdvals(x)
x.relu().cumsum(-1).max(-1)[0]
torch.logdet(x @ x.T + torch.eye(x.shape[0]))
F.ctc_loss(x.reshape(-1, 1, x.shape[-1]).log_softmax(-1), torch.tensor([[1]]), (2,), (1,))
F.kl_div(x.log_softmax(-1), x.detach().softmax(-1))
F.binary_cross_entropy(x.sigmoid(), torch.zeros_like(x))
F.nll_loss(x.log_softmax(-1), torch.zeros(x.shape[0], dtype=torch.int64))
F.poisson_nll_loss(x, torch.ones_like(x))
F.gaussian_nll_loss(x, torch.ones_like(x), x.relu())
F.multilabel_soft_margin_loss(x, torch.ones_like(x))
F.cross_entropy(x, x.detach().softmax(-1))
F.interpolate(x.unsqueeze(1), scale_factor=2, mode='nearest').max(-1)[0]
F.pad(x, (1, 1), 'constant', 0.0).max(-1)[0]
F.pad(x.unsqueeze(1), (1, 1), 'reflect').max(-1)[0]
F.pad(x.unsqueeze(1), (1, 1), 'replicate').max(-1)[0]
F.pad(x.unsqueeze(1), (1, 1), 'circular').max(-1)[0]
"""


def draws(form: str, seed: int, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        x = torch.randint(-(number % 2), 2, (2, 3), generator=generator)
        u, c = (torch.randint(-2, 3, shape, generator=generator).double() for shape in ((2, 3), (64,)))
        yield x.double(), u, c
    one = torch.ones(1, 1, dtype=torch.float64)
    for kink in (0.0, 1.0, -1.0, 0.5)[:count] if form in ELEMENTWISE.splitlines() else ():
        yield kink * one, one, None


def odd_part(form: str, x: Tensor, u: Tensor, c: Tensor | None) -> tuple[WideNetwork, float, float] | None:
    """The network, autodiff's derivative at 0 and the true one; None without a fitting form or derivative."""
    try:
        odd = network(form, x, u, (1, -1), c)
        left, right = slopes(odd)
        gradient = float(odd.gradient())
    except (RuntimeError, IndexError):  # not of this shape, or not differentiable as torch sees it
        return None
    return (odd, gradient, right) if close(left, right) else None


def check(count: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed, form in enumerate((*ELEMENTWISE.split("\n")[1:-1], *TABLES.split("\n")[1:-1])):
        for x, u, c in draws(form, seed, count):
            found = odd_part(form, x, u, c)
            if found is None:
                seen["nothing to see"] += 1
                continue
            odd, gradient, truth = found
            wrong = not close(gradient, truth)  # a NaN is wrong
            verdict = certificate_of(odd, strict=bool(seed % 4 == 0)).verdict
            assert not wrong or verdict is not adcert.Verdict.CERTIFIED, f"{form} at {x.tolist()} along {u.tolist()}"
            seen[f"{'wrong' if wrong else 'right'}, {verdict}"] += 1
    print(dict(seen))
    return seen


@pytest.mark.filterwarnings("ignore")
def test_zoo() -> None:
    seen = check(2)
    assert seen["wrong, undecided"] > 50
    assert seen["wrong, uncertified"] > 30
    assert seen["right, certified"] > 150
    assert seen["nothing to see"] < seen.total() / 2


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
def test_large_zoo() -> None:
    check(40)
