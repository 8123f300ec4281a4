"""The parts that are programs of their own: the tests on the GPU, and compute-sanitizer over the checks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from gpu.paths import ROOT, without_folders
from gpu.session import Part, Row

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NOTHING = 5  # pytest's exit status without tests
FOUND = 86  # compute-sanitizer's exit status for what it finds
OURS = "kns=_ZN6adcert"  # kernels whose mangled name holds this


def finished(command: list[str], seconds: float, **environ: str) -> tuple[int | None, str]:
    """Exit status and output of a command; the status is None if its time was up and it was ended, children and all."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path} | environ, stdout=output, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        status: int | None
        try:
            status = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            status = None
            ended(process)
        except BaseException:
            ended(process)
            raise
        output.seek(0)
        return status, without_folders(output.read())


def ended(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=3)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
    process.wait()


# tests


def tests(part: Part, dry: bool) -> None:
    """The tests that need a GPU; of those that fail first in their process, what they say with synchronous launches."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes"
        processes = min(8, max(2, (os.cpu_count() or 4) // 2))
        command = pytest(path, ["tests/test_render.py"], 0) if dry else pytest(path, ["tests"], processes)
        status, output = finished(command, part.left())
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    part.set(**counts(lines), exit_status=status, slowest=slowest(lines))
    if status is None:
        part.note("out of time: the other tests did not run")
    elif status not in (0, 1, NOTHING):
        part.note(f"pytest ended with status {status}: {output[-1500:]}")
    elif not any(part.data[outcome] for outcome in ("passed", "failed", "error")):
        part.note("no test ran on a GPU")
    for test in culprits(lines)[:2]:
        if part.left() > 10:
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
            status, output = finished(command, min(40.0, part.left()), CUDA_LAUNCH_BLOCKING="1")
            part.row("alone", {"test": test, "exit_status": status, "output": output[-2500:]})


def pytest(path: Path, chosen: list[str], processes: int) -> list[str]:
    """The command that runs the chosen tests that need a GPU, and writes their outcomes to a file."""
    parallel = ["-n", str(processes)] if processes and importlib.util.find_spec("xdist") else []
    options = ["-q", "-p", "no:cacheprovider", "-p", "gpu.plugin", "--outcomes", str(path)]
    return [sys.executable, "-m", "pytest", *options, *parallel, *chosen]


def counts(lines: list[Row]) -> Row:
    """How many tests had each outcome, and which failed."""
    outcomes = Counter(line["outcome"] for line in lines)
    bad = [{key: line[key] for key in ("test", "message")} for line in lines if line["outcome"] in ("failed", "error")]
    found: Row = {name: outcomes.get(name, 0) for name in ("passed", "failed", "error", "skipped")}
    return found | {"failures": bad[:60]}


def culprits(lines: list[Row]) -> list[str]:
    """The first test of each process that failed: a kernel that fails takes all later tests of its process with it."""
    first: dict[str, str] = {}
    for line in lines:
        if line["outcome"] in ("failed", "error"):
            first.setdefault(line.get("worker", ""), line["test"])
    return list(dict.fromkeys(first.values()))


def slowest(lines: list[Row]) -> list[Row]:
    ordered = sorted(lines, key=lambda line: -line["seconds"])[:5]
    return [{key: line[key] for key in ("test", "seconds")} for line in ordered]


# compute-sanitizer


def sanitizer(part: Part, dry: bool) -> None:
    """memcheck and, as far as the time goes, the other tools, over a few of the checks; adcert's kernels alone."""
    program = tool()
    if program is None:
        part.note("compute-sanitizer is not on the PATH, nor beside nvcc, nor in CUDA_HOME")
        return
    for name in TOOLS:
        if part.left() < (0 if dry else 20):
            part.note(f"out of time before {name}")
            return
        row = sanitized(program, name, part.left(), dry)
        part.row("tools", row)
        if row["refused"]:
            part.note("compute-sanitizer refused the device or its arguments")
            return


def sanitized(program: str, name: str, seconds: float, dry: bool) -> Row:
    """Without torch's caching allocator each tensor is an allocation of its own, whose ends the tools know."""
    checks = [sys.executable, "-m", "gpu.check", "--thin", "--device", "cpu" if dry else "cuda"]
    options = ["--tool", name, "--error-exitcode", str(FOUND)]
    start = time.monotonic()
    for some in (["--kernel-regex", OURS], []):  # old versions have no filter
        command = [program, *options, *some, *checks]
        status, output = finished(command, seconds - time.monotonic() + start, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if status in (0, None) or "kernel-regex" not in output:
            break
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    passed = re.findall(r"\d+ of \d+ checks passed.*", output)
    clean = status == 0 and bool(summary) and ": 0 " in summary[-1]
    row: dict[str, Any] = {
        "tool": name,
        "clean": clean,
        "summary": summary[-1] if summary else "out of time" if status is None else "none",
        "checks": passed[-1] if passed else "not finished",
        "exit_status": status,
        "seconds": round(time.monotonic() - start, 1),
        "refused": status is not None and not summary,
    }
    return row if clean else row | {"output": output[:3000], "end": output[-1000:]}


def tool() -> str | None:
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=path)
