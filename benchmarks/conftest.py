"""What `make bench` saves: the machine without its name, the version of torch, and no raw data."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    cpu = machine_info.get("cpu", {})
    kept = {
        "cpu": cpu.get("brand_raw") or machine_info.get("machine", "unknown processor"),
        "cores": cpu.get("count"),
        "python": machine_info["python_version"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    machine_info.clear()
    machine_info.update(kept)


@pytest.hookimpl
def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["commit_info"] = {key: output_json["commit_info"].get(key) for key in ("id", "dirty")}
    for row in output_json["benchmarks"]:
        row.pop("options", None)
        row["params"] = {key: value for key, value in (row["params"] or {}).items() if isinstance(value, int | str)}
        row["stats"] = {key: row["stats"][key] for key in ("min", "q1", "median", "q3", "max", "rounds")}
