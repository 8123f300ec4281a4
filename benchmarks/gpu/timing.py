"""The device and its clocks: CUDA events around single calls, or, for a dry run on the CPU, the wall clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from training import affordable, spread

Call = Callable[[], Any]
FLUSHED = 1 << 28  # bytes, several times what any L2 cache holds
HEADSTART = 0.5  # ms the GPU is kept busy before each timed call, so that the host is ahead of it


class Device:
    """``dry``: sizes are tiny and the wall clock runs, to try the benchmarks themselves, on the CPU or ``name``."""

    def __init__(self, dry: bool = False, name: str = "") -> None:
        self.dry = dry
        self.torch = torch.device(name or ("cpu" if dry else "cuda"))
        if dry:
            torch.set_num_threads(1)
        self._flush: torch.Tensor | None = None
        self._flushes = 1

    def wait(self) -> None:
        if self.torch.type == "cuda":
            torch.cuda.synchronize()

    def poisoned(self) -> bool:
        """Whether an earlier failure has taken the GPU from this process."""
        try:
            self.wait()
            torch.ones(1, device=self.torch).sum().item()
        except torch.cuda.OutOfMemoryError:
            return False
        except RuntimeError:
            return True
        return False

    def times(self, *calls: Call, seconds: float = 0.25, most: int = 40) -> list[list[float]]:
        """Milliseconds of each call, in turns that alternate their order; the L2 cache is flushed before each."""
        self._turns(calls, 2)  # warm-up
        start = time.perf_counter()
        self._turns(calls, 1)
        turns = affordable(seconds, time.perf_counter() - start, 2 if self.dry else 7, 2 if self.dry else most)
        return self._turns(calls, turns)

    def compare(self, ours: Call, theirs: Call, **options: Any) -> dict[str, Any]:
        """Medians of both in milliseconds; the median and quartiles of the ratios of the pairs."""
        mine, plain = self.times(ours, theirs, **options)
        return {
            "ours_ms": round(median(mine), 5),
            "torch_ms": round(median(plain), 5),
            "pairs": len(mine),
            **spread([a / b for a, b in zip(mine, plain, strict=True)]),
        }

    def wall(self, call: Call, seconds: float = 0.5, most: int = 20) -> float:
        """Median milliseconds from the call until the device is done with it: for calls that wait for the device."""

        def once() -> float:
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            return time.perf_counter() - start

        once()
        return 1e3 * median(once() for _ in range(affordable(seconds, once(), 2, most)))

    def _turns(self, calls: Sequence[Call], turns: int) -> list[list[float]]:
        spans: list[list[Any]] = [[] for _ in calls]
        for turn in range(turns):
            for k in list(range(len(calls)))[:: -1 if turn % 2 else 1]:
                spans[k].append(self._span(calls[k]))
        self.wait()
        if self.dry:
            return spans
        return [[start.elapsed_time(end) for start, end in pairs] for pairs in spans]

    def _span(self, call: Call) -> Any:
        """Milliseconds, or on a GPU the two events around the call."""
        if self.dry:
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        self.flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        return start, end

    def forget(self) -> None:
        """Free what flushes the cache, where memory is measured."""
        self._flush = None

    def flush(self) -> None:
        """Overwrite the L2 cache, for long enough that what follows is queued before the GPU gets to it."""
        if self.dry:
            return
        if self._flush is None:
            self._flush = torch.empty(FLUSHED, dtype=torch.uint8, device=self.torch)
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._flush.zero_()
            end.record()
            self.wait()
            self._flushes = max(1, math.ceil(HEADSTART / start.elapsed_time(end)))
        for _ in range(self._flushes):
            self._flush.zero_()
