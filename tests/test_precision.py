"""Mixed precision: autocast, GradScaler, 16-bit parameters. Literal cases of false certificates that must not be given,
then the offset network of docs/theory.md, section 1.4, as an oracle, then training as people write it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_helpers import autograd_rows, engine_rows, random_pairs
from offsets import Offset, pool, recorded
from torch import Tensor, nn
from torch.nn import functional as F

import adcert
from adcert import Certificate, Monitor, Verdict, certify
from adcert.replay import _along

HALVES = (torch.bfloat16, torch.float16)
LOW = (torch.float32, *HALVES)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def leaf(*values: float, dtype: torch.dtype = torch.float16) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def verdict(loss: Callable[[], Tensor], *leaves: nn.Parameter) -> Certificate:
    return certify(loss, nn.ParameterList(leaves))


def under(dtype: torch.dtype | None, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The closure under CPU autocast, or as it is."""

    def run() -> Tensor:
        with torch.autocast("cpu", dtype) if dtype is not None else contextlib.nullcontext():
            return closure()

    return run


# ---- numbers that low precision takes for others -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("proxy", "side"), [(0.05, 0.0), (0.004, 0.0), (0.97, 1.0)])
def test_a_proxy_near_a_side_is_not_that_side(dtype: torch.dtype, proxy: float, side: float) -> None:
    """relu(w) - relu(w) is 0 with gradient 0; with proxies ``proxy`` and ``side`` AD gives their difference."""
    w, near, exact = leaf(0.0, dtype=dtype), adcert.nn.ReLU(proxy=proxy), adcert.nn.ReLU(proxy=side)
    found = verdict(lambda: (near(w) - exact(w)).sum(), w)
    assert w.grad is not None and float(w.grad) != 0
    assert found.verdict is not Verdict.CERTIFIED
    assert verdict(lambda: (exact(w) - exact(w)).sum(), w).verdict is Verdict.CERTIFIED


@pytest.mark.parametrize("kinked", [lambda x: F.leaky_relu(x, 1e-9), lambda x: F.elu(x, 1e-9)], ids=["leaky", "elu"])
@pytest.mark.parametrize("dtype", LOW)
def test_a_slope_that_underflows_is_not_zero(kinked: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """relu(-l(x)) - l(x) at 0 has slopes -2e-9 on the left and -1 on the right; AD gives -1e-9, and 0 in float16."""
    x = leaf(0.0, dtype=dtype)
    assert verdict(lambda: (F.relu(-kinked(x)) - kinked(x)).sum(), x).verdict is not Verdict.CERTIFIED


def test_float32_values_that_tie_as_bfloat16_have_rows_of_float32() -> None:
    """max(bf16(a), bf16(b)) with a != b: whoever wins, the row is e_a - e_b, and the opposite choice contradicts it."""
    pair = torch.tensor([[1.0, 1.001]])
    assert pair[0, 0] != pair[0, 1] and bool((pair.bfloat16() == 1).all())
    w = nn.Parameter(pair)
    alone = verdict(lambda: F.max_pool1d(w.bfloat16()[None], 2).sum(), w)
    assert alone.verdict is Verdict.CERTIFIED and alone.layers[0].rows == 1
    turned = verdict(lambda: (F.max_pool1d(w.bfloat16(), 2) - F.max_pool1d(w.bfloat16().flip(1), 2)).sum(), w)
    assert turned.verdict is Verdict.UNCERTIFIED
    apart = verdict(lambda: F.max_pool1d(w[None], 2).sum(), w)
    assert apart.verdict is Verdict.CERTIFIED and apart.layers[0].ties == 0


def test_a_weight_that_underflows_hides_nothing_of_itself() -> None:
    """w = 1e-9 is 0 in float16: the cast is w plus a constant. relu(x w) - relu(-x w) is x w, and AD gives 0."""
    w = leaf(1e-9, dtype=torch.float32)
    x = torch.ones(1, 1)

    def loss() -> Tensor:
        return (F.relu(F.linear(x, w[None])) - F.relu(-F.linear(x, w[None]))).float().sum()

    found = verdict(under(torch.float16, loss), w)
    assert w.grad is not None and float(w.grad) == 0
    assert found.verdict is Verdict.UNCERTIFIED


# ---- infinities --------------------------------------------------------------------------------------------------

SWALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "divided by": lambda inf: 1 / (inf * 1.0),
    "a constant over": lambda inf: torch.ones_like(inf) / inf,
    "reciprocal": torch.reciprocal,
    "rsqrt": torch.rsqrt,
    "negative power": lambda inf: inf**-2,
    "fractional power": lambda inf: inf**-0.5,
    "sigmoid": torch.sigmoid,
    "sigmoid in place": lambda inf: (inf * 1.0).sigmoid_(),
    "tanh": lambda inf: torch.tanh(-inf),
    "erf": torch.erf,
    "erfc": torch.erfc,
    "atan": torch.atan,
    "log-sigmoid": F.logsigmoid,
    "softplus": lambda inf: F.softplus(-inf),
    "elu": lambda inf: F.elu(-inf),
    "elu in place": lambda inf: F.elu(-inf, inplace=True),
    "celu": lambda inf: F.celu(-inf),
    "gate": lambda inf: F.glu(torch.cat([torch.ones_like(inf), inf])),
    "clamped": lambda inf: inf.clamp(max=5.0),
    "maximum": lambda inf: torch.minimum(inf, torch.ones_like(inf)),
}


