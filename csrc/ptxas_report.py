"""What ptxas says about each kernel (``-Xptxas -v``), as records, a table and a verdict.

A kernel that spills keeps registers in device memory: many times slower, and easily missed. Every kernel counts as
hot and must not spill; one that may is named in :data:`MAY_SPILL`.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence

# Regular expression for the whole short name of a kernel -> why it may spill.
MAY_SPILL: dict[str, str] = {}

NAME_WIDTH = 72

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_FUNCTION = re.compile(r"Function properties for (\S+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclasses.dataclass(frozen=True)
class Usage:
    """Resources of one kernel, or of a device function that was not inlined (it has no registers of its own)."""

    symbol: str
    architecture: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int | None = None
    shared: int = 0
    kernel: str = ""
    source: str = ""

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0


def parse(text: str) -> list[Usage]:
    """The kernels in the output of ptxas, in its order.

    Raises:
        ValueError: if a kernel lacks its numbers: a format that is not understood must not pass for "no spills".
    """
    used: dict[tuple[str, str], tuple[int, int] | None] = {}
    frames: list[tuple[str, str, int, int, int]] = []
    kernel, function = ("", ""), ""
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            kernel = (match[1], match[2])
            used[kernel] = None
        elif match := _FUNCTION.search(line):
            function = match[1]
        elif match := _FRAME.search(line):
            frames.append((function, kernel[1], int(match[1]), int(match[2]), int(match[3])))
        elif match := _USED.search(line):
            shared = _SHARED.search(line)
            used[kernel] = (int(match[1]), int(shared[1]) if shared else 0)
    described = {frame[:2] for frame in frames}
    incomplete = [name for (name, target), numbers in used.items() if not numbers or (name, target) not in described]
    if incomplete or any("" in key for key in described):
        names = ", ".join(incomplete) or "a function without a name"
        raise ValueError(f"the output of ptxas is not understood, see {names}:\n{text}")
    return [Usage(*frame, *(used.get(frame[:2]) or (None, 0))) for frame in frames]


def demangle(symbols: Iterable[str], program: str | None = None) -> dict[str, str]:
    """Readable names by cu++filt or c++filt; without either the symbols stay as they are."""
    names = list(dict.fromkeys(symbols))
    program = program or shutil.which("cu++filt") or shutil.which("c++filt")
    if program is None or not names:
        return {name: name for name in names}
    done = subprocess.run([program], input="\n".join(names) + "\n", capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def shorten(name: str) -> str:
    """Without return type, own namespace and parameters.

    >>> shorten("void adcert::(anonymous namespace)::relu_kernel<float, (Layout)1>(float const*, long)")
    'relu_kernel<float, (Layout)1>'
    """
    name = name.replace("(anonymous namespace)::", "").replace("adcert::", "").removeprefix("void ")
    depth = 0
    for at, sign in enumerate(name):
        depth += {"<": 1, ">": -1}.get(sign, 0)
        if sign == "(" and depth == 0:
            return name[:at]
    return name


def read(logs: Mapping[str, str], program: str | None = None) -> list[Usage]:
    """The usages in the outputs ``{source: text}``, with readable names, in alphabetical order."""
    found = [dataclasses.replace(usage, source=source) for source, text in logs.items() for usage in parse(text)]
    names = demangle((usage.symbol for usage in found), program)
    found = [dataclasses.replace(usage, kernel=shorten(names[usage.symbol])) for usage in found]
    return sorted(found, key=lambda usage: (usage.source, usage.kernel, usage.architecture))


def problems(usages: Sequence[Usage], may_spill: Mapping[str, str] | None = None) -> list[str]:
    """Every kernel that spills without leave, and every exemption that no kernel needs."""
    exempt = MAY_SPILL if may_spill is None else may_spill
    needed = set()
    texts = []
    for usage in usages:
        if not usage.spills:
            continue
        matching = [pattern for pattern in exempt if re.fullmatch(pattern, usage.kernel)]
        needed.update(matching)
        if not matching:
            texts.append(
                f"{usage.kernel} ({usage.source}, {usage.architecture}) spills registers: {usage.spill_stores} bytes "
                f"stored, {usage.spill_loads} bytes loaded"
            )
    texts += [f"MAY_SPILL names {pattern!r}, but no such kernel spills" for pattern in exempt if pattern not in needed]
    return texts


def table(usages: Sequence[Usage]) -> str:
    """One line a kernel and architecture; sizes in bytes."""
    heads = ("kernel", "target", "registers", "shared", "stack", "spill stores", "spill loads")
    rows = [
        (
            _cut(usage.kernel),
            usage.architecture,
            "-" if usage.registers is None else str(usage.registers),
            *(str(number) for number in (usage.shared, usage.stack, usage.spill_stores, usage.spill_loads)),
        )
        for usage in usages
    ]
    widths = [max(len(row[k]) for row in (heads, *rows)) for k in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines) + "\n"


def _cut(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 3] + "..."
