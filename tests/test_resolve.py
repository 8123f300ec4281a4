"""The native resolver of ties: literal cases, the reference, the general rules, and the truth by autograd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_helpers import Seen, autograd_rows, look
from emulation.build import load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adcert
from adcert import analysis, conclusion, decisions, ops, partial, reference
from adcert.choices import Window
from adcert.differences import Differences
from adcert.equality import base_of, follow_to, tied_pairs
from adcert.findings import Findings, Pending, Scope
from adcert.ranks import rank_leaves
from adcert.records import OpRecord
from adcert.stages import Stages, axes_of, stages_above
from adcert.ties import normalized_rows

ANSWERS = ("zero", "row", "open", "hard", "flat")


def stages_of(seen: Seen, record: OpRecord) -> Stages | None:
    base = base_of(seen.graph, record, False)
    return stages_above(seen.graph, record, base, seen.order().own[base])


def arguments(record: OpRecord, stages: Stages) -> tuple[Any, ...]:
    ties = record.ties
    assert ties is not None
    pool = axes_of(ties.window, record.input_shape[2:], tuple(ties.offsets.shape[2:]))
    return ties.windows, ties.members, ties.offsets, pool, stages.numbers, stages.tensors


def on_gpu(
    windows: Tensor, members: Tensor, offsets: Tensor, pool: Any, stages: Any, tensors: list[Tensor]
) -> ops.Resolved:
    """Lists on the host, as the analysis has them."""
    return ops.resolve_ties(windows, members, offsets.cuda(), pool, stages, [t.cuda() for t in tensors])


def by_cuda_sources(*arguments: Any) -> ops.Resolved:
    """The CUDA sources, compiled for the CPU."""
    load()
    return ops.Resolved(*torch.ops.adcert_emulated.resolve_ties(*arguments))


RESOLVERS = [ops.resolve_ties, by_cuda_sources, *([on_gpu] if torch.cuda.is_available() else [])]


def counts(seen: Seen, record: OpRecord) -> dict[str, int]:
    """Answers of the resolver; the reference agrees in everything, and autograd with every zero and every row."""
    stages = stages_of(seen, record)
    assert stages is not None
    expected = reference.resolve_ties(*arguments(record, stages))
    for resolve in RESOLVERS:
        found = resolve(*arguments(record, stages))
        for actual, other in zip(found, expected, strict=True):
            assert torch.equal(actual.cpu(), other)
    confirm(seen, record, stages, found)
    return {name: count for name, count in zip(ANSWERS, found.counts.tolist(), strict=True) if count}


def confirm(seen: Seen, record: OpRecord, stages: Stages, found: ops.Resolved) -> None:
    assert record.ties is not None
    base = stages.base
    windows, differences = tied_pairs(record.ties)
    d, _ = follow_to(seen.graph, record, base, differences)
    if len(d) == 0:
        return
    truth = torch.cat([row.flatten(1) for row in autograd_rows(seen.y(base), seen.parameters(), d).values()], 1)
    listed = Counter(zip(found.window.tolist(), found.chosen.tolist(), found.other.tolist(), strict=True))
    everything = Counter(zip(windows.tolist(), d.plus.tolist(), d.minus.tolist(), strict=True))
    assert listed <= everything
    for key, row in zip(zip(windows.tolist(), d.plus.tolist(), d.minus.tolist(), strict=True), truth, strict=True):
        if key not in listed:
            assert float(row.abs().max()) < 1e-9, f"pair {key} was called equal"  # normalisation rounds in float64
    confirm_rows(seen, base, stages, Differences(found.chosen, found.other).select(found.answer == 1))


def confirm_rows(seen: Seen, base: OpRecord, stages: Stages, d: Differences) -> None:
    """The true own rows are positive multiples of the patch differences in the filter, and zero in every other leaf."""
    assert stages.conv is not None
    leaf = seen.graph.leaf(stages.conv.next_functions[1][0])
    own = seen.order().own[base]
    if leaf not in own or len(d) == 0:
        return
    channel = stages.channel(d.plus)
    x = stages.conv._saved_input
    patch = ops.conv_patches(x, d.plus, stages.patches) - ops.conv_patches(x, d.minus, stages.patches)
    gamma = torch.ones(len(d)) if stages.norm is None or stages.norm._saved_weight is None else (
        stages.norm._saved_weight.detach()[channel]
    )  # fmt: skip
    for name, rows in autograd_rows(seen.y(base), {name: seen.leaves.tensor(name) for name in own}, d).items():
        if name != leaf:
            assert float(rows.abs().max()) < 1e-9, f"a row has an entry in {name}, too"
            continue
        groups = rows.reshape(len(d), stages.patches[6], -1)
        mine = groups[torch.arange(len(d)), channel]
        assert float((groups.abs().sum((1, 2)) - mine.abs().sum(1)).abs().max()) < 1e-9
        turned = patch * gamma.sign()[:, None]
        scale = (mine * turned).sum(1) / (turned * turned).sum(1)
        assert bool((scale > 0).all())
        assert float((mine - scale[:, None] * turned).abs().max()) < 1e-9


def image(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def kernel(*values: float, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64).reshape(shape))


# ---- literal cases -------------------------------------------------------------------------------


def test_equal_patches_and_equal_sums():
    """Patches [1 2], [2 1], [1 2], [2 1] of 1 2 1 2 1: one window of all four; the first wins."""
    w = kernel(1.0, 1.0, shape=(1, 1, 1, 2))
    window = Window((1, 4), (1, 4), (0, 0), (1, 1))
    x = image([1.0, 2.0, 1.0, 2.0, 1.0])
    seen = look(lambda p: p.max_pool2d(nn.functional.conv2d(x, w), window=window, ceil_mode=False), w=w)
    assert counts(seen, seen.records[0]) == {"zero": 1, "row": 2}


def test_padding_is_a_constant_and_a_pixel_of_value_zero_is_one_too():
    """Width 3, padding 1, image 0 5 0: patches [p 0 5] and [5 0 p] differ; of 0 0 0 0 they are all equal."""
    w = kernel(1.0, 1.0, 1.0, shape=(1, 1, 1, 3))

    def forward(x: Tensor) -> Callable[[Any], Tensor]:
        window = Window((1, x.shape[3]), (1, x.shape[3]), (0, 0), (1, 1))
        return lambda p: p.max_pool2d(nn.functional.conv2d(x, w, padding=(0, 1)), window=window, ceil_mode=False)

    seen = look(forward(image([0.0, 5.0, 0.0])), w=w)
    assert counts(seen, seen.records[0]) == {"row": 2}
    seen = look(forward(image([0.0, -0.0, 0.0, 0.0])), w=w)
    assert counts(seen, seen.records[0]) == {"zero": 3}


def two_layers(x: Tensor, first: nn.Parameter, second: nn.Parameter) -> Seen:
    def forward(p: Any) -> Tensor:
        z = p.max_pool2d(nn.functional.conv2d(x, first), "first", 1, ceil_mode=False, relu=True)
        return p.max_pool2d(nn.functional.conv2d(z, second), "second", ceil_mode=False, relu=True)

    return look(forward, first=first, second=second)


def test_equal_hidden_values_of_different_functions_stay_open():
    """Hidden values 3 3 / 3 3 from patches [1 2] and [2 1]: equal own rows, different gradients below."""
    first, second = kernel(1.0, 1.0, shape=(1, 1, 1, 2)), kernel(1.0, shape=(1, 1, 1, 1))
    seen = two_layers(image([1.0, 2.0, 1.0], [1.0, 2.0, 1.0]), first, second)
    assert counts(seen, seen.record("second")) == {"zero": 1, "open": 2}


def test_closed_units_are_congruent_to_each_other_only():
    """Hidden values 0 0 behind a closed ReLU: whatever patches they had, their gradients vanish."""
    first, second = kernel(1.0, -2.0, shape=(2, 1, 1, 1)), kernel(1.0, 1.0, shape=(1, 2, 1, 1))
    seen = two_layers(image([3.0, 3.0], [3.0, 2.0]), first, second)  # second filter: always off
    assert counts(seen, seen.record("second")) == {"zero": 2}


def test_pool_over_relu_counts_closed_pairs_as_flat():
    w = kernel(-1.0, shape=(1, 1, 1, 1))

    def forward(p: Any) -> Tensor:
        return p.max_pool2d(p.relu(nn.functional.conv2d(image([1.0, 2.0], [3.0, 4.0]), w)), ceil_mode=False)

    seen = look(forward, w=w)
    assert counts(seen, seen.record("pool")) == {"flat": 3}


def test_a_filter_is_not_shared_between_groups():
    """Two groups read channels 5 5 and 6 6; each window compares inside its own group."""
    x = torch.tensor([[[[5.0, 5.0]], [[6.0, 6.0]]]], dtype=torch.float64)
    w = kernel(1.0, 1.0, shape=(2, 1, 1, 1))
    window = Window((1, 2), (1, 2), (0, 0), (1, 1))
    seen = look(lambda p: p.max_pool2d(nn.functional.conv2d(x, w, groups=2), window=window, ceil_mode=False), w=w)
    assert counts(seen, seen.records[0]) == {"zero": 2}


# ---- where the stages end ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_sum_ends_the_stages(seed: int):
    """x + f(x) below a convolution is no stage: nothing below is proved, nothing false is said."""
    torch.manual_seed(seed)
    first, second = (nn.Parameter(torch.ones(1, 1, 1, 1, dtype=torch.float64)) for _ in range(2))
    x = torch.randint(0, 2, (1, 1, 4, 4)).double()

    def forward(p: Any) -> Tensor:
        z = p.relu(nn.functional.conv2d(x, first), "first")
        return p.max_pool2d(nn.functional.conv2d(z + z, second), "second", ceil_mode=False)

    seen = look(forward, first=first, second=second)
    stages = stages_of(seen, seen.record("second"))
    assert stages is not None
    assert stages.numbers[-ops.STAGE_INTS] == 1  # unknown
    assert "zero" not in counts(seen, seen.record("second"))


def test_no_stages_without_a_convolution_or_with_a_gamma_of_zero():
    w = nn.Parameter(torch.ones(1, 1, 2, 2, dtype=torch.float64))
    seen = look(lambda p: p.max_pool2d(w, ceil_mode=False), w=w)
    assert stages_of(seen, seen.records[0]) is None
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).double()
    nn.init.zeros_(model[1].weight)
    seen = look(lambda p: p.max_pool2d(model(torch.ones(1, 1, 2, 2).double()), ceil_mode=False), model)
    assert stages_of(seen, seen.records[0]) is None


class TwoInARow(nn.Module):
    """Two convolutions without a nonlinearity between them, the second one's bias and all."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Conv2d(1, 1, (1, 2), bias=False), between, nn.Conv2d(1, 1, (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize("between", [nn.Identity(), nn.AvgPool2d(1), nn.BatchNorm2d(1).eval()], ids=str)
