"""Data parallel steps: one certificate for the global batch, the one that a single process would have made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import random_network
from ranks import World
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import adcert
from adcert import compiled, distributed, systems, wire
from adcert import monitor as driver
from adcert.assembly import Share, assemble, merge
from adcert.cli._loop import Job, run
from adcert.cli._ranks import Ranks
from adcert.conclusion import Observed, conclude
from adcert.distributed import PartedError
from adcert.joint import Joint

Rows = set[tuple[Any, ...]]


@pytest.fixture(scope="module")
def two() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


@pytest.fixture(scope="module")
def four() -> Iterator[World]:
    world = World(4)
    yield world
    world.close()


def plain(certificate: adcert.Certificate) -> dict[str, Any]:
    """Everything of a certificate but its times, the assumption about ranks, and where a reason arose."""
    certificate.verify()
    found = {**vars(certificate), "layers": [asdict(layer) for layer in certificate.layers]}
    for name in ("seconds", "assumptions", "reasons"):
        del found[name]
    found["blocks"] = [
        {
            **vars(block),
            "columns": [(column.parameter, column.indices.tolist()) for column in block.columns],
            **{
                name: None if getattr(block, name) is None else getattr(block, name).tolist()
                for name in ("rows", "minus", "radius")
            },
        }
        for block in certificate.blocks
    ]
    return found


def rows_of(observed: Observed) -> Rows:
    """The rows of all layered systems: rule, and leaf, group and entries of each part."""
    found: Rows = set()
    for rowset in observed.rowsets:
        entries: dict[int, list[Any]] = {k: [] for k in range(rowset.count)}
        for part in rowset.parts:
            for k, owner in enumerate(part.owner.tolist()):
                value = tuple((part.plus[k].double() - part.minus[k].double()).tolist())
                entries[owner].append((part.leaf, int(part.group[k]), value))
        found |= {(rowset.rule, *sorted(parts)) for parts in entries.values()}
    return found


def network(kind: str) -> nn.Module:
    """Integer weights come later; every activation, gradient and comparison is exact in float64."""
    if kind == "mlp":
        layers = [nn.Linear(4, 3), nn.Hardtanh(-1.0, 1.0), nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)]
    elif kind == "two":
        layers = [nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(2, 2)]
    else:
        layers = [nn.Conv2d(1, 2, 3, bias=kind == "conv"), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)]
    return adcert.convert(nn.Sequential(*layers).double())


KINDS = ("mlp", "two", "conv", "bare")
SHAPES = {"mlp": (4,), "two": (1, 5, 5), "conv": (1, 6, 6), "bare": (1, 6, 6)}


def draw(number: int, model: nn.Module, kind: str, samples: int) -> tuple[Tensor, Tensor]:
    """The inputs and loss weights of step ``number``; the model gets the weights that every process has then."""
    dice = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=dice) / 2)
    x = torch.randint(-1, 2, (samples, *SHAPES[kind]), generator=dice).double()
    return x, torch.randint(-1, 2, (samples, 2), generator=dice).double()


def caught(module: Any) -> list[Observed]:
    """What goes into the certificates that ``module`` makes from now on."""
    seen: list[Observed] = []
    before = conclude

    def look(observed: Observed, *rest: Any) -> adcert.Certificate:
        seen.append(observed)
        return before(observed, *rest)

    module.conclude = look
    return seen


def train_apart(rank: int, steps: int, samples: int) -> list[tuple[Any, ...]]:
    size = dist.get_world_size()
    found: list[tuple[Any, ...]] = []
    for kind in KINDS:
        seen = caught(distributed)
        model = network(kind)
        parallel = DistributedDataParallel(model)
        with adcert.Monitor(parallel, keep=steps) as monitor:
            for number in range(steps):
                x, weights = (t.tensor_split(size)[rank] for t in draw(number, model, kind, samples))
                parallel.zero_grad()
                with monitor.step():
                    (parallel(x) * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        for certificate, observed in zip(monitor.certificates, seen, strict=True):
            assert certificate.seconds["exchange"] > 0
            found.append((plain(certificate), rows_of(observed), certificate.reasons, gradient.tolist()))
    distributed.conclude = conclude
    return found


def train_together(steps: int, samples: int, parts: int) -> list[tuple[Any, ...]]:
    """The same steps in this process, the batch in so many micro-batches."""
    found: list[tuple[Any, ...]] = []
    for kind in KINDS:
        seen = caught(driver)
        model = network(kind)
        with adcert.Monitor(model, keep=steps) as monitor:
            for number in range(steps):
                x, weights = (t.tensor_split(parts) for t in draw(number, model, kind, samples))
                model.zero_grad()
                with monitor.step():
                    for each, weight in zip(x, weights, strict=True):
                        (model(each) * weight).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        for certificate, observed in zip(monitor.certificates, seen, strict=True):
            found.append((plain(certificate), rows_of(observed), gradient.tolist()))
    driver.conclude = conclude
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_find_what_one_process_finds(size: int, request: pytest.FixtureRequest) -> None:
    steps, samples = 8, 8  # of each kind: 32 in all
    world = request.getfixturevalue("two" if size == 2 else "four")
    ranks = world.run(train_apart, steps, samples)
    assert all(found == ranks[0] for found in ranks), "every rank has the same certificates"
    micro, whole = train_together(steps, samples, size), train_together(steps, samples, 1)
    verdicts = []
    for number, ((mine, rows, _, gradient), (theirs, others, accumulated), (one, single, _)) in enumerate(
        zip(ranks[0], micro, whole, strict=True)
    ):
        assert gradient == [value / size for value in accumulated]
        assert mine["verdict"] == theirs["verdict"] == one["verdict"] or one["system"] in ("hull", "joint")
        assert rows == others
        if mine["verdict"] is adcert.Verdict.CERTIFIED:
            assert mine == theirs
        if mine["system"] == one["system"]:
            for name in ("windows", "ties", "touches", "differing"):
                totals = [sum(layer[name] for layer in found["layers"]) for found in (mine, theirs, one)]
                assert totals[0] == totals[1] == totals[2], name
            # A batch that touches both kinks of a hardtanh has other rows than micro-batches that touch one each.
            assert rows == single or KINDS[number // steps] == "mlp"
        verdicts.append(mine["verdict"])
    assert all(verdicts.count(verdict) > 5 for verdict in ("certified", "uncertified"))


class Signed(nn.Module):
    """``sign relu(w x)``: with both signs over the ranks it is w x, whose derivative at w = 0 is not autodiff's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))

    def forward(self, x: Tensor, sign: float) -> Tensor:
        return sign * torch.relu(x @ self.weight)


