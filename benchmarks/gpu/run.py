"""The run: part after part within the time, each saved, the parts with kernels in a process of their own.

    python -m gpu.run [--only PART,...] [--seconds 480] [--results FOLDER] [--dry]

``--dry`` runs tiny sizes on the CPU, to try the benchmarks themselves. A process that dies takes one case with it: the
next one goes on with the cases that are left. Exit status 0 if no part and no case failed.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.paths import ROOT, without_folders
from gpu.session import Part, PoisonedError, Results, described

RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 480.0
RESERVE = 8.0  # seconds for the tables at the end
ATTEMPTS = 4  # processes for one part
POISONED = 3  # exit status


@dataclass(frozen=True)
class Spec:
    """``limit``: seconds a part may take; ``least``: with less than this left it is not begun.

    A part that is still running ``grace`` seconds after its time hangs, and is ended with its process.
    """

    name: str
    function: str
    limit: float
    least: float
    external: bool = False
    grace: float = 15.0


PARTS = (
    Spec("tests", "gpu.external:tests", 130, 20, external=True),
    Spec("check", "gpu.check:part", 40, 5),
    Spec("bandwidth", "gpu.kernels:bandwidth", 20, 3),
    Spec("graphs", "gpu.operators:graphs", 20, 3),
    Spec("kernels", "gpu.kernels:kernels", 90, 10),
    Spec("steps", "gpu.steps:small", 100, 10),
    Spec("resnet50", "gpu.steps:large", 100, 20),
    Spec("operators", "gpu.operators:operators", 30, 10),
    Spec("compile", "gpu.compiled:compiled", 80, 30),
    Spec("naive", "gpu.steps:direct", 30, 10),
    Spec("sanitizer", "gpu.external:sanitizer", 120, 25, external=True),
)
FINAL = ("done", "failed", "skipped")


def found(place: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def parts_of(place: str) -> dict[str, Spec]:
    return {spec.name: spec for spec in found(place)}


def run_part(spec: Spec, results: Results, end: float, call: Any, poisoned: Any = None) -> None:
    """One part, whatever becomes of it; ``end`` is the time of day at which the run has to be over."""
    data = results.part(spec.name)
    left = end - time.time()
    if left < spec.least:
        data |= {"status": "skipped", "why": f"{max(0, round(left))} s were left, it needs {spec.least:.0f} s"}
        results.save()
        return
    seconds = max(1.0, min(spec.limit - data.get("seconds", 0.0), left))
    part = Part(results, spec.name, seconds, *([poisoned] if poisoned else []))
    data |= {"status": "running", "began": time.time()}
    results.save()
    try:
        call(part)
        data["status"] = "done"
    except PoisonedError:
        data["status"] = "again"
        raise
    except Exception as error:
        data |= {"status": "failed", "failure": described(error)}
        if poisoned and poisoned():
            raise PoisonedError(spec.name) from error
    finally:
        used(data)
        results.save()


def used(data: dict[str, Any]) -> None:
    """Adds the time since the part began, or went on, to its seconds."""
    data["seconds"] = round(data.get("seconds", 0.0) + time.time() - data.pop("began", time.time()), 1)


# the process of the parts with kernels


def work(options: argparse.Namespace) -> None:
    """Runs parts until one loses the GPU; a part that hangs is ended with the process, by a watchdog."""
    from gpu.timing import Device

    results, device, parts, end = Results(options.file), Device(options.dry), parts_of(options.parts), options.end
    for name in options.work.split(","):
        spec = parts[name]
        faulthandler.dump_traceback_later(max(1.0, min(spec.limit + spec.grace, end - time.time() + 3)), exit=True)
        try:
            run_part(spec, results, end, lambda part, spec=spec: found(spec.function)(device, part), device.poisoned)
        except PoisonedError:
            sys.stderr.flush()
            os._exit(POISONED)  # a lost GPU may hang the usual way out
        finally:
            faulthandler.cancel_dump_traceback_later()


def supervise(names: list[str], path: Path, end: float, options: argparse.Namespace) -> None:
    """Lets processes work on these parts until each has its status."""
    inherited = ["--parts", options.parts, "--end", str(end), "--file", str(path), *(["--dry"] if options.dry else [])]
    while names:
        if time.time() > end - 2:  # too late for another process
            results = Results(path)
            for name in names:
                results.part(name).setdefault("why", "no time was left")
                results.part(name)["status"] = "skipped" if results.part(name)["status"] == "waiting" else "failed"
            results.save()
            return
        before = progress(path, names)
        command = [sys.executable, "-m", "gpu.run", "--work", ",".join(names), *inherited]
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, stderr=output)
            try:
                status = process.wait(timeout=max(1.0, end - time.time() + 5))
            except BaseException as error:
                process.kill()
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                status = -9
            output.seek(0)
            said = without_folders(output.read())
        results = Results(path)
        cut_off(results, names, status, said)
        names[:] = [name for name in names if results.part(name)["status"] not in FINAL]
        if names and before == progress(path, before):
            for name in names:  # it does not even begin
                results.part(name).update(status="failed", failure={"message": f"exit status {status}: {said[-1500:]}"})
            results.save()
            return


def progress(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Changes whenever a process has done anything."""
    parts = {name: Results(path).part(name) for name in names}
    return {name: (part["status"], part.get("tried"), len(part.get("crashes", []))) for name, part in parts.items()}


