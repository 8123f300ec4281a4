"""Processes that form a gloo group; all of them do what a test tells them."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _serve(rank: int, size: int, port: int, seconds: float, orders: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    while True:
        order = orders.recv()
        if order is None:
            break
        function, arguments = order
        try:
            orders.send((True, function(rank, *arguments)))
        except Exception:
            orders.send((False, traceback.format_exc()))
    dist.destroy_process_group()
    os._exit(0)  # quickly


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun puts into the environment; ``port``: of a store that is there already."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    named = {name: str(value) for name, value in found.items()}
    elastic = {"RUN_ID": "test", "RESTART_COUNT": "0", "USE_AGENT_STORE": "True"}
    return {**named, "MASTER_ADDR": "127.0.0.1", **{f"TORCHELASTIC_{name}": value for name, value in elastic.items()}}


def launched(rank: int) -> None:
    """Tell libraries of this rank as torchrun does."""
    os.environ.update(variables(rank, dist.get_world_size(), 0))


class World:
    """``size`` spawned ranks; ``seconds``: the group's time-out. Functions have to be at the top of a module."""

    def __init__(self, size: int, seconds: float = 60.0) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self._ends: list[Connection] = []
        self.processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, seconds, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, limit: float = 240.0) -> list[Any]:
        """What ``function(rank, *arguments)`` returns on every rank, None where the rank died over it."""
        for end in self._ends:
            end.send((function, arguments))
        results, failures = [], []
        for rank, end in enumerate(self._ends):
            assert end.poll(limit), f"rank {rank} hangs in {function.__name__}"
            try:
                good, result = end.recv()
            except EOFError:
                good, result = True, None
            results.append(result)
            failures += [] if good else [f"rank {rank}: {result}"]
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        """End the processes, those that hang too."""
        for end in self._ends:
            try:
                end.send(None)
            except OSError:
                continue
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def assert_goes_on(found: list[Any], names: list[str], folder: Path) -> list[dict[str, Any]]:
    """Two ranks trained plainly, certified, and resumed after a failure: the same weights, totals and logs.

    Six steps; the job that failed was resumed after the second. Returns the lines of the certified job's log.
    """
    first, second = found
    assert first == second
    plain, certified, resumed = first["digests"]
    assert plain == certified == resumed
    assert first["whole"]["totals"] == first["resumed"]["totals"]
    assert (first["whole"]["totals"]["certified"], first["whole"]["totals"]["aborted"]) == (6, 0)
    assert all(shapes == names and set(p) <= set(names) for _, _, p, shapes in first["whole"]["certificates"])
    whole, log, superseded = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("whole", "log", "log.superseded")
    )
    assert [line.get("step") for line in whole] == [line.get("step") for line in log] == [*range(1, 7), None]
    assert [line.get("step") for line in superseded] == [3, 4, None]
    return whole