def test_parameters_above_the_first_convolution_belong_to_the_row(between: nn.Module):
    """A patch difference of the outer filter is not the whole own row: the general rules have to give it."""
    model = nn.Sequential(TwoInARow(between), nn.ReLU(), nn.MaxPool2d((1, 2))).double()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    seen = recorded(adcert.convert(model), image([3.0, 0.0, 0.0, 3.0]))
    assert stages_of(seen, seen.records[0]) is None


def test_a_row_that_lacks_half_of_its_parameters_was_certified_falsely():
    """Found by review. With y_t = y_p - y_q the tie row and the touch row of t are opposite; AD's gradient is none."""
    first, second = (nn.Conv2d(1, 1, (1, 2), bias=False).double() for _ in range(2))
    model = adcert.convert(nn.Sequential(first, second, nn.ReLU(), nn.MaxPool2d((1, 2))))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    x = torch.tensor([[3.0, 0.0, 0.0, 3.0], [3.0, 0.0, -3.0, 0.0]]).double().reshape(2, 1, 1, 4)
    weights = torch.tensor([1.0, -2.0]).double()
    for strict in (False, True):
        certificate = adcert.certify(lambda: (model(x).flatten() * weights).sum(), model, strict=strict)
        assert certificate.verdict.value == "uncertified"