@pytest.mark.parametrize("swallow", SWALLOWED.values(), ids=SWALLOWED)
def test_an_overflow_that_is_swallowed_is_undecided(swallow: Callable[[Tensor], Tensor]) -> None:
    """300 * 300 is infinite in float16; loss and gradient are finite all the same."""
    u, w = leaf(300.0), leaf(0.0)
    small = leaf(2.0)
    found = verdict(lambda: (F.relu(w) + swallow(u * 300.0)).sum(), w, u)
    assert u.grad is not None and bool(torch.isfinite(u.grad).all())
    assert found.verdict is Verdict.UNDECIDED and found.reasons
    assert verdict(lambda: (F.relu(w) + swallow(small * 3.0)).sum(), w, small).verdict is Verdict.CERTIFIED


def test_an_overflow_that_nobody_reads_is_no_matter() -> None:
    u, w = leaf(300.0), leaf(0.0)
    mask = torch.tensor([True])
    assert verdict(lambda: (F.relu(w) + torch.where(mask, w, u * 300.0)).sum(), w, u).verdict is Verdict.CERTIFIED


def clipped(w: nn.Parameter) -> None:
    nn.utils.clip_grad_value_([w], 1.0)


def zeroed(w: nn.Parameter) -> None:
    assert w.grad is not None
    w.grad.zero_()


def freed(w: nn.Parameter) -> None:
    w.grad = None


@pytest.mark.parametrize("after", [clipped, zeroed, freed, lambda w: None], ids=["clipped", "zeroed", "freed", "kept"])
def test_gradients_that_were_not_finite_stay_so(after: Callable[[nn.Parameter], None]) -> None:
    """float16 holds no gradient of 9e4, whatever becomes of it before the block ends."""
    w = leaf(1.0)
    with Monitor(nn.ParameterList([w])).step() as step:
        (F.relu(w).float() * 9e4).sum().backward()
        after(w)
    assert step.certificate().verdict is Verdict.UNDECIDED
    assert step.certificate().reasons == ["the gradient of 0 is not finite"]


def test_gradients_of_autograd_grad_are_looked_at() -> None:
    w = leaf(1.0)
    for factor, expected in ((9e4, Verdict.UNDECIDED), (1.0, Verdict.CERTIFIED)):
        with Monitor(nn.ParameterList([w])).step() as step:
            torch.autograd.grad((F.relu(w).float() * factor).sum(), [w])
        assert step.certificate().verdict is expected


def test_an_overflow_is_skipped_by_the_scaler_and_undecided() -> None:
    w = leaf(1.0, dtype=torch.float32)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**16), torch.optim.SGD([w], 0.5)
    monitor, seen = Monitor(nn.ParameterList([w])), []
    for _ in range(3):
        optimizer.zero_grad()
        with monitor.step() as step:
            loss = (F.relu(w.half()).float() * 1.5).sum()
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append((step.certificate().verdict.value, w.item()))
    assert seen == [("undecided", 1.0), ("certified", 0.25), ("certified", -0.5)]


