"""The report on registers, shared memory and spills, on what ptxas printed."""

from __future__ import annotations

import shutil

import ptxas_report
import pytest
from ptxas_report import Usage

SPILL = "_ZN6adcert12spill_kernelIfLi64EEEvPKT_PS1_l"
# nvcc 13.0, -Xptxas -v, two targets: a kernel that spills, a function it calls, a kernel without a C++ name.
TEXT = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SPILL}' for 'sm_80'
ptxas info    : Function properties for {SPILL}
    672 bytes stack frame, 900 bytes spill stores, 1068 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 672 bytes cumulative stack size, 272 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 46.395 ms
ptxas info    : Function properties for _ZN6adcert6helperEPKfi
    0 bytes stack frame, 820 bytes spill stores, 940 bytes spill loads
ptxas info    : Compiling entry function 'plain' for 'sm_80'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 0.500 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'plain' for 'sm_90'
ptxas info    : Function properties for plain
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 9 registers, used 0 barriers
ptxas info    : Compile time = 0.571 ms
"""


def test_parse() -> None:
    assert ptxas_report.parse(TEXT) == [
        Usage(SPILL, "sm_80", 672, 900, 1068, registers=32, shared=272),
        Usage("_ZN6adcert6helperEPKfi", "sm_80", 0, 820, 940),
        Usage("plain", "sm_80", 0, 0, 0, registers=8),
        Usage("plain", "sm_90", 16, 0, 0, registers=9),
    ]


def test_parse_a_kernel_without_barriers() -> None:
    """Older releases do not count barriers."""
    text = TEXT.replace(", used 1 barriers", "").replace(", used 0 barriers", "")
    assert ptxas_report.parse(text) == ptxas_report.parse(TEXT)


@pytest.mark.parametrize(
    "missing", ["Used 8", "    0 bytes stack frame, 0 bytes spill", "Function properties for plain"]
)
def test_what_is_not_understood_is_no_clean_kernel(missing: str) -> None:
    text = "".join(line for line in TEXT.splitlines(keepends=True) if missing not in line)
    with pytest.raises(ValueError, match="plain"):
        ptxas_report.parse(text)


def test_a_function_of_no_kernel_is_not_understood() -> None:
    with pytest.raises(ValueError, match="not understood"):
        ptxas_report.parse("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n")


def test_parse_nothing() -> None:
    assert ptxas_report.parse("ptxas info    : 0 bytes gmem\n") == []


@pytest.mark.skipif(not shutil.which("c++filt"), reason="no c++filt here")
def test_read_gives_short_names_in_order() -> None:
    found = ptxas_report.read({"b.cu": TEXT, "a.cu": TEXT})
    assert [(usage.source, usage.kernel, usage.architecture) for usage in found[:4]] == [
        ("a.cu", "helper", "sm_80"),
        ("a.cu", "plain", "sm_80"),
        ("a.cu", "plain", "sm_90"),
        ("a.cu", "spill_kernel<float, 64>", "sm_80"),
    ]
    assert [usage.source for usage in found] == ["a.cu"] * 4 + ["b.cu"] * 4


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("plain", "plain"),
        ("adcert::helper(float const*, int)", "helper"),
        (
            "void adcert::(anonymous namespace)::run<adcert::Relu<float> >(adcert::Relu<float>, long)",
            "run<Relu<float> >",
        ),
        ("void run<f(int)::{lambda(long)#1}>(f(int)::{lambda(long)#1})", "run<f(int)::{lambda(long)#1}>"),
        ("void pool<(adcert::Layout)1>(float const*)", "pool<(Layout)1>"),
    ],
)
def test_shorten(name: str, short: str) -> None:
    assert ptxas_report.shorten(name) == short


def _usage(kernel: str, stores: int, loads: int = 0) -> Usage:
    return Usage(kernel, "sm_90", 0, stores, loads, registers=255, kernel=kernel, source="a.cu")


def test_no_kernel_may_spill() -> None:
    found = [_usage("pool<float>", 8, 12), _usage("relu<float>", 0), _usage("only_loads", 0, 4)]
    assert ptxas_report.problems(found, {}) == [
        "pool<float> (a.cu, sm_90) spills registers: 8 bytes stored, 12 bytes loaded",
        "only_loads (a.cu, sm_90) spills registers: 0 bytes stored, 4 bytes loaded",
    ]


def test_a_stack_alone_is_no_spill() -> None:
    assert ptxas_report.problems([Usage("a", "sm_90", 672, 0, 0, 32)], {}) == []


def test_exemptions_name_the_whole_kernel() -> None:
    spilling = [_usage("pool<float>", 8), _usage("pool_backward<float>", 8)]
    (left,) = ptxas_report.problems(spilling, {"pool<.*>": "large windows, rare"})
    assert left.startswith("pool_backward<float>")


def test_an_exemption_that_nobody_needs_is_a_problem() -> None:
    (text,) = ptxas_report.problems([_usage("pool<float>", 0)], {"pool<.*>": "large windows, rare"})
    assert text == "MAY_SPILL names 'pool<.*>', but no such kernel spills"


def test_table() -> None:
    found = [_usage("k" * 100, 8, 12), Usage("f", "sm_80", 16, 0, 0, kernel="helper")]
    head, first, second = ptxas_report.table(found).splitlines()
    assert head.split() == "kernel target registers shared stack spill stores spill loads".split()
    assert first.split() == ["k" * 69 + "...", "sm_90", "255", "0", "0", "8", "12"]
    assert second.split() == ["helper", "sm_80", "-", "0", "16", "0", "0"]
    assert len(head) == len(first) == len(second)