def lemma_2(rank: int, strict: bool) -> list[Any]:
    model = Signed()
    x, sign = torch.full((1, 1), 1.0 - 2.0 * rank).double(), 1.0 - 2.0 * rank
    alone = adcert.certify(lambda: model(x, sign).sum(), model, strict, group="local")
    parallel = DistributedDataParallel(model)
    both = adcert.certify(lambda: parallel(x, sign).sum(), parallel, strict)
    both.verify()
    return [alone.verdict.value, both.verdict.value, both.reasons, list(both.shapes), float(model.weight.grad)]


@pytest.mark.parametrize("strict", [False, True])
def test_each_rank_alone_is_certified_and_the_global_batch_is_not(two: World, strict: bool) -> None:
    """relu(w) on one rank and -relu(-w) on the other: their sum is w, and autodiff's gradient is 0."""
    first, second = two.run(lemma_2, strict)
    assert first == second
    alone, both, reasons, names, gradient = first
    assert (alone, both, gradient) == ("certified", "uncertified", 0.0)
    assert "empty" in reasons[0] and names == ["weight"]


def uneven(rank: int) -> list[Any]:
    """Only rank 1 meets ties; only rank 0 touches."""
    model = adcert.convert(nn.Sequential(nn.Conv2d(1, 1, 2, bias=False), nn.ReLU(), nn.MaxPool2d(2)).double())
    nn.init.ones_(model[0].weight)
    x = torch.arange(9.0).double().reshape(1, 1, 3, 3)
    x = torch.ones(1, 1, 3, 3).double() if rank else x - 9
    x[0, 0, 0, 0] += 0 if rank else 30
    parallel = DistributedDataParallel(model)
    certificate = adcert.certify(lambda: parallel(x).sum(), parallel)
    layer = certificate.layers[0]
    return [certificate.verdict.value, layer.windows, layer.ties, layer.touches, sorted(certificate.fingerprints)]


def test_ranks_with_different_decisions_add_up(two: World) -> None:
    first, second = two.run(uneven)
    assert first == second
    assert first[0] == "certified"
    assert first[1:4] == [2, 1, 0]
    assert first[4] == ["2", "2#2"]


