"""Builds the compiled libraries ``adcert/_C.abi3.so`` and, where nvcc is found, ``adcert/_cuda.so``.

They use PyTorch's stable ABI only, so one binary loads in torch 2.10 and later and in any Python. No flag here
may relax IEEE arithmetic: contraction, reassociation, flushing to zero make and destroy ties. The instruction
set is chosen at run time (csrc/lanes.h), never by the machine that builds. The CUDA library is a file of its own
(csrc/cuda_build.py), loaded only where torch has CUDA; the environment variable ADCERT_CUDA decides about it.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import TORCH_LIB_PATH, BuildExtension, CppExtension, include_paths
except ImportError as error:
    sys.exit(
        f"adcert's build needs torch ({error}).\n"
        "Install torch >= 2.10 first, then: pip install --no-build-isolation -e ."
    )

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "csrc"))
cuda_build = importlib.import_module("cuda_build")

FAMILIES = ("relu", "activation", "pool", "route", "resolve", "rows", "windows", "fingerprint")
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
    """The usual build with few processes (it must not eat the memory), the CUDA library, and a line about both."""

    def run(self) -> None:
        environ = dict(os.environ)
        os.environ.setdefault("MAX_JOBS", str(max(1, (os.cpu_count() or 2) // 2 + 1)))
        sources = sorted(HERE.glob("csrc/*_cuda.cu"))
        try:
            nvcc = cuda_build.choose(environ, sources)  # before the long part
            super().run()
            # One of another build would not fit the new CPU library.
            for path in self._cuda_libraries():
                path.unlink(missing_ok=True)
            why_not = isinstance(nvcc, str)
            outcome = f"; no CUDA library: {nvcc}" if why_not else f" and {self._build_cuda(nvcc, sources, environ)}"
        except cuda_build.CudaBuildError as error:
            sys.exit(f"adcert: {error}")
        line = f"adcert: built the CPU library {Path(self.get_ext_fullpath('adcert._C')).name}{outcome}"
        print(line, file=sys.stderr)
        (HERE / "build").mkdir(exist_ok=True)
        (HERE / "build/built.txt").write_text(line + "\n")  # pip shows no output of a build that succeeds

    def _build_cuda(self, nvcc: Any, sources: list[Path], environ: dict[str, str]) -> str:
        include = tuple(Path(path) for path in include_paths())
        about = cuda_build.Torch(torch.__version__, torch.version.cuda, include, Path(TORCH_LIB_PATH))
        built = cuda_build.build(nvcc, about, sources, HERE / "build/cuda", environ)
        for path in self._cuda_libraries():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, path)
        return cuda_build.summary(nvcc, about)

    def _cuda_libraries(self) -> list[Path]:
        """Where the CUDA library goes: where the CPU library goes, and like it to the source tree when in place."""
        folders = [Path(self.build_lib) / "adcert", *([HERE / "adcert"] if self.inplace else [])]
        return [folder / cuda_build.LIBRARY for folder in folders]

    def get_outputs(self) -> list[str]:
        found = super().get_outputs()
        built = str(self._cuda_libraries()[0])
        return found if self.inplace or not Path(built).is_file() else [*found, built]

    def get_output_mapping(self) -> dict[str, str]:
        built, *in_place = (str(path) for path in self._cuda_libraries())
        found = {built: in_place[0]} if in_place and Path(built).is_file() else {}
        return {**super().get_output_mapping(), **found}

    def get_source_files(self) -> list[str]:
        """For source distributions, which have to hold everything a build reads."""
        return [*super().get_source_files(), *(str(path.relative_to(HERE)) for path in sorted(HERE.glob("csrc/*.*")))]


LIBRARY = CppExtension("adcert._C", SOURCES, extra_compile_args={"cxx": COMPILE}, py_limited_api=True)

setup(
    ext_modules=[LIBRARY],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
