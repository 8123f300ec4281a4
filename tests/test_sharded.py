"""Models that ``fully_shard`` has sharded: the certificates of DistributedDataParallel, or a reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from test_distributed import draw, network, plain
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import adcert


@pytest.fixture(scope="module")
def two() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


def mine(rank: int, *values: Tensor) -> list[Tensor]:
    return [value.tensor_split(dist.get_world_size())[rank] for value in values]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def shard(model: nn.Sequential, **options: Any) -> nn.Sequential:
    """In groups: every layer with parameters, but the last, which is the root's."""
    for layer in [layer for layer in model if list(layer.parameters())][:-1]:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def refresh(model: nn.Module, source: nn.Module) -> None:
    """Hand the weights of ``source`` to the shards of ``model``."""
    for p, q in zip(model.parameters(), source.parameters(), strict=True):
        with torch.no_grad():
            p.to_local().copy_(q.tensor_split(dist.get_world_size())[dist.get_rank()])


def both(rank: int, steps: int, samples: int) -> list[Any]:
    found = []
    for kind in ("mlp", "two"):
        source, model = network(kind), network(kind)
        parallel = DistributedDataParallel(source)
        shard(model, reshard_after_forward=False)
        with adcert.Monitor(parallel) as one, adcert.Monitor(model) as other:
            for number in range(steps):
                x, weights = mine(rank, *draw(number, source, kind, samples))
                refresh(model, source)
                certificates = []
                for monitor, trained in ((one, parallel), (other, model)):
                    trained.zero_grad()
                    with monitor.step() as step:
                        (trained(x) * weights).sum().backward()
                    certificates.append(step.certificate())
                grads = zip(source.parameters(), model.parameters(), strict=True)
                same = all(torch.equal(p.grad, whole(q.grad)) for p, q in grads)
                names = list(dict(source.named_parameters()))
                found.append((*map(plain, certificates), same, names, *(c.reasons for c in certificates)))
    return found


def test_certificates_are_those_of_distributed_data_parallel(two: World) -> None:
    first, second = two.run(both, 6, 8)
    assert first == second, "every rank has the same certificates"
    verdicts = []
    for one, other, same, names, _, reasons in first:
        assert one == other and same, reasons
        assert list(other["shapes"]) == names
        verdicts.append(other["verdict"])
    assert verdicts.count("certified") > 2 and verdicts.count("uncertified") > 2


def refused(rank: int, how: str) -> list[Any]:
    """One step of a small network: verdict and first reason."""
    torch.manual_seed(0)
    model = adcert.convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double())
    options: dict[str, Any] = {"reshard_after_forward": {"freed": True, "auto": None}.get(how, False)}
    if how == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    elif how == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    elif how == "ignored":
        options["ignored_params"] = {model[0].bias}
    elif how == "replicated":
        options["mesh"] = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards"))
    if how == "parts":
        fully_shard(model[0], **options)
    else:
        shard(model, **options)
    if how == "unsynced":
        model.set_requires_gradient_sync(False)
    elif how == "divided":
        model.set_gradient_divide_factor(1.0)
    elif how == "hooked":
        model.set_all_reduce_hook(lambda gradient: gradient.mul_(2))
    elif how == "later":
        model.set_is_last_backward(False)
    x = torch.ones(2, 3).double() * (rank + 1)
    group = "local" if how == "local" else None
    with adcert.Monitor(model, group=group) as monitor, monitor.step() as step:
        if how == "zeroed":
            model.zero_grad()
        loss = model(x).sum()
        if how == "accumulated":
            loss.backward()
            loss = model(x).sum()
        elif how in ("halves", "between"):
            model.set_requires_gradient_sync(how != "halves")
            loss.backward()
            model.set_requires_gradient_sync(True)
            if how == "between":
                with torch.no_grad():
                    next(iter(model.parameters()))._local_tensor.add_(1)
            loss = model(x).sum()
        elif how == "written":
            with torch.no_grad():
                model[2].bias.add_(1)
        elif how == "shifted":
            with torch.no_grad():
                model[2].bias.data.add_(1)
        elif how == "checkpointed":
            loss = checkpoint(torch.relu, model(x), use_reentrant=False).sum()
        elif how == "repeated":
            loss = loss + model(x).sum()
        elif how == "twice":
            loss.backward(retain_graph=True)
        if how == "grad":
            torch.autograd.grad(loss, list(model.parameters()))
        else:
            loss.backward()
    return [step.summary["verdict"], (step.summary["reasons"] or [""])[0]]