class Forked(nn.Module):
    """A graph of its own on every rank: the layers the other way round, or an operation nobody records at a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(2, 2).double() for _ in range(2))

    def forward(self, x: Tensor, way: str) -> Tensor:
        first, second = (self.second, self.first) if way == "swapped" else (self.first, self.second)
        y = torch.relu(second(torch.relu(first(x))))
        return torch.aminmax(torch.cat([y, y])).max if way == "aminmax" else y


def forked(rank: int, way: str, strict: bool) -> list[Any]:
    torch.manual_seed(0)
    model = Forked()
    with torch.no_grad():
        model.first.weight[0], model.first.bias[0] = 0, 0  # a unit that touches
        model.second.weight[0], model.second.bias[0] = 0, 0
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    x = torch.ones(1, 2).double() * (rank + 1)
    found = adcert.certify(lambda: parallel(x, way if rank else "straight").sum(), parallel, strict)
    found.verify()
    return [found.verdict.value, found.system, found.reasons]


def test_a_rank_that_is_undecided_makes_all_undecided(two: World) -> None:
    first, second = two.run(forked, "aminmax", False)
    assert first == second
    assert first[0] == "undecided"
    assert all(reason.startswith("rank 1: ") for reason in first[2]) and "AminmaxBackward" in first[2][0]


@pytest.mark.parametrize("strict", [False, True])
def test_graphs_that_order_the_layers_differently(two: World, strict: bool) -> None:
    """first before second on rank 0, second before first on rank 1: no layered system, the joint one may do."""
    first, second = two.run(forked, "swapped", strict)
    assert first == second
    if strict:
        assert first[0] == "undecided" and "circle" in first[2][0]
    else:
        assert first[:2] == ["certified", "joint"]


def accumulate(rank: int, last: bool) -> list[Any]:
    model = Signed()
    parallel = DistributedDataParallel(model)
    with adcert.Monitor(parallel) as monitor, monitor.step() as step:
        with parallel.no_sync():
            parallel(torch.ones(1, 1).double(), 1.0 + rank).sum().backward()
        if last:
            parallel(torch.full((1, 1), 1.0 - 2.0 * rank).double(), 1.0).sum().backward()
    return [step.summary["verdict"], step.summary["touches"], step.summary["reasons"]]


def test_micro_batches_under_no_sync_join(two: World) -> None:
    """Rank 0 meets w twice, rank 1 w and -w: the rows contradict each other."""
    first, second = two.run(accumulate, True)
    assert first == second
    assert first[:2] == ["uncertified", 4]


def halved(state, bucket):  # torch reads the annotations, and not as strings
    future = torch.futures.Future()
    future.set_result(bucket.buffer() / 2)
    return future


def moved(rank: int, how: str) -> list[Any]:
    model = nn.Linear(2, 1).double()
    parallel = DistributedDataParallel(model)
    x = torch.ones(1, 2).double() * (rank + 1)
    if how == "hooked":
        parallel.register_comm_hook(None, halved)
    with adcert.Monitor(parallel) as monitor, monitor.step() as step:
        if how in ("averaged", "hooked"):
            parallel(x).sum().backward()
        elif how == "around":
            model(x).sum().backward()
        elif how == "grad":
            torch.autograd.grad(parallel(x).sum(), list(model.parameters()))
        else:
            parallel.register_comm_hook(None, halved)
            parallel(x).sum().backward()
    return [step.summary["verdict"], step.summary["reasons"]]


def test_gradients_that_nobody_averaged_are_not_certified(two: World) -> None:
    assert two.run(moved, "averaged")[0] == ["certified", []]
    reasons = {
        "around": "no backward pass of the step averaged them",
        "grad": "no gradient was accumulated",
        "hook": "the communication hook halved may change the averaged gradient",
        "hooked": "the communication hook halved may change the averaged gradient",
    }
    for how, reason in reasons.items():
        first, second = two.run(moved, how)
        assert first == second
        assert first[0] == "undecided" and any(reason in text for text in first[1]), how


def hooked_alone(rank: int) -> list[Any]:
    own = [dist.new_group([0]), dist.new_group([1])][rank]
    model = nn.Linear(2, 1).double()
    parallel = DistributedDataParallel(model, process_group=own)
    parallel.register_comm_hook(None, halved)
    found = []
    for group in (None, "local"):
        with adcert.Monitor(parallel, group=group) as monitor, monitor.step() as step:
            parallel(torch.ones(1, 2).double()).sum().backward()
        found.append([step.summary["verdict"], step.summary["reasons"], step.summary["assumptions"]])
    return found


def test_a_hook_counts_in_a_group_of_one_rank_too(two: World) -> None:
    (verdict, reasons, _), (alone, _, assumptions) = two.run(hooked_alone)[0]
    assert verdict == "undecided" and "the communication hook halved" in reasons[0]
    assert alone == "certified" and any("before any averaging" in text for text in assumptions)


def over_the_world(rank: int) -> list[Any]:
    """torch's own hook without a state averages over all ranks, whatever the group is."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    own = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    found = []
    for group in (own, dist.group.WORLD):
        for state in (None, group):
            parallel = DistributedDataParallel(nn.Linear(2, 1).double(), process_group=group)
            parallel.register_comm_hook(state, allreduce_hook)
            with adcert.Monitor(parallel) as monitor, monitor.step() as step:
                parallel(torch.ones(1, 2).double() * (1 + rank)).sum().backward()
            found.append(step.summary["verdict"])
    return found


def test_a_hook_that_averages_over_another_group(four: World) -> None:
    assert four.run(over_the_world) == [["undecided", "certified", "certified", "certified"]] * 4


def left(rank: int) -> str:
    """Rank 0 leaves its monitor by an exception, and lives on."""
    parallel = DistributedDataParallel(nn.Linear(2, 1))
    try:
        with adcert.Monitor(parallel) as monitor:
            with monitor.step():
                parallel(torch.ones(1, 2)).sum().backward()
            if rank == 0:
                raise ValueError("of the program")
    except (ValueError, adcert.AdcertError) as error:
        monitor.close()  # nothing is left to do
        return str(error)
    return ""


def test_a_rank_that_leaves_by_an_exception_is_not_waited_for(two: World) -> None:
    first, second = two.run(left)
    assert first == "of the program" and "a rank is lost" in second


