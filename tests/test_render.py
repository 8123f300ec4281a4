"""The rendered benchmarks: every figure is the file's, and only the part between the markers changes."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path
from typing import Any

import pytest
import render
from gpu import render as gpu_render

ROOT = Path(__file__).resolve().parent.parent
PAIRS = {"plain_s": 0.25, "ratio": 1.044, "ratio_q1": 1.0, "ratio_q3": 1.1}
VERDICTS = {"certified": 42, "uncertified": 1, "undecided": 0, "ties_per_step": 18486}
MEMORY = {
    "plain_rss_mib": 600.2, "certified_rss_mib": 630.0, "added_rss_percent": 5.0, "added_tensors_percent": -3.25,
}  # fmt: skip


def row(file: str, name: str, **info: Any) -> dict[str, Any]:
    return {
        "fullname": f"benchmarks/{file}.py::{name}",
        "params": {"count": 32},
        "extra_info": info,
        "stats": {"median": 0.00164},
    }


def results() -> dict[str, Any]:
    case = {"model": "vgg11-bn", "low": True, "inplace": True}
    note = {"throughput": 1.19, "naive_ratio": 5273.6, "naive_note": "extrapolated from 32 of 20,123 pairs"}
    return {
        "machine_info": {"cpu": "A processor", "cores": 2, "threads": 2, "torch": "2.13.0", "python": "3.11.7"},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": [
            row("bench_steps", "test_certified_over_plain[x]", **case, **PAIRS, **VERDICTS, **note),
            row("bench_memory", "test_peak_memory[x]", **case, **MEMORY, **VERDICTS),
            row("bench_scaling", "test_batch_size[16]", batch=16, **PAIRS, **VERDICTS),
            row("bench_scaling", "test_tie_rate[5]", achieved_percent=4.9, **PAIRS, **VERDICTS),
            row("bench_scaling", "test_rows[100-empty]", rows=100, nonempty=False, reason="highs"),
            row("bench_backward", "test_engine[32]", **{"seconds per difference": 0.0037}),
            row("bench_ops", "test_relu_forward[x]", ratio=0.5),
        ],
    }


def test_render() -> None:
    lines = render.render(results()).splitlines()
    assert lines[0] == "A processor, 2 threads, torch 2.13.0, Python 3.11.7, 2026-01-02."
    assert (
        "| vgg11-bn, in-place ReLU | bfloat16 | 250 ms | 1.04 (1.00 to 1.10) | 1.19 "
        "| 5,274 (extrapolated from 32 of 20,123 pairs) | 42 / 1 / 0 |"
    ) in lines
    assert "| vgg11-bn, in-place ReLU | bfloat16 | 600 MiB | 630 MiB | +5.0 % | -3.2 % | 42 / 1 / 0 |" in lines
    assert "| 16 | 250 ms | 1.04 (1.00 to 1.10) | 42 / 1 / 0 |" in lines
    assert "| 4.90 % | 18,486 | 1.04 (1.00 to 1.10) | 42 / 1 / 0 |" in lines
    assert "| 100 | empty | 1.64 ms | highs |" in lines
    assert "| batched | 32 | 3.7 ms |" in lines


def test_the_ratio_of_undecided_steps_is_called_so() -> None:
    (saved,) = (row for row in results()["benchmarks"] if "batch_size" in row["fullname"])
    saved["extra_info"] |= {"certified": 0, "uncertified": 0, "undecided": 9}
    assert "| 16 | 250 ms | nothing decided: 1.04 (1.00 to 1.10) | 0 / 0 / 9 |" in render.batches(
        results() | {"benchmarks": [saved]}
    )


def test_examples() -> None:
    assert doctest.testmod(render).attempted > 0 and doctest.testmod(render).failed == 0


def test_what_is_not_in_the_file_has_no_line() -> None:
    only = results() | {"benchmarks": []}
    assert render.render(only) == "A processor, 2 threads, torch 2.13.0, Python 3.11.7, 2026-01-02."


def test_only_the_marked_part_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, text = tmp_path / "cpu.json", tmp_path / "README.md"
    saved.write_text(json.dumps(results()))
    text.write_text(f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
    for _ in range(2):  # the second time changes nothing
        render.main([str(saved), "--write", str(text)])
        rendered = capsys.readouterr().out.strip()
        assert text.read_text() == f"before\n{render.BEGIN}\n\n{rendered}\n\n{render.END}\nafter\n"


@pytest.mark.parametrize("text", ["", render.BEGIN, render.END + render.BEGIN, 2 * (render.BEGIN + render.END)])
def test_a_text_without_its_markers_is_left_alone(text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        render.rewrite(text, "new")


def test_the_readme_has_the_markers() -> None:
    assert "new" in render.rewrite((ROOT / "README.md").read_text(), "new")


SAVED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def named(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", [path for path in SAVED if not path.name.startswith("gpu-")], ids=named)
def test_saved_results_render_and_name_no_machine(path: Path) -> None:
    saved = json.loads(path.read_text())
    assert render.render(saved)
    assert saved["machine_info"].keys() == {"cpu", "cores", "python", "torch", "threads"}
    assert saved["commit_info"].keys() == {"id", "dirty"}
    assert '"data"' not in path.read_text() and '"/' not in path.read_text()


@pytest.mark.parametrize("path", [path for path in SAVED if path.name.startswith("gpu-")], ids=named)
def test_saved_results_of_a_gpu_render_and_name_no_folder(path: Path) -> None:
    saved = json.loads(path.read_text())
    assert saved["machine"]["gpu"] != "dry"
    assert "cannot be shown" not in gpu_render.render(saved)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|opt|usr|work)/", path.read_text())