def cut_off(results: Results, names: Sequence[str], status: int, said: str) -> None:
    """What a process left behind that died: the part it was at is tried again, without the case it was at."""
    for name in names:
        data = results.part(name)
        if data["status"] not in ("running", "again"):
            continue
        used(data)
        crash = {"exit_status": status, "at": data.get("at", ""), "output": said[-2500:]}
        data.setdefault("crashes", []).append(crash)
        if len(data["crashes"]) >= ATTEMPTS or crash["at"] in [c["at"] for c in data["crashes"][:-1]]:
            data |= {"status": "failed", "failure": {"message": f"its process ended {len(data['crashes'])} times"}}
        else:
            data["status"] = "again"
    results.save()


# the whole


def everything(results: Results, names: Sequence[str], end: float, options: argparse.Namespace) -> None:
    waiting, parts = list(names), parts_of(options.parts)
    while waiting:
        spec = parts[waiting[0]]
        if spec.external:
            run_part(spec, results, end, lambda part, spec=spec: found(spec.function)(part, options.dry))
            tell(results, waiting[:1])
            del waiting[0]
            continue
        together = []
        while waiting and not parts[waiting[0]].external:
            together.append(waiting.pop(0))
        supervise(list(together), results.path, end, options)
        results.data = Results(results.path).data
        tell(results, together)


def tell(results: Results, names: Sequence[str]) -> None:
    for name in names:
        data = results.part(name)
        errors = len(data.get("errors", [])) + len(data.get("crashes", []))
        print(f"{name}: {data['status']}, {data.get('seconds', 0)} s" + (f", {errors} errors" if errors else ""))


def faultless(results: Results) -> bool:
    parts = results.data["parts"].values()
    return not any(p["status"] == "failed" or p.get("errors") or p.get("crashes") or p.get("failures") for p in parts)


def begin(options: argparse.Namespace, names: Sequence[str]) -> Results:
    from gpu.machine import describe, said, slug

    about = describe(options.dry)
    fresh = {
        "datetime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": said("git", "rev-parse", "HEAD"),
        "machine": about,
        "libraries": options.libraries,
        "parts": {name: {"status": "waiting"} for name in names},
    }
    results = Results(options.results / f"gpu-{slug(about['gpu'])}.json", fresh)
    results.save()
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    if options.work:
        work(options)
        return 0
    names = options.only.split(",") if options.only else list(parts_of(options.parts))
    end = options.began + options.seconds - RESERVE
    results = begin(options, names)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        everything(results, names, end, options)
    finally:
        results.data = Results(results.path).data
        results.data["seconds"] = round(time.time() - options.began, 1)
        for data in results.data["parts"].values():
            for passing in ("tried", "at"):
                data.pop(passing, None)
        results.save()
        from gpu.render import render

        print(f"\n{render(results.data)}\n\nsaved: {results.path.name}", flush=True)
    return 0 if faultless(results) else 1


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"of {','.join(spec.name for spec in PARTS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the whole run")
    parser.add_argument("--began", type=float, default=time.time(), help="time of day from which they count")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--libraries", default="", help="whether the libraries were found or built")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--parts", default="gpu.run:PARTS", help=argparse.SUPPRESS)
    for hidden, kind in (("--work", str), ("--file", Path), ("--end", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.results = options.results.absolute()
    if options.only and (unknown := set(options.only.split(",")) - set(parts_of(options.parts))):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    sys.exit(main())
