"""Builds the compiled library ``adcert/_C.abi3.so``.

It uses PyTorch's stable ABI only, so one binary loads in torch 2.10 and later and in any Python. No flag here
may relax IEEE arithmetic: contraction, reassociation, flushing to zero make and destroy ties. The instruction
set is chosen at run time (csrc/lanes.h), never by the machine that builds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"adcert's build needs torch ({error}).\n"
        "Install torch >= 2.10 first, then: pip install --no-build-isolation -e ."
    )

FAMILIES = ("relu", "pool", "route", "resolve", "rows")
SOURCES = ["csrc/library.cpp", *(f"csrc/{family}_cpu.cpp" for family in FAMILIES)]
COMPILE = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # torch's own headers
    "-Wno-psabi",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


class Build(BuildExtension):
    """The usual build with few processes (a build must not eat the memory) and one line about the result."""

    def run(self) -> None:
        os.environ.setdefault("MAX_JOBS", str(max(1, (os.cpu_count() or 2) // 2 + 1)))
        super().run()
        built = Path(self.get_ext_fullpath("adcert._C")).name
        print(f"adcert: built the CPU library {built}; this version has no CUDA kernels.", file=sys.stderr)


LIBRARY = CppExtension("adcert._C", SOURCES, extra_compile_args={"cxx": COMPILE}, py_limited_api=True)

setup(
    ext_modules=[LIBRARY],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