class Adding(nn.Module):
    """Two layers of two megabytes each: DistributedDataParallel has a compiler cut the program between them."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 8192), nn.Linear(8192, 64)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(torch.relu(y))
        if self.in_place:
            y += 1.0
        return torch.relu(z).mean() + y.mean()


def cut(rank: int, order: str, in_place: bool) -> list[Any]:
    """The verdict, its reasons, and how many programs were compiled for it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, backend, programs = adcert.convert(Adding(in_place)), compiled.backend, []

    def counting(module: Any, examples: list[Any]) -> Any:
        programs.append(module)
        return backend(module, examples)

    compiled.backend = counting
    if order == "compiled inside":
        parallel = net = DistributedDataParallel(torch.compile(model, backend="aot_eager"), bucket_cap_mb=1)
    else:
        parallel = DistributedDataParallel(model, bucket_cap_mb=1)
        net = torch.compile(parallel, backend="aot_eager")
    with adcert.Monitor(parallel) as monitor, monitor.step() as step:
        net(torch.randn(4, 64, generator=torch.Generator().manual_seed(rank))).backward()
    compiled.backend = backend
    return [step.summary["verdict"], step.summary["reasons"], len(programs)]


@pytest.mark.parametrize("order", ["compiled inside", "compiled outside"])
def test_compiled_code_that_is_cut_where_buckets_end(two: World, order: str) -> None:
    first, second = two.run(cut, order, False)
    assert first == second
    assert first[:2] == ["certified", []] and first[2] > 1


def test_a_write_to_what_another_bucket_has_made(two: World) -> None:
    verdict, reasons, programs = two.run(cut, "compiled inside", True)[0]
    assert verdict == "undecided" and programs > 1
    assert "add_" in reasons[0] and "optimize_ddp = False leaves it whole" in reasons[0]


class Table(nn.Module):
    """An embedding of which each rank reads one row: two gradients that differ in two entries of 64."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.rows = nn.Embedding(64, 1, sparse=sparse)
        nn.init.ones_(self.rows.weight)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.rows(row))


def one_row(rank: int, how: str) -> list[Any]:
    table = Table(how == "sparse")
    if how == "ignored":
        names = ["rows.weight"]
        table.other = nn.Linear(1, 1)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(table, names)
    parallel = DistributedDataParallel(table, find_unused_parameters=how == "ignored")
    row = torch.tensor([1 + rank])
    if how in ("returned", "zeros"):
        table.rows.weight.grad = torch.zeros(64, 1)
    with adcert.Monitor(parallel) as monitor, monitor.step() as step:
        if how == "around":
            table(row).sum().backward()
        elif how == "returned":
            torch.autograd.grad(parallel(row).sum(), [table.rows.weight])
        elif how in ("no_sync", "sparse"):
            with parallel.no_sync():
                parallel(row).sum().backward()
        else:
            parallel(row).sum().backward()
    return [step.summary["verdict"], step.summary["reasons"]]


def test_one_entry_that_nobody_averaged_is_enough(two: World) -> None:
    reasons = {
        "around": "its gradients or parameters are not those of rank 0",
        "no_sync": "ran under no_sync",
        "sparse": "sparse gradients are not compared",
        "returned": "returns this rank's own gradient",
        "ignored": "ignores rows.weight",
    }
    assert two.run(one_row, "plain")[0] == ["certified", []]
    for how, reason in reasons.items():
        first, second = two.run(one_row, how)
        assert first == second
        assert first[0] == "undecided" and any(reason in text for text in first[1]), (how, first)


class Branches(nn.Module):
    """Three equal parameters; a forward pass names those that take part."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abc":
            self.register_parameter(name, nn.Parameter(torch.ones(2, 2, dtype=torch.float64)))

    def forward(self, *parts: tuple[str, Tensor]) -> Tensor:
        return sum(((getattr(self, name) * x).sum() for name, x in parts), torch.zeros(()).double())


def apart(rank: int, how: str) -> list[Any]:
    """Gradients that are not the mean of the ranks' when the step ends, or that look so."""
    model = Branches()
    shared = {name: torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double() * k for k, name in enumerate("abc", 1)}
    parts = list(shared.items())
    unused = how in ("used by one", "used by none")
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=how == "bucket", find_unused_parameters=unused)
    a, b, c = model.parameters()
    with adcert.Monitor(parallel) as monitor, monitor.step() as step:
        if how == "branch":
            parallel(parts[rank]).backward()
        elif how in ("bucket", "used by none"):
            parallel(parts[0]).backward()
        elif how == "used by one":
            parallel(*parts[: 1 + rank]).backward()
        else:
            parallel(*parts).backward()
        if how == "data":
            a.grad.data.mul_(1 + rank)
        elif how == "numpy":
            a.grad.numpy()[0, 0] += rank
        elif how == "transposed" and rank == 1:
            a.grad = a.grad.clone().t()
        elif how == "exchanged" and rank == 1:
            b.grad, c.grad = c.grad, b.grad
        elif how == "freed" and rank == 1:
            c.grad = None
        elif how == "touched" and rank == 1:
            a.grad.mul_(1.0)
    return [step.summary["verdict"], step.summary["reasons"]]