def test_casts_from_an_earlier_step_are_undecided() -> None:
    """One autocast around two steps keeps the cast of w = 1, which torch reads in the second, where w is 2."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    monitor, seen = Monitor(layer), []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with monitor.step() as step:
                loss = F.relu(layer(torch.ones(1, 1))).sum()
                loss.backward()
            seen.append((loss.item(), step.certificate().verdict))
            with torch.no_grad():
                layer.weight.mul_(2)
    assert seen == [(1.0, Verdict.CERTIFIED), (1.0, Verdict.UNDECIDED)]
    assert "begin it inside the step" in step.certificate().reasons[0]


# ---- operations that autocast casts itself -----------------------------------------------------------------------

CAST: dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {  # (is it narrowed, the operation)
    "prelu": (True, lambda x, a: F.prelu(x, a)),
    "prelu of a tensor": (True, lambda x, a: x.prelu(a)),
    "max_pool3d": (False, lambda x, a: F.max_pool3d(x[:, None], 2)),
    "max_pool3d with indices": (False, lambda x, a: F.max_pool3d(x[:, None], 2, return_indices=True)[0]),
    "adaptive_max_pool3d": (False, lambda x, a: F.adaptive_max_pool3d(x[:, None], (1, 2, 2))),
    "fractional_max_pool2d": (False, lambda x, a: F.fractional_max_pool2d(x, 2, output_size=3)),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CAST)
def test_what_autocast_casts_is_recorded_as_if_cast_by_hand(name: str, dtype: torch.dtype) -> None:
    """The same verdict, ties, touches and gradients as with the casts written out, and those of plain torch."""
    narrowed, operation = CAST[name]
    values = torch.randint(-2, 3, (2, 2, 4, 4), generator=torch.Generator().manual_seed(3)).float()
    values[0, 0, 0, 0] = 1e-9 if dtype is torch.float16 else 0.0  # 0 in float16

    def leaves() -> list[nn.Parameter]:
        return [nn.Parameter(values.clone()), nn.Parameter(torch.tensor([0.25, 0.3]))]

    def run(w: nn.Parameter, a: nn.Parameter, automatic: bool) -> Tensor:
        torch.manual_seed(7)
        x = w * 1.0 if narrowed else (w * 1.0).to(dtype)
        if not automatic:
            x, a = (t.to(dtype if narrowed else torch.float32) for t in (x, a))
        with torch.autocast("cpu", dtype, enabled=automatic):
            return (operation(x, a).float() * 3).sum()

    seen = []
    for automatic in (True, False):
        mine, theirs = leaves(), leaves()
        run(*theirs, automatic).backward()
        found = verdict(lambda automatic=automatic, mine=mine: run(*mine, automatic), *mine)  # type: ignore[misc]
        for p, q in zip(mine, theirs, strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)
        layers = [(layer.ties, layer.touches, layer.rows, layer.exemptions) for layer in found.layers]
        seen.append((found.verdict, found.reasons, layers))
    assert [len(seen[0][2]), *seen[0]] == [1, *seen[1]]
    assert seen[0][2][0][:2] > (0, 0) and seen[0][0] is not Verdict.UNDECIDED


# ---- the offset network as an oracle -----------------------------------------------------------------------------


def convolutions(seed: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Convolutions, three normalisations, a residual sum, linear layers."""
    torch.manual_seed(seed)
    layers = {"c": nn.Conv2d(2, 4, 3, padding=1), "b": nn.BatchNorm2d(4), "d": nn.Conv2d(4, 4, 3, padding=1)}
    layers |= {"g": nn.GroupNorm(2, 4), "l": nn.Linear(64, 6), "n": nn.LayerNorm(6), "o": nn.Linear(6, 3)}
    x = torch.randint(0, 3, (4, 2, 8, 8)).float() / 2

    def network(m: nn.ModuleDict, relu: Callable[[Tensor], Tensor], pool: Callable[[Tensor], Tensor]) -> Tensor:
        h = pool(relu(m["b"](m["c"](x))))
        h = relu(m["g"](m["d"](h)) + h).flatten(1)
        return relu(m["o"](relu(m["n"](m["l"](h)))))

    return nn.ModuleDict(layers), network