# ---- random networks -----------------------------------------------------------------------------


def random_model(seed: int) -> tuple[nn.Module, Tensor]:
    """Small integers everywhere, so that ties, touches and closed units abound."""
    g = torch.Generator().manual_seed(seed)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=g))]

    layers: list[nn.Module] = []
    channels, size = pick(1, 2), 12
    x = torch.randint(-1, 3, (2, channels, size, size), generator=g).double()
    x = x * (torch.rand(2, 1, size, size, generator=g) < 0.6)
    if pick(True, False):
        x = x.contiguous(memory_format=torch.channels_last)
    for _ in range(pick(1, 2, 2, 3)):
        groups = pick(1, 1, channels)
        out = groups * pick(1, 2)
        conv = nn.Conv2d(channels, out, pick(1, 2, 3), padding=pick(0, 1), groups=groups, bias=pick(True, False))
        for parameter in conv.parameters():
            parameter.data = torch.randint(-1, 2, parameter.shape, generator=g).double()
        layers.append(conv)
        if pick(True, False, False, False):  # another linear operation of the same layer
            again = nn.Conv2d(out, out, 1, bias=pick(True, False))
            for parameter in again.parameters():
                parameter.data = torch.randint(-1, 2, parameter.shape, generator=g).double()
            layers += [*pick([], [nn.AvgPool2d(1)], [nn.BatchNorm2d(out).eval()]), again]
        if pick(True, False):
            norm = nn.BatchNorm2d(out)
            norm.weight.data = torch.randint(1, 3, (out,), generator=g).double() * pick(1, -1)
            norm.train(pick(True, False))
            layers.append(norm)
        relu, pool = nn.ReLU(inplace=pick(True, False)), nn.MaxPool2d(pick(2, 3), pick(1, 2), padding=pick(0, 1))
        size = size + 2 * int(conv.padding[0]) - conv.kernel_size[0] + 1
        layers += pick([relu, pool], [relu, nn.Identity(), pool], [pool, relu], [pool], [relu])  # fused, apart, ...
        if isinstance(layers[-1], nn.MaxPool2d) or pool in layers[-3:]:
            size = (size + 2 * pool.padding - pool.kernel_size) // pool.stride + 1
        channels = out
        if size < 5:
            break
    return adcert.convert(nn.Sequential(*layers).double()), x


