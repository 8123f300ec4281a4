"""Certified training steps beside plain ones on the GPU: time, peak memory, host waits, and the weights bit by bit."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import naive
import torch
from torch import Tensor, nn
from training import Batch, Case, Race, affordable, optimizer, spread, trainer

import adcert
from gpu.pictures import pictures
from gpu.session import Part, Row
from gpu.timing import Device

SMALL = tuple(Case(model, low) for low in (False, True) for model in ("vgg11", "vgg11-bn", "resnet18"))
LARGE = tuple(Case("resnet50", low, size=224, channels_last=True) for low in (False, True))
TRIAL = (Case("vgg11", channels_last=True),)
KINDS = ("plain", "certified")
WARM_UP = 3
MIB = 2**20


def small(device: Device, part: Part) -> None:
    """The networks of the training job, at their usual size; first all times, then the rest."""
    measured(device, part, SMALL[:1] if device.dry else SMALL, [2 if device.dry else 128], 10.0)


def large(device: Device, part: Part) -> None:
    """ResNet50; with a smaller batch where the usual one does not fit."""
    measured(device, part, TRIAL if device.dry else LARGE, [2] if device.dry else [256, 128, 64, 32], 20.0)


def measured(device: Device, part: Part, cases: Sequence[Case], sizes: Sequence[int], seconds: float) -> None:
    for table, measure in (("times", partial(times, seconds=seconds)), ("memory", memory), ("waits", waits)):
        part.each(table, {str(c): partial(fitting, measure, c, device, sizes) for c in cases}, least=seconds / 2)
    fewer = [min(32, size) for size in sizes[:1]]
    part.each("weights", {str(c): partial(fitting, weights, c, device, fewer) for c in cases}, least=seconds / 4)


def fitting(measure: Callable[[Case, Device, int], Row], case: Case, device: Device, sizes: Sequence[int]) -> Row:
    """The measurement with the first batch size that fits into the memory."""
    about = {"model": case.model, "low": case.low, "channels_last": case.channels_last, "size": size_of(case, device)}
    for size in sizes:
        try:
            return about | {"batch": size} | measure(case, device, size)
        except torch.cuda.OutOfMemoryError:
            if size == sizes[-1]:
                raise
        finally:
            clear(device)
    raise AssertionError("no batch size was given")


def size_of(case: Case, device: Device) -> int:
    return 32 if device.dry else case.size


def clear(device: Device) -> None:
    """Give back all memory that nothing needs any more."""
    device.forget()
    gc.collect()
    if not device.dry:
        torch.cuda.empty_cache()


def batches(case: Case, device: Device, size: int, count: int) -> tuple[list[Batch], str]:
    """On the device, in the layout of the network."""
    made, source = pictures(size, count, size_of(case, device))
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return [(x.to(device.torch, memory_format=layout), y.to(device.torch)) for x, y in made], source


# time


def times(case: Case, device: Device, size: int, seconds: float) -> Row:
    """Consecutive steps, during which the host runs ahead; then single ones, waiting for the device after each."""
    race = Race(case, device.torch)
    data, source = batches(case, device, size, 4)
    each = [race.pair(*data[k % len(data)]) for k in range(1 if device.dry else WARM_UP)][-1]
    length = affordable(seconds / 12, each, 2, 2 if device.dry else 20)
    rounds = affordable(seconds / 2, length * each, 2 if device.dry else 4, 2 if device.dry else 20)
    run = [data[k % len(data)] for k in range(length)]
    found = consecutive(race, run, rounds)
    for k in range(affordable(seconds / 4, each, 3, 3 if device.dry else 20)):
        race.pair(*data[k % len(data)])
    alone = race.ratios(1 if device.dry else WARM_UP)
    return {
        "data": source,
        **found,
        "alone_plain_ms": round(1e3 * alone["plain_s"], 3),
        "alone_ratio": alone["ratio"],
        **{key: alone[f"ratio_{key[6:]}"] for key in ("alone_q1", "alone_q3")},
        **race.verdicts(),
    }


def consecutive(race: Race, run: Sequence[Batch], rounds: int) -> Row:
    """Rounds of steps of one kind, in turn first; ``paid`` waits for the last verdict too."""
    seen: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind in KINDS[:: -1 if number % 2 else 1]:
            seen[kind].append(race.together(kind, run))
    pairs = list(zip(*seen.values(), strict=True))
    return {
        "rounds": rounds,
        "steps_a_round": len(run),
        "plain_ms": round(1e3 * median(done for done, _ in seen["plain"]) / len(run), 4),
        "certified_ms": round(1e3 * median(done for done, _ in seen["certified"]) / len(run), 4),
        **spread([certified[0] / plain[0] for plain, certified in pairs]),
        **spread([certified[1] / plain[1] for plain, certified in pairs], "paid"),
    }


# memory


def memory(case: Case, device: Device, size: int) -> Row:
    """Peak of what torch's allocator holds in steps of one kind, with nothing of the other there."""
    data, _ = batches(case, device, size, 2)
    peaks = {}
    for kind in KINDS:
        clear(device)
        model = case.build(device=device.torch)
        monitor = adcert.Monitor(adcert.convert(model)) if kind == "certified" else None
        step = trainer(model, monitor, case.low)
        for k in range(5):
            if k == 2 and not device.dry:  # optimiser and workspaces are there
                torch.cuda.reset_peak_memory_stats()
            step(*data[k % 2])
        if monitor is not None:
            monitor.flush()
        device.wait()
        peaks[kind] = 1 if device.dry else torch.cuda.max_memory_allocated()
        del model, monitor, step
    added = 100 * (peaks["certified"] / peaks["plain"] - 1)
    return {f"{kind}_mib": round(peak / MIB, 1) for kind, peak in peaks.items()} | {"added_percent": round(added, 2)}


