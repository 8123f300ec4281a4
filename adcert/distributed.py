"""One certificate for the global batch of data-parallel training, the same on every rank.

The loss of a step is the mean of the ranks' losses, all of the same parameters, and its gradient the mean of theirs: it
is gradient accumulation over the ranks' graphs. So what the ranks saw is exchanged (:mod:`adcert.wire`) and merged into
what one process would have seen (:func:`adcert.assembly.merge`). Of the blocks of its systems every rank decides those
that take a glance, alike everywhere; the others are shared out, and every answer is checked by every rank. All of it is
done by the worker threads, over a process group of their own (gloo: it is data of the host), so that it lies beside
training and never between its collectives.
"""

from __future__ import annotations

import atexit
import struct
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from . import wire
from .answers import Decision
from .assembly import Share, assemble, merge
from .certificate import Certificate
from .conclusion import conclude, failed
from .errors import AdcertError
from .sharded import Shards, is_sharded
from .systems import Answer, Memory
from .worker import flush_all

T = TypeVar("T")

LOCAL = "local"
MAX_BYTES = 1 << 30  # of the shares of all ranks together
_MAGIC = b"adcert-1"
_HEAD = struct.Struct("<8sQQQQ")  # what it is, number of the step, number of the message, bytes
_EAGER = 1 << 13  # bytes that travel with the header
_SHARE, _ANSWERS, _END = range(3)
_ROUNDING = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")  # torch's own, which only round
_QUIET = "no collective of the program's own writes to a tensor that the step has used"
_DOING = ("hands in step", "decides systems of step", "has ended after step")


class PartedError(AdcertError):
    """The ranks do not do the same any more: steps that differ in number, a lost rank, or a time-out."""


@dataclass(frozen=True)
class Plan:
    """How a model's steps are certified.

    ``model``: the one that names the parameters; ``team``: None for steps of this process alone; ``parallel``: its
    DistributedDataParallel modules; ``sharded``: why no step can be certified, or ""; ``assumed``: of every step;
    ``fsdp``: ``fully_shard`` has sharded the model.
    """

    model: torch.nn.Module
    team: Team | None = None
    parallel: tuple[Any, ...] = ()
    sharded: str = ""
    assumed: tuple[str, ...] = ()
    fsdp: bool = False

    def refusal(self) -> str:
        """Why a step that begins now cannot be certified, or ""."""
        if self.sharded:
            return self.sharded
        for each in self.parallel:
            if getattr(each, "mixed_precision", None) is not None:
                return "DistributedDataParallel(mixed_precision=...) swaps the parameters in forward: not supported"
            if self.team is None and self.assumed:
                continue  # the gradient before any averaging
            ignored = () if self.team is None else getattr(each, "parameters_to_ignore", ())
            for name, parameter in each.module.named_parameters() if ignored else ():
                if parameter.requires_grad and name in ignored:
                    return f"DistributedDataParallel ignores {name}, whose gradient nobody averages: not supported"
            for hook, state in getattr(each, "_comm_hooks", ()):
                over = dist.group.WORLD if state is None else state  # as torch's own hooks take it
                same = over is each.process_group or (state is None and _is_world(each.process_group))
                if not _only_rounds(hook) or not same:
                    return f"the communication hook {_named(hook)} may change the averaged gradient: not supported"
        return ""

    def unfinished(self) -> str:
        """Why DistributedDataParallel has not averaged the gradients of its last backward pass, or ""."""
        for each in self.parallel:
            try:
                each.reducer._check_reducer_finalized()
            except RuntimeError:
                return (
                    "DistributedDataParallel has not averaged all gradients: a parameter took no part in the backward "
                    "pass (find_unused_parameters=True waits for none)"
                )
            except AttributeError as error:
                return f"DistributedDataParallel of torch {torch.__version__} is not known ({error}): not supported"
        return ""