def report(seed: int, strict: bool) -> tuple[Any, ...]:
    """What a certificate says, whatever way it was found."""
    model, x = random_model(seed)
    certificate = adcert.certify(lambda: model(x).sum(), model, strict=strict)
    certificate.verify()
    layers = [(layer.name, layer.windows, layer.ties, layer.touches, layer.differing) for layer in certificate.layers]
    exemptions = [sorted(layer.exemptions.items()) for layer in certificate.layers]
    return certificate.verdict, layers, exemptions, certificate.scales


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_bulk_and_general_rules_agree(seed: int, strict: bool, monkeypatch: pytest.MonkeyPatch):
    bulk = report(seed, strict)
    monkeypatch.setattr(decisions, "stages_above", lambda *_: None)
    assert report(seed, strict) == bulk


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_a_sample_of_the_rows_changes_no_verdict(seed: int, strict: bool, monkeypatch: pytest.MonkeyPatch):
    """Where rows abound a few of them are looked at first; the others are counted if those contradict each other."""
    full = report(seed, strict)
    monkeypatch.setattr(analysis, "SAMPLE", 2)
    monkeypatch.setattr(analysis, "LARGE", 2)
    monkeypatch.setattr(conclusion, "LARGE", 2)
    sampled = report(seed, strict)
    assert (sampled[0], sampled[1], sampled[3]) == (full[0], full[1], full[3])


def test_samples_do_contradict_and_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(analysis, "SAMPLE", 64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).double()
    nn.init.ones_(model[0].weight)  # sums of nine small integers tie everywhere
    adcert.convert(model)
    x = torch.randint(0, 3, (16, 1, 16, 16)).double()
    certificate = adcert.certify(lambda: model(x).sum(), model)
    certificate.verify()
    assert certificate.verdict.value == "uncertified"
    (block,) = certificate.blocks
    (layer,) = certificate.layers
    assert len(block.rows) == 2
    assert layer.rows > 200
    assert layer.differing > 100


def test_rows_left_out_without_a_proof_leave_the_step_undecided():
    """Cannot happen; if it did, the step must not be certified."""
    observed = conclusion.Observed([], [], (), [], {}, [], 3, {"w": (2,)}, False, (), {})
    certificate = conclusion.conclude(observed)
    assert certificate.verdict.value == "undecided"
    assert "left out" in certificate.reasons[0]


def test_the_random_networks_reach_every_answer():
    """The comparison above is worth something: all answers and verdicts occur."""
    answers: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    for seed in range(150):
        model, x = random_model(seed)
        seen = recorded(model, x)
        for record in seen.records:
            if record.ties is not None and stages_of(seen, record) is not None:
                answers.update(counts(seen, record))
        verdicts[report(seed, False)[0].value] += 1
    assert set(answers) == set(ANSWERS), answers
    assert min(verdicts["certified"], verdicts["uncertified"]) >= 3, verdicts


