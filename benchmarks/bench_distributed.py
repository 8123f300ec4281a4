"""Two ranks that certify the global batch: what the exchange adds to a step. gloo on this machine, half a batch each.

    python benchmarks/bench_distributed.py [vgg11 vgg11-bn resnet18]

Runs of a few steps, in turn: plain DistributedDataParallel, certified steps of which each rank certifies its own
gradient (group="local"), the same again (so that the noise shows), and steps certified together. A run ends when every
rank has all its verdicts. Prints, for every model: medians of the seconds of a step; quartiles of the ratios to the
local runs beside them; of the steps certified together ``exchange``, how long the worker threads take from their own
share to everybody's (mostly waiting for the other rank), and ``work``, the processor time of packing, sending, reading
and merging.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import Counter
from contextlib import nullcontext
from operator import truediv
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import Case, photos

import adcert
from adcert import distributed

WARM_UP, RUNS, STEPS, BATCH, RANKS = 1, 24, 4, 128, 2
WAYS = ("plain", "local", "again", "together")


def timed() -> list[float]:
    """From now on the processor seconds that each share's packing, travelling and merging takes on this thread."""
    spent: list[float] = []
    before = distributed.Team._merged

    def merged(team: distributed.Team, *arguments: Any) -> Any:
        start = time.thread_time()
        found = before(team, *arguments)
        spent.append(time.thread_time() - start)
        return found

    distributed.Team._merged = merged  # type: ignore[method-assign]
    return spent


def trainer(model: str, way: str) -> tuple[Any, adcert.Monitor | None]:
    """A function that does a run and returns the seconds of a step."""
    built = Case(model).build()
    parallel = DistributedDataParallel(built if way == "plain" else adcert.convert(built))
    optimizer = torch.optim.SGD(parallel.parameters(), 0.01, 0.9, weight_decay=1e-4)
    group = None if way == "together" else "local"
    monitor = None if way == "plain" else adcert.Monitor(parallel, group=group, keep=2 * RUNS * STEPS)

    def run(x: torch.Tensor, y: torch.Tensor) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(STEPS):
            optimizer.zero_grad()
            with nullcontext() if monitor is None else monitor.step():
                nn.functional.cross_entropy(parallel(x), y).backward()
            optimizer.step()
        if monitor is not None:
            monitor.flush()  # all that is deferred counts
        dist.barrier()
        return (time.perf_counter() - start) / STEPS

    return run, monitor


def measure(rank: int, port: int, model: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    spent = timed()
    trainers = {way: trainer(model, way) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number, batch in enumerate(photos(BATCH, WARM_UP + RUNS)):
        x, y = (t.tensor_split(RANKS)[rank] for t in batch)
        first = number % len(WAYS)
        for way in (*WAYS[first:], *WAYS[:first]):
            taken = trainers[way][0](x, y)
            if number >= WARM_UP:
                seconds[way].append(taken)
    monitor = trainers["together"][1]
    assert monitor is not None
    monitor.close()
    if rank == 0:
        certificates = list(monitor.certificates)[WARM_UP * STEPS :]
        work = median(spent[WARM_UP * STEPS :])
        found = {
            "model": model,
            "seconds": {way: round(median(taken), 4) for way, taken in seconds.items()},
            "over_local": {
                way: [round(x, 3) for x in quantiles(map(truediv, seconds[way], seconds["local"]), n=4)]
                for way in ("again", "together")
            },
            "exchange_s": round(median(c.seconds["exchange"] for c in certificates), 5),
            "work_s": round(work, 5),
            "work_over_step": round(work / median(seconds["plain"]), 4),
            "verdicts": Counter(str(c.verdict) for c in certificates),
        }
        print(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    for model in sys.argv[1:] or ("vgg11", "vgg11-bn", "resnet18"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.multiprocessing.spawn(measure, (port, model), nprocs=RANKS)


if __name__ == "__main__":
    main()