def plan(model: torch.nn.Module, group: Any = None) -> Plan:
    """What ``Monitor(model, group=group)`` means.

    Args:
        model: a DistributedDataParallel model is certified over its process group; its parameters bear the names of
            the module inside. One that ``fully_shard`` has sharded is certified over its mesh.
        group: a process group, whose ranks average the gradients of equal models in whatever way, or "local".

    Raises:
        AdcertError: if torch.distributed runs several ranks and it is not clear which of this is meant.
    """
    ready = dist.is_available() and dist.is_initialized()
    if group is not None and group != LOCAL and not (ready and isinstance(group, dist.ProcessGroup)):
        raise AdcertError(f'group is a process group of torch.distributed, or "local", got {group!r}')
    parallel = [each for each in model.modules() if _is_parallel(each)]
    inner = model.module if parallel and parallel[0] is model else model
    assert isinstance(inner, torch.nn.Module)
    fsdp = is_sharded(model)
    sharded = _unusual(model, group, parallel) if fsdp else _sharded(model)
    if group == LOCAL or sharded:
        several = ready and dist.get_world_size() > 1
        own = "the gradient is this rank's own, before any averaging"
        return Plan(inner, None, tuple(parallel), sharded, (own, _QUIET) if several else ())
    if fsdp and group is None:
        group = Shards(model).group()
    if group is None:
        groups = list({id(each.process_group): each.process_group for each in parallel}.values())
        if len(groups) > 1:
            raise AdcertError("the model holds DistributedDataParallel modules of several process groups: name group=")
        if groups:
            group = groups[0]
        elif ready and dist.get_world_size() > 1:
            raise AdcertError(
                f"torch.distributed runs {dist.get_world_size()} ranks, and this model is no DistributedDataParallel: "
                'hand over the parallel model, or group= with the ranks that average its gradients, or group="local" '
                "to certify this rank's own gradient"
            )
    averaging = [dist.get_process_group_ranks(each.process_group) for each in parallel]  # type: ignore[arg-type]
    for ranks in averaging:
        if group is not None and ranks != dist.get_process_group_ranks(group):
            raise AdcertError("the ranks of group= are not those over which DistributedDataParallel averages gradients")
    if group is None or dist.get_world_size(group) == 1:
        return Plan(inner, None, tuple(parallel), fsdp=fsdp)
    by = "FSDP" if fsdp else "DistributedDataParallel" if parallel else ""
    return Plan(inner, Team(group, by), tuple(parallel), fsdp=fsdp)


