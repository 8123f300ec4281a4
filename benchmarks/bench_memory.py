"""Peak memory of certified training steps beside plain ones: medians over fresh processes, each kind in turn.

    pytest benchmarks/bench_memory.py --benchmark-only

``rss``: the process's peak resident set after a few steps; ``added_rss_percent``: what a monitor adds to it; ``base``:
the peak before the first step, when everything is imported and built. ``tensors``: the most bytes that the training
thread holds in tensors allocated during one step, by torch.profiler; a worker's show up in the resident set alone.

The resident set is read from VmHWM, since getrusage's ru_maxrss of a new process starts at its parent's peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from training import CASES, Case, photos, trainer

import adcert

BATCH, STEPS = 128, 5
PROCESSES = 5  # of each kind: the resident set varies by a few percent from one to the next
SECONDS = 10.0  # after which no further step is made
MIB = 2**20


def peak_rss() -> int:
    """Peak resident set of this process so far, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def peak_tensors(run: Any) -> int:
    """The most bytes held in tensors that were allocated since ``run()`` began."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def measure(case: Case, monitored: bool) -> dict[str, dict[str, int]]:
    """Train a few steps in this process and tell its peaks in bytes, and what came of the steps."""
    model = case.build()
    monitor = adcert.Monitor(adcert.convert(model)) if monitored else None
    step = trainer(model, monitor, case.low)
    batches = photos(BATCH, STEPS + 1)
    base = peak_rss()
    began = time.perf_counter()
    for x, y in batches[:-1]:
        step(x, y)
        if time.perf_counter() - began > SECONDS:
            break
    if monitor is not None:
        monitor.flush()
    rss = peak_rss()
    tensors = peak_tensors(lambda: step(*batches[-1]))
    report = monitor.report() if monitor else None
    verdicts = {key: getattr(report, key) for key in ("certified", "uncertified", "undecided")} if report else {}
    return {"peaks": {"base": base, "rss": rss, "tensors": tensors}, "verdicts": verdicts}


def in_new_process(case: Case, monitored: bool) -> dict[str, dict[str, int]]:
    command = [sys.executable, __file__, json.dumps([vars(case), monitored])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peak_memory(benchmark: Any, case: Case) -> None:
    found: dict[str, list[dict[str, dict[str, int]]]] = {"plain": [], "certified": []}

    def both() -> None:
        for kind, seen in found.items():
            seen.append(in_new_process(case, kind == "certified"))

    benchmark.pedantic(both, rounds=PROCESSES)
    benchmark.extra_info |= vars(case) | found["certified"][-1]["verdicts"]
    keys = ("base", "rss", "tensors")
    plain, certified = ({key: median(run["peaks"][key] for run in seen) for key in keys} for seen in found.values())
    for kind, peaks in (("plain", plain), ("certified", certified)):
        benchmark.extra_info |= {f"{kind}_{key}_mib": round(value / MIB, 1) for key, value in peaks.items()}
        runs = [run["peaks"]["rss"] / MIB for run in found[kind]]
        benchmark.extra_info[f"{kind}_rss_range_mib"] = [round(min(runs), 1), round(max(runs), 1)]
    for key in ("rss", "tensors"):
        benchmark.extra_info[f"added_{key}_percent"] = round(100 * (certified[key] / plain[key] - 1), 1)


if __name__ == "__main__":
    options, with_monitor = json.loads(sys.argv[1])
    print(json.dumps(measure(Case(**options), with_monitor)))
