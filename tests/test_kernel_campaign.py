"""All native operators of CUDA against those of the CPU, on random cases: bitwise the same answers.

The CUDA sources run on the emulator, most cases in a hostile order, and on a GPU where there is one. A seed tells a
case, and a failure says how to run that case alone.
"""

from __future__ import annotations

import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import kernel_cases as cases
import pytest
import torch
from emulation.build import load
from kernel_cases import INF, Dice, bits
from kernel_ties import full_table, ties
from places import Place, opened
from torch import Tensor

from adcert import ops

CPU = torch.ops.adcert
HALF = (torch.bfloat16, torch.float16)


class Kernels(NamedTuple):
    """Operators under test, and the device their tensors have to be on."""

    name: str
    operators: Any
    place: Place

    def __call__(self, operator: str, *arguments: Any) -> list[Tensor]:
        """The results, on the host. Tensors arrive with their strides and their place in memory."""
        found = getattr(self.operators, operator)(*(self._moved(argument) for argument in arguments))
        return [t.cpu() for t in ([found] if isinstance(found, Tensor) else found)]

    def _moved(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            memory = argument.new_empty(0).set_(argument.untyped_storage())
            where = argument.shape, argument.stride(), argument.storage_offset()
            return self.place.to(memory).as_strided(*where)
        if isinstance(argument, list):
            return [self._moved(each) for each in argument]
        return argument


def kernels_named(name: str, place: Place) -> Kernels:
    if name == "cuda":
        return Kernels(name, CPU, place)
    load()
    return Kernels(name, torch.ops.adcert_emulated, place)


@pytest.fixture(params=["sources", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The CUDA sources compiled for the CPU, and a GPU."""
    with opened("cuda" if request.param == "cuda" else "cpu") as place:
        yield kernels_named(request.param, place)


# ---- comparisons ---------------------------------------------------------------------------------


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape, strides (where they mean something) and bits."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if actual.numel():
        strides = zip(actual.shape, actual.stride(), expected.stride(), strict=True)
        assert all(size == 1 or mine == other for size, mine, other in strides)
    if actual.is_floating_point():
        actual, expected = bits(actual), bits(expected)
    assert torch.equal(actual, expected)


def assert_lists(capacity: int, actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Lists of ``capacity`` entries in any order against ascending ones; the first is of indices, each at most once.

    Returns whether they were too short: then any of the entries may be there.
    """
    assert all(len(listed) == capacity for listed in actual)
    kept = min(capacity, len(expected[0]))
    indices, order = actual[0][:kept].sort()
    assert bool((indices[1:] > indices[:-1]).all()), "an index is there twice"
    assert bool(torch.isin(indices, expected[0]).all()), "an index should not be there"
    at = torch.searchsorted(expected[0], indices)
    for mine, other in zip(actual, expected, strict=True):
        assert torch.equal(mine[:kept][order], other[at])
    return kept < len(expected[0])


def unsigned(output: Tensor) -> Tensor:
    """torch.relu keeps -0.0 on the CPU and makes it +0.0 on CUDA."""
    return output + 0.0


# ---- one case of each family: what was seen ------------------------------------------------------


def check_relu(kernels: Kernels, dice: Dice) -> set[str]:
    batch, channels, height, width = dice.number(0, 3), dice.number(1, 19), dice.number(1, 12), dice.number(1, 12)
    x = cases.images(dice, cases.dtype(dice), batch, channels, height, width)
    if dice.chance(0.2):
        x = x.flatten()[dice.number(0, 3) :]
    capacity, at = cases.capacity(dice), dice.one_of([[0.0], [1.0], [2.0], [INF], [0.1], [-1.0, 1.0], [-INF, 1e-8]])
    output, touches, counts = kernels("relu", x, capacity)
    expected = CPU.relu(x)
    assert_same(output, unsigned(expected[0]))
    assert_same(counts, expected[2])
    overflow = assert_lists(capacity, [touches], [expected[1]])
    touches, counts = kernels("touches", x, at, capacity)
    kinks = CPU.touches(x, at)
    assert_same(counts, kinks[1])
    overflow |= assert_lists(capacity, [touches], [kinks[0]])
    return _seen(
        overflow=overflow, touches=len(expected[1]), kinks=len(kinks[0]), nonfinite=counts[2], empty=not len(x)
    )


def check_activation(kernels: Kernels, dice: Dice) -> set[str]:
    shape = dice.number(0, 3), dice.number(1, 19), dice.number(1, 9), dice.number(1, 9)
    x = cases.images(dice, cases.dtype(dice), *shape)
    kind, parameters, capacity = *cases.activation(dice), cases.capacity(dice)
    if kind == "prelu":
        weight = cases.slopes(dice, x)
        (output, touches, counts), expected = kernels("prelu", x, weight, capacity), CPU.prelu(x, weight)
        assert_same(output, expected[0])
    else:
        arguments = x, tuple(ops.ACTIVATIONS).index(kind), list(parameters)
        (output, touches, counts), expected = kernels("activation", *arguments, capacity), CPU.activation(*arguments)
        assert_same(output, cases.on_cuda(x, kind, parameters, expected[0]))
    assert_same(counts, expected[2])
    overflow = assert_lists(capacity, [touches], [expected[1]])
    return _seen(overflow=overflow, touches=len(expected[1]), nonfinite=counts[2], empty=not len(x)) | {kind}


def check_pool(kernels: Kernels, dice: Dice) -> set[str]:
    x, geometry, relu = cases.pooling(dice)
    capacity = cases.capacity(dice)
    if refusal := _refusal(lambda: CPU.max_pool2d(x, *geometry, relu)):
        assert _refusal(lambda: kernels("max_pool2d", x, *geometry, relu, capacity)) == refusal
        return {"refused"}
    expected = CPU.max_pool2d(x, *geometry, relu)
    output, offsets, windows, members, touches, counts, routes = kernels("max_pool2d", x, *geometry, relu, capacity)
    assert_same(output, unsigned(expected[0]) if relu else expected[0])
    for actual, other in ((offsets, expected[1]), (counts, expected[5]), (routes, expected[6])):
        assert_same(actual, other)
    overflow = assert_lists(capacity, [windows, members], list(expected[2:4]))
    if relu:
        overflow |= assert_lists(capacity, [touches], [expected[4]])
    check_routes(kernels, dice, x, routes if relu else offsets, geometry)
    tied, touched, nonfinite = counts.tolist()
    wide = dict(words=members.shape[1] > 1, int32=offsets.dtype == torch.int32, empty=not len(x))
    return _seen(overflow=overflow, ties=tied, touches=touched, nonfinite=nonfinite, **wide)


def check_routes(kernels: Kernels, dice: Dice, x: Tensor, routes: Tensor, geometry: cases.Geometry) -> None:
    """The backward of a pooling and its adjoint. Sums of half types run in float32 and are rounded once."""
    grad, last = cases.gradient(dice, routes.to(x.dtype)), dice.chance(0.5)
    arguments = routes, *x.shape[-2:], *geometry[:4], last
    wide = grad.float() if grad.dtype in HALF else grad
    (back,) = kernels("max_pool2d_backward", grad, *arguments)
    assert_same(back, CPU.max_pool2d_backward(wide, *arguments).to(grad.dtype))
    y = x if len(grad) == len(x) else torch.cat([x, x, -x])
    if y.dim() == 4 and dice.chance(0.3):
        y = y.contiguous(memory_format=dice.one_of([torch.channels_last, torch.contiguous_format]))
    (read,) = kernels("max_pool2d_gather", y, routes, *geometry[:4])
    assert_same(read, CPU.max_pool2d_gather(y, routes, *geometry[:4]))


def check_windows(kernels: Kernels, dice: Dice) -> set[str]:
    x, output, axes = cases.windows(dice)
    capacity, expected = cases.capacity(dice), CPU.window_ties(x, output, axes)
    owner, member, counts = kernels("window_ties", x, output, axes, capacity)
    assert_same(counts, expected[2])
    code = [first * max(1, x.numel()) + second for first, second in ((owner, member), expected[:2])]
    overflow = assert_lists(capacity, code[:1], code[1:])
    tied, _, nonfinite, lost = counts.tolist()
    own = any(axis.dim() == 3 for axis in axes)
    return _seen(overflow=overflow, ties=tied, nonfinite=nonfinite, lost=lost, own=own, empty=not output.numel())


def check_rows(kernels: Kernels, dice: Dice) -> set[str]:
    rows, plus, minus, group = cases.matrices(dice)
    distinct, opposite = CPU.distinct_rows(rows), CPU.opposite_rows(plus, minus, group)
    assert_same(kernels("distinct_rows", rows)[0], distinct)
    assert_same(kernels("opposite_rows", plus, minus, group)[0], opposite)
    assert_same(kernels("fingerprints", [plus, minus, plus[1:]])[0], CPU.fingerprints([plus, minus, plus[1:]]))
    bytes_ = rows.dtype in (torch.int8, torch.uint8)
    return _seen(repeats=len(distinct) < len(rows), opposite=len(opposite), bytes=bytes_, empty=not rows.numel())


def check_patches(kernels: Kernels, dice: Dice) -> set[str]:
    x, units, stage = cases.convolution(dice)
    assert_same(kernels("conv_patches", x, units, stage)[0], CPU.conv_patches(x, units, stage))
    return _seen(patches=(units >= 0).any(), off=(units < 0).any(), empty=not len(units))


def check_ties(kernels: Kernels, dice: Dice) -> set[str]:
    question = ties(dice)
    found = assert_resolved(kernels, question)
    answers = dict(zip(("zero", "row", "open", "hard", "flat"), found.counts.tolist(), strict=True))
    return _seen(**answers, words=question.members.shape[1] > 1, empty=not len(question.windows))


def assert_resolved(kernels: Kernels, question: Any) -> ops.Resolved:
    expected = ops.Resolved(*CPU.resolve_ties(*question))
    for actual, other in zip(kernels("resolve_ties", *question), expected, strict=True):
        assert_same(actual, other)
    return expected


def _seen(**kinds: Any) -> set[str]:
    return {kind for kind, number in kinds.items() if number}


def _refusal(call: Callable[[], object]) -> str:
    """What a pooling says that refuses its arguments, without the place in the sources; empty if it does not."""
    try:
        call()
    except RuntimeError as problem:
        line = str(problem).splitlines()[0]
        return line.partition("max_pool2d: ")[2] or line
    return ""


# ---- campaigns -----------------------------------------------------------------------------------

Check = Callable[[Kernels, Dice], set[str]]
FAMILIES: dict[str, tuple[Check, str]] = {
    "relu": (check_relu, "overflow touches kinks nonfinite empty"),
    "activation": (check_activation, f"overflow touches nonfinite empty prelu {' '.join(ops.ACTIVATIONS)}"),
    "pool": (check_pool, "overflow ties touches nonfinite refused words int32 empty"),
    "windows": (check_windows, "overflow ties nonfinite lost own empty"),
    "rows": (check_rows, "repeats opposite bytes empty"),
    "patches": (check_patches, "patches off empty"),
    "ties": (check_ties, "zero row open hard flat words empty"),
}


def run(kernels: Kernels, family: str, seed: int, patch: pytest.MonkeyPatch) -> set[str]:
    """One case; a quarter of them in the emulator's usual order."""
    patch.setenv("ADCERT_EMULATION_ORDER", str(seed if seed % 4 else 0))
    try:
        return FAMILIES[family][0](kernels, Dice(seed))
    except Exception as problem:
        problem.add_note(f"this case alone: python tests/test_kernel_campaign.py {kernels.name} {family} {seed}")
        raise


def campaign(kernels: Kernels, count: int, seed: int, patch: pytest.MonkeyPatch) -> None:
    """``count`` cases of each family; every kind of answer has to be among them."""
    for family, (_, kinds) in FAMILIES.items():
        seen: Counter[str] = Counter(dict.fromkeys(kinds.split(), 0))
        for case in range(seed, seed + count):
            seen.update(run(kernels, family, case, patch))
        print(f"{kernels.name}, {family}: {count} cases from seed {seed}, all the same;", dict(seen))
        assert set(seen) == set(kinds.split()) and all(seen.values()), f"{family}, seed {seed}: {seen}"


def test_pinned_cases(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign(kernels, 200, 0, monkeypatch)


@pytest.mark.fuzz
def test_many_new_cases(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign(kernels, 4000, secrets.randbits(40), monkeypatch)


@pytest.mark.parametrize(("differs", "answer"), [(False, "zero"), (True, "open")])
def test_more_comparisons_than_the_first_table_holds(kernels: Kernels, differs: bool, answer: str) -> None:
    """What a full table leaves open is asked again with a larger one."""
    found = assert_resolved(kernels, full_table(differs))
    assert found.counts.tolist() == [answer == kind for kind in ("zero", "row", "open", "hard", "flat")]


if __name__ == "__main__":
    with opened("cuda" if sys.argv[1] == "cuda" else "cpu") as device, pytest.MonkeyPatch.context() as context:
        print(run(kernels_named(sys.argv[1], device), sys.argv[2], int(sys.argv[3]), context))