def everywhere(action: Callable[[], T]) -> list[T]:
    """What ``action`` gives on each rank of torch.distributed, in their order; all ranks call it at the same place.

    Raises:
        Exception: on every rank, if it fails on one, so that none goes on and waits for the others: what ``action``
            raised where it failed, elsewhere an AdcertError that names the rank.

    Example:
        >>> everywhere(lambda: 1)  # in a process of its own
        [1]
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [action()]
    error: Exception | None = None
    mine: tuple[str, T | None] = "", None
    try:
        mine = "", action()
    except Exception as caught:
        error, mine = caught, (str(caught) or type(caught).__name__, None)
    found: list[Any] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    if error is not None:
        raise error
    for rank, (reason, _) in enumerate(found):
        if reason:
            raise AdcertError(f"rank {rank}: {reason}")
    return [value for _, value in found]


def _is_parallel(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.parallel.DistributedDataParallel)


def _is_world(group: Any) -> bool:
    return dist.get_process_group_ranks(group) == list(range(dist.get_world_size()))


def _only_rounds(hook: Any) -> bool:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return any(hook is getattr(default_hooks, name, None) for name in _ROUNDING)


def _named(hook: Any) -> str:
    return getattr(hook, "__name__", type(hook).__name__)


def _sharded(model: torch.nn.Module) -> str:
    """Why no rank has whole parameters, or ""; of a model that ``fully_shard`` has not seen."""
    fsdp, tensor = sys.modules.get("torch.distributed.fsdp"), sys.modules.get("torch.distributed.tensor")
    if fsdp is not None and any(isinstance(each, fsdp.FullyShardedDataParallel) for each in model.modules()):
        return "FullyShardedDataParallel (FSDP1) flattens parameters: not supported, use fully_shard (FSDP2)"
    if tensor is not None and any(isinstance(p, tensor.DTensor) for p in model.parameters()):
        return "parameters are distributed tensors: not supported, use DistributedDataParallel"
    return ""


def _unusual(model: torch.nn.Module, group: Any, parallel: list[torch.nn.Module]) -> str:
    """Why steps of a model that ``fully_shard`` has sharded cannot be certified over this group, or ""."""
    if group == LOCAL:
        return 'FSDP averages the gradient, no rank has its own: leave group="local" out'
    if parallel:
        return "FSDP and DistributedDataParallel in one model: not supported, use one of them"
    try:
        return Shards(model, None if group is None else dist.get_process_group_ranks(group)).setting()
    except (AttributeError, KeyError) as error:
        return f"FSDP of torch {torch.__version__} is not known ({error}): not supported, use DistributedDataParallel"


class Team:
    """The ranks that certify a step together. Every rank makes one, at the same place in its program.

    ``by``: who averages the gradients, so that they are compared, or "". Used by one thread at a time.
    """

    def __init__(self, group: Any, by: str) -> None:
        self.parallel = bool(by)
        self._channel = Channel(group)
        self._number = 0
        self._ended = -1
        size = self._channel.size
        averaged = f"{by} averages" if by else "the program averages, or adds up,"
        self._assumptions = (
            f"the {size} ranks have the same parameters, and {averaged} their gradients",
            "no other collective of the step carries values from rank to rank",
            _QUIET,
        )

    def conclude(self, number: int, share: Share, memory: Memory | None) -> Certificate:
        """The certificate of everybody's step ``number``: UNDECIDED on all ranks if one of them has a reason."""
        self._number = number
        start = time.perf_counter()
        try:
            merged = self._merged(number, share)
        except PartedError as error:
            return failed(assemble(replace(share, hull=None)), str(error))
        seconds = {**share.seconds, "exchange": time.perf_counter() - start}
        assumptions = (*self._assumptions, *merged.assumptions)
        return conclude(assemble(replace(merged, assumptions=assumptions, seconds=seconds)), memory, self)

    def decide(self, count: int, answer: Callable[[int], Answer], short: bool) -> dict[int, Answer]:
        """See :class:`adcert.systems.Team`: rank r answers for blocks r, r + size, ..."""
        mine: dict[int, Answer] = {}
        rank, size = self._channel.rank, self._channel.size
        for number in range(rank, count, size):
            try:
                mine[number] = answer(number)
            except Exception as error:
                mine[number] = None, Decision(None, None, None, f"rank {rank} failed: {type(error).__name__}: {error}")
            if short and mine[number][1].proof is not None:
                break
        answers: dict[int, Answer] = {}
        for sender, message in enumerate(self._channel.gather(_ANSWERS, self._number, wire.pack_answers(mine))):
            found = wire.unpack_answers(message)
            if not all(number in range(sender, count, size) for number in found):
                raise AdcertError(f"rank {sender} has answered for blocks of others")
            answers.update(found)
        if len(answers) < count and not any(found.proof is not None for _, found in answers.values()):
            raise AdcertError("a rank has left blocks out though no other one is proved empty")
        return answers

    def leave(self, reason: str) -> None:
        """See :class:`adcert.systems.Team`: gloo tells the others that the connection is gone."""
        self._channel.parted = self._channel.parted or reason
        self._channel.close()

    def end(self, number: int) -> None:
        """Tell the others that ``number`` steps were all. A second call for the same number does nothing.

        Raises:
            PartedError: if they have had more or fewer of them, or have not been there for some step.
        """
        if number == self._ended:
            return
        self._ended = number
        try:
            self._channel.gather(_END, number, b"")
        finally:
            self._channel.close()

    def _merged(self, number: int, share: Share) -> Share:
        messages = self._channel.gather(_SHARE, number, self._packed(share))
        return merge([self._read(message) for message in messages])

    def _packed(self, share: Share) -> bytes:
        try:
            message = wire.pack(share)
        except Exception as error:
            return wire.pack(Share([f"its share cannot be sent: {type(error).__name__}: {error}"], share.strict))
        limit = MAX_BYTES // self._channel.size
        if len(message) > limit:
            message = wire.pack(Share([f"{len(message)} bytes of rows, limit {limit}"], share.strict))
        return message

    def _read(self, message: bytes) -> Share:
        try:
            return wire.unpack(message)
        except Exception as error:
            return Share([f"its share cannot be read: {type(error).__name__}: {error}"], False)


