"""The partial backward engine on every layer kind: against autograd, exact on integers, in low precision, by hand."""

from __future__ import annotations

import pytest
import torch
from core_helpers import Probe, Seen, autograd_rows, engine_rows, fill, look, pairs, param, random_pairs
from layer_cases import CASES, ELEMENTWISE, KINKS, NORMALISATIONS, Case
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from adcert import backward
from adcert.differences import Differences


class Network(nn.Module):
    """A parameter of the input's shape in front, so that gradients have to go through the layer."""

    def __init__(self, case: Case, whole: bool, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.case = case
        self.layer = case.make()
        self.x = nn.Parameter(torch.randn(case.shape))
        if whole:
            fill(self, seed + 1)
        if case.positive:
            with torch.no_grad():
                self.x.copy_(self.x.abs() + 0.5)

    def forward(self, probe: Probe) -> Tensor:
        return probe.relu(self.case.call(self.layer, self.x * 1.0), "last")


def seen_at(network: Network, dtype: torch.dtype) -> Seen:
    network = network.to(dtype)
    torch.manual_seed(5)
    return look(network, network)


def rows(name: str, whole: bool) -> tuple[Seen, Differences]:
    seen = seen_at(Network(CASES[name], whole), torch.float64)
    return seen, random_pairs(seen.y(seen.records[-1]).numel(), 8, 7)


# torch's own gradient of hardsigmoid is 1/6 rounded to float32, in float64 too.
COARSE = {"hardsigmoid": 1e-8}


@pytest.mark.parametrize("name", CASES)
def test_against_autograd(name: str) -> None:
    seen, d = rows(name, False)
    found = engine_rows(seen, seen.records[-1], d)
    truth = autograd_rows(seen.y(seen.records[-1]), seen.parameters(), d)
    assert any(bool(expected.any()) for expected in truth.values())
    for leaf, expected in truth.items():
        scale = 1 + float(expected.abs().max())
        rounding = COARSE.get(name, 1e-13) * scale  # of autograd
        assert bool(((found[leaf].value - expected).abs() <= found[leaf].radius + rounding).all()), leaf
        assert float(found[leaf].radius.max()) < 1e-9 * scale, leaf


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])
def test_integers_are_exact(name: str) -> None:
    seen, d = rows(name, True)
    found = engine_rows(seen, seen.records[-1], d)
    truth = autograd_rows(seen.y(seen.records[-1]), seen.parameters(), d)
    for leaf, expected in truth.items():
        assert torch.equal(found[leaf].value, expected), leaf
        assert not bool(found[leaf].radius.any()), leaf