def attention(fused: bool) -> Callable[[int], tuple[nn.Module, Callable[..., Tensor]]]:
    """One block of a transformer between ReLUs, and smooth activations."""

    def build(seed: int) -> tuple[nn.Module, Callable[..., Tensor]]:
        torch.manual_seed(seed)
        layers: dict[str, nn.Module] = {name: nn.Linear(8, 8) for name in "qkvp"}
        layers |= {"n": nn.LayerNorm(8), "m": nn.LayerNorm(8), "f": nn.Linear(8, 16), "h": nn.Linear(16, 8)}
        z = torch.randn(3, 5, 8)

        def network(m: nn.ModuleDict, relu: Callable[[Tensor], Tensor], pool: Callable[[Tensor], Tensor]) -> Tensor:
            x = m["h"](relu(m["f"](z)))
            h = m["n"](x)
            q, k, v = m["q"](h), m["k"](h), m["v"](h)
            if fused:
                a = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
            else:
                a = torch.matmul(F.softmax(torch.matmul(q, k.transpose(1, 2)) * 0.35, dim=-1), v)
            x = F.gelu(m["m"](x + m["p"](a)))
            return relu(m["h"](relu(m["f"](torch.tanh(x) * torch.sigmoid(x)))))

        return nn.ModuleDict(layers), network

    return build


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("build", [convolutions, attention(True), attention(False)], ids=["cnn", "fused", "eager"])
def test_rows_enclose_the_gradients_of_the_offset_network(build: Callable[..., object], dtype: torch.dtype) -> None:
    """Radii belong to the precision in which a value was computed; what is called exactly zero is."""
    for seed in range(2):
        model, network = build(seed)  # type: ignore[misc]
        offset, seen = Offset(network, model, dtype), recorded(network, model, dtype)
        offset()
        wide = dict(offset.model.named_parameters())
        for y, record in zip(offset.inputs, seen.records, strict=True):
            d = random_pairs(y.numel(), 12, seed)
            found, truth = engine_rows(seen, record, d), autograd_rows(y, wide, d)
            for name, expected in truth.items():
                slack = 1e-11 * (1 + float(expected.abs().max()))
                far = (found[name].value - expected).abs() - found[name].radius
                assert float(far.max()) <= slack, (record.name, name)
                assert not bool((found[name].zero() & (expected.abs() > slack)).any()), (record.name, name)


def small(seed: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A random little CNN on images of few grey levels, where 16 bits tie everywhere."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most, (1,), generator=generator))

    norm, bias, skip, early, channels = draw(2), bool(draw(2)), draw(2), draw(2), 2 + draw(3)
    layers: dict[str, nn.Module] = {"c": nn.Conv2d(1, channels, 3, padding=1, bias=bias)}
    layers |= {"d": nn.Conv2d(channels, channels, 3, padding=1, bias=bias)}
    layers |= {"l": nn.Linear(4 * channels, 4, bias=bias), "o": nn.Linear(4, 3)}
    if norm:
        layers |= {"b": nn.BatchNorm2d(channels), "g": nn.GroupNorm(1, channels)}
    levels = 1 + draw(3)
    x = torch.randint(levels + 1, (3, 1, 8, 8), generator=generator) / (levels * (1 + draw(3) * 0.37))
    x[1], x[:, :, : 4 * draw(2)] = x[0], 0
    model, weights = nn.ModuleDict(layers), torch.randint(-2, 3, (3, 3), generator=generator)
    if draw(2):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(8).round_().div_(8)

    def network(m: nn.ModuleDict, relu: Callable[[Tensor], Tensor], pool: Callable[[Tensor], Tensor]) -> Tensor:
        h = m["b"](m["c"](x)) if norm else m["c"](x)
        h = relu(pool(h)) if early else pool(relu(h))
        z = m["g"](m["d"](h)) if norm else m["d"](h)
        z = z + h if skip else z
        h = relu(m["l"](pool(relu(z)).flatten(1)))
        return (m["o"](h).float() * weights).sum()

    return model, network


def test_certificates_hold_for_the_offset_network() -> None:
    """The gradient of the offset network along the witness tends to AD's; against the witness it often does not."""
    certified = rows = noticed = 0
    for seed in range(40):
        dtype = HALVES[seed % 2]
        model, network = small(seed)
        offset = Offset(network, model, dtype)

        found = certify(under(dtype, lambda: network(model, torch.relu, pool)), model)  # noqa: B023
        if found.verdict is not Verdict.CERTIFIED or found.system == "hull":
            continue
        wide = dict(offset.model.named_parameters())
        walked = _along(found, offset, {name: wide[name] for name in found.shapes}, [], 0)
        assert walked.converges, (seed, walked)
        certified, rows = certified + 1, rows + sum(layer.rows for layer in found.layers)
        turned = {name: -p for name, p in found.directions.items()}
        wrong: Any = SimpleNamespace(shapes=found.shapes, directions=turned, scales=found.scales)
        noticed += not _along(wrong, offset, {name: wide[name] for name in found.shapes}, [], 0).converges
    assert certified > 30 and rows > 50 and noticed > 5