@pytest.mark.parametrize("how", ["data", "numpy", "transposed", "exchanged", "freed", "branch", "bucket"])
def test_gradients_that_differ_at_the_end_of_a_step(two: World, how: str) -> None:
    first, second = two.run(apart, how)
    assert first == second and first[0] == "undecided"
    expected = "has not averaged all gradients" if how in ("branch", "bucket") else "are not those of rank 0"
    assert any(expected in reason for reason in first[1]), first[1]


@pytest.mark.parametrize("how", ["nothing", "touched", "used by one", "used by none"])
def test_gradients_that_are_the_mean(two: World, how: str) -> None:
    assert two.run(apart, how) == [["certified", []]] * 2


def failing(rank: int) -> list[list[Any]]:
    """In the second step rank 1 runs out of memory over a block; both programs read each verdict at once."""
    model = adcert.convert(nn.Sequential(nn.Linear(2, 1), nn.ReLU()).double())
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    parallel = DistributedDataParallel(model)
    before, found = systems._glanced, []

    def glanced(*arguments: Any) -> Any:
        if rank == 1 and len(found) == 1:
            raise MemoryError("no memory left")
        return before(*arguments)

    systems._glanced = glanced
    monitor = adcert.Monitor(parallel)
    for _ in range(3):
        with monitor.step() as step:
            parallel(torch.ones(1, 2).double()).sum().backward()
        found.append([step.summary["verdict"], step.summary["reasons"]])
    systems._glanced = before
    return found


def test_a_rank_that_fails_over_a_block_keeps_nobody_waiting(two: World) -> None:
    first, second = two.run(failing)
    assert first[0] == second[0] == ["certified", []]
    assert second[1][0] == "undecided" and "no memory left" in second[1][1][0]
    assert [found[2][0] for found in (first, second)] == ["undecided"] * 2
    assert "a rank is lost" in first[2][1][0]


def other_ranks(rank: int) -> str:
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    try:
        adcert.Monitor(DistributedDataParallel(Table()), group=alone)
    except adcert.AdcertError as error:
        return str(error)
    return ""


def test_a_group_of_other_ranks_than_those_that_average(two: World) -> None:
    assert all("are not those over which" in text for text in two.run(other_ranks))


def parameters_apart(rank: int) -> list[Any]:
    model = nn.Linear(2, 1).double()
    parallel = DistributedDataParallel(model)
    found = []
    for change in ("frozen", "value"):
        with torch.no_grad():
            model.bias.requires_grad_(change != "frozen" or rank == 0)
            model.weight[0, 0] += rank if change == "value" else 0
        monitor = adcert.Monitor(model, group=dist.group.WORLD) if change == "frozen" else adcert.Monitor(parallel)
        with monitor, monitor.step() as step:
            (model if change == "frozen" else parallel)(torch.ones(1, 2).double()).sum().backward()
        found.append([step.summary["verdict"], step.summary["reasons"]])
    return found


def test_ranks_with_other_parameters_are_not_certified(two: World) -> None:
    first, second = two.run(parameters_apart)
    assert first == second
    assert [verdict for verdict, _ in first] == ["undecided"] * 2
    assert first[0][1] == ["rank 1: its trainable parameters are not those of rank 0: bias"]
    assert "its gradients or parameters are not those of rank 0" in first[1][1][0]


