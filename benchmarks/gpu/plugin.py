"""A pytest plugin: keeps the tests that need a GPU, and writes down each outcome at once.

    pytest -p gpu.plugin --outcomes FILE tests

A test needs a GPU if a parameter is called like one, if it is marked ``cuda`` or ``gpu``, or if it is skipped
where there is none, with a reason that says so. What runs on an emulated device does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu.paths import without_folders

MARKS = frozenset({"cuda", "gpu"})
DEVICE = re.compile(r"(?:^|[-_])(?:cuda|gpu)(?::?\d+)?(?:$|-)")  # as a part of a test's parameters


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--outcomes", help="file that takes one JSON line for each outcome")


def needs_gpu(parameters: str, marks: Mapping[str, str]) -> bool:
    """``parameters``: of the test, as its id shows them; ``marks``: their names, and the reasons they give.

    >>> [needs_gpu(text, {}) for text in ("cuda", "float32-cuda:0-2", "on_gpu", "cpu", "by_cuda_sources", "")]
    [True, True, True, False, False, False]
    >>> [needs_gpu("", marks) for marks in ({"gpu": ""}, {"skipif": "needs a GPU"}, {"skipif": "needs nvcc"})]
    [True, True, False]
    """
    if marks.keys() & MARKS or DEVICE.search(parameters):
        return True
    return bool(re.search(r"\bGPU\b|CUDA device", marks.get("skipif", "")))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    kept: list[Any] = []
    left: list[Any] = []
    for item in items:
        parameters = item.callspec.id if hasattr(item, "callspec") else ""
        marks = {mark.name: str(mark.kwargs.get("reason", "")) for mark in item.iter_markers()}
        needed = needs_gpu(parameters, marks) and "emulated" not in getattr(item, "fixturenames", ())
        (kept if needed else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def pytest_configure(config: Any) -> None:
    if config.getoption("--outcomes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path(config.getoption("--outcomes"))))


class Outcomes:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._write(report.nodeid, "error", report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            self._write(report.nodeid, outcome, report)

    def _write(self, test: str, outcome: str, report: Any) -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(getattr(report, "duration", 0.0), 2)}
        if outcome in ("failed", "error"):
            line |= {"message": _message(report), "worker": getattr(report, "worker_id", "")}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = f"{Path(crash.path).name}:{crash.lineno}: {crash.message}" if crash else str(report.longrepr)[-600:]
    return without_folders(text)[:600]