@pytest.mark.parametrize("how", ["plain", "zeroed", "accumulated"])
def test_certified_steps(two: World, how: str) -> None:
    assert two.run(refused, how) == [["certified", ""]] * 2


@pytest.mark.parametrize(
    ("how", "reason"),
    {
        "freed": "frees whole parameters after the forward pass",
        "auto": "reshard_after_forward=False) on every module",
        "mixed": "MixedPrecisionPolicy",
        "offload": "offload_policy",
        "ignored": "does not average the gradient of 0.bias",
        "replicated": "HSDP",
        "parts": "call fully_shard on the whole model",
        "unsynced": "set_requires_gradient_sync",
        "halves": "set_requires_gradient_sync",
        "divided": "set_gradient_divide_factor",
        "hooked": "a hook of its own",
        "later": "set_requires_gradient_sync",
        "local": 'leave group="local" out',
        "between": "modified after its first use",
        "written": "was written to",
        "shifted": "is not what the ranks hold",
        "twice": "a second backward pass after one forward pass",
        "checkpointed": "torch.utils.checkpoint",
        "repeated": "run more than once",
        "grad": "autograd.grad",
    }.items(),
)
def test_other_steps_are_undecided(two: World, how: str, reason: str) -> None:
    first, second = two.run(refused, how)
    assert first[0] == second[0] == "undecided" and reason in first[1]


class Forked(nn.Module):
    """Two equal layers, one after the other; each is a group of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(2, 2, bias=False).double() for _ in range(2))
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))

    def forward(self, x: Tensor, swapped: bool) -> Tensor:
        first, second = (self.second, self.first) if swapped else (self.first, self.second)
        return second(torch.relu(first(x)))


def forked(rank: int, ways: tuple[bool, bool]) -> list[Any]:
    model = Forked()
    for layer in (model.first, model.second, model):
        fully_shard(layer, reshard_after_forward=False)
    x = torch.ones(1, 2).double() * (rank + 1)
    found = adcert.certify(lambda: model(x, ways[rank]).sum(), model)
    return [found.verdict.value, found.reasons]


def test_collectives_pair_what_belongs_together(two: World) -> None:
    """With equal weights only the order tells that rank 0's gradient of first was averaged with that of second."""
    assert two.run(forked, (True, True))[0][0] == "certified"
    first, second = two.run(forked, (False, True))
    assert first == second
    assert first[0] == "undecided" and "FSDP gathers or averages in another order" in first[1][0]


def trained(rank: int) -> list[Any]:
    found: list[Any] = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = shard(
            adcert.convert(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))),
            reshard_after_forward=False,
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        monitor = adcert.Monitor(model)
        for number in range(4):
            x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2 * number + rank))
            if watched:
                with monitor.step() as step:
                    optimizer.zero_grad()
                    model(x).square().mean().backward()
                    optimizer.step()
                found.append([step.summary["verdict"], step.summary["assumptions"]])
            else:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        found.append([whole(t).tolist() for p in model.parameters() for t in (p, p.grad)])
    return found


def test_training_is_that_of_plain_torch(two: World) -> None:
    first, second = two.run(trained)
    assert first == second
    before, *verdicts, after = first
    assert before == after
    assert [verdict for verdict, _ in verdicts] == ["certified"] * 4
    assert verdicts[1][1] == [
        "the 2 ranks have the same parameters, and FSDP averages their gradients",
        "no other collective of the step carries values from rank to rank",
        "no collective of the program's own writes to a tensor that the step has used",
    ]