def in_pairs(rank: int) -> list[Any]:
    """Ranks 0 and 1 meet w and -w; ranks 2 and 3 both meet w."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = Signed()
    parallel = DistributedDataParallel(model, process_group=pairs[rank // 2], gradient_as_bucket_view=True)
    x = torch.full((1, 1), -1.0 if rank == 1 else 1.0).double()
    found = []
    with adcert.Monitor(parallel) as monitor:
        for _ in range(2):
            with monitor.step() as step:
                parallel(x, 1.0).sum().backward()
            found.append([step.summary["verdict"], step.summary["touches"]])
    return found


def test_groups_beside_each_other(four: World) -> None:
    assert four.run(in_pairs) == [[["uncertified", 2]] * 2] * 2 + [[["certified", 2]] * 2] * 2


def talk(rank: int) -> list[Any]:
    channel = distributed.Channel(dist.group.WORLD)
    sizes = [0, 8151, 8152, 8153, 100_000]
    found = [channel.gather(0, n, bytes([rank + n]) * (size if rank else size // 2)) for n, size in enumerate(sizes)]
    return [[(len(message), sorted(set(message))) for message in each] for each in found]


def test_messages_of_any_length(two: World) -> None:
    first, second = two.run(talk)
    assert first == second
    for number, ((short, low), (long, high)) in enumerate(first):
        size = [0, 8151, 8152, 8153, 100_000][number]
        assert (short, long) == (size // 2, size)
        assert not size or (low, high) == ([number], [number + 1])


def cramped(rank: int) -> list[Any]:
    limit, distributed.MAX_BYTES = distributed.MAX_BYTES, 4000
    model = adcert.convert(nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(9))))
    parallel = DistributedDataParallel(model)
    try:
        return adcert.certify(lambda: parallel(torch.ones(1, 2)).sum(), parallel).reasons
    finally:
        distributed.MAX_BYTES = limit


def test_a_share_that_is_too_large_is_not_sent(two: World) -> None:
    first, second = two.run(cramped)
    assert first == second
    assert "bytes of rows, limit 2000" in first[0]


def swapped(rank: int) -> list[str]:
    names = ["first", "second"] if rank == 0 else ["second", "first"]
    parallel = DistributedDataParallel(nn.Sequential(OrderedDict((name, nn.Linear(1, 1)) for name in names)))
    return adcert.certify(lambda: parallel(torch.ones(1, 1)).sum(), parallel).reasons


def test_gradients_are_averaged_in_the_same_order(two: World) -> None:
    """DistributedDataParallel averages the k-th parameters, whatever they are called."""
    first, second = two.run(swapped)
    assert first == second
    assert "rank 1: its trainable parameters are not those of rank 0: their order" in first


def foreign_leaf(rank: int) -> list[str]:
    parallel = DistributedDataParallel(nn.Linear(2, 1))
    x = torch.ones(1, 2, requires_grad=True)
    return adcert.certify(lambda: parallel(x).sum(), parallel).reasons


def test_a_leaf_of_one_rank_is_named(two: World) -> None:
    first, second = two.run(foreign_leaf)
    assert first == second
    assert first[0] == "rank 0: leaf0, a leaf outside the model, is not the other ranks': not supported"


def whose(rank: int) -> list[str]:
    model, said = nn.Linear(2, 1), []
    for arguments in ({}, {"group": 3}, {"group": "local"}, {"group": dist.group.WORLD}):
        try:
            monitor = adcert.Monitor(model, **arguments)
            with monitor, monitor.step() as step:
                model(torch.ones(1, 2)).sum().backward()
            said.append("; ".join(step.summary["assumptions"]))
        except adcert.AdcertError as error:
            said.append(str(error))
    return said


def test_whose_gradient_it_is_has_to_be_clear(two: World) -> None:
    unclear, wrong, local, group = two.run(whose)[0]
    assert "torch.distributed runs 2 ranks, and this model is no DistributedDataParallel" in unclear
    assert wrong == 'group is a process group of torch.distributed, or "local", got 3'
    assert local.startswith("the gradient is this rank's own, before any averaging; no collective of the program's own")
    assert group.startswith("the 2 ranks have the same parameters, and the program averages, or adds up, their gradie")


def normalised(rank: int) -> list[Any]:
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2), nn.ReLU())
    model.cuda()
    x = torch.eye(2).cuda() * (rank + 1)
    found = adcert.certify(lambda: model(x).sum(), model, group=dist.group.WORLD)
    return [found.verdict.value, found.reasons]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's SyncBatchNorm needs a GPU")
def test_synchronised_statistics_are_undecided(two: World) -> None:
    """What one rank computes depends on the others' samples: their programs are one, and not a sum."""
    first, second = two.run(normalised)
    assert first == second
    assert first[0] == "undecided" and "SyncBatchNormBackward is not recorded" in first[1][0]


def counted(rank: int, steps: tuple[int, ...], queue: int) -> list[Any]:
    model, began = nn.Linear(2, 1), time.monotonic()
    said = ""
    try:
        with adcert.Monitor(model, queue=queue, group=dist.group.WORLD, keep=9) as monitor:
            for _ in range(steps[rank]):
                with monitor.step():
                    model(torch.ones(1, 2)).sum().backward()
    except PartedError as error:
        said = str(error)
    return [[c.verdict.value for c in monitor.certificates], said, time.monotonic() - began, monitor.report().reasons]


@pytest.mark.parametrize("queue", [0, 8])
def test_unequal_numbers_of_steps_are_told_at_once(two: World, queue: int) -> None:
    found = two.run(counted, (4, 2), queue)
    assert [verdicts for verdicts, *_ in found] == [["certified"] * 2 + ["undecided"] * 2, ["certified"] * 2]
    text = "the ranks are not at the same step: rank 0 hands in step 3, rank 1 has ended after step 2"
    assert [said for _, said, *_ in found] == [text] * 2
    assert found[0][3] == {text: 2}
    assert max(seconds for _, _, seconds, _ in found) < 30  # of a time-out of 60


def lost(rank: int, how: str) -> list[Any]:
    if rank == 1 and how == "late":
        began = time.monotonic()
        adcert.Monitor(nn.Linear(2, 1), group=dist.group.WORLD)
        time.sleep(4)
        return [time.monotonic() - began]
    model, said = nn.Linear(2, 1), ""
    began = time.monotonic()
    try:
        with adcert.Monitor(model, group=dist.group.WORLD, keep=9) as monitor:
            for number in range(3):
                if rank == 1 and number == 2:
                    monitor.flush()
                    os._exit(9)
                with monitor.step() as step:
                    model(torch.ones(1, 2)).sum().backward()
                if how == "late":
                    break
            step.certificate()
    except PartedError as error:
        said = str(error)
    return [[c.verdict.value for c in monitor.certificates], said, time.monotonic() - began]