class Channel:
    """Gathers messages over gloo, with the ranks and the time-out of ``group``.

    ``parted``: why it does so no more, or "".

    The connections are nobody else's, and no group that torch.distributed would know: ``new_group`` has to be called by
    all processes, members or not, and names groups of the same ranks alike if it need not be.
    """

    def __init__(self, group: Any) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.parted = ""
        self._count = 0
        self._gloo: Any = None
        store = dist.distributed_c10d._get_default_store()
        number = store.add(f"adcert/{group.group_name}/{self.rank}", 1)  # this rank's monitors of the group
        place = dist.distributed_c10d.PrefixStore(f"adcert/{group.group_name}/{number}", store)
        try:
            self._gloo = dist.ProcessGroupGloo(place, self.rank, self.size, _timeout(group))
        except RuntimeError as error:
            raise PartedError(f"not every rank of the group has made its monitor: {error}") from error
        _CHANNELS.add(self)

    def close(self) -> None:
        """Let go of the connections, and wait for gloo's threads: they need the interpreter, which may be ending."""
        self.parted = self.parted or "the monitor is closed: make a new one on every rank"
        self._gloo = None

    def gather(self, kind: int, number: int, message: bytes) -> list[bytes]:
        """Everybody's message of this kind about step ``number``.

        Raises:
            PartedError: if one of them has sent something else, or nothing within the time-out; and ever after.
        """
        if self.parted:
            raise PartedError(self.parted)
        self._count += 1
        head = _HEAD.pack(_MAGIC, kind, number, self._count, len(message))
        try:
            first = self._gathered((head + message)[:_EAGER], _EAGER)
            sizes = self._sizes(first, (kind, number, self._count))
            rest = max(sizes) + _HEAD.size - _EAGER
            second = self._gathered((head + message)[_EAGER:], rest) if rest > 0 else [b""] * self.size
        except PartedError as error:
            self.parted = str(error)
            raise
        except Exception as error:  # gloo's own errors are RuntimeErrors
            place = f"rank {self.rank} {_DOING[kind]} {number}"
            self.parted = f"a rank is lost, or has not come within the time-out ({place}): {error}"
            raise PartedError(self.parted) from error
        return [(a + b)[_HEAD.size : _HEAD.size + size] for a, b, size in zip(first, second, sizes, strict=True)]

    def _sizes(self, first: list[bytes], mine: tuple[int, int, int]) -> list[int]:
        """Bytes of every message; all have to be of this kind, step and number."""
        heads = [_HEAD.unpack_from(message) for message in first]
        strange = [rank for rank, head in enumerate(heads) if head[0] != _MAGIC or head[1] not in range(3)]
        if strange:
            raise PartedError(f"rank {strange[0]} sends what this version of adcert does not know")
        if any(head[1:4] != mine for head in heads):
            told = ", ".join(f"rank {rank} {_DOING[head[1]]} {head[2]}" for rank, head in enumerate(heads))
            raise PartedError(f"the ranks are not at the same step: {told}")
        sizes = [int(head[4]) for head in heads]
        if max(sizes) > MAX_BYTES // self.size:
            raise PartedError(f"a message of {max(sizes)} bytes, limit {MAX_BYTES // self.size}")
        return sizes

    def _gathered(self, message: bytes, size: int) -> list[bytes]:
        sent = torch.zeros(size, dtype=torch.uint8, device="cpu")
        if message:
            sent[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        found = [torch.empty_like(sent) for _ in range(self.size)]
        self._gloo.allgather([found], [sent]).wait()
        return [each.numpy().tobytes() for each in found]


_CHANNELS: weakref.WeakSet[Channel] = weakref.WeakSet()


@atexit.register
def _hang_up() -> None:
    """After what is still waiting has been exchanged."""
    flush_all()
    for channel in list(_CHANNELS):
        channel.close()


def _timeout(group: Any) -> timedelta:
    """A group's time-out; torch's own where it does not tell."""
    found = []
    for device in ("cpu", "cuda"):
        try:
            found.append(group._get_backend(torch.device(device)).options._timeout)
        except (RuntimeError, AttributeError):
            continue
    return min(found, default=dist.constants.default_pg_timeout)