def recorded(model: nn.Module, x: Tensor) -> Seen:
    """A converted model under a probe: its modules find the probe as the active recorder."""
    return look(lambda probe: model(x), model)


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_native_is_the_reference(seed: int):
    model, x = random_model(seed)
    seen = recorded(model, x)
    for record in seen.records:
        if record.ties is not None and stages_of(seen, record) is not None:
            counts(seen, record)


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_dtype_and_layout(dtype: torch.dtype, layout: torch.memory_format):
    torch.manual_seed(0)
    first = nn.Conv2d(2, 3, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 3), nn.MaxPool2d(2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1.0)
    adcert.convert(model).to(dtype=dtype, memory_format=layout)
    x = torch.randint(0, 2, (2, 2, 16, 16)).to(dtype).contiguous(memory_format=layout)
    x[:, :, 8:] = 1.0
    seen = recorded(model, x)
    for record in seen.records:
        stages = stages_of(seen, record)
        assert stages is not None
        found = ops.resolve_ties(*arguments(record, stages))
        for actual, other in zip(found, reference.resolve_ties(*arguments(record, stages)), strict=True):
            assert torch.equal(actual, other)
        assert int(found.counts[:2].min()) > 0


def test_order_does_not_depend_on_threads():
    model, x = random_model(0)
    x = x.repeat(64, 1, 1, 1)
    seen = recorded(model, x)
    record = next(record for record in seen.records if record.ties is not None and stages_of(seen, record))
    stages = stages_of(seen, record)
    assert stages is not None
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.resolve_ties(*arguments(record, stages)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# ---- rows through a normalisation whose inputs do not tie ----------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_normalized_rows_hold_the_truth(training: bool, sign: float):
    """The true row, divided by |gamma| s, lies within the radius; beta and the bias do not take part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(4, 1)).double()
    model.train(training)
    with torch.no_grad():
        model[1].weight.copy_(sign * torch.tensor([0.5, 1.0, 2.0]))
        model[1].running_var.copy_(torch.tensor([0.25, 1.0, 4.0]))
    x = torch.rand(3, 2, 8, 8).double()
    seen = recorded(adcert.convert(model), x)
    record = seen.records[0]
    stages = stages_of(seen, record)
    assert stages is not None
    order = seen.order()
    scope = Scope(seen.graph, rank_leaves(seen.graph, order, False), False)
    plane = 36
    plus = torch.arange(0, 9 * plane, 5)
    d = Differences(plus, plus // plane * plane + (plus + 7) % plane)  # any two units of one plane
    found = Findings()
    pending = Pending(record, d, "tie", torch.arange(len(d)), plus, stages)
    assert normalized_rows(scope, pending, found).all()
    truth = autograd_rows(seen.y(record), seen.parameters(), d)
    norm = stages.norm
    assert norm is not None
    variance = norm._saved_input.var((0, 2, 3), unbiased=False) if training else model[1].running_var
    channel = plus // plane % 3
    factor = (model[1].weight.abs() / (variance + model[1].eps).sqrt()).detach()[channel]
    (rowset,) = found.rowsets
    assert {part.leaf for part in rowset.parts} == {"0.weight", "1.weight"}
    for part in rowset.parts:
        rows = truth[part.leaf].reshape(len(d), 3, -1)[torch.arange(len(d)), part.group] / factor[:, None]
        assert part.radius is not None
        assert bool(((part.plus - part.minus - rows).abs() <= part.radius + 1e-12).all())
        if part.leaf == "0.weight" and not training:
            assert not part.radius.any()
    assert float(truth["0.bias"].abs().max()) < 1e-12
    assert float(truth["1.bias"].abs().max()) < 1e-12


def test_rounded_normalised_ties_are_certified_without_the_engine(monkeypatch: pytest.MonkeyPatch):
    """float32: inputs one unit in the last place apart give one normalised value; the row needs no backward pass."""
    monkeypatch.setattr(partial.backward, "gradients", None)
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.ReLU(), nn.MaxPool2d((1, 2)))
    nn.init.ones_(model[0].weight)
    nn.init.constant_(model[1].bias, 1024.0)
    adcert.convert(model)
    x = torch.tensor([[[[1.0, 1.0 + 2.0**-23, 5.0, 3.0]]]])
    certificate = adcert.certify(lambda: model(x).sum(), model)
    assert certificate.verdict.value == "certified"
    assert sum(layer.rows for layer in certificate.layers) == 1
    certificate.verify()


# ---- bad arguments -------------------------------------------------------------------------------


def good() -> list[Any]:
    model, x = random_model(1)
    seen = recorded(model, x)
    record = next(record for record in seen.records if record.ties is not None and stages_of(seen, record))
    stages = stages_of(seen, record)
    assert stages is not None
    return list(arguments(record, stages))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda w: w + 10**9, "outside"),
        (0, lambda w: w.int(), "int64"),
        (1, lambda m: m[:, :0], "members"),
        (3, lambda p: p[:5], "12 integers"),
        (4, lambda s: s[:-1], "integers"),
        (4, lambda s: [9, *s[1:]], "unknown stage"),
        (4, lambda s: [*s[:4], s[4] + 1, *s[5:]], "channels|shape|fit"),
        (5, lambda t: [u[:1] for u in t], "batch"),
        (5, lambda t: [u[:, :, :1] for u in t], "shape"),
        (5, lambda t: [], "names tensor"),
    ],
)
def test_arguments_that_do_not_fit(place: int, change: Callable[[Any], Any], message: str):
    wrong = good()
    wrong[place] = change(wrong[place])
    with pytest.raises(RuntimeError, match=message):
        ops.resolve_ties(*wrong)


# ---- patches and rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_patches_are_unfold(dtype: torch.dtype, groups: int):
    torch.manual_seed(0)
    x = torch.randint(-8, 8, (2, 4, 7, 6)).to(dtype)
    axes = (7, 3, 2, 1, 1, 4, 6, 2, 1, 0, 2, 4)  # height: kernel 3, stride 2, padding 1; width: kernel 2, dilation 2
    stage = (5, 0, 0, -1, 4, groups, 6, *axes)
    units = torch.tensor([0, 17, 5 * 16 + 3, -1, 2 * 6 * 16 - 1])
    columns = nn.functional.unfold(x.double(), (3, 2), (1, 2), (1, 0), (2, 1)).reshape(2, groups, -1, 16)
    expected = []
    for unit in units.tolist():
        n, c, p = unit // 96, unit // 16 % 6, unit % 16
        expected.append(columns[n, c // (6 // groups), :, p] if unit >= 0 else torch.zeros(24 // groups).double())
    found = ops.conv_patches(x, units, stage)
    assert found.dtype == dtype
    assert torch.equal(found.double(), torch.stack(expected))
    assert torch.equal(reference.conv_patches(x, units, stage), found)
    assert torch.equal(ops.conv_patches(x.contiguous(memory_format=torch.channels_last), units, stage), found)
    with pytest.raises(RuntimeError, match="unit 192"):
        ops.conv_patches(x, torch.tensor([192]), stage)


def test_distinct_rows_by_hand():
    rows = torch.tensor([[1.0, 2.0], [1.0, -2.0], [1.0, 2.0], [0.0, 0.0], [-0.0, 0.0], [0.0, 0.0]])
    assert ops.distinct_rows(rows).tolist() == [0, 1, 3, 4]
    assert ops.distinct_rows(rows[:0]).tolist() == []
    assert ops.distinct_rows(torch.zeros(3, 0)).tolist() == [0]


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_rows_are_the_reference(seed: int):
    g = torch.Generator().manual_seed(seed)
    plus, minus = (torch.randint(0, 3, (40, 3), generator=g).float() for _ in range(2))
    group = torch.randint(0, 3, (40,), generator=g)
    assert torch.equal(ops.opposite_rows(plus, minus, group), reference.opposite_rows(plus, minus, group))
    assert torch.equal(ops.distinct_rows(plus), reference.distinct_rows(plus))


def test_opposite_rows_by_hand():
    plus, minus = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 3.0], [0.0, 0.0]]), torch.zeros(4, 2)
    minus[3, 0] = 1.0
    assert ops.opposite_rows(plus, minus, torch.zeros(4, dtype=torch.int64)).tolist() == [0, 3]
    assert ops.opposite_rows(plus, minus, torch.arange(4)).tolist() == []
    huge = torch.tensor([[1.0, 2.0**60], [-1.0, -(2.0**60)]], dtype=torch.float64)
    assert ops.opposite_rows(huge, torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2).long()).tolist() == [0, 1]
    with pytest.raises(RuntimeError, match="alike"):
        ops.opposite_rows(plus, minus.double(), torch.arange(4))


def test_no_ties_at_all():
    wrong = good()
    empty = ops.resolve_ties(wrong[0][:0], wrong[1][:0], *wrong[2:])
    assert empty.counts.tolist() == [0] * 5
    assert empty.window.numel() == 0