# host waits


def waits(case: Case, device: Device, size: int) -> Row:
    """How often the host waits for the device in one step, as far as torch can tell, by phase and thread."""
    data, _ = batches(case, device, size, 2)
    row: Row = {}
    for kind in KINDS:
        model = case.build(device=device.torch)
        monitor = adcert.Monitor(adcert.convert(model)) if kind == "certified" else None
        step = phased(model, monitor, case.low)
        for _ in range(2):
            step(data[0], lambda phase: None)
        with counted(device) as seen:
            step(data[1], seen.enter)
            if monitor is not None:
                monitor.flush()
        row[kind] = {phase: sum(places.values()) for phase, places in seen.places.items()}
        row[f"{kind}_where"] = {phase: dict(places.most_common(8)) for phase, places in seen.places.items() if places}
    return row


def phased(
    model: nn.Module, monitor: adcert.Monitor | None, low: bool
) -> Callable[[Batch, Callable[[str], None]], None]:
    """A training step that tells when its next phase begins."""
    descent = optimizer(model)

    def step(batch: Batch, enter: Callable[[str], None]) -> None:
        x, y = batch
        enter("optimizer")
        descent.zero_grad()
        enter("forward")
        with monitor.step() if monitor is not None else nullcontext():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
                loss = nn.functional.cross_entropy(model(x), y)
            enter("backward")
            loss.backward()  # type: ignore[no-untyped-call]
            enter("end of the block")
        enter("optimizer")
        descent.step()
        enter("after the step")

    return step


class Seen:
    """Waits by phase; those of other threads are the ``worker``'s."""

    def __init__(self) -> None:
        self.phase = "optimizer"
        self.places: dict[str, Counter[str]] = {
            phase: Counter() for phase in ("forward", "backward", "end of the block", "optimizer", "worker")
        }

    def enter(self, phase: str) -> None:
        self.phase = phase

    def warned(self, message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            mine = threading.current_thread() is threading.main_thread()
            phase = self.phase if mine else "worker"
            self.places.setdefault(phase, Counter())[f"{Path(filename).name}:{lineno}"] += 1


@contextmanager
def counted(device: Device) -> Iterator[Seen]:
    seen = Seen()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = seen.warned
        if device.dry:
            yield seen
            return
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


# weights


def weights(case: Case, device: Device, size: int) -> Row:
    """Whether a few steps end with the same bits, with deterministic convolutions; plain ones twice, for comparison."""
    data, _ = batches(case, device, size, 3)
    settings = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        first, again, certified = (trained(case, device, data, kind) for kind in ("plain", "plain", "certified"))
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = settings
    return {"steps": len(data), "plain_repeats": equal(first, again), "same": equal(first, certified)}


def trained(case: Case, device: Device, data: Sequence[Batch], kind: str) -> list[Tensor]:
    """The bits of parameters and buffers after a step on each batch."""
    model = case.build(device=device.torch)
    monitor = adcert.Monitor(adcert.convert(model)) if kind == "certified" else None
    step = trainer(model, monitor, case.low)
    for x, y in data:
        step(x, y)
    if monitor is not None:
        monitor.flush()
    return [t.detach().contiguous().flatten().view(torch.uint8) for t in model.state_dict().values()]


def equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


# the direct check


def direct(device: Device, part: Part) -> None:
    """The direct Algorithm 2 of naive.py, extrapolated from a few pairs of each layer, beside a plain step."""

    def run(case: Case) -> Row:
        data, _ = batches(case, device, 8 if device.dry else 128, 2)
        model = case.build(device=device.torch)
        plain = trainer(copy.deepcopy(model), None, case.low)
        each = device.wall(lambda: plain(*data[0]))
        step = naive.trainer(model, optimizer(model), 2 if device.dry else 16, case.low)
        seen = [step(*batch) for batch in data][-1]
        return {
            "model": case.model,
            "low": case.low,
            "plain_ms": round(each, 4),
            "naive_s": round(seen.seconds, 3),
            "naive_ratio": round(1e3 * seen.seconds / each, 1),
            "naive_note": seen.note,
        }

    cases = SMALL[:1] if device.dry else SMALL[:3]
    part.each("naive", {str(case): partial(run, case) for case in cases}, least=6.0)