@pytest.mark.parametrize("how", ["killed", "late"])
def test_a_lost_rank_is_told_within_the_time_out(how: str) -> None:
    world = World(2, seconds=2.0)
    try:
        (verdicts, said, seconds), _ = world.run(lost, how)
    finally:
        world.close()
    assert verdicts == (["certified"] * 2 if how == "killed" else []) + ["undecided"]
    assert said.startswith("a rank is lost, or has not come within the time-out (rank 0 hands in step")
    assert seconds < 30  # not gloo's thirty minutes


JOB = Job("fnn-relu", "digits", batch_size=8, steps=3)


def train(rank: int, plain: bool) -> dict[str, Any]:
    ranks = Ranks("cpu", rank, dist.get_world_size())
    return run(replace(JOB, plain=plain), lambda outcome, result: None, ranks).as_dict()


def test_torchrun_trains_and_certifies(two: World) -> None:
    """The job by its command; and in the ranks that are there, also without adcert: the same weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "adcert"]
    command += ["train", "--model", JOB.model, "--data", JOB.data, "--batch-size", "8", "--steps", "3"]
    done = subprocess.run([*command, "--check", "--json"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one document: the second process is silent
    assert told["report"]["certified"] == told["steps"] == 3
    certified, other = two.run(train, False)
    without, _ = two.run(train, True)
    assert told["weights_sha256"] == certified["weights_sha256"] == without["weights_sha256"] == other["weights_sha256"]
    assert told["loss"] == certified["loss"] == without["loss"]
    assert certified["report"]["certified"] == 3 and without["report"] is None


def test_a_batch_has_to_be_cut_evenly() -> None:
    with pytest.raises(adcert.AdcertError, match="--batch-size 8 cannot be cut into equal parts for 3 ranks"):
        Ranks("cpu", 0, 3).part(torch.zeros(8))


# One process: the merge and its messages.


def shares_of(model: nn.Module, losses: list[Callable[[], Tensor]], strict: bool = False) -> list[Share]:
    """One share for each loss."""
    found: list[Share] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.Monitor, "_conclude", lambda self, job: found.append(job[1]))
        for loss in losses:
            with adcert.Monitor(model, strict=strict, queue=0).step():
                loss().backward()
    return found


def accumulated(model: nn.Module, losses: list[Callable[[], Tensor]], strict: bool) -> adcert.Certificate:
    with adcert.Monitor(model, strict=strict, queue=0).step() as step:
        for loss in losses:
            loss().backward()
    return step.certificate()


def carried(shares: list[Share]) -> adcert.Certificate:
    certificate = conclude(assemble(merge([wire.unpack(wire.pack(share)) for share in shares])))
    certificate.verify()
    return certificate


@pytest.mark.parametrize("strict", [False, True])
def test_random_networks_by_message_and_in_one_process(strict: bool) -> None:
    """Each sample of a tiny network on a rank of its own: the verdict of gradient accumulation, and its certificate."""
    verdicts = []
    for seed in range(40):
        found = random_network(seed)
        model = adcert.convert(found.model)
        losses = [
            lambda k=k, found=found, model=model: (found.weights[k] * model(found.inputs[k : k + 1])[0]).sum()
            for k in range(len(found.inputs))
        ]
        mine, theirs = carried(shares_of(model, losses, strict)), accumulated(model, losses, strict)
        if len(losses) > 1:
            assert mine.verdict is theirs.verdict, seed
            assert mine.verdict is not adcert.Verdict.CERTIFIED or plain(mine) == plain(theirs), seed
            verdicts.append(mine.verdict.value)
    assert min(verdicts.count("certified"), verdicts.count("uncertified")) > 5


def test_equal_free_rows_of_two_ranks_are_two_choices() -> None:
    """abs between its one-sided derivatives, without a bias: the same row twice is not independent."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.tensor([[1.0, 2.0]]).double()
    losses = [lambda: torch.abs(model(x)).sum(), lambda: -torch.abs(model(x)).sum()]
    shares = shares_of(model, losses)
    assert [conclude(assemble(share)).verdict.value for share in shares] == ["certified"] * 2
    together = carried(shares)
    assert together.verdict is adcert.Verdict.UNDECIDED and "not independent" in together.reasons[0]


def test_equal_rows_travel_once() -> None:
    model = adcert.convert(nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU()).double())
    nn.init.zeros_(model[0].weight)
    (share,) = shares_of(model, [lambda: model(torch.ones(50, 2).double()).sum()])
    # The analysis has merged equal units already where it knew them; here rows are equal, units are not.
    received = wire.unpack(wire.pack(share))
    assert share.rowsets[0].count == 50 and received.rowsets[0].count == 1
    assert rows_of(assemble(share)) == rows_of(assemble(received))


