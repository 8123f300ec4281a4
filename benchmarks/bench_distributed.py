"""Two ranks that certify the global batch: what the exchange adds to a step. gloo on this machine, half a batch each.

    python benchmarks/bench_distributed.py [vgg11 vgg11-bn resnet18]

Prints, for every model, medians over the steps of the first rank: a plain DistributedDataParallel step, a certified one
of which each rank certifies its own gradient (group="local"), and one certified together, in turn; ``exchange``, how
long the worker threads take from their own share to everybody's (mostly waiting for the other rank), and ``work``, the
processor time of it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import Case, photos

import adcert
from adcert import distributed

WARM_UP, STEPS, BATCH, RANKS = 3, 15, 128, 2
WAYS = ("plain", "local", "together")


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
    built = Case(model).build()
    parallel = DistributedDataParallel(built if way == "plain" else adcert.convert(built))
    optimizer = torch.optim.SGD(parallel.parameters(), 0.05, 0.9, weight_decay=1e-4)
    group = "local" if way == "local" else None
    monitor = None if way == "plain" else adcert.Monitor(parallel, group=group, keep=2 * STEPS)

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        if monitor is None:
            nn.functional.cross_entropy(parallel(x), y).backward()
        else:
            with monitor.step():
                nn.functional.cross_entropy(parallel(x), y).backward()
        optimizer.step()
        if monitor is not None:
            monitor.flush()  # all that is deferred counts
        return time.perf_counter() - start

    return step, monitor


def measure(rank: int, port: int, model: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    spent = timed()
    steps = {way: trainer(model, way) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number, batch in enumerate(photos(BATCH, WARM_UP + STEPS)):
        x, y = (t.tensor_split(RANKS)[rank] for t in batch)
        for way, (step, _) in steps.items():
            taken = step(x, y)
            if number >= WARM_UP:
                seconds[way].append(taken)
    monitor = steps["together"][1]
    assert monitor is not None
    monitor.close()
    if rank == 0:
        certificates = list(monitor.certificates)[WARM_UP:]
        plain = median(seconds["plain"])
        ratios = [a / b for a, b in zip(seconds["together"], seconds["local"], strict=True)]
        work = median(spent[WARM_UP:])
        found = {
            "model": model,
            "plain_s": round(plain, 4),
            "local_s": round(median(seconds["local"]), 4),
            "together_s": round(median(seconds["together"]), 4),
            "together_over_local": [round(x, 3) for x in quantiles(ratios, n=4)],
            "exchange_s": round(median(c.seconds["exchange"] for c in certificates), 5),
            "work_s": round(work, 5),
            "work_over_step": round(work / plain, 4),
            "verdicts": sorted(str(c.verdict) for c in certificates),
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
