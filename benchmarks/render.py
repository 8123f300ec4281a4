"""The saved benchmarks as Markdown, printed or written between two markers of a text.

    python benchmarks/render.py benchmarks/results/cpu.json [--write README.md]

Every figure comes from the file; a benchmark that is not in it has no line. What ``gpu.sh`` saved goes between two
markers of its own, the chief figures of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import gpu.render
from markdown_tables import VERDICTS, Row, table, verdicts

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
GPU = "<!-- gpu:begin -->", "<!-- gpu:end -->"


def of(results: Row, file: str, test: str) -> list[Row]:
    """``extra_info``, ``params``, ``stats`` and the parts of the id of every benchmark of one test function."""
    found = [row for row in results["benchmarks"] if f"{file}.py::{test}[" in row["fullname"]]
    return [
        row["extra_info"]
        | {"params": row["params"], "stats": row["stats"], "id": row["fullname"].split("[")[1].rstrip("]").split("-")}
        for row in found
    ]


def machine(results: Row) -> str:
    info = results["machine_info"]
    return (
        f"{info['cpu']}, {info['threads']} threads, torch {info['torch']}, Python {info['python']}, "
        f"{results['datetime'][:10]}."
    )


def case(row: Row) -> list[str]:
    return [row["model"] + (", in-place ReLU" if row["inplace"] else ""), "bfloat16" if row["low"] else "float32"]


def quartiles(row: Row) -> str:
    """The median ratio and its quartiles; an undecided step was cut short, and its time is not that of a certificate.

    >>> quartiles({"ratio": 1.044, "ratio_q1": 1.0, "ratio_q3": 1.1, "certified": 9, "uncertified": 0})
    '1.04 (1.00 to 1.10)'
    """
    text = f"{row['ratio']:.2f} ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"
    return text if row["certified"] + row["uncertified"] else f"nothing decided: {text}"


def steps(results: Row) -> str:
    header = [
        "model", "precision", "plain step", "certified / plain", "with all deferred work", "naive / plain", VERDICTS,
    ]  # fmt: skip
    lines = [
        [
            *case(row),
            seconds(row["plain_s"]),
            quartiles(row),
            f"{row['throughput']:.2f}",
            f"{row['naive_ratio']:,.0f} ({row['naive_note']})",
            verdicts(row),
        ]
        for row in of(results, "bench_steps", "test_certified_over_plain")
    ]
    return table(header, lines)


def memory(results: Row) -> str:
    header = [
        "model", "precision", "plain peak RSS", "certified peak RSS", "added", "added tensor bytes of a step", VERDICTS,
    ]  # fmt: skip
    lines = [
        [
            *case(row),
            f"{row['plain_rss_mib']:,.0f} MiB",
            f"{row['certified_rss_mib']:,.0f} MiB",
            f"{row['added_rss_percent']:+.1f} %",
            f"{row['added_tensors_percent']:+.1f} %",
            verdicts(row),
        ]
        for row in of(results, "bench_memory", "test_peak_memory")
    ]
    return table(header, lines)


def batches(results: Row) -> str:
    lines = [
        [str(row["batch"]), seconds(row["plain_s"]), quartiles(row), verdicts(row)]
        for row in of(results, "bench_scaling", "test_batch_size")
    ]
    return table(["batch", "plain step", "certified / plain", VERDICTS], lines)


def ties(results: Row) -> str:
    lines = [
        [f"{row['achieved_percent']:.2f} %", f"{row['ties_per_step']:,}", quartiles(row), verdicts(row)]
        for row in of(results, "bench_scaling", "test_tie_rate")
    ]
    header = ["windows tied", "ties a step", "certified / plain", VERDICTS]
    return table(header, lines)


def rows(results: Row) -> str:
    lines = [
        [f"{row['rows']:,}", "nonempty" if row["nonempty"] else "empty", seconds(row["stats"]["median"]), row["reason"]]
        for row in of(results, "bench_scaling", "test_rows")
    ]
    return table(["rows of 27 columns", "answer", "time", "decided by"], lines)


def kernels(results: Row) -> str:
    """One line for each dtype, layout and window: forward and backward, each with the part of the floor reached."""
    found: dict[tuple[str, ...], list[str]] = {}
    for test in ("test_relu_pool_forward", "test_relu_pool_backward"):
        for row in of(results, "bench_ops", test):
            found.setdefault(tuple(row["id"]), []).append(f"{row['ratio']:.2f} ({100 * row['floor']:.0f} %)")
    lines = [[*case, *cells] for case, cells in found.items() if len(cells) == 2]
    return table(["dtype", "layout", "window", "forward", "backward"], lines)


def systems(results: Row) -> str:
    """Large systems: the time of one, whatever generator made it."""
    lines = []
    for row in of(results, "bench_feasibility", "test_decide"):
        height, width, answer, made = row["id"]
        time = seconds(row["stats"]["median"] / row["systems"])
        lines.append([f"{int(height):,} x {width}", made, answer, time, row["reasons"][0]])
    for row in of(results, "bench_feasibility", "test_thin_cone"):
        height, width, *margin = row["id"]
        time = f"{seconds(row['stats']['median'] / row['systems'])}, worst {seconds(row['worst'])}"
        cells = [f"margins of {'-'.join(margin)}", "nonempty", time, row["reasons"][0]]
        lines.append([f"{int(height):,} x {width}", *cells])
    return table(["rows x columns", "made of", "answer", "time", "decided by"], lines)


def differences(results: Row) -> str:
    lines = [
        [name, str(row["params"]["count"]), seconds(row["seconds per difference"])]
        for name, test in (("batched", "test_engine"), ("torch.autograd.grad", "test_autograd_one_by_one"))
        for row in of(results, "bench_backward", test)
    ]
    return table(["backward passes", "differences", "time of each"], lines)


def seconds(value: float) -> str:
    """
    >>> seconds(0.0123), seconds(2.5)
    ('12.3 ms', '2.50 s')
    """
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


STEPS = """\
**Time of a step**, batch 128 of photographs, pairs in turn in one process: median ratio (quartiles). The next column
pays for deferred work too: consecutive certified steps up to the last verdict, over plain ones. The naive step is
Algorithm 2 written down directly (`benchmarks/naive.py`)."""
KERNELS = """\
**Kernels**, ReLU + max pooling of [128, 64, 32, 32] with ties and touches over torch's relu + max_pool2d; in brackets
the part of the floor reached: the time a copy of the bytes that must move takes, over ours."""
SECTIONS = (
    (STEPS, steps),
    ("**Peak memory**, medians of five processes of each kind in turn.", memory),
    ("**Batch size**, vgg11-bn on photographs, float32.", batches),
    ("**Ties**, vgg11-bn on noise and stripes, batch 128, float32.", ties),
    ("**Rows**, one system decided exactly.", rows),
    ("**Large systems**, decided exactly (`benchmarks/bench_feasibility.py` has more kinds).", systems),
    (KERNELS, kernels),
    ("**Partial backward engine**, two convolutions, batch 128.", differences),
)


def render(results: Row) -> str:
    """Everything in the file as Markdown."""
    parts = [machine(results)]
    for text, section in SECTIONS:
        found = section(results)
        parts += [text, found] if found else []
    return "\n\n".join(parts)


def rewrite(text: str, rendered: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """``text`` with what stands between the two markers replaced.

    >>> rewrite(f"a {BEGIN} old {END} z", "new").split()
    ['a', '<!--', 'benchmarks:begin', '-->', 'new', '<!--', 'benchmarks:end', '-->', 'z']
    """
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and then {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{rendered}\n\n{end}{rest.split(end)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what `make bench` saved")
    parser.add_argument("--write", type=Path, metavar="FILE", help="rewrite FILE between the markers")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text())
    of_gpu = "parts" in results
    print(gpu.render.render(results) if of_gpu else render(results))
    if options.write is not None:
        rendered = gpu.render.render(results, brief=True) if of_gpu else render(results)
        options.write.write_text(rewrite(options.write.read_text(), rendered, GPU if of_gpu else (BEGIN, END)))


if __name__ == "__main__":
    main()