def test_a_combination_is_of_one_rank_and_is_not_merged() -> None:
    """relu(w) + relu(-w) on rank 0 is certified by Theorem H; what rank 1 adds is not in its combination."""
    model = Signed()
    one = torch.ones(1, 1).double()
    shares = shares_of(model, [lambda: (model(one, 1.0) + model(-one, 1.0)).sum(), lambda: (model.weight * 3).sum()])
    assert conclude(assemble(shares[0])).theorem == "Theorem H"
    assert merge(shares).hull is None
    assert carried(shares).verdict is adcert.Verdict.UNCERTIFIED


def test_joint_rows_of_all_ranks_or_of_none() -> None:
    """Weight tying on rank 0; rank 1 has left its joint rows out: no joint system."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.ones(1, 1).double()
    losses = [lambda: torch.relu(model(torch.relu(model(x)))).sum(), lambda: torch.relu(model(x)).sum()]
    shares = shares_of(model, losses)
    assert carried(shares).system == "joint"
    left = replace(shares[1], joint=Joint(missing="too many"))
    found = carried([shares[0], left])
    assert found.verdict is adcert.Verdict.UNDECIDED
    assert "rank 1: too many" in found.reasons[-1]


def test_messages_that_were_altered_are_refused() -> None:
    model = adcert.convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double())
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    (share,) = shares_of(model, [lambda: model(torch.ones(1, 2).double()).sum()])
    message = wire.pack(share)
    assert wire.unpack(message).rowsets
    head = message.index(b'"count":')
    for bad in (
        b"",
        message[:7],
        message[:-1],
        message + b"\0",
        message.replace(b'"count":', b'"Count":'),
        message.replace(b'"leaf":"0.', b'"leaf":"9.'),
        message.replace(b'["i4",[', b'["i4",[9999999999'),
        message.replace(b'"strict":false', b'"strict":0    '),
        message[: head + 8] + b"0" + message[head + 9 :],
        message.replace(b'"rule":"touch"', b'"rule":"truth"'),
    ):
        with pytest.raises(adcert.AdcertError):
            wire.unpack(bad)


def test_answers_of_others_are_checked() -> None:
    """A direction that fails on a row, a proof that is none, an answer for the wrong columns."""
    from adcert.answers import Decision, Proof

    model = adcert.convert(nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU()).double())
    nn.init.zeros_(model[0].weight)
    (share,) = shares_of(model, [lambda: model(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]).double()).sum()])

    class Liar:
        def __init__(self, answer: Any) -> None:
            self.answer = answer

        def decide(self, count: int, answer: Any, short: bool) -> Any:
            return dict.fromkeys(range(count), self.answer)

    wrong = [
        (None, Decision(True, (1, 1), None, "said")),
        (None, Decision(True, (-1,), None, "said")),
        (None, Decision(False, None, Proof((0, 1), (1, 1)), "said")),
        (torch.tensor([1, 0]).numpy(), Decision(True, (-1, -1), None, "said")),
        (torch.tensor([0, 7]).numpy(), Decision(True, (-1, -1), None, "said")),
    ]
    right = None, Decision(True, (-1, -1), None, "said")
    for answer in wrong:
        found = conclude(assemble(share), None, Liar(answer))
        assert found.verdict is adcert.Verdict.UNDECIDED and "does not hold" in found.reasons[0]
    assert conclude(assemble(share), None, Liar(right)).verdict is adcert.Verdict.CERTIFIED


class Nobody:
    """A team that is asked for nothing."""

    def decide(self, count: int, answer: Any, short: bool) -> Any:
        raise AssertionError(f"{count} blocks were to travel")


@pytest.mark.parametrize("samples", [[[1.0, 2.0]], [[1.0, 2.0], [2.0, -1.0]], [[1.0, 0.0]] * 200])
def test_what_a_glance_decides_does_not_travel(samples: list[list[float]]) -> None:
    model = adcert.convert(nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU()).double())
    nn.init.zeros_(model[0].weight)
    (share,) = shares_of(model, [lambda: model(torch.tensor(samples).double()).sum()])
    found, alone = conclude(assemble(share), None, Nobody()), conclude(assemble(share))
    assert found.verdict is adcert.Verdict.CERTIFIED
    assert found.blocks[0].direction == alone.blocks[0].direction


def test_what_a_glance_leaves_is_shared_out() -> None:
    """Two filters: one row of the first, rows (-2, 1) and (1, -2) of the second."""
    model = adcert.convert(nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()).double())
    x = torch.tensor([[2.0, -1.0], [-1.0, 2.0]]).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))  # 0 on the first sample, 3 on the second
    (share,) = shares_of(model, [lambda: model(x).sum()])
    asked = []

    class One:
        def decide(self, count: int, answer: Any, short: bool) -> Any:
            asked.append(count)
            return {number: answer(number) for number in range(count)}

    found, alone = conclude(assemble(share), None, One()), conclude(assemble(share))
    assert asked == [1] and found.verdict is adcert.Verdict.CERTIFIED
    assert [block.direction for block in found.blocks] == [block.direction for block in alone.blocks]