# One smooth node on inputs that are exact: the derivative is that of the exact function at the recorded input.
_SEVERAL = {
    "tanhshrink", "softsign", "one over", "clamp by tensors", "maximum", "minimum", "power of a vector", "hardswish",
    "rrelu",
}  # fmt: skip
_ONE = ("layer", "group", "batch", "var", "standard", "dev", "vec", "norm of", "instance norm 1d")
SINGLE = [
    *(name for name in (*ELEMENTWISE, *KINKS) if name not in _SEVERAL),
    *(name for name in NORMALISATIONS if name.startswith(_ONE)),
    *("softmax", "softmax over samples", "softmax of a vector", "log_softmax", "logsumexp", "causal, one head"),
]
LOW = {
    **CASES,
    "causal, one head": Case((2, 1, 3, 4), lambda _, h: F.scaled_dot_product_attention(h, h, h, is_causal=True)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in LOW if name != "rrelu"])  # its noise is another in each precision
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """Within its radius of the derivative at the recorded values; where several nodes round, near it."""
    if dtype is torch.bfloat16 and name in ("local response", "move: avg_pool3d"):
        pytest.skip("torch has no avg_pool3d of bfloat16")
    low = seen_at(Network(LOW[name], False), dtype)
    wide = seen_at(Network(LOW[name], False).to(dtype), torch.float64)
    d = random_pairs(low.y(low.records[-1]).numel(), 8, 7)
    found = engine_rows(low, low.records[-1], d)
    truth = autograd_rows(wide.y(wide.records[-1]), wide.parameters(), d)
    single = name in SINGLE
    for leaf, expected in truth.items():
        scale = 1 + float(expected.abs().max())
        near = COARSE.get(name, 1e-12) if single else {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
        assert bool(((found[leaf].value - expected).abs() <= found[leaf].radius + near * scale).all()), leaf
        assert float(found[leaf].radius.max()) < {torch.float32: 1e-3, torch.bfloat16: 2.0}[dtype] * scale, leaf


# ---- literal cases ---------------------------------------------------------------------------------------------


def only(forward, differences: Differences, **named: nn.Parameter) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """Rows of the last record, which must all be exact."""
    seen = look(forward, **named)
    found = engine_rows(seen, seen.records[-1], differences)
    assert not any(bool(ball.radius.any()) for ball in found.values())
    return {leaf: ball.value.tolist() for leaf, ball in found.items()}


def test_a_transposed_convolution_by_hand() -> None:
    """y = (x_0 w_0, x_0 w_1, x_1 w_0, x_1 w_1) with stride 2; x = (3, 5), w = (1, 2)."""
    w, x = param([[[1.0, 2.0]]]), param([[[3.0, 5.0]]])
    found = only(lambda p: p.relu(F.conv_transpose1d(x, w, stride=2)), pairs((0, 3), (2, -1)), w=w, x=x)
    assert found == {"w": [[3.0, -5.0], [5.0, 0.0]], "x": [[1.0, -2.0], [0.0, 1.0]]}


def test_a_tied_weight_accumulates_by_hand() -> None:
    """y = w (w x) at x = 3, w = 2: dy = 2 w x = 12; and a sum of a weight and itself transposed."""
    w = param([[2.0]])
    x = torch.tensor([[3.0]], dtype=torch.float64)
    assert only(lambda p: p.relu(F.linear(F.linear(x, w), w)), pairs((0, -1)), w=w) == {"w": [[12.0]]}
    m = param([[1.0, 2.0], [3.0, 4.0]])
    y = torch.tensor([[5.0, 7.0]], dtype=torch.float64)
    found = only(lambda p: p.relu(F.linear(y, m + m.t())), pairs((0, -1), (1, -1)), m=m)
    assert found["m"] == [[10.0, 7.0, 7.0, 0.0], [0.0, 5.0, 5.0, 14.0]]


def test_a_weight_that_is_computed_by_hand() -> None:
    """y_i = 3 v_i . x with v = (1, 2), x = (5, 7): the row of y_0 is 3 x."""
    v = param([[1.0, 2.0]])
    x = torch.tensor([[5.0, 7.0]], dtype=torch.float64)
    assert only(lambda p: p.relu(F.linear(x, 3.0 * v)), pairs((0, -1)), v=v) == {"v": [[15.0, 21.0]]}
    expanded = only(lambda p: p.relu(F.linear(x, v.expand(2, 2))), pairs((0, 1), (0, -1)), v=v)
    assert expanded == {"v": [[0.0, 0.0], [5.0, 7.0]]}


def test_an_embedding_by_hand() -> None:
    table = param([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    at = torch.tensor([2, 0, 2])
    found = only(lambda p: p.relu(F.embedding(at, table)), pairs((0, 2), (0, 4), (1, -1)), table=table)
    assert found["table"] == [[-1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [0.0] * 6, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]


def test_softmax_by_hand() -> None:
    """p = (1, 3)/4 at x = (0, ln 3): dp_0 = p_0 (1 - p_0, -p_1) = (3, -3)/16."""
    x = param([[0.0, 1.0986122886681098]])
    seen = look(lambda p: p.relu(x.softmax(1)), x=x)
    found = engine_rows(seen, seen.records[0], pairs((0, -1)))["x"]
    assert found.value[0].tolist() == pytest.approx([3 / 16, -3 / 16], abs=1e-15)
    assert 0 < float(found.radius.max()) < 1e-13


def test_layer_norm_by_hand() -> None:
    """x = (1, 3), eps = 3: mean 2, variance 1, scale 1/2, xhat = (-1/2, 1/2); gamma = (2, 5).

    d y_0 / d x = 2 (1/2) ((1, 0) - 1/2 - xhat (-1/2) / 2) = (1/2 - 1/8, -1/2 + 1/8).
    """
    x, gamma, beta = param([[1.0, 3.0]]), param([2.0, 5.0]), param([0.0, 0.0])
    seen = look(lambda p: p.relu(F.layer_norm(x, (2,), gamma, beta, 3.0)), x=x, gamma=gamma, beta=beta)
    found = engine_rows(seen, seen.records[0], pairs((0, -1)))
    assert found["x"].value[0].tolist() == pytest.approx([3 / 8, -3 / 8], abs=1e-14)
    assert found["gamma"].value[0].tolist() == pytest.approx([-0.5, 0.0], abs=1e-14)
    assert found["beta"].value.tolist() == [[1.0, 0.0]]
    assert not bool(found["beta"].radius.any())


def test_a_group_normalisation_that_cancels_is_known_to() -> None:
    """Equal entries of one channel: gamma, beta and the entries beside them get exact zeros."""
    x = param([[[1.0, 4.0, 1.0, 2.0]]])
    norm = nn.GroupNorm(1, 1).double()
    seen = look(lambda p: p.relu(norm(x)), nn.ParameterDict({"x": x, **dict(norm.named_parameters())}))
    found = engine_rows(seen, seen.records[0], pairs((0, 2), (0, 1)))
    assert bool(found["weight"].zero()[0].all())
    assert bool(found["bias"].zero()[0].all())
    assert found["x"].zero()[0].tolist() == [False, True, False, True]
    assert bool(found["weight"].nonzero()[1].all())


def test_a_dropped_unit_has_no_row() -> None:
    w = param([1.0, 2.0, 3.0, 4.0])
    torch.manual_seed(0)
    seen = look(lambda p: p.relu(F.dropout(w, 0.5)), w=w)
    kept = seen.y(seen.records[0]) != 0
    assert 0 < int(kept.sum()) < 4
    found = engine_rows(seen, seen.records[0], pairs(*((i, -1) for i in range(4))))["w"]
    assert torch.equal(found.value, torch.diag(kept * 2.0).double())
    assert not bool(found.radius.any())


# ---- refusals and memory ---------------------------------------------------------------------------------------


KINK_AT = {
    "AbsBackward": lambda w: w.abs(),
    "ClampBackward": lambda w: w.clamp(0.0, 5.0),
    "ClampMinBackward": lambda w: w.clamp_min(0.0),
    "LeakyReluBackward": lambda w: F.leaky_relu(w),
    "MaximumBackward": lambda w: torch.maximum(w, -w),
    "AmaxBackward": lambda w: torch.stack([w, -w]).amax(0),
    "PreluKernelBackward": lambda w: F.prelu(w, w[1:]),
}


@pytest.mark.parametrize("name", KINK_AT)
def test_an_unrecorded_kink_has_no_rule_where_it_is_touched(name: str) -> None:
    for value, touched in ((0.0, True), (1.0, False)):
        w = param([value, 2.0])
        seen = look(lambda p, w=w: p.relu(KINK_AT[name](w)), w=w)
        passes = backward.gradients(seen.graph, seen.records[0].edge, pairs((0, -1)))
        if touched:
            with pytest.raises(backward.Unsupported, match=name):
                list(passes)
        else:
            assert len(list(passes)) == 1


def test_a_normalisation_whose_scales_are_not_its_own_is_refused() -> None:
    """The recorded scales are changed behind the engine's back: no eps can explain them."""
    x = param([[1.0, 3.0], [2.0, 7.0]])
    seen = look(lambda p: p.relu(F.layer_norm(x, (2,))), x=x)
    seen.records[0].edge[0]._saved_result2.data[0] *= 1.01
    with pytest.raises(backward.Unsupported, match="NativeLayerNormBackward"):
        list(backward.gradients(seen.graph, seen.records[0].edge, pairs((0, -1))))


def test_attention_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _ = rows("attention", False)
    d = random_pairs(seen.y(seen.records[-1]).numel(), 12, 1)
    whole = engine_rows(seen, seen.records[-1], d)
    monkeypatch.setattr(backward, "BUDGET", 20_000)
    assert len(list(backward.gradients(seen.graph, seen.records[-1].edge, d))) > 3
    for leaf, ball in engine_rows(seen, seen.records[-1], d).items():
        assert bool(((ball.value - whole[leaf].value).abs() <= ball.radius + whole[leaf].radius).all())


def test_two_parametrizations_of_one_weight() -> None:
    """spectral_norm over weight_norm: a weight computed from a computed weight."""
    torch.manual_seed(0)
    model = parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(3, 2))).double().eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    seen = look(lambda p: p.relu(model(x)), model)
    d = pairs((0, 3), (1, -1))
    found = engine_rows(seen, seen.records[0], d)
    truth = autograd_rows(seen.y(seen.records[0]), seen.parameters(), d)
    assert len(truth) == 3
    for leaf, expected in truth.items():
        assert bool(((found[leaf].value - expected).abs() <= found[leaf].radius + 1e-14).all()), leaf
        assert float(found[leaf].radius.max()) < 1e-12
