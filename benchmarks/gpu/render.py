"""The saved results of a run on a GPU as Markdown, beside what they are measured by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from markdown_tables import VERDICTS, Row, table, verdicts

FP32, LOW, FORWARD, MEMORY = 1.02, 1.5, 0.60, 2.0  # the bars: certified / plain, ours / torch, percent


def rows(results: Row, part: str, name: str) -> list[Row]:
    found: list[Row] = results["parts"].get(part, {}).get(name, [])
    return found


def steps(results: Row, name: str) -> list[Row]:
    return [*rows(results, "steps", name), *rows(results, "resnet50", name)]


def machine(results: Row) -> str:
    about = results["machine"]
    tf32 = [name for name in ("convolutions", "matrices") if about[f"tf32_{name}"]]
    driver = f"driver {about['driver']}, " if about.get("driver") else ""
    return (
        f"{about['gpu']}, {driver}torch {about['torch']}, nvcc {about['nvcc'] or 'missing'}, Python {about['python']}, "
        f"{results['datetime'][:10]}. float32 with TF32 in {' and '.join(tf32) or 'nothing'}, as torch has it."
    )


def case(row: Row) -> list[str]:
    layout = "channels_last" if row["channels_last"] else "contiguous"
    return [row["model"], precision(row), f"{row['batch']} x {row['size']} x {row['size']}", layout]


def precision(row: Row) -> str:
    return "bfloat16 autocast" if row["low"] else "float32"


def span(row: Row, name: str) -> str:
    """
    >>> span({"ratio": 1.014, "ratio_q1": 1.0, "ratio_q3": 1.1}, "ratio")
    '1.01 (1.00 to 1.10)'
    """
    return f"{row[name]:.2f} ({row[f'{name}_q1']:.2f} to {row[f'{name}_q3']:.2f})"


# what was promised


def bars(results: Row) -> str:
    lines = [[what, found, f"at most {bar}", "yes" if met else "**no**"] for what, found, bar, met in judged(results)]
    return table(["what", "measured", "bar", "met"], lines)


def judged(results: Row) -> Iterator[tuple[str, str, str, bool]]:
    """What, measured, bar, met."""
    for row in steps(results, "times"):
        bar = LOW if row["low"] else FP32
        decided = row["certified"] + row["uncertified"] > 0
        found = span(row, "ratio") if decided else f"nothing decided: {span(row, 'ratio')}"
        what = f"certified / plain step, {row['model']} {precision(row)}"
        yield what, found, str(bar), row["ratio"] <= bar and decided
    kernels: dict[str, list[float]] = {}
    for row in rows(results, "kernels", "forward"):
        if row["layout"] == "channels_last" and row["dtype"] == "bfloat16":
            shape = "x".join(map(str, row["shape"]))
            kernels.setdefault(f"{shape} {row['window']}", []).append(row["ratio"])
    for name, ratios in kernels.items():
        what, worst = f"forward / torch, channels_last bfloat16 {name}, worst of the tie rates", max(ratios)
        yield what, f"{worst:.2f}", f"{FORWARD:.2f}", worst <= FORWARD
    for row in steps(results, "memory"):
        what, added = f"added peak memory, {row['model']} {precision(row)}", row["added_percent"]
        yield what, f"{added:+.1f} %", f"{MEMORY:.0f} %", added <= MEMORY


# the parts


def outcome(results: Row) -> str:
    """One line for each part, and what went wrong in it."""
    lines = []
    for name, part in results["parts"].items():
        said = [*([part["why"]] if "why" in part else []), *part.get("notes", [])]
        said += [part["failure"]["message"]] if "failure" in part else []
        errors = [f"{e['case']}: {e['type']}: {e['message']}" for e in part.get("errors", [])]
        said += [f"{len(errors)} cases failed, e.g. {'; '.join(errors[:3])}"] if errors else []
        said += [f"a process ended ({c['exit_status']}) at {c['at'] or 'no case'}" for c in part.get("crashes", [])]
        text = " / ".join(said).replace("|", "\\|").replace("\n", " ")[:900]
        lines.append([name, part["status"], f"{part.get('seconds', 0):.0f} s", text])
    return table(["part", "status", "time", "notes"], lines)


def tests(results: Row) -> str:
    part, check = results["parts"].get("tests", {}), results["parts"].get("check", {})
    lines = []
    if "passed" in part:
        lines = [["tests", *(str(part[key]) for key in ("passed", "failed", "error", "skipped"))]]
    if "passed" in check:
        wrong = str(len(check.get("errors", [])))
        lines.append(["operators against their CPU kernels", str(check["passed"]), wrong, "", ""])
    graphs = rows(results, "graphs", "graphs")
    if graphs:
        errors = results["parts"]["graphs"].get("errors", [])
        lines.append(["operators in replayed CUDA graphs", str(len(graphs)), str(len(errors)), "", ""])
    found = table(["what", "passed", "failed", "errors", "skipped"], lines)
    bad = [f"* {f['test']}: {f['message'].splitlines()[0] if f['message'] else ''}" for f in part.get("failures", [])]
    return "\n\n".join(filter(None, [found, "\n".join(bad[:15])]))


def sanitizers(results: Row) -> str:
    lines = [[row["tool"], row["summary"], row["checks"]] for row in rows(results, "sanitizer", "tools")]
    return table(["compute-sanitizer", "summary", "checks"], lines)


def times(results: Row) -> str:
    header = [
        "model", "precision", "batch", "layout", "plain step", "certified / plain", "with all deferred work",
        "waiting after each step", VERDICTS,
    ]  # fmt: skip
    lines = [
        [*case(row), f"{row['plain_ms']:.2f} ms", span(row, "ratio"), f"{row['paid']:.2f}", f"{row['alone_ratio']:.2f}",
         verdicts(row)]
        for row in steps(results, "times")
    ]  # fmt: skip
    reasons = [
        f"* undecided steps of {row['model']} {precision(row)}: {'; '.join(row['reasons'])[:500]}"
        for row in steps(results, "times")
        if row["undecided"]
    ]
    return "\n\n".join(filter(None, [table(header, lines), "\n".join(reasons)]))


def memory(results: Row) -> str:
    """Peak memory, host waits and bits, by model."""
    found: dict[tuple[str, ...], Row] = {}
    for name in ("memory", "waits", "weights"):
        for row in steps(results, name):
            found.setdefault((row["model"], precision(row)), {})[name] = row
    lines = []
    for names, row in found.items():
        peak, wait, bits = (row.get(name) for name in ("memory", "waits", "weights"))
        cells = ["", "", ""]
        if peak:
            cells[:2] = [f"{peak['plain_mib']:,.0f} MiB", f"{peak['added_percent']:+.1f} %"]
        cells[2] = " / ".join(waited(wait, kind) for kind in ("plain", "certified")) if wait else ""
        lines.append([*names, *cells, same(bits) if bits else ""])
    header = ["model", "precision", "plain peak", "added", "host waits, plain / certified", "weights"]
    return table(header, lines)


def waited(row: Row, kind: str) -> str:
    """Waits in the forward pass + the backward pass + the end of the block (+ the worker's)."""
    seen = row[kind]
    text = " + ".join(str(seen.get(phase, 0)) for phase in ("forward", "backward", "end of the block"))
    return f"{text} (worker {seen.get('worker', 0)})" if kind == "certified" else text


def same(row: Row) -> str:
    if row["same"]:
        return "same bits"
    return "differ" if row["plain_repeats"] else "differ, as two plain runs do"


def kernels(name: str, rates: Sequence[float] = ()) -> Callable[[Row], str]:
    """The section of one table; ``rates``: only these."""

    def section(results: Row) -> str:
        lines = [
            [
                "x".join(map(str, row["shape"])), row["dtype"], row["layout"], row["window"], f"{row['rate']:.0%}",
                f"{1e3 * row['ours_ms']:.1f} us", span(row, "ratio"), percent(row.get("share")),
                percent(row.get("torch_share")), "" if row["same"] else "**differs**",
            ]
            for row in rows(results, "kernels", name)
            if not rates or row["rate"] in rates
        ]  # fmt: skip
        header = ["shape", "dtype", "layout", "window", "rate", "time", "/ torch", "of the copy", "torch's", ""]
        return table(header, lines)

    return section


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def basics(results: Row) -> str:
    """Copies and launches."""
    copies = [[row["case"], f"{row['gb_s']:,.0f} GB/s"] for row in rows(results, "bandwidth", "copies")]
    launches = [
        [row["case"], *(f"{row[key]:.1f} us" for key in ("device_us", "host_us", "in_a_row_us", "alone_us"))]
        for row in rows(results, "bandwidth", "launches")
    ]
    tables = (
        table(["copy within the device", "read + written"], copies),
        table(["call", "device", "host", "one of many in a row", "alone, until it is done"], launches),
    )
    return "\n\n".join(filter(None, tables))


def operators(results: Row) -> str:
    keys = ("ms", "ms_windows_on_the_host", "ms_units_on_the_host", "cpu_ms")
    lines = [
        [row["case"], f"{row['mb']:.1f} MB", *(f"{row[key]:.3f}" if key in row else "" for key in keys)]
        for row in rows(results, "operators", "operators")
    ]
    header = ["largest call of a step", "arguments", "ms", "windows on the host", "units on the host", "CPU"]
    return table(header, lines)


def compiled(results: Row) -> str:
    breaks = {row["case"]: row["graph_breaks"] for row in rows(results, "compile", "breaks")}
    lines = [
        [
            row["model"], str(breaks.get(row["case"], "")), f"{row['plain_ms']:.2f} ms", span(row, "compiled_ratio"),
            span(row, "converted_ratio"), span(row, "certified_ratio"),
        ]
        for row in rows(results, "compile", "compiled")
    ]  # fmt: skip
    header = [
        "model", "graph breaks", "plain step", "compiled / plain", "converted, compiled / compiled",
        "certified / compiled",
    ]  # fmt: skip
    if not lines:
        return table(header[:2], [[name, str(count)] for name, count in breaks.items()])
    return table(header, lines)


def naive(results: Row) -> str:
    lines = [
        [row["model"], precision(row), f"{row['plain_ms']:.2f} ms", f"{row['naive_ratio']:,.0f} ({row['naive_note']})"]
        for row in rows(results, "naive", "naive")
    ]
    return table(["model", "precision", "plain step", "naive / plain"], lines)


STEPS = """\
**Steps.** Consecutive steps of each kind in turn, waiting for the GPU only after the last: median ratio (quartiles);
the same until the last verdict is there; single steps, waiting for the GPU after each."""
KERNELS = """\
**ReLU + max pooling with ties and touches** over torch's relu, then max_pool2d; then the part of the copy's bandwidth
at which the bytes that must move do so, and at which torch moves as many. `rate`: of windows with a tie."""
MEMORY_TEXT = "**Memory, host waits (forward + backward + end of the block), weights.**"
GRADIENT = "**Its gradient** over torch's two kernels."
BRIEF: Sequence[tuple[str, Callable[[Row], str]]] = (
    ("**What was promised.**", bars),
    ("**Right or wrong.**", tests),
    ("", sanitizers),
    (STEPS, times),
    (MEMORY_TEXT, memory),
    (KERNELS, kernels("forward", rates=(0.02,))),
    (GRADIENT, kernels("backward")),
)
WHOLE: Sequence[tuple[str, Callable[[Row], str]]] = (
    *BRIEF[:-2],
    ("**The ceiling.**", basics),
    (KERNELS, kernels("forward")),
    (GRADIENT, kernels("backward")),
    ("**Max pooling alone.**", kernels("pooling")),
    ("**ReLU with touches.** `rate`: of units at the kink.", kernels("relu")),
    ("**Touches alone**, over torch.count_nonzero, which lists nothing.", kernels("touches")),
    ("**Operators between forward and backward**, in milliseconds.", operators),
    ("**torch.compile**, outside a step but for the last column.", compiled),
    ("**The direct Algorithm 2** (`benchmarks/naive.py`).", naive),
    ("**The run.**", outcome),
)


def render(results: Row, brief: bool = False) -> str:
    """Everything that is in the file, or the chief figures; what is not in it has no line."""
    parts = [machine(results)]
    for text, section in BRIEF if brief else WHOLE:
        try:
            found = section(results)
        except (LookupError, TypeError, ValueError) as error:  # a part that was cut off: the others are shown
            found = f"cannot be shown: {type(error).__name__}: {error}"
        parts += [text, found] if found else []
    return "\n\n".join(filter(None, parts))
